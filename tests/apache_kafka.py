"""A real Apache Kafka for the tests: one KRaft node in a process of its own.

It owns how the server is fetched, configured, started and stopped, and that it never outlives
the tests. It knows nothing of Earshot.
"""

from __future__ import annotations

import hashlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

POM = Path(__file__).with_name("pom.xml")
CACHE = Path(__file__).resolve().parents[1] / "build" / "kafka"

FETCH_TIMEOUT = 600.0  # seconds; a registry that hangs must not hang the tests
START_TIMEOUT = 90.0  # seconds; a start takes about four on two idle cores
STOP_TIMEOUT = 30.0  # seconds until a server that does not obey SIGTERM is killed

CLUSTER_ID = "earshot-tests-cluster0"  # 22 characters of base64, as Kafka wants it

# A small heap, the quick compiler and the simple collector: a test's broker lives for a minute.
JVM = ("-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")
QUIET = ("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true")

SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    # One node: what Kafka replicates three times by default exists once.
    "offsets.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    # Fifty partitions each by default, all created when the first client needs one.
    "offsets.topic.num.partitions": "2",
    "transaction.state.log.num.partitions": "2",
    # The first member of a group need not wait for others.
    "group.initial.rebalance.delay.ms": "0",
    # A test that forgot to create a topic should fail.
    "auto.create.topics.enable": "false",
    # After a kill the node may not register again before its old session has run out; 9 s by default.
    "broker.session.timeout.ms": "2000",
    "broker.heartbeat.interval.ms": "500",
    "num.network.threads": "2",
    "num.io.threads": "2",
    "log.cleaner.dedupe.buffer.size": "4194304",  # bytes; 128 MiB by default
}


class Unavailable(Exception):
    """No Apache Kafka can be had on this machine; the message says what is missing."""


def fetch() -> Path:
    """Return the folder with the jars that ``pom.xml`` asks for, fetched by Maven when it has changed.

    Raises:
        Unavailable: there is no Java or no Maven, or Maven cannot get the jars.
    """
    for command in ("java", "mvn"):
        if shutil.which(command) is None:
            raise Unavailable(f"there is no Kafka to test against: {command!r} is not on the PATH")
    jars = CACHE / hashlib.sha256(POM.read_bytes()).hexdigest()[:12]
    if jars.is_dir():
        return jars
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as unfinished:
        copy = (
            "mvn",
            "-q",
            "-B",
            "-f",
            str(POM),
            "dependency:copy-dependencies",
            f"-DoutputDirectory={unfinished}/jars",
        )
        try:
            done = subprocess.run(copy, capture_output=True, text=True, check=False, timeout=FETCH_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"Maven has not fetched Apache Kafka within {FETCH_TIMEOUT:.0f} s") from None
        if done.returncode != 0:
            raise Unavailable(f"Maven cannot fetch Apache Kafka: {(done.stdout + done.stderr)[:500]}")
        try:
            Path(unfinished, "jars").rename(jars)
        except OSError:
            if not jars.is_dir():  # else another run of the tests was quicker
                raise
    return jars


@dataclass(frozen=True)
class Secured:
    """What a secured broker shows and whom it knows.

    Attributes:
        certificate: A PEM file of its key and its certificate, for the name ``localhost``.
        authority: A PEM file of who may sign the certificates of clients.
        user: A name that PLAIN and SCRAM know; OAUTHBEARER takes any token that is not signed.
        password: What goes with it.
    """

    certificate: Path
    authority: Path
    user: str
    password: str

    def settings(self) -> dict[str, str]:
        """Return what the listeners named SECURED (SASL_SSL) and MUTUAL (SSL, with the client's certificate) need."""
        scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        plain = "org.apache.kafka.common.security.plain.PlainLoginModule required"
        oauth = "org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required"
        sasl = "listener.name.secured"
        return {
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,OPEN:PLAINTEXT,SECURED:SASL_SSL,MUTUAL:SSL",
            "inter.broker.listener.name": "OPEN",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.certificate),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.authority),
            "listener.name.mutual.ssl.client.auth": "required",
            "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
            f"{sasl}.plain.sasl.jaas.config": f'{plain} user_{self.user}="{self.password}";',
            f"{sasl}.scram-sha-256.sasl.jaas.config": scram,
            f"{sasl}.scram-sha-512.sasl.jaas.config": scram,
            f"{sasl}.oauthbearer.sasl.jaas.config": f'{oauth} unsecuredLoginStringClaim_sub="{self.user}";',
        }

    def credentials(self) -> tuple[str, ...]:
        """Return what ``kafka-storage format`` needs, so that SCRAM knows the user."""
        return tuple(
            argument
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
            for argument in ("--add-scram", f"{mechanism}=[name={self.user},password={self.password}]")
        )


class ApacheKafka:
    """One broker that keeps its ports and its data from one start to the next.

    Args:
        jars: What `fetch` returned.
        folder: An empty folder for the configuration, the data and ``server.log``.
        secured: Adds the listeners at ``secured_address`` (TLS and SASL) and ``mutual_address``
            (TLS that asks for the client's certificate).
    """

    def __init__(self, jars: Path, folder: Path, secured: Secured | None = None) -> None:
        self._java = ("java", *JVM, *QUIET, "-cp", f"{jars}/*")
        self.data = folder / "data"
        self._settings = folder / "server.properties"
        self._log = folder / "server.log"
        self._server: subprocess.Popen[bytes] | None = None
        self._lifeline: subprocess.Popen[bytes] | None = None
        self._secured = secured
        self.address, self.secured_address, self.mutual_address, controller = (
            f"localhost:{port}" for port in _free_ports(4)
        )
        listeners = {"PLAINTEXT": self.address, "CONTROLLER": controller}
        if secured is not None:
            listeners = {
                "OPEN": self.address,
                "SECURED": self.secured_address,
                "MUTUAL": self.mutual_address,
                "CONTROLLER": controller,
            }
        settings = SETTINGS | {
            "log.dirs": str(self.data),
            "listeners": ",".join(f"{name}://{address}" for name, address in listeners.items()),
            "controller.quorum.voters": f"1@{controller}",
        }
        if secured is not None:
            settings |= secured.settings()
        self._settings.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and return when it answers.

        Raises:
            RuntimeError: it ended instead, or does not answer within `START_TIMEOUT`.
        """
        if not self.data.is_dir():
            self._format()
        with self._log.open("ab") as log:
            command = (*self._java, "kafka.Kafka", str(self._settings))
            self._server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        # However the tests end, the pipe closes with them, and then this shell kills the server.
        self._lifeline = subprocess.Popen(
            ("sh", "-c", f"cat; kill -KILL -{self._server.pid}"), stdin=subprocess.PIPE, start_new_session=True
        )
        self._wait_until_ready()

    def stop(self) -> None:
        """End the server in good order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server as a power cut does."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Let the server neither answer nor end, as a disk or a host that hangs does."""
        assert self._server is not None
        self._server.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on."""
        assert self._server is not None
        self._server.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Stop and start on the same port, with the same data."""
        self.stop()
        self.start()

    def _format(self) -> None:
        scram = () if self._secured is None else self._secured.credentials()
        done = subprocess.run(
            (*self._java, "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(self._settings), *scram),
            capture_output=True,
            text=True,
            check=False,
            timeout=START_TIMEOUT,
        )
        if done.returncode != 0:
            raise RuntimeError(f"Apache Kafka cannot format {self.data}: {done.stdout}{done.stderr}")

    def _wait_until_ready(self) -> None:
        assert self._server is not None
        deadline = time.monotonic() + START_TIMEOUT
        client = AdminClient({"bootstrap.servers": self.address, "log_level": 0, "reconnect.backoff.max.ms": 200})
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                break
            try:
                client.list_topics(timeout=1.0)
            except KafkaException:
                continue
            return
        self.kill()
        raise RuntimeError(f"Apache Kafka did not start on {self.address}: {self._log.read_text()[-2000:]}")

    def _end(self, how: signal.Signals) -> None:
        server, self._server = self._server, None
        lifeline, self._lifeline = self._lifeline, None
        if server is not None:
            server.send_signal(how)
            server.send_signal(signal.SIGCONT)  # it may be frozen
            try:
                server.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        if lifeline is not None:
            lifeline.kill()  # not closed: the shell would then kill a process that is no longer ours
            lifeline.communicate()


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on; held open together, so that they differ."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports

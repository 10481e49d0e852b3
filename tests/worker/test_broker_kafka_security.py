"""A cluster with TLS and SASL: who is let in, who is not and how soon, and that nobody hears the password."""

from __future__ import annotations

import base64
import json
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import apache_kafka
from tests.conftest import missing
from worker import kafka_cluster, kafka_wire
from worker.__main__ import main
from worker.broker_kafka import KafkaBroker
from worker.config import Config
from worker.errors import Retryable
from worker.kafka_cluster import CONNECT_TIMEOUT
from worker.messages import Message, Topics
from worker.security import security

USER = "earshot"
PASSWORD = "correct-horse-battery-staple"  # noqa: S105 - of a broker that lives for a minute

PATIENCE = 30.0  # seconds to wait for what must come


def token(subject: str) -> str:
    """Return a JSON Web Token that nobody has signed, valid for an hour."""
    now = time.time()
    claims = {"sub": subject, "iat": now, "exp": now + 3600}
    parts = (json.dumps(part).encode() for part in ({"alg": "none"}, claims))
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts) + "."


class Authority:
    """Someone who signs certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self.certificate = folder / f"{name}.pem"
        self._key = folder / f"{name}.key"
        authority = ("-addext", "keyUsage=critical,keyCertSign", "-subj", f"/CN={name}", "-days", "2")
        self._openssl("req", "-x509", *self._new_key(self._key), *authority, "-out", str(self.certificate))

    def sign(self, name: str, extensions: str) -> tuple[Path, Path]:
        """Return the files of a certificate and of its key."""
        certificate, key, request, config = (
            self._folder / f"{self._name}-{name}.{ending}" for ending in ("pem", "key", "csr", "cnf")
        )
        config.write_text(f"{extensions}\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n")
        self._openssl("req", *self._new_key(key), "-subj", f"/CN={name}", "-out", str(request))
        self._openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(self.certificate), "-CAkey", str(self._key)),
            *("-CAcreateserial", "-days", "2", "-extfile", str(config), "-out", str(certificate)),
        )
        return certificate, key

    @staticmethod
    def _new_key(path: Path) -> tuple[str, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path))

    @staticmethod
    def _openssl(*arguments: str) -> None:
        subprocess.run(("openssl", *arguments), check=True, capture_output=True)


class Cluster(NamedTuple):
    """A secured cluster, and the files that a client of it needs."""

    secured: str
    mutual: str
    plain: str
    authority: Path
    stranger: Path
    client: tuple[Path, Path]
    foreign: tuple[Path, Path]
    secrets: Path


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One broker with a certificate for ``localhost``, that knows one user by four mechanisms."""
    try:
        jars = apache_kafka.fetch()
    except apache_kafka.Unavailable as why:
        missing(str(why))
    folder = tmp_path_factory.mktemp("secured")
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    certificate, key = ours.sign("server", "subjectAltName=DNS:localhost")
    store = folder / "keystore.pem"
    store.write_text(key.read_text() + certificate.read_text())
    (folder / "password").write_text(f"{PASSWORD}\n")
    (folder / "token").write_text(token(USER))
    secured = apache_kafka.Secured(store, ours.certificate, USER, PASSWORD)
    with apache_kafka.ApacheKafka(jars, tmp_path_factory.mktemp("kafka"), secured) as kafka:
        yield Cluster(
            kafka.secured_address,
            kafka.mutual_address,
            kafka.address,
            ours.certificate,
            theirs.certificate,
            ours.sign("client", "extendedKeyUsage=clientAuth"),
            theirs.sign("client", "extendedKeyUsage=clientAuth"),
            folder,
        )


@pytest.fixture
def topics() -> Topics:
    return Topics(prefix=f"{uuid.uuid4().hex[:12]}.")


def settings(cluster: Cluster, mechanism: str) -> Config:
    """Return what a user of a mechanism sets."""
    common = {"kafka_security_protocol": "SASL_SSL", "kafka_ssl_cafile": str(cluster.authority)}
    particular = {
        "OAUTHBEARER": {"kafka_sasl_token_file": str(cluster.secrets / "token")},
        "PLAIN": {"kafka_sasl_username": USER, "kafka_sasl_password_file": str(cluster.secrets / "password")},
    }.get(mechanism, {"kafka_sasl_username": USER, "kafka_sasl_password": PASSWORD})
    return Config(kafka_sasl_mechanism=mechanism, **common, **particular)  # type: ignore[arg-type]


def works(broker: KafkaBroker, topics: Topics) -> None:
    """Create the topics, publish a sound, and commit what is heard in it."""
    broker.create_topics(topics.layout(1))
    broker.publish([Message(topics.audio_in, b"source", b"sound")])
    with closing(broker.join("group", "one")) as session:
        deadline = time.monotonic() + PATIENCE
        while not (records := session.poll(0.5, 10).records):
            assert time.monotonic() < deadline, "what must come did not come"
        with session.transaction() as transaction:
            transaction.send([Message(topics.predictions_out, b"source", records[0].value)])
            transaction.commit_offsets({0: records[0].offset + 1})
    (heard,) = next(broker.follow([topics.predictions_out], from_beginning=True))
    assert b"sound" == heard.value


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"])
def test_the_right_credentials_open_everything(
    cluster: Cluster, topics: Topics, mechanism: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each mechanism serves every client of a worker, and no log line holds a secret, however much is logged."""
    caplog.set_level("DEBUG")
    config = settings(cluster, mechanism)
    with closing(KafkaBroker([cluster.secured], topics, security(config))) as broker:
        works(broker, topics)

    said = caplog.text + repr(config) + repr(security(config))
    assert PASSWORD not in said
    assert token(USER)[:20] not in said


def test_a_certificate_can_be_asked_of_the_client(cluster: Cluster, topics: Topics) -> None:
    """TLS that authenticates both sides needs no SASL."""
    certificate, key = cluster.client
    config = Config(
        kafka_security_protocol="SSL",
        kafka_ssl_cafile=str(cluster.authority),
        kafka_ssl_certfile=str(certificate),
        kafka_ssl_keyfile=str(key),
    )
    with closing(KafkaBroker([cluster.mutual], topics, security(config))) as broker:
        works(broker, topics)


def test_what_tls_has_taken_from_the_connection_is_read(
    cluster: Cluster, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It decrypts more at once than is read at once, and then the connection itself has nothing more to tell."""
    monkeypatch.setattr(kafka_wire, "RECEIVE_BYTES", 1000)
    sound = bytes(range(256)) * 2000
    with closing(KafkaBroker([cluster.secured], topics, security(settings(cluster, "PLAIN")))) as broker:
        broker.create_topics(topics.layout(1))
        broker.publish([Message(topics.audio_in, b"source", sound)])

        assert [sound] == [record.value for records in broker.read([topics.audio_in]) for record in records]


def refusal(address: str, config: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that is refused, and return what it says about that, which is one line."""
    flags = [word for name, value in config.items() for word in (f"--{name.replace('_', '-')}", value)]
    started = time.monotonic()
    assert 1 == main(["topics", "--broker", f"kafka://{address}", *flags])
    assert time.monotonic() - started < CONNECT_TIMEOUT, "it tried again and again"
    said = capsys.readouterr()
    assert "" == said.out
    (line,) = said.err.splitlines()
    assert address in line
    return line


def test_a_refusal_is_read_when_the_end_of_the_connection_comes_with_it(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server hangs up once it has answered, and who looks a moment later finds both."""
    receive = kafka_wire._received

    def look_late(*arguments: Any) -> Any:
        time.sleep(0.1)  # as long as a busy process may take
        return receive(*arguments)

    monkeypatch.setattr(kafka_wire, "_received", look_late)
    monkeypatch.setenv("EARSHOT_KAFKA_SASL_PASSWORD", "wrong-secret")
    config = {
        "kafka_security_protocol": "SASL_SSL",
        "kafka_ssl_cafile": str(cluster.authority),
        "kafka_sasl_mechanism": "PLAIN",
        "kafka_sasl_username": USER,
    }
    assert "Authentication failed" in refusal(cluster.secured, config, capsys)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_a_wrong_password_is_refused(
    cluster: Cluster,
    mechanism: str,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At once, in words, and without the password."""
    caplog.set_level("DEBUG")
    monkeypatch.setenv("EARSHOT_KAFKA_SASL_PASSWORD", "wrong-secret")
    config = {
        "kafka_security_protocol": "SASL_SSL",
        "kafka_ssl_cafile": str(cluster.authority),
        "kafka_sasl_mechanism": mechanism,
        "kafka_sasl_username": USER,
    }
    line = refusal(cluster.secured, config, capsys)

    assert "Authentication failed" in line
    assert "check the settings --kafka-" in line
    assert "wrong-secret" not in line + caplog.text


def test_a_token_that_is_not_accepted_is_refused(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so is one that has expired."""
    path = tmp_path / "token"
    path.write_text("not-a-token")
    config = {
        "kafka_security_protocol": "SASL_SSL",
        "kafka_ssl_cafile": str(cluster.authority),
        "kafka_sasl_mechanism": "OAUTHBEARER",
        "kafka_sasl_token_file": str(path),
    }
    line = refusal(cluster.secured, config, capsys)

    assert "check the settings --kafka-" in line
    assert "not-a-token" not in line


def test_an_unknown_certificate_is_refused(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """Signed by somebody whom the settings, or else the system, do not name."""
    tls = {"kafka_security_protocol": "SSL"}

    for config in (tls, tls | {"kafka_ssl_cafile": str(cluster.stranger)}):
        line = refusal(cluster.mutual, config, capsys)
        assert f"TLS with {cluster.mutual} failed: unable to get local issuer certificate" in line
        assert "--kafka-" in line


def test_the_certificate_of_another_host_is_refused(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """It is for the name ``localhost`` alone."""
    port = cluster.mutual.rpartition(":")[2]
    config = {"kafka_security_protocol": "SSL", "kafka_ssl_cafile": str(cluster.authority)}

    assert "not valid for '127.0.0.1'" in refusal(f"127.0.0.1:{port}", config, capsys)


def test_a_client_without_a_certificate_is_refused(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the servers ask for one; and so is one whose certificate they do not know."""
    config = {"kafka_security_protocol": "SSL", "kafka_ssl_cafile": str(cluster.authority)}
    certificate, key = cluster.foreign
    foreign = config | {"kafka_ssl_certfile": str(certificate), "kafka_ssl_keyfile": str(key)}

    for wrong in (config, foreign):
        assert f"TLS with {cluster.mutual} failed" in refusal(cluster.mutual, wrong, capsys)


@pytest.mark.parametrize("protocol", ["PLAINTEXT", "SSL"])
def test_a_port_of_another_protocol_gives_a_hint(
    cluster: Cluster, topics: Topics, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes the connection without a word, as one does that is down: nobody goes on, and the text says both."""
    monkeypatch.setattr(kafka_cluster, "CONNECT_TIMEOUT", 1.0)
    config = Config(kafka_security_protocol=protocol)  # type: ignore[arg-type]
    address = cluster.plain if protocol == "SSL" else cluster.secured

    with (
        closing(KafkaBroker([address], topics, security(config))) as broker,
        pytest.raises(Retryable, match=f"another --kafka-security-protocol than {protocol}"),
    ):
        broker.create_topics(topics.layout(1))

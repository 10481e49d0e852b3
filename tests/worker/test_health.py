"""Health: what the loop's pulse means, what the endpoint answers, and whose fault a bad port is."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.system.processes import run, wait_for, worker
from tests.worker.test_service import (
    Counter,
    Scripted,
    ScriptedBroker,
    Time,
    after,
    lost,
    nothing,
    polled,
    serve,
    sound,
)
from worker import broker_kafka, health, kafka_clients, kafka_cluster
from worker.broker import Polled
from worker.errors import Fatal
from worker.health import STUCK, Health, Pulse, endpoint


@pytest.fixture
def time() -> Time:
    """A clock that stands still until it is moved."""
    return Time()


@pytest.fixture
def pulse(time: Time) -> Pulse:
    """A pulse on that clock."""
    return Pulse(clock=time.clock)


@pytest.fixture
def port(pulse: Pulse) -> Iterator[int]:
    """Where the endpoint of that pulse listens."""
    with endpoint(pulse, "127.0.0.1", 0) as port:
        yield port


def ask(port: int, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(host, port, timeout=10)) as connection:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read()


def body(port: int, path: str) -> tuple[int, dict[str, Any]]:
    status, raw = ask(port, path)
    return status, json.loads(raw)


class TestPulse:
    def test_starts_alive_and_not_ready(self, pulse: Pulse) -> None:
        """Before the first step it is alive, and nothing is assigned."""
        assert pulse.live().good
        assert Health(good=False, why="nothing is assigned yet") == pulse.serving()

    def test_stuck(self, time: Time, pulse: Pulse) -> None:
        """Without a beat for the stated time it is dead, and says since which step; a beat revives it."""
        pulse.beat("polled")
        pulse.ready()
        time.now += STUCK
        assert Health(good=True, why="the loop polled 300.0 s ago") == pulse.live()
        time.now += 1.0
        dead = Health(good=False, why="the loop is stuck: nothing for 301 s since it polled")
        assert (dead, dead) == (pulse.live(), pulse.serving())
        pulse.unready("the session was lost")
        assert dead == pulse.serving()
        pulse.ready()
        pulse.beat("committed")
        assert pulse.live().good
        assert pulse.serving().good

    def test_longer_than_any_step(self) -> None:
        """No bound of the Kafka client is longer, so that only what has no bound can be taken for stuck."""
        bounds = (
            broker_kafka.RESTORE_TIMEOUT,
            kafka_cluster.INIT_TIMEOUT + kafka_cluster.CONNECT_TIMEOUT,
            kafka_clients.TRANSACTION_TIMEOUT,
        )
        assert 2 * max(bounds) < STUCK == broker_kafka.MAX_POLL_INTERVAL


class TestLoop:
    """What a service tells its pulse."""

    def test_ready_once_assigned_and_restored(self, pulse: Pulse) -> None:
        """Neither joining nor an empty poll is enough, and what is being restored is not ready."""
        seen: list[bool] = []

        def look() -> Any:
            seen.append(pulse.serving().good)
            return nothing()

        class Looking(Scripted):
            def restore(self, partitions: Any) -> Any:
                seen.append(pulse.serving().good)
                return super().restore(partitions)

        given = polled(assigned=[0]), look, polled(assigned=[1]), look
        serve(ScriptedBroker(Looking(look, look, *given)), Counter(), pulse=pulse)

        assert [False, False, False, True, False, True] == seen

    def test_a_rebalance_is_not_death(self, pulse: Pulse) -> None:
        """Partitions come and go; what is left is served."""
        seen: list[Health] = []

        def look() -> Any:
            seen.extend([pulse.live(), pulse.serving()])
            return nothing()

        serve(ScriptedBroker(Scripted(polled(assigned=[0, 1]), polled(revoked=[1]), look)), Counter(), pulse=pulse)

        assert [True, True] == [each.good for each in seen]

    def test_an_outage_is_not_death(self) -> None:
        """An outage of hours leaves it alive and not ready, with the reason; when it is over it is ready again."""
        broker = ScriptedBroker(Scripted(polled(assigned=[0]), lost()), *(lost() for _ in range(1000)))
        pulse = Pulse(clock=broker.stop.clock)
        seen: list[tuple[bool, Health]] = []
        wait = broker.stop.wait

        def look(timeout: float | None = None) -> bool:
            done = wait(timeout)
            seen.append((pulse.live().good, pulse.serving()))
            return done

        broker.stop.wait = look  # type: ignore[method-assign]  # somebody asks during each pause
        broker._script.append(Scripted(polled(assigned=[0]), polled(sound(0))))

        began = broker.stop.now
        serve(broker, Counter(), pulse=pulse, give_up_seconds=1e6)

        assert broker.stop.now - began > 10 * STUCK
        assert {(True, Health(good=False, why="the session was lost: the broker is gone"))} == set(seen)
        assert pulse.serving().good

    @pytest.mark.parametrize("where", ["poll", "pipeline", "commit"])
    def test_a_stuck_loop_is(self, where: str) -> None:
        """Whatever step hangs, it is dead when its time is over, and not before: each step ends with a beat."""
        broker = ScriptedBroker()
        time, pulse = broker.stop, Pulse(clock=broker.stop.clock)
        seen: list[bool] = []

        def step(name: str) -> None:
            time.now += STUCK
            if name == where:
                seen.append(pulse.live().good)
                time.now += 1.0
                seen.append(pulse.live().good)

        def poll() -> Polled:
            step("poll")
            return polled(sound(0))

        class Slow(Scripted):
            def _fail(self, point: str) -> None:
                if point == "commit":
                    step("commit")

        broker._script.append(Slow(after(time, STUCK, polled(assigned=[0])), poll))
        serve(broker, Counter(lambda _: step("pipeline")), pulse=pulse)

        assert [True, False] == seen


class TestEndpoint:
    def test_answers(self, port: int, pulse: Pulse, time: Time) -> None:
        """200 or 503, each with the reason in JSON."""
        assert (200, {"status": "OK", "why": "the loop started 0.0 s ago"}) == body(port, "/livez")
        assert (503, {"status": "Service Unavailable", "why": "nothing is assigned yet"}) == body(port, "/readyz")
        pulse.ready()
        assert 200 == body(port, "/readyz")[0]
        time.now += STUCK + 1
        assert (503, 503) == (body(port, "/livez?verbose")[0], body(port, "/readyz")[0])

    def test_head(self, port: int, pulse: Pulse) -> None:
        """The same statuses, with no body."""
        assert [(200, b""), (503, b"")] == [ask(port, path, "HEAD") for path in ("/livez", "/readyz")]
        pulse.ready()
        assert (200, b"") == ask(port, "/readyz", "HEAD")

    @pytest.mark.parametrize(
        ("method", "path"),
        [("GET", "/"), ("GET", "/livez/"), ("GET", "/../etc/passwd"), ("HEAD", "/x"), ("POST", "/livez"), ("PUT", "/")],
    )
    def test_anything_else(self, port: int, method: str, path: str) -> None:
        """There is nothing else."""
        assert 404 == ask(port, path, method)[0]

    def test_nothing_of_a_request_comes_back(self, port: int) -> None:
        """A request that is none is refused, and not quoted."""
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(b"<script>\x1b[31m\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        assert b"there are GET /livez and GET /readyz" in answer
        assert b"script" not in answer

    def test_quiet(self, port: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither an answer, nor a client that goes away or says nothing, is worth a line of the log."""
        monkeypatch.setattr(health._Handler, "timeout", 0.05)
        ask(port, "/livez")
        ask(port, "/nothing")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as silent:
            assert silent.recv(10) == b""
        assert ("", "") == capfd.readouterr()

    def test_a_silent_client_holds_up_nobody(self, port: int) -> None:
        """Each client has a thread of its own, and not for ever."""
        assert health.CLIENT_PATIENCE == health._Handler.timeout
        with socket.create_connection(("127.0.0.1", port), timeout=10):
            assert 200 == ask(port, "/livez")[0]

    def test_ipv6(self, pulse: Pulse) -> None:
        """An address of IPv6 is one, where the machine has it."""
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no IPv6")
        with endpoint(pulse, "::1", 0) as port:
            assert 200 == ask(port, "/livez", host="::1")[0]

    def test_asks_no_dns(self, pulse: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
        """A name server that does not answer must not hold up the start."""
        monkeypatch.setattr(socket, "getfqdn", lambda _: pytest.fail("it asks for its own name"))
        with endpoint(pulse, "127.0.0.1", 0) as port:
            assert 200 == ask(port, "/livez")[0]

    def test_port_in_use(self, port: int, pulse: Pulse) -> None:
        """Which setting is to blame, and what would do."""
        with pytest.raises(Fatal, match=rf"--health-port {port}.*in use.*name another port"), refused(pulse, port):
            pass

    def test_no_such_address(self, pulse: Pulse) -> None:
        """An address of another machine is none to listen on."""
        with pytest.raises(Fatal, match=r"--health-host 192\.0\.2\.1"), endpoint(pulse, "192.0.2.1", 0):
            pass

    def test_ends_with_its_block(self, pulse: Pulse) -> None:
        """The port is free again."""
        with endpoint(pulse, "127.0.0.1", 0) as port:
            pass
        with suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
            pytest.fail("somebody still listens")


def refused(pulse: Pulse, port: int) -> Any:
    return endpoint(pulse, "127.0.0.1", port)


def test_a_worker_answers(machine_bundle: Path, tmp_path: Path) -> None:
    """`--health-port 0` logs the port that it found; the worker is live and ready there until it ends."""
    url = f"sqlite:///{tmp_path / 'earshot.db'}"
    run("earshot-worker", "topics", "--broker", url)
    with worker(tmp_path / "log", "--model", machine_bundle, "--broker", url, "--health-port", "0") as serving:
        (entry,) = wait_for(lambda: serving.events("health"), "the port of the endpoint")
        wait_for(lambda: serving.events("assigned"), "an assignment")
        assert "127.0.0.1" == entry["host"]
        assert (200, 200) == (body(entry["port"], "/livez")[0], body(entry["port"], "/readyz")[0])
        assert 0 == serving.stop()

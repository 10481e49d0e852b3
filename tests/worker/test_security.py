"""The settings of a secured cluster: which go together, which files are read, and what is never shown."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from worker.arguments import parser
from worker.config import SECRETS, Config, resolve
from worker.errors import Fatal
from worker.security import OPEN, Secret, security

PASSWORD = "correct-horse"  # noqa: S105 - of nobody

SCRAM: dict[str, Any] = {
    "kafka_security_protocol": "SASL_PLAINTEXT",
    "kafka_sasl_mechanism": "SCRAM-SHA-512",
    "kafka_sasl_username": "earshot",
}
OAUTH: dict[str, Any] = {"kafka_security_protocol": "SASL_PLAINTEXT", "kafka_sasl_mechanism": "OAUTHBEARER"}


def refusal(**settings: Any) -> str:
    with pytest.raises(Fatal) as caught:
        security(Config(**settings))
    return str(caught.value)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The files of a certificate and of its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    subprocess.run(
        (
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", str(key), "-out", str(certificate), "-subj", "/CN=me", "-days", "2"),
        ),
        check=True,
        capture_output=True,
    )
    return certificate, key


class TestPassword:
    def test_from_the_environment(self) -> None:
        """It is a setting like the others, except on the command line."""
        environment = {f"EARSHOT_{name.upper()}": value for name, value in SCRAM.items()}
        config = resolve({}, environment | {"EARSHOT_KAFKA_SASL_PASSWORD": PASSWORD})

        assert PASSWORD == security(config).password

    def test_from_a_file(self, tmp_path: Path) -> None:
        """The line that an editor or `echo` ends with a newline."""
        (tmp_path / "password").write_text(f"{PASSWORD}\n")
        config = Config(**SCRAM, kafka_sasl_password_file=str(tmp_path / "password"))

        assert PASSWORD == security(config).password

    def test_has_no_flag(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Not even as the short form of the one that names its file."""
        for name in SECRETS:
            with pytest.raises(SystemExit):
                parser().parse_args(["topics", f"--{name.replace('_', '-')}", PASSWORD])
            assert "unrecognized arguments" in capsys.readouterr().err

    def test_is_never_shown(self) -> None:
        """Whatever is logged or raised may hold the settings, or what a client makes of them."""
        config = Config(**SCRAM, kafka_sasl_password=PASSWORD)
        shown = security(config)

        assert PASSWORD not in repr(config) + str(config) + repr(shown) + str(shown) + repr(
            {"password": shown.password}
        )
        assert "username='earshot'" in repr(shown)

    def test_missing(self) -> None:
        """The variable and the flag are named."""
        assert "EARSHOT_KAFKA_SASL_PASSWORD in the environment, or --kafka-sasl-password-file" in refusal(**SCRAM)

    def test_given_twice(self) -> None:
        """Nobody guesses which one is meant."""
        assert "which one" in refusal(**SCRAM | {"kafka_sasl_password": PASSWORD, "kafka_sasl_password_file": "x"})

    @pytest.mark.parametrize(
        ("content", "told"), [(None, "No such file"), (b" \n", "empty"), (b"secret-\xff", "not UTF-8")]
    )
    def test_in_a_file_that_cannot_be_used(self, tmp_path: Path, content: bytes | None, told: str) -> None:
        """The file and the setting are named, and nothing of what is in it."""
        path = tmp_path / "password"
        if content is not None:
            path.write_bytes(content)
        text = refusal(**SCRAM, kafka_sasl_password_file=str(path))

        assert f"--kafka-sasl-password-file {path}: " in text
        assert told in text
        assert "secret-" not in text


class TestTogether:
    def test_nothing_is_needed(self) -> None:
        """A cluster is open unless the settings say otherwise."""
        assert OPEN == security(Config())

    @pytest.mark.parametrize("name", ["kafka_ssl_cafile", "kafka_ssl_certfile", "kafka_ssl_keyfile"])
    @pytest.mark.parametrize("protocol", ["PLAINTEXT", "SASL_PLAINTEXT"])
    def test_certificates_without_tls(self, name: str, protocol: str) -> None:
        """Who names a certificate thinks that the connection is encrypted."""
        text = refusal(**{name: "x.pem", "kafka_security_protocol": protocol})
        assert f"--{name.replace('_', '-')} is given" in text
        assert f"is {protocol}; expected SSL or SASL_SSL" in text

    def test_a_mechanism_without_sasl(self) -> None:
        """Who names a mechanism thinks that somebody asks who is there."""
        assert "expected SASL_SSL or SASL_PLAINTEXT" in refusal(kafka_sasl_mechanism="PLAIN")

    def test_sasl_without_a_mechanism(self) -> None:
        """There is none that all clusters know."""
        assert "no --kafka-sasl-mechanism" in refusal(kafka_security_protocol="SASL_SSL")

    def test_a_password_without_a_user(self) -> None:
        """The flag is named."""
        assert "--kafka-sasl-username" in refusal(**SCRAM | {"kafka_sasl_username": ""}, kafka_sasl_password=PASSWORD)

    def test_a_key_without_a_certificate(self, pair: tuple[Path, Path]) -> None:
        """The other way round is allowed: one file may hold both."""
        certificate, key = pair
        assert "without --kafka-ssl-certfile" in refusal(kafka_security_protocol="SSL", kafka_ssl_keyfile=str(key))
        both = certificate.with_name("both.pem")
        both.write_text(key.read_text() + certificate.read_text())
        assert security(Config(kafka_security_protocol="SSL", kafka_ssl_certfile=str(both))).tls is not None


class TestToken:
    def test_is_read_when_it_is_needed(self, tmp_path: Path) -> None:
        """The file is looked at once, so that a mistake shows at once, and kept as a file."""
        path = tmp_path / "token"
        path.write_text("token")
        assert path == security(Config(**OAUTH, kafka_sasl_token_file=str(path))).token_file

    def test_missing(self) -> None:
        """The flag is named."""
        assert "OAUTHBEARER needs --kafka-sasl-token-file" in refusal(**OAUTH)
        assert "--kafka-sasl-token-file nowhere: No such file" in refusal(
            **OAUTH | {"kafka_sasl_token_file": "nowhere"}
        )


class TestCertificates:
    def test_ours(self, pair: tuple[Path, Path]) -> None:
        """A certificate and its key, and whom to trust: names and certificates are checked."""
        certificate, key = map(str, pair)
        tls = security(
            Config(
                kafka_security_protocol="SSL",
                kafka_ssl_cafile=certificate,
                kafka_ssl_certfile=certificate,
                kafka_ssl_keyfile=key,
            )
        ).tls
        assert tls is not None
        assert tls.check_hostname
        assert 1 == len(tls.get_ca_certs())

    def test_files_that_are_none(self, tmp_path: Path, pair: tuple[Path, Path]) -> None:
        """Each is named with its setting."""
        other = tmp_path / "other.pem"
        other.write_text("something else")
        tls: dict[str, Any] = {"kafka_security_protocol": "SSL"}
        assert "--kafka-ssl-cafile nowhere: No such file" in refusal(**tls, kafka_ssl_cafile="nowhere")
        assert f"--kafka-ssl-cafile {other}: not a PEM file" in refusal(**tls, kafka_ssl_cafile=str(other))
        wrong = refusal(**tls, kafka_ssl_certfile=str(pair[0]), kafka_ssl_keyfile=str(other))
        assert f"--kafka-ssl-keyfile {other}: not a PEM file" in wrong

    def test_an_encrypted_key(self, tmp_path: Path, pair: tuple[Path, Path]) -> None:
        """Nobody sits at the terminal to be asked for its password."""
        certificate, key = pair
        locked = tmp_path / "locked.pem"
        locking = ("openssl", "pkcs8", "-topk8", "-in", str(key), "-out", str(locked), "-passout", "pass:locked")
        subprocess.run(locking, check=True, capture_output=True)
        text = refusal(
            kafka_security_protocol="SSL", kafka_ssl_certfile=str(certificate), kafka_ssl_keyfile=str(locked)
        )
        assert "--kafka-ssl-keyfile: the key is encrypted" in text


def test_a_secret_is_text() -> None:
    """It is shown as nothing, and sent as what it is."""
    assert "'***'" == repr(Secret(PASSWORD))
    assert PASSWORD.encode() == Secret(PASSWORD).encode()

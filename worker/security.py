"""How a cluster is to be trusted and what it is told: TLS and SASL, read from the settings and checked.

It reads the files that the settings name, so that what is missing or damaged is said before
anything connects. It knows no client. Secrets come by the environment or by files, never by a
flag, and none of them has a representation that could end up in a log.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from worker.config import Config
from worker.errors import Fatal


class Secret(str):
    """Text that is shown to nobody but the cluster."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Return no part of it: clients log what they were configured with."""
        return "'***'"


NO_SECRET: Final = Secret()


@dataclass(frozen=True)
class Security:
    """What a connection needs; the default is neither encrypted nor authenticated.

    ``mechanism`` is None without SASL. ``token_file`` holds the token of OAUTHBEARER, which is read
    at each connection, so that whoever renews it replaces the file.
    """

    protocol: str = "PLAINTEXT"
    tls: ssl.SSLContext | None = None
    mechanism: str | None = None
    username: str = ""
    password: Secret = NO_SECRET
    token_file: Path | None = None


OPEN: Final = Security()
"""A cluster that is neither encrypted nor asks who is there."""


def security(config: Config) -> Security:
    """Read what ``config`` says about the cluster.

    Raises:
        Fatal: settings that do not go together, or a file that cannot be used; the text names the setting.
    """
    encrypted = config.kafka_security_protocol in {"SSL", "SASL_SSL"}
    authenticated = config.kafka_security_protocol in {"SASL_PLAINTEXT", "SASL_SSL"}
    for name in ("kafka_ssl_cafile", "kafka_ssl_certfile", "kafka_ssl_keyfile"):
        if getattr(config, name) and not encrypted:
            _refuse(f"{_flag(name)} is given", config, "SSL or SASL_SSL")
    if config.kafka_sasl_mechanism and not authenticated:
        _refuse("--kafka-sasl-mechanism is given", config, "SASL_SSL or SASL_PLAINTEXT")
    tls = _tls(config) if encrypted else None
    if not authenticated:
        return Security(config.kafka_security_protocol, tls)
    if not config.kafka_sasl_mechanism:
        raise Fatal(
            f"--kafka-security-protocol is {config.kafka_security_protocol}, and no --kafka-sasl-mechanism is given"
        )
    if config.kafka_sasl_mechanism == "OAUTHBEARER":
        if not config.kafka_sasl_token_file:
            raise Fatal("OAUTHBEARER needs --kafka-sasl-token-file, a file that holds the token")
        path = Path(config.kafka_sasl_token_file)
        read_secret("--kafka-sasl-token-file", path)
        return Security(config.kafka_security_protocol, tls, config.kafka_sasl_mechanism, token_file=path)
    if not config.kafka_sasl_username:
        raise Fatal(f"{config.kafka_sasl_mechanism} needs --kafka-sasl-username")
    return Security(
        config.kafka_security_protocol, tls, config.kafka_sasl_mechanism, config.kafka_sasl_username, _password(config)
    )


def read_secret(setting: str, path: Path) -> Secret:
    """Return the text of a file without the white space around it.

    Raises:
        Fatal: it cannot be read, or there is nothing in it.
    """
    try:
        text = path.read_text().strip()
    except OSError as error:
        raise Fatal(f"{setting} {path}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise Fatal(f"{setting} {path}: it is not UTF-8") from None  # the error would quote it
    if not text:
        raise Fatal(f"{setting} {path}: it is empty")
    return Secret(text)


def _password(config: Config) -> Secret:
    if config.kafka_sasl_password and config.kafka_sasl_password_file:
        raise Fatal("there are both --kafka-sasl-password-file and kafka_sasl_password: which one is it?")
    if config.kafka_sasl_password_file:
        return read_secret("--kafka-sasl-password-file", Path(config.kafka_sasl_password_file))
    if not config.kafka_sasl_password:
        raise Fatal(
            f"{config.kafka_sasl_mechanism} needs a password: "
            "EARSHOT_KAFKA_SASL_PASSWORD in the environment, or --kafka-sasl-password-file"
        )
    return Secret(config.kafka_sasl_password)


def _tls(config: Config) -> ssl.SSLContext:
    """Return what verifies the servers' certificates and names, and shows ours if there is one."""
    try:
        context = ssl.create_default_context(cafile=config.kafka_ssl_cafile or None)
    except OSError as error:  # of which ssl.SSLError is one
        raise Fatal(f"--kafka-ssl-cafile {config.kafka_ssl_cafile}: {_why(error)}") from error
    if config.kafka_ssl_keyfile and not config.kafka_ssl_certfile:
        raise Fatal("--kafka-ssl-keyfile is given without --kafka-ssl-certfile")
    if config.kafka_ssl_certfile:
        try:
            context.load_cert_chain(config.kafka_ssl_certfile, config.kafka_ssl_keyfile or None, password=_encrypted)
        except OSError as error:
            files = f"--kafka-ssl-certfile {config.kafka_ssl_certfile}, --kafka-ssl-keyfile {config.kafka_ssl_keyfile}"
            raise Fatal(f"{files}: {_why(error)}") from error
    return context


def _encrypted() -> NoReturn:
    """Take the place of a prompt on the terminal."""
    raise Fatal("--kafka-ssl-keyfile: the key is encrypted; give one that is not, readable by the worker alone")


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"not a PEM file of what is expected ({error.reason or error})"
    return error.strerror or str(error)


def _refuse(what: str, config: Config, needed: str) -> NoReturn:
    raise Fatal(f"{what}, and --kafka-security-protocol is {config.kafka_security_protocol}; expected {needed}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

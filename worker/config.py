"""The settings of the worker's commands: one frozen `Config` from flags, environment and file.

Each setting has one name. ``--poll-seconds 2`` on the command line is ``EARSHOT_POLL_SECONDS=2``
in the environment and ``poll_seconds = 2`` in a TOML file; the first of these that is given wins.
"""

from __future__ import annotations

import socket
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from worker.errors import Fatal

ENVIRONMENT_PREFIX: Final = "EARSHOT_"

MISSPELT: Final = 0.8
"""From this likeness on (Ratcliff and Obershelp's, 0 to 1) a name is taken for another one misspelt."""

SECRETS: Final = frozenset({"kafka_sasl_password"})
"""Settings that come from the environment or a file only, and are never shown."""

Positive = Annotated[float, Meta(gt=0, le=1e6)]  # eleven days: nothing can wait for `inf`
Count = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=0, le=65535)]


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every setting, with its default. Times are in seconds, sizes in bytes."""

    model: str = ""
    broker: str = "sqlite:///earshot.db"
    group: str = "earshot"
    instance: str = msgspec.field(default_factory=socket.gethostname)
    processes: Annotated[int, Meta(ge=1, le=256)] = 1
    topic_prefix: str = ""
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_ssl_cafile: str = ""
    kafka_ssl_certfile: str = ""
    kafka_ssl_keyfile: str = ""
    kafka_sasl_mechanism: Literal["", "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] = ""
    kafka_sasl_username: str = ""
    kafka_sasl_password: str = ""
    kafka_sasl_password_file: str = ""
    kafka_sasl_token_file: str = ""
    on_lost_offset: Literal["stop", "earliest"] = "stop"
    max_batch_records: Count = 256
    max_batch_bytes: Count = 32 * 1024**2
    poll_seconds: Positive = 1.0
    give_up_seconds: Positive = 300.0
    max_record_bytes: Count = 8 * 1024**2
    max_record_seconds: Positive = 60.0
    min_record_seconds: Annotated[float, Meta(ge=0, le=1e6)] | None = None  # half of the model's window
    drift_block_seconds: Positive = 10.0
    drift_delta: Annotated[float, Meta(gt=0, lt=1)] = 0.002
    drift_quorum: Count = 3
    max_sources: Count = 1_000
    forget_after: Count = 100_000_000
    reset_state: bool = False
    health_port: Port | None = None
    health_host: str = "127.0.0.1"
    log_format: Literal["auto", "console", "json"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def __repr__(self) -> str:
        """Return the settings without the secret, which has no flag either: it would show in `ps`."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__ if name not in SECRETS}
        return f"Config({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def resolve(flags: Mapping[str, Any], environment: Mapping[str, str]) -> Config:
    """Merge the layers and check every value.

    Args:
        flags: what was given on the command line; ``config`` names a TOML file.
        environment: ``EARSHOT_*`` variables, of which ``EARSHOT_CONFIG`` names the file if the
            flag does not. One that is no setting is ignored (Kubernetes sets ``EARSHOT_PORT`` for a
            service of that name), unless it looks like a setting misspelt.

    Raises:
        Fatal: a file that cannot be read, an unknown setting, or a value out of its range; the
            text names the setting and where it was set.
    """
    flags = dict(flags)
    variables = _variables(environment)
    fallback = variables.pop("config", None)
    path = flags.pop("config", None) or fallback
    layers: list[tuple[str, Mapping[str, Any]]] = [("the command line", flags), ("the environment", variables)]
    if path:
        layers.append((path, _read(Path(path))))
    merged: dict[str, Any] = {}
    for origin, layer in reversed(layers):
        _check(layer, origin)
        merged.update(layer)
    return msgspec.convert(merged, Config, strict=False)


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that are in the environment, by name."""
    known = {"config", *Config.__struct_fields__}
    found = {}
    for variable, value in environment.items():
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if not variable.startswith(ENVIRONMENT_PREFIX) or name.startswith("test_"):
            continue
        if name in known:
            found[name] = value
        elif meant := get_close_matches(name, known, n=1, cutoff=MISSPELT):
            raise Fatal(f"{variable} is no setting; is {ENVIRONMENT_PREFIX}{meant[0].upper()} meant?")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Fatal(f"settings file {path}: {error}") from error


def _check(layer: Mapping[str, Any], origin: str) -> None:
    try:
        msgspec.convert(layer, Config, strict=False)
    except msgspec.ValidationError as error:
        expected, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`")
        if name in layer:
            given = "not shown" if name in SECRETS else repr(layer[name])
            raise Fatal(f"{name} from {origin} is {given}: {expected.replace('`', '')}") from error
        known = ", ".join(Config.__struct_fields__)
        raise Fatal(f"a setting from {origin} does not fit: {error}. The settings are: {known}") from error

"""The errors of Earshot, named by the reaction they demand.

    EarshotError
    ├── BadRecord   reject this record to audio.dlq and go on with the stream
    ├── BadModel    refuse the bundle: nothing of it may be unpickled or served
    ├── Retryable   drop the session, wait, and start again from what was committed
    └── Fatal       stop: a person must change a setting, a file or the cluster

Every message is written for that person: what was wrong, with which record, file or
setting, what was expected, and what to do.
"""

from __future__ import annotations

from typing import Final, Literal

Reason = Literal[
    "bad-header",
    "bad-key",
    "no-source",
    "structured-mode",
    "unknown-content-type",
    "undecodable",
    "empty",
    "too-large",
    "too-long",
    "too-short",
    "bad-rate",
    "bad-channels",
    "non-finite",
    "internal-error",
]
"""Why a record was rejected: one word a program can switch on."""

DETAIL_LIMIT: Final = 280
"""Characters of a detail: it may quote the record, whose copy must still fit its topic."""


class EarshotError(Exception):
    """The base of every error that Earshot raises on purpose."""


class BadRecord(EarshotError):
    """One record cannot be used; it goes to audio.dlq with this reason and detail.

    ``trace`` is the traceback of the unexpected exception behind it, if there is one: for the log.
    """

    def __init__(self, reason: Reason, detail: str, trace: str | None = None) -> None:
        self.reason: Reason = reason
        self.detail = detail[:DETAIL_LIMIT]
        self.trace = trace
        super().__init__(f"{reason}: {self.detail}")


class BadModel(EarshotError):
    """A model bundle is damaged, foreign, or does not reproduce what its trainer saw."""


class Retryable(EarshotError):
    """The broker or the network failed in a way that a new session may survive."""


class Fatal(EarshotError):
    """Going on cannot help: somebody has to change something first."""

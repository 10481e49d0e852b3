"""What the worker says about itself: one structured event a line, on standard error.

Every event has an ``action``, a word that a program can switch on, and fields; nothing that was
heard, and no secret, is ever a field.
"""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

Log = structlog.typing.FilteringBoundLogger


def configure(format: Literal["auto", "console", "json"], level: str) -> Log:
    """Return the log of this process: for people on a terminal, JSON otherwise or as told."""
    readable = format == "console" or (format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(event_key="action", colors=sys.stderr.isatty())
        if readable
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.EventRenamer("action"),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    # kafka-python narrates its own retries; what matters of them comes back to us as an error.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    log: Log = structlog.get_logger()
    return log

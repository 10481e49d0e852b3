"""The board: a picture of what was heard, with a row for each source and below them what has changed.

Owns how a terminal's lines and columns are shared out. It must not know where the news comes
from, or what a record is: every text it is given is clean already, and none is taken for markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Final, Literal

import msgspec
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

SHARES_SHOWN: Final = 3
"""Labels whose share is shown for a source, the most frequent first."""

LINES_PER_CHANGE: Final = 8
"""One drift event is shown for so many lines of terminal, so that the sources keep most of them."""

FRAME_LINES: Final = 5
"""Lines around the rows: the summary, a blank, two of heading, and the cursor's own."""

COLUMNS: Final = (
    (120, {"source": 0, "heard": 7, "last": 0, "confidence": 15, "rejected": 8, "UTC": 8, "drift": 5, "so far": 34}),
    (76, {"source": 0, "heard": 7, "last": 0, "confidence": 10, "rejected": 8, "UTC": 8, "drift": 5}),
    (56, {"source": 0, "heard": 7, "last": 0, "conf": 4, "rejected": 8, "drift": 5}),
    (0, {"source": 0, "last": 0, "conf": 4}),
)
"""For terminals of at least so many columns: what is shown of a source, and how wide; 0 shares what is left."""

_REQUESTED: Final = "; retraining requested"


class _Row(msgspec.Struct):
    """What is known of one source."""

    labels: Counter[str]
    time: str = ""
    last: str = ""
    confidence: float | None = None
    heard: int = 0
    rejected: int = 0
    changes: int = 0


class Board:
    """Takes in one piece of news after the other, and draws what is known.

    ``time`` is a UTC time as "YYYY-MM-DD hh:mm:ss", or anything else for an unknown one.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: dict[str, _Row] = {}  # the last heard at the end
        self._changes: dict[tuple[str, Hashable], str] = {}  # the last change at the end
        self._troubles: dict[str, str] = {}  # the last rejection, the last unreadable record

    def classified(self, source: str, time: str, label: str, confidence: float) -> None:
        """Take in what a classifier heard, and how sure it is, from 0 to 1."""
        row = self._heard(source, time)
        row.last, row.confidence = label, confidence
        row.labels[label] += 1

    def measured(self, source: str, time: str, measurement: str) -> None:
        """Take in what a regressor measured: the value, and of what."""
        row = self._heard(source, time)
        row.last, row.confidence = measurement, None

    def rejected(self, source: str, time: str, why: str) -> None:
        """Take in that a record of a source could not be used."""
        row = self._row(source)
        row.rejected += 1
        row.time = time
        self._troubles["rejected"] = f"{source or '-'}, {why}"

    def changed(self, source: str, since: Hashable, change: str) -> None:
        """Take in a drift event; ``since`` tells a source's changes apart."""
        self._row(source).changes += 1
        self._changes[source, since] = f"{source} {change}"

    def requested(self, source: str, since: Hashable, change: str) -> None:
        """Take in a request for retraining; ``change`` is shown if the drift event has not been seen."""
        self._row(source)
        known = self._changes.get((source, since), f"{source} {change}")
        self._changes[source, since] = known.removesuffix(_REQUESTED) + _REQUESTED

    def unreadable(self, what: str) -> None:
        """Take in that there was something that means nothing."""
        self._troubles["unreadable"] = what

    def picture(self) -> Group:
        """Return everything, no higher than the terminal."""
        console, rows = self._console, self._rows.values()
        above = _line(
            f"predictions {sum(row.heard for row in rows):,}, rejections {sum(row.rejected for row in rows):,}, "
            f"drift events {sum(row.changes for row in rows):,}, sources {len(rows):,}",
            "bold",
        )
        self._changes = dict(list(self._changes.items())[-max(1, console.height // LINES_PER_CHANGE) :])
        changes = Text("\n".join(self._changes.values()) or "nothing so far")
        below: list[RenderableType] = [Panel(changes, title="drift", title_align="left", border_style="dim")]
        below += [_line(f"{kind}: {words}", "dim") for kind, words in self._troubles.items()]
        room = console.height - FRAME_LINES - sum(len(console.render_lines(part)) for part in below)
        if len(self._rows) > room:
            room = max(1, room - 1)
            below.insert(0, _line(f"{len(self._rows) - room:,} more, heard less recently", "dim"))
        return Group(above, Text(), _table(sorted(list(self._rows.items())[-room:]), console.options), *below)

    def _row(self, source: str) -> _Row:
        """Return the row of a source, which is now the last heard."""
        row = self._rows.pop(source, None) or _Row(Counter())
        self._rows[source] = row
        return row

    def _heard(self, source: str, time: str) -> _Row:
        row = self._row(source)
        row.heard += 1
        row.time = time
        return row


def _table(rows: list[tuple[str, _Row]], terminal: ConsoleOptions) -> Table:
    """Return a line for each source, in columns that stay where they are while numbers grow."""
    columns = next(columns for least, columns in COLUMNS if terminal.max_width >= least)
    shared = [name for name, width in columns.items() if not width]
    left = terminal.max_width - sum(columns.values()) - 2 * (len(columns) - 1)
    columns = columns | dict.fromkeys(shared, max(4, left // len(shared)))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for name, width in columns.items():
        justify: Literal["left", "right"] = "right" if name in {"heard", "rejected"} else "left"
        table.add_column(name, width=width, no_wrap=True, overflow="ellipsis", justify=justify)
    bar, mark = ("-", "!") if terminal.ascii_only else ("━", "▲")
    for source, row in rows:
        shares = [f"{label} {count / row.heard:.0%}" for label, count in row.labels.most_common(SHARES_SHOWN)]
        cells: dict[str, RenderableType] = {
            "source": Text(source or "-", "bold"),
            "last": Text(row.last),
            "heard": Text(f"{row.heard:,}"),
            "rejected": Text(f"{row.rejected:,}" if row.rejected else "-", "red" if row.rejected else "dim"),
            "UTC": Text(row.time[11:]),
            "drift": Text(f"{mark} {row.changes}" if row.changes else "", "yellow"),
            "so far": Text(", ".join(shares), "dim"),
        }
        if row.confidence is not None:
            filled = round(min(max(row.confidence, 0), 1) * (columns.get("confidence", 0) - 5))
            cells["conf"] = Text(f"{row.confidence:.2f}")
            cells["confidence"] = Text.assemble(f"{row.confidence:.2f} ", (bar * filled, "cyan"))
        table.add_row(*(cells.get(name, "") for name in columns))
    return table


def _line(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")

"""What lies in a bundle for people: the model card, the report, and everything that was found out as data.

This module owns which documents there are, and what is known again from them later. It must not know
how they are laid out.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from trainer import card, report
from trainer.report import Findings
from trainer.results import Evaluation, FamilyImportance, Search
from worker import bundle
from worker.errors import Fatal


class Kept(msgspec.Struct, frozen=True):
    """What a bundle keeps of its training as data.

    ``clips`` are the names of what was trained on, and the SHA-256 of each file, by which it is known
    again wherever it lies.
    """

    evaluation: Evaluation
    importances: tuple[FamilyImportance, ...]
    search: Search | None
    clips: dict[str, str]


def documents(findings: Findings, *, with_report: bool) -> dict[str, str]:
    """Return the documents of a bundle by their names."""
    clips = {clip.name: clip.sha256 for clip in findings.dataset.clips}
    kept = Kept(findings.evaluation, findings.importances, findings.search, clips)
    found = {
        bundle.EVALUATION: msgspec.json.format(msgspec.json.encode(kept)).decode() + "\n",
        bundle.CARD: card.markdown(findings),
    }
    return found | {bundle.REPORT: report.html(findings)} if with_report else found


def kept(path: Path) -> Kept:
    """Return what the bundle at ``path`` keeps of its training.

    Raises:
        Fatal: it keeps nothing, or it cannot be read.
    """
    try:
        return msgspec.json.decode((path / bundle.EVALUATION).read_bytes(), type=Kept)
    except (OSError, msgspec.MsgspecError) as error:
        raise Fatal(
            f"{path / bundle.EVALUATION} cannot be read ({error}), so nobody knows which clips this model has heard: "
            "take it from a copy of the bundle, or train again"
        ) from error

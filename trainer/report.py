"""The report: one page that holds everything there is to see, hear and read of a training.

This module owns what is shown, and the choice of clips to listen to. The page needs no network and no script, and
holds no time but the model's: the same findings give the same bytes. It must not know how a finding was computed.
What stands in names and labels is foreign text, and the template escapes all of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import jinja2
import msgspec
import numpy as np
from markupsafe import Markup

from trainer import excerpts, plots, tables, wording
from trainer.dataset import Clip, Dataset
from trainer.listening import Skipped, read_clip
from trainer.results import Answer, ClipFacts, Evaluation, FamilyImportance, Search, Survey
from trainer.survey import MUCH_CLIPPED, MUCH_SILENT
from worker.bundle import Manifest, model_hash
from worker.errors import BadRecord
from worker.profile import ReferenceProfile

TEMPLATES: Final = Path(__file__).with_name("templates")

EXAMPLES: Final = 12
"""Clips that show what the data are: one for each class, as far as they go."""

MISTAKES: Final = 12
"""Mistakes to listen to: the worst are the most telling, and nobody hears out a hundred."""

LINES: Final = 20
"""Lines of a list that could be endless: candidates of a search, clips that were skipped, remarkable clips."""


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """All that a training has found out, and the clips it was found out from."""

    manifest: Manifest
    survey: Survey
    evaluation: Evaluation
    profile: ReferenceProfile
    dataset: Dataset
    importances: tuple[FamilyImportance, ...] = ()
    search: Search | None = None
    skipped: tuple[Skipped, ...] = ()


class Heard(NamedTuple):
    """A clip to look at and to listen to; without a sound if it cannot be read any more."""

    title: str
    note: str
    name: str
    stretch: str = ""
    picture: Markup = Markup()
    sound: Markup = Markup()


class _Chosen(NamedTuple):
    title: str
    note: str
    name: str


def html(findings: Findings) -> str:
    """Return the report as one HTML document, a few megabytes at most.

    At most `EXAMPLES` + `MISTAKES` clips are read again, to be looked at and listened to.
    """
    evaluation, survey = findings.evaluation, findings.survey
    examples, mistakes = _examples(evaluation, survey), _mistakes(evaluation)
    rate = findings.manifest.spec.sample_rate
    seconds = excerpts.longest(len(examples) + len(mistakes), rate)
    clips = {clip.name: clip for clip in findings.dataset.clips}

    def heard(chosen: Iterable[_Chosen], where: str) -> list[Heard]:
        return [
            _heard(each, clips.get(each.name), rate, seconds, f"{where}-{number}") for number, each in enumerate(chosen)
        ]

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else wording.printable(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    classification = evaluation.task == "classification"
    return environment.get_template("report.html.j2").render(
        **{name: getattr(findings, name) for name in Findings.__struct_fields__},
        say=wording,
        hash=model_hash(findings.manifest),
        rates=Counter((fact.sample_rate, fact.channels) for fact in survey.facts).most_common(),
        remarkable=_remarkable(survey.facts),
        lines=LINES,
        examples=heard(examples, "example"),
        mistakes=heard(mistakes, "mistake"),
        wrong=sum(answer.truth != answer.said for answer in evaluation.answers),
        pictures=_pictures(evaluation, survey),
        confusion=tables.confusion(evaluation) if classification else None,
        confused=tables.most_confused(evaluation, 10) if classification else [],
        heat_map=tables.heat_map(findings.search) if findings.search else None,
        candidates=findings.search.candidates if findings.search else (),
    )


def _examples(evaluation: Evaluation, survey: Survey) -> list[_Chosen]:
    """Choose a clip of each of the largest classes, the one that was named with most confidence; or values in order."""
    if evaluation.task == "regression":
        ordered = sorted(evaluation.answers, key=lambda answer: float(answer.truth))
        places = np.linspace(0, len(ordered) - 1, min(EXAMPLES // 2, len(ordered))).round().astype(int)
        return [
            _Chosen(f"{evaluation.label} {answer.truth}", f"said {answer.said}", answer.name)
            for answer in (ordered[place] for place in places)
        ]
    largest = sorted(evaluation.classes, key=lambda name: -survey.counts.get(name, 0))[:EXAMPLES]
    best = {
        answer.truth: answer
        for answer in sorted(
            evaluation.answers, key=lambda answer: (answer.said == answer.truth, answer.confidence or 0)
        )
    }
    return [
        _Chosen(name, _said(best[name]), best[name].name) for name in evaluation.classes if name in {*largest} & {*best}
    ]


def _mistakes(evaluation: Evaluation) -> list[_Chosen]:
    """Choose the worst mistakes: what was said wrong with most confidence, or was off by most."""
    if evaluation.task == "regression":
        worst = sorted(evaluation.answers, key=lambda answer: -abs(_error(answer)))[:MISTAKES]
        return [_Chosen(f"{answer.truth}, said {answer.said}", _missed(answer), answer.name) for answer in worst]
    wrong = [answer for answer in evaluation.answers if answer.said != answer.truth]
    worst = sorted(wrong, key=lambda answer: -(answer.confidence or 0))[:MISTAKES]
    return [_Chosen(answer.truth, _said(answer), answer.name) for answer in worst]


def _said(answer: Answer) -> str:
    sure = "" if answer.confidence is None else f"{wording.percent(answer.confidence, 0)} sure"
    said = "" if answer.said == answer.truth else f"called {answer.said}"
    return ", ".join(filter(None, (said, sure)))


def _error(answer: Answer) -> float:
    return float(answer.said) - float(answer.truth)


def _missed(answer: Answer) -> str:
    error = _error(answer)
    off = f"off by {'+' if error > 0 else ''}{wording.number(error)}"
    if answer.low is None or answer.high is None:
        return off
    return f"{off}; interval {wording.number(answer.low)} to {wording.number(answer.high)}"


def _heard(chosen: _Chosen, clip: Clip | None, sample_rate: int, seconds: float, name: str) -> Heard:
    """Read a clip as the model hears it, and keep its loudest stretch."""
    try:
        samples = read_clip(clip, sample_rate) if clip else None
    except BadRecord:
        samples = None
    if samples is None:
        return Heard(*chosen)
    excerpt = excerpts.loudest(samples, sample_rate, seconds)
    whole = len(samples) / sample_rate - excerpt.seconds < 0.1
    stretch = "" if whole else f"{excerpt.start:.1f} to {excerpt.start + excerpt.seconds:.1f} s"
    return Heard(*chosen, stretch, plots.sound(excerpt.samples, sample_rate, name), excerpts.data_uri(excerpt))


def _remarkable(facts: Sequence[ClipFacts]) -> dict[str, list[ClipFacts]]:
    """Return the clips that somebody should listen to before trusting them, the worst first."""
    return {
        "clipped": sorted((fact for fact in facts if fact.clipped >= MUCH_CLIPPED), key=lambda fact: -fact.clipped),
        "silent": sorted((fact for fact in facts if fact.silent >= MUCH_SILENT), key=lambda fact: -fact.silent),
    }


def _pictures(evaluation: Evaluation, survey: Survey) -> dict[str, Markup]:
    found = dict.fromkeys(("durations", "levels", "reliability", "scatter", "residuals"), Markup())
    if survey.facts:
        found["durations"] = plots.histogram([fact.seconds for fact in survey.facts], "seconds", "durations")
        found["levels"] = plots.histogram([fact.rms for fact in survey.facts], "level in dB of full scale", "levels")
    if evaluation.reliability:
        found["reliability"] = plots.reliability(evaluation.reliability)
    if evaluation.task == "regression" and evaluation.answers:
        columns: Any = [
            (
                float(answer.truth),
                float(answer.said),
                *(np.nan if end is None else end for end in (answer.low, answer.high)),
            )
            for answer in evaluation.answers
        ]
        arrays = np.array(columns, dtype=np.float64).T
        found["scatter"], found["residuals"] = plots.scatter(*arrays), plots.residuals(*arrays)
    return found

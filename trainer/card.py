"""The model card: what a model is, what it is worth and where it ends, in words (Mitchell et al. 2019).

This module owns the Markdown that lies in a bundle beside the model. It says in words what the report shows, and must
not know about sound or pictures. Names and labels are foreign text: none of it is taken for Markdown or HTML.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup

from trainer import tables, wording
from trainer.report import Findings
from worker.bundle import model_hash

TEMPLATES: Final = Path(__file__).with_name("templates")

SPECIAL: Final = re.compile(r"[\\`*\[\]#|~]|(?<![^\W_])_|_(?![^\W_])")
"""What may mean something in Markdown, but no underscore within a word; "<" and "&" are HTML's, and escaped as such."""


def markdown(findings: Findings) -> str:
    """Return the model card; the same findings give the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    evaluation = findings.evaluation
    classification = evaluation.task == "classification"
    return environment.get_template("card.md.j2").render(
        manifest=findings.manifest,
        survey=findings.survey,
        evaluation=evaluation,
        importances=findings.importances,
        search=findings.search,
        skipped=len(findings.skipped),
        say=wording,
        hash=model_hash(findings.manifest),
        confused=tables.most_confused(evaluation, 5) if classification else [],
        weakest=sorted(evaluation.per_class, key=lambda each: each.f1)[:3],
    )


def _plain(value: Any) -> Markup:
    """Return a value as Markdown that reads as the very same text."""
    if isinstance(value, Markup):
        return value
    escaped = SPECIAL.sub(r"\\\g<0>", wording.printable(str(value)))
    return Markup(escape(escaped, quote=False))  # noqa: S704  # escaped just here

"""The summary on a terminal: aligned, complete, and harmless whatever a class is called."""

from __future__ import annotations

from trainer.results import ClassResult, Evaluation, Measure
from trainer.summary import evaluation

MEASURES = {"accuracy": Measure(0.875, 0.8, 0.925)}


def found(**changes: object) -> Evaluation:
    fields: dict[str, object] = {"task": "classification", "label": "label", "classes": ("dog", "noise")}
    fields |= {"how": "By hand.", "clip": MEASURES, "window": MEASURES, "leaky": {"accuracy": 0.99}}
    return Evaluation(**(fields | changes))  # type: ignore[arg-type]  # of many types


def test_columns_are_below_each_other() -> None:
    """Names to the left, figures to the right, and the leak is explained where it stands."""
    dog = ClassResult("dog", 12, 1.0, 0.5, 0.667, 0.9, 0.8)
    noise = ClassResult("noise", 3, 0.25, 1.0, 0.4, None, None, background=True)
    expected = """\
held out: By hand.
                            clips                windows  random split
  accuracy  87.5 % (80.0 to 92.5)  87.5 % (80.0 to 92.5)        99.0 %
(a random split has windows of one clip on both sides: nobody will ever see its figure)

  class               clips  precision  recall    F1  AUROC  AUPRC
  dog                    12       1.00    0.50  0.67   0.90   0.80
  noise (background)      3       0.25    1.00  0.40"""
    assert expected == evaluation(found(per_class=(dog, noise)))


def test_without_a_leak() -> None:
    """What was not asked for has no column."""
    told = evaluation(found(leaky={}))
    assert "random split" not in told
    assert 3 == len(told.splitlines())


def test_silence_has_a_column_where_there_is_some() -> None:
    """Between all windows and the leak, and it is said what is meant."""
    told = evaluation(found(silent=0.25, sounding={"accuracy": Measure(0.95, 0.9, 0.975)})).splitlines()
    assert "                            clips                windows     windows with sound  random split" == told[1]
    assert "  accuracy  87.5 % (80.0 to 92.5)  87.5 % (80.0 to 92.5)  95.0 % (90.0 to 97.5)        99.0 %" == told[2]
    assert told[3].startswith("(25.0 % of the windows are silent: more than 60 dB under the loudest of their clip.")
    assert "with sound" not in evaluation(found())


def test_a_name_cannot_move_the_terminal() -> None:
    """Classes are called by folders, and folders by whoever made them."""
    told = evaluation(found(per_class=(ClassResult("a\x1b[2Jb\nc", 1, 1.0, 1.0, 1.0, None, None),)))
    assert "\x1b" not in told
    assert "a\N{REPLACEMENT CHARACTER}[2Jb c" in told

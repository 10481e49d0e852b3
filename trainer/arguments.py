"""What can be typed after ``earshot-trainer``: commands, options, help.

Knows nothing of what a command does with them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from worker.arguments import LONGEST, number

LARGEST_SEED: Final = 2**32 - 1  # scikit-learn's

SEED: Final = number(int, 0, LARGEST_SEED)
SECONDS: Final = number(float, 0.001, LONGEST)
WHOLE: Final = number(int, 1)


def parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses has the name of the command in ``command``."""
    top = argparse.ArgumentParser(
        prog="earshot-trainer",
        description="Labelled clips in, a model bundle for earshot-worker out.",
        epilog="exit status: 0 done, 1 something has to be changed first, 2 wrong usage",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    simulate = _command(
        commands,
        "simulate",
        "write labelled sounds of machines with faults, from published fault models",
        "earshot-trainer simulate clips",
    )
    simulate.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    simulate.add_argument("--seed", type=SEED, default=0, help="another seed, other sounds (%(default)s)")
    simulate.add_argument("--clips", type=WHOLE, default=240, metavar="N", help="how many (%(default)s)")
    simulate.add_argument("--seconds", type=SECONDS, default=4.0, metavar="S", help="how long each (%(default)s)")

    fit = _command(
        commands,
        "fit",
        "train a forest on labelled clips and write the bundle that the worker serves",
        "earshot-trainer fit clips --label label --out bundle",
    )
    _training(fit)
    _forest(fit)

    tune = _command(
        commands,
        "tune",
        "search for the forest that suits the clips, and write the bundle of the best one",
        "earshot-trainer tune clips --out bundle --strategy random --candidates 20",
    )
    tune.description = (
        "Search for the settings of a forest on folds of whole groups, measure the best one on a fifth of the clips "
        "that the search never heard, and train it on all of them. Settings that are not searched are as for `fit`; "
        "one that is given as an option, as --trees, is not searched."
    )
    _training(tune)
    _search(tune)
    _forest(tune)

    evaluate = _command(
        commands,
        "evaluate",
        "say what a bundle is worth on labelled clips that it has not heard",
        "earshot-trainer evaluate bundle new-clips",
    )
    evaluate.description = (
        "Say what a bundle is worth on labelled clips. Clips that it was trained on are found by their content and "
        "left out; if there are no others, models are trained by its settings on folds, and those are measured."
    )
    evaluate.add_argument("bundle", type=Path, metavar="BUNDLE", help="the folder of the bundle")
    evaluate.add_argument("data", type=Path, metavar="DATA", help="clips that are labelled as those of its training")
    _work(evaluate)
    evaluate.add_argument("--json", action="store_true", help="print the evaluation as JSON")
    return top


def _training(command: argparse.ArgumentParser) -> None:
    """Add what every command that trains a model has to know, but for the forest."""
    command.add_argument(
        "data", type=Path, metavar="DATA", help="a folder with a folder per class, or with a CSV manifest"
    )
    command.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="the folder of the bundle")
    command.add_argument(
        "--name", help="what predictions call the model, as it can stand in a URI (the name of the bundle's folder)"
    )

    data = command.add_argument_group("data")
    data.add_argument("--label", default="label", metavar="COLUMN", help="the column to predict (%(default)s)")
    data.add_argument("--task", choices=("classification", "regression"), help="what a numeric label leaves open")
    data.add_argument(
        "--group",
        metavar="COLUMN",
        help="what says which clips belong together, such as a recording; columns are joined by + (group)",
    )
    data.add_argument(
        "--folds",
        type=number(int, 2),
        default=5,
        metavar="N",
        help="how many, if the data set has none of its own; as many as groups leaves out one at a time (%(default)s)",
    )
    data.add_argument(
        "--augment",
        metavar="CHANGES",
        help="train on changed copies as well: stretch, pitch, shift, noise, highpass, lowpass, gain, codec; as in "
        "noise=10:30,gain=-12:0,copies=2",
    )

    features = command.add_argument_group("features")
    features.add_argument(
        "--features",
        default="compact",
        metavar="SETS",
        help="article, compact, rich, pitch, several joined by +, or a file of one's own in TOML or JSON (%(default)s)",
    )
    features.add_argument("--level", type=float, metavar="DBFS", help="bring each window to this RMS level first")
    features.add_argument("--sample-rate", type=WHOLE, metavar="HZ", help="what everything is resampled to (16000)")
    features.add_argument("--window-seconds", type=SECONDS, metavar="S", help="what one prediction hears (1.0)")
    features.add_argument("--window-hop-seconds", type=SECONDS, metavar="S", help="between two windows (0.5)")
    features.add_argument(
        "--precision",
        choices=("float64", "float32"),
        help="of Fourier transforms (float64); float32 is faster, mel bands are up to 0.002 dB off, and of the sets"
        " with a name only article does",
    )

    command.add_argument("--seed", type=SEED, default=0, help="of forests, folds and copies (%(default)s)")
    _work(command)
    command.add_argument(
        "--backend",
        choices=("local", "dask"),
        default="local",
        help="who listens to the clips, and searches: this machine, or a Dask cluster (%(default)s)",
    )
    command.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of the Dask cluster, as in tcp://10.0.0.1:8786; its workers must see the clips under the same path",
    )
    command.add_argument("--no-report", action="store_true", help="do not write report.html, which takes a few seconds")
    command.add_argument("--json", action="store_true", help="print everything that was found out as JSON")


def _search(command: argparse.ArgumentParser) -> None:
    """Add what is searched, and how."""
    search = command.add_argument_group("search")
    search.add_argument(
        "--strategy",
        choices=("grid", "random", "halving"),
        default="grid",
        help="try everything, draw some, or let all compete with few trees, and the best with more (%(default)s)",
    )
    search.add_argument(
        "--candidates", type=WHOLE, metavar="N", help="how many are drawn (20 for random, all there are for halving)"
    )
    search.add_argument("--grid", type=Path, metavar="FILE", help="TOML or JSON: a list of values for each setting")
    search.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="a setting and its values, beside those of --grid, as in max_depth=None,10,20; without either there is "
        "a grid of n_estimators, max_depth and min_samples_split, and a wider one for random and halving",
    )


def _forest(command: argparse.ArgumentParser) -> None:
    """Add the settings of a forest; one that is not typed is None, for what is typed is not searched over."""
    forest = command.add_argument_group("forest (names and meanings are scikit-learn's)")
    forest.add_argument("--forest", choices=("random-forest", "extra-trees"), help="the kind (random-forest)")
    forest.add_argument("--trees", type=WHOLE, metavar="N", help="how many (100)")
    forest.add_argument("--max-depth", type=WHOLE, metavar="N", help="of a tree (as deep as it gets)")
    forest.add_argument(
        "--max-features",
        type=_features,
        metavar="N",
        help="tried for a split: sqrt, log2, or a share of all (sqrt, and 1.0 for a quantity)",
    )
    forest.add_argument("--min-samples-leaf", type=WHOLE, metavar="N", help="windows in a leaf (1)")
    forest.add_argument(
        "--class-weight", choices=("balanced", "balanced_subsample"), help="let rare classes count as much as others"
    )


def _work(command: argparse.ArgumentParser) -> None:
    command.add_argument("--jobs", type=WHOLE, default=-1, metavar="N", help="processor cores (all)")
    command.add_argument("--no-cache", action="store_true", help="neither use nor keep features that were computed")


def _features(text: str) -> str | float:
    """Read what scikit-learn calls max_features."""
    if text in {"sqrt", "log2"}:
        return text
    try:
        share = number(float, 0, 1)(text)
    except argparse.ArgumentTypeError:
        share = 0
    if share == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is neither sqrt nor log2 nor a share, above 0 and up to 1")
    return share


def _command(commands: Any, name: str, purpose: str, example: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=name)
    return command

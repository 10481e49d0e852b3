"""The command line of the trainer, where everything is put together."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from worker.arguments import LONGEST, number
from worker.errors import BadModel, Fatal

EXIT_OK: Final = 0
EXIT_FATAL: Final = 1

LARGEST_SEED: Final = 2**32 - 1  # scikit-learn's


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # "R²" must not end a training where that cannot be written
        sys.stdout.reconfigure(errors="replace")
    arguments = vars(parser().parse_args(argv))
    command: Callable[[dict[str, Any]], int] = arguments.pop("command")
    try:
        return command(arguments)
    except (BadModel, Fatal, OSError) as error:  # of OSErrors, what a disk or its permissions may raise
        print(f"earshot-trainer: {error}", file=sys.stderr)
        return EXIT_FATAL
    except KeyboardInterrupt:
        return 130


def _simulate(arguments: dict[str, Any]) -> int:
    from trainer.simulate import simulate

    with _progress() as advance:
        manifest = simulate(
            arguments["out"],
            seed=arguments["seed"],
            clips=arguments["clips"],
            seconds=arguments["seconds"],
            on_progress=lambda done, total: advance("simulating machines", done, total),
        )
    print(f"{arguments['clips']} clips of {arguments['seconds']:g} s, listed in {manifest}")
    return EXIT_OK


def _fit(arguments: dict[str, Any]) -> int:
    from trainer.dataset import load
    from trainer.training import fit
    from worker.features import FeatureSpec

    dataset = load(arguments["data"], label=arguments["label"], task=arguments["task"])
    for warning in dataset.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    chosen = {name: arguments[name] for name in ("sample_rate", "window_seconds", "window_hop_seconds")}
    try:
        spec = FeatureSpec(**{name: value for name, value in chosen.items() if value is not None})
    except ValueError as error:
        raise Fatal(str(error)) from error
    with _progress() as advance:
        fitted = fit(
            dataset,
            arguments["out"],
            name=re.sub(r"[^A-Za-z0-9._-]+", "-", arguments["name"] or arguments["out"].resolve().name),
            spec=spec,
            trees=arguments["trees"],
            seed=arguments["seed"],
            jobs=arguments["jobs"],
            on_progress=advance,
        )
    for skipped in fitted.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}", file=sys.stderr)
    manifest = fitted.manifest
    if arguments["json"]:
        print(msgspec.json.encode(manifest).decode())
        return EXIT_OK
    what = f"{len(manifest.classes)} classes" if manifest.classes else f"{manifest.label} (regression)"
    print(f"{manifest.clips} clips, {manifest.windows} windows, {what}, {manifest.forest['n_estimators']} trees")
    print("held out:")
    for name, words in METRICS.items():
        if name in manifest.metrics:
            print(f"  {words:36} {_metric(name, manifest.metrics[name], manifest.label)}")
    print(f"bundle written to {arguments['out']}")
    return EXIT_OK


METRICS: Final = {
    "accuracy": "accuracy, clips",
    "macro_f1": "macro-F1, clips",
    "window_accuracy": "accuracy, single windows",
    "mae": "mean absolute error, clips",
    "r2": "R², clips",
    "window_mae": "mean absolute error, single windows",
}


def _metric(name: str, value: float, unit: str) -> str:
    if "accuracy" in name:
        return f"{100 * value:.1f} %"
    return f"{value:.3f} {unit}" if "mae" in name else f"{value:.3f}"


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each stage on standard error, if somebody is looking at it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done)

        yield advance


def parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses has the function of the command in ``command``."""
    top = argparse.ArgumentParser(
        prog="earshot-trainer",
        description="Labelled clips in, a model bundle for earshot-worker out.",
        epilog="exit status: 0 done, 1 something has to be changed first, 2 wrong usage",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    simulate = _command(
        commands,
        "simulate",
        _simulate,
        "write labelled sounds of machines with faults, from published fault models",
        "earshot-trainer simulate clips",
    )
    simulate.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    seed, seconds = number(int, 0, LARGEST_SEED), number(float, 0.001, LONGEST)
    simulate.add_argument("--seed", type=seed, default=0, help="another seed, other sounds (%(default)s)")
    simulate.add_argument("--clips", type=number(int, 1), default=240, metavar="N", help="how many (%(default)s)")
    simulate.add_argument("--seconds", type=seconds, default=4.0, metavar="S", help="how long each (%(default)s)")

    fit = _command(
        commands,
        "fit",
        _fit,
        "train a forest on labelled clips and write the bundle that the worker serves",
        "earshot-trainer fit clips --label label --out bundle",
    )
    fit.add_argument("data", type=Path, metavar="DATA", help="a folder with a folder per class, or with a CSV manifest")
    fit.add_argument("--label", default="label", metavar="COLUMN", help="the column to predict (%(default)s)")
    fit.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="the folder of the bundle")
    fit.add_argument("--task", choices=("classification", "regression"), help="what a numeric label leaves open")
    fit.add_argument(
        "--name", help="what predictions call the model, as it can stand in a URI (the name of the bundle's folder)"
    )
    fit.add_argument(
        "--trees", type=number(int, 1), default=100, metavar="N", help="the size of the forest (%(default)s)"
    )
    fit.add_argument("--seed", type=seed, default=0, help="of the forest and the splits (%(default)s)")
    fit.add_argument("--jobs", type=number(int, 1), default=-1, metavar="N", help="processor cores (all)")
    fit.add_argument("--sample-rate", type=number(int, 1), metavar="HZ", help="what everything is resampled to (16000)")
    fit.add_argument("--window-seconds", type=seconds, metavar="S", help="what one prediction hears (1.0)")
    fit.add_argument("--window-hop-seconds", type=seconds, metavar="S", help="between two windows (0.5)")
    fit.add_argument("--json", action="store_true", help="print the manifest of the bundle")
    return top


def _command(
    commands: Any, name: str, function: Callable[[dict[str, Any]], int], purpose: str, example: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=function)
    return command


if __name__ == "__main__":
    sys.exit(main())

"""The command line of the trainer, where everything is put together."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.arguments import parser
from worker.errors import BadModel, Fatal

EXIT_OK: Final = 0
EXIT_FATAL: Final = 1
EXIT_KILLED: Final = 130

FOREST: Final = {
    "forest": "kind",
    "trees": "n_estimators",
    "max_depth": "max_depth",
    "max_features": "max_features",
    "min_samples_leaf": "min_samples_leaf",
    "class_weight": "class_weight",
}
"""The options of a forest, and what `trainer.models.ForestSpec` calls them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # "R²" must not end a training where that cannot be written
        sys.stdout.reconfigure(errors="replace")
    arguments = vars(parser().parse_args(argv))
    command = COMMANDS[arguments.pop("command")]
    try:
        return command(arguments)
    except (BadModel, Fatal, OSError) as error:  # of OSErrors, what a disk or its permissions may raise
        print(f"earshot-trainer: {error}", file=sys.stderr)
        return EXIT_FATAL
    except KeyboardInterrupt:
        return EXIT_KILLED


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
    from trainer.training import fit

    fitted, seen = _train(arguments, fit)
    if arguments["json"]:
        print(msgspec.json.encode(fitted._asdict() | {"survey": seen}, enc_hook=str).decode())
    else:
        _tell(arguments, fitted)
    return EXIT_OK


def _tune(arguments: dict[str, Any]) -> int:
    from trainer import grid, summary
    from trainer.tuning import tune

    chosen = {**(grid.read(arguments["grid"]) if arguments["grid"] else {}), **grid.parse(arguments["param"])}
    fixed = _typed(arguments)
    for option, name in FOREST.items():
        if name in fixed and name in chosen:
            raise Fatal(
                f"--{option.replace('_', '-')} fixes {name}, and --param or --grid searches it: leave one of them out"
            )
    strategy, candidates = arguments["strategy"], arguments["candidates"]
    train = partial(tune, grid=chosen, strategy=strategy, candidates=candidates, fixed=fixed)
    (found, fitted), seen = _train(arguments, train)
    if arguments["json"]:
        print(msgspec.json.encode(fitted._asdict() | {"survey": seen, "search": found}, enc_hook=str).decode())
    else:
        print(summary.search(found, fitted.manifest.label), end="\n\n")
        _tell(arguments, fitted)
    return EXIT_OK


def _train(arguments: dict[str, Any], train: Callable[..., Any]) -> tuple[Any, Any]:
    """Survey the clips and train on them; return what comes of both."""
    from trainer.augmentation import read_augmentation
    from trainer.cache import Cache
    from trainer.dataset import load
    from trainer.models import ForestSpec
    from trainer.survey import describe, survey
    from worker.bundle import check_replaceable

    check_replaceable(arguments["out"])
    spec = _spec(arguments)
    augmentation = read_augmentation(arguments["augment"]) if arguments["augment"] else None
    dataset = load(arguments["data"], label=arguments["label"], task=arguments["task"], group=arguments["group"])
    cache = None if arguments["no_cache"] else Cache()
    with _where(arguments, dataset), _progress() as advance:
        seen = survey(
            dataset,
            shortest_seconds=spec.shortest_seconds,
            jobs=arguments["jobs"],
            cache=cache,
            on_progress=advance,
        )
        if not arguments["json"]:
            print(describe(seen), end="\n\n", flush=True)
        trained = train(
            dataset,
            arguments["out"],
            name=arguments["name"],
            spec=spec,
            forest=ForestSpec(**_typed(arguments)),
            folds=arguments["folds"],
            augmentation=augmentation,
            survey=seen,
            report=not arguments["no_report"],
            seed=arguments["seed"],
            jobs=arguments["jobs"],
            cache=cache,
            on_progress=advance,
        )
    return trained, seen


def _typed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the forest that were typed."""
    return {name: arguments[option] for option, name in FOREST.items() if arguments[option] is not None}


def _where(arguments: dict[str, Any], dataset: Any) -> AbstractContextManager[None]:
    """Return the cluster that is to do the work, or nothing."""
    asked, scheduler = arguments["backend"], arguments["scheduler"]
    if asked == "dask" and scheduler is None:
        raise Fatal("--backend dask needs --scheduler ADDRESS, as in tcp://10.0.0.1:8786")
    if asked != "dask" and scheduler is not None:
        raise Fatal(f"--scheduler {scheduler} is for --backend dask; name both, or neither")
    if scheduler is None:
        return nullcontext()
    from trainer.backend import cluster

    return cluster(scheduler, dataset.clips[0].path)


def _tell(arguments: dict[str, Any], fitted: Any) -> None:
    """Print what a training has brought."""
    from trainer import summary

    print(summary.model(fitted.manifest))
    print(summary.evaluation(fitted.evaluation))
    print(f"\nbundle written to {arguments['out']}")


def _evaluate(arguments: dict[str, Any]) -> int:
    from trainer import summary
    from trainer.cache import Cache
    from trainer.verdict import evaluate

    with _progress() as advance:
        found, warnings = evaluate(
            arguments["bundle"],
            arguments["data"],
            jobs=arguments["jobs"],
            cache=None if arguments["no_cache"] else Cache(),
            on_progress=advance,
        )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(msgspec.json.encode(found).decode() if arguments["json"] else summary.evaluation(found))
    return EXIT_OK


COMMANDS: Final[dict[str, Callable[[dict[str, Any]], int]]] = {
    "simulate": _simulate,
    "fit": _fit,
    "tune": _tune,
    "evaluate": _evaluate,
}


def _spec(arguments: dict[str, Any]) -> Any:
    """Return the features that are asked for by the names of sets or by a file, with the settings typed beside it."""
    from worker.features import NAMED, Featurizer, feature_spec, read_spec

    names = {"level": "level_dbfs"}
    settings = ("level", "sample_rate", "window_seconds", "window_hop_seconds", "precision")
    typed = {names.get(name, name): arguments[name] for name in settings if arguments[name] is not None}
    asked = arguments["features"]
    named = all(name in NAMED for name in asked.split("+"))  # these first: a folder may hold a file called rich
    own = not named and (Path(asked).is_file() or Path(asked).suffix == ".toml")
    try:
        if own:
            spec = msgspec.structs.replace(read_spec(Path(asked).read_text(encoding="utf-8")), **typed)
        else:
            spec = feature_spec(asked, **typed)
        Featurizer(spec)  # what cannot be computed is said before anything is listened to
    except (OSError, ValueError) as error:
        raise Fatal(f"{asked}: {error}" if own else str(error)) from error
    return spec


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


if __name__ == "__main__":
    sys.exit(main())

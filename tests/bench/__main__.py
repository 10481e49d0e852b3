"""`make bench`: measure, print one table, and write it for machines with ``--json FILE``."""

from __future__ import annotations

import argparse
import os
import sys

# One thread each, before anything loads a BLAS: what is compared is work, not the number of cores.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import json  # noqa: E402  # see above
import platform  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterable, Iterator, Sequence  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402

import msgspec  # noqa: E402

from tests.bench import hotpath, roundtrip, workers  # noqa: E402
from tests.bench.measure import Row  # noqa: E402
from trainer.dataset import load  # noqa: E402
from trainer.simulate import simulate  # noqa: E402
from trainer.training import fit  # noqa: E402
from worker import bundle  # noqa: E402
from worker.features import feature_spec  # noqa: E402

PARTS = ("features", "forest", "decode", "drift", "pipeline", "broker", "kafka", "start")
MODELS = {
    **{name: feature_spec(name) for name in ("article", "compact", "rich")},
    hotpath.IN_FLOAT32: feature_spec("article", precision="float32"),
}
NEEDED = {
    "drift": ("article",),
    "pipeline": ("article", hotpath.IN_FLOAT32, "compact"),
    "kafka": tuple(MODELS),
    "start": ("article", "rich"),
}
"""Which models a part needs."""

CHUNKS = 256


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for and return the exit status."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON too")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: expected {', '.join(PARTS)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in measured(arguments.parts or PARTS, Path(folder)):
            if not rows or rows[-1].section != row.section:
                print(f"\n{row.section}")
            print(line(row), flush=True)
            rows.append(row)
    if arguments.json:
        document = {"machine": machine(), "rows": msgspec.to_builtins(rows)}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def measured(parts: Iterable[str], work: Path) -> Iterator[Row]:
    """Yield the rows of the parts, in the order of `PARTS`."""
    simulate(work / "clips", clips=144)
    clips = sorted((work / "clips" / "audio").glob("*.wav"))
    for name in {name: None for part in parts for name in NEEDED.get(part, ())}:
        fit(load(work / "clips"), work / name, name=name, spec=MODELS[name])
    chunks = hotpath.wavs(clips, CHUNKS)
    if "features" in parts:
        yield from hotpath.features(chunks, MODELS)
    if "forest" in parts:
        yield from hotpath.forests()
    if "decode" in parts:
        yield from hotpath.decode(chunks)
    if "drift" in parts:
        yield from hotpath.drift(bundle.load(work / "article"), chunks)
    if "pipeline" in parts:
        bundles = {name: bundle.load(work / name) for name in NEEDED["pipeline"]}
        yield from hotpath.pipeline(bundles, work / "article", chunks)
    if "broker" in parts:
        yield from roundtrip.on_brokers(work, chunks[0])
    if "kafka" in parts:
        yield from workers.on_kafka(work, chunks)
    if "start" in parts:
        yield from workers.start(work, chunks)


def line(row: Row) -> str:
    """Return a row of the table: microseconds of CPU and of wall time an item, quartiles, ratio; the same when cold."""
    if row.timing is None:
        return f"  {row.contestant:44} {row.note}"
    times = [row.timing.cpu, row.timing.wall, row.timing.low, row.timing.high]
    cpu, wall, low, high = (f"{1e6 * seconds:10.1f}" for seconds in times)
    ratio = "" if row.ratio is None else f"{row.ratio:8.1f} x {row.peer}"
    cold = "" if row.cold is None else f"  first call {1e6 * row.cold.cpu:.1f} µs"
    cold += "" if row.cold_ratio is None else f" ({row.cold_ratio:.1f} x)"
    spread = f"[{low.strip()}, {high.strip()}]"
    return f"  {row.contestant:44}{cpu} µs CPU{wall} µs   {spread}{ratio}{cold}  {row.note}".rstrip()


def machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    packages = ("earshot", "librosa", "scikit-learn", "numpy", "numba", "kafka-python", "onnxruntime", "quixstreams")
    return {
        "platform": platform.platform(),
        "processors": str(os.cpu_count()),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


if __name__ == "__main__":
    sys.exit(main())

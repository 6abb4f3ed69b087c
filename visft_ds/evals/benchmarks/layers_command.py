"""The sub-command `layers` of visft evaluate: its flags, and what it writes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import orjson

from visft_ds import program
from visft_ds.evals.benchmarks.command import add_flags, check_folder, settings_of
from visft_ds.evals.benchmarks.intervals import LEVEL, Interval
from visft_ds.evals.benchmarks.kinds import check_numbers, parse_benchmarks
from visft_ds.evals.benchmarks.layers import END, Choice, choose, encode_blocks
from visft_ds.evals.benchmarks.models import ModelSpec, parse_model
from visft_ds.evals.benchmarks.protocol import Benchmark, Score
from visft_ds.evals.benchmarks.run import Settings, check_same_everywhere, score
from visft_ds.evals.benchmarks.table import rows_of
from visft_ds.evals.charts import Bar, block_chart
from visft_ds.flags import Parser
from visft_ds.interop.writing import write_atomically
from visft_ds.monitor.console import Gauge, Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.parallel import distributed
from visft_ds.redaction import redacted
from visft_ds.resilience.errors import met_by_one_rank, tell

FORMAT, VERSION = "visft_ds layers", 1
RECORD, CHART = "layers.json", "layers.svg"
USAGE = """Every block of a model on the same probes, and the best one to read.

    visft evaluate layers --model timm:tf_efficientnet_lite0:FILE --benchmark dense=coco --out OUT
    visft evaluate layers --model RUN --benchmark dense=camvid --benchmark digits --primary "probe/digits knn" --out OUT

The best block of a number is chosen on one half of the test images and judged on the other, against the end of the
model. `--model M#BLOCK` of visft evaluate benchmarks reads there, `visft.model.until` trains there.
"""


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0 fine, 2 wrong usage or unusable input."""
    given = _parser().parse_args(arguments)
    try:
        settings, spec = settings_of(given), parse_model(given.model)
        check_folder(given.out, RECORD, given.primary)
        benchmarks = parse_benchmarks(given.benchmark)
        check_numbers([given.primary] if given.primary else [], benchmarks)
        with met_by_one_rank():
            _measure(given, spec, benchmarks, settings)
    except (ValueError, OSError, RuntimeError) as error:
        return tell(error, "evaluate")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{program('evaluate')} layers", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="as in visft evaluate benchmarks")
    parser.add_argument(
        "--primary",
        metavar="NUMBER",
        help='the number that names the best block, such as "dense/coco objects knn" (default: the first)',
    )
    add_flags(parser)
    return parser


def _measure(given: argparse.Namespace, spec: ModelSpec, benchmarks: Sequence[Benchmark], settings: Settings) -> None:
    """Encode on all ranks, score and write on the main one."""
    began = time.perf_counter()
    if distributed.world_size() > 1:
        from visft_ds.parallel.engine import start_process_group  # imports deepspeed, which costs seconds

        start_process_group()
        check_same_everywhere(benchmarks)
    main, facts = distributed.is_main(), dict[str, str]()
    encoded = encode_blocks(spec, benchmarks, settings, facts.update)
    distributed.close()  # before scoring, which the main process does alone
    if not main:
        return
    results: dict[str, dict[str, Score]] = {block: {} for block in encoded}
    with Gauge("scoring", len(encoded) * len(benchmarks), "benchmarks") as gauge:
        for block, of_block in encoded.items():
            for benchmark, features in zip(benchmarks, of_block, strict=True):
                gauge.show(gauge.done, f", now {benchmark.label} of {block}")
                results[block] |= score(benchmark, features, features, settings.cache)
                gauge.add()
    _write(given, spec, facts, results, time.perf_counter() - began)


def _write(
    given: argparse.Namespace,
    spec: ModelSpec,
    facts: Mapping[str, str],
    results: Mapping[str, Mapping[str, Score]],
    seconds: float,
) -> None:
    levels = {block: {row.name: row.values[block] for row in rows_of({block: of}, {})} for block, of in results.items()}
    numbers = list(next(iter(levels.values())))
    primary = given.primary or numbers[0]
    if primary not in numbers:
        raise ValueError(f"--primary {primary}: no such number; there are {', '.join(numbers)}")
    choices = {choice.number: choice for choice in choose(results)}
    best = choices[primary].block
    curves = {
        name: [Bar(block, *(100 * part for part in asdict(of[name]).values())) for block, of in levels.items()]
        for name in numbers
    }
    chart = block_chart(list(levels), curves, title=f"{spec.label}, read after each block", y_label="percent").encode()
    write_atomically(given.out / CHART, lambda file: file.write(chart), overwrite=True)
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": {spec.label: dict(facts)},
        "levels": {block: {name: asdict(value) for name, value in of.items()} for block, of in levels.items()},
        "choices": [asdict(choice) for choice in choices.values()],
        "primary": given.primary,
        "best": best,
        "settings": {name: redacted(value) for name, value in vars(given).items()},
        "processes": distributed.world_size(),
        "seconds": round(seconds, 3),
        "versions": versions(),
        "command": [redacted(word) for word in sys.argv],
    }
    content = orjson.dumps(record, option=orjson.OPT_INDENT_2)
    write_atomically(given.out / RECORD, lambda file: file.write(content), overwrite=True)
    lines = [[block, *(f"{100 * of[name].value:.2f}" for name in numbers)] for block, of in levels.items()]
    title = f"best block: chosen on one half of the test images, judged on the other, with {LEVEL:.0%} intervals"
    judged = [[one.number, one.block, _level(one.value), _level(one.end), _difference(one)] for one in choices.values()]
    rest = [("seconds", f"{seconds:.1f}"), ("written", f"{given.out}: {RECORD}, {CHART}")]
    parts = [
        Section("model", list(facts.items())),
        Section("percent, all test images", lines, ["", *numbers]),
        Section(title, judged, ["", "block", "there", "end of the model", "difference"]),
        Section(f"by {primary}", [("best", best), ("read it", _reading(given.model, best))]),
    ]
    print_plan("visft_ds layers", [*parts, Section("run", rest)])


def _level(value: Interval) -> str:
    return f"{100 * value.value:.2f} [{100 * value.low:.2f}, {100 * value.high:.2f}]"


def _difference(choice: Choice) -> str:
    value = choice.difference
    return "–" if value is None else value.text(shown=value.sure)


def _reading(model: str, best: str) -> str:
    if best == END:
        return "the model as it is"
    return f"--model {redacted(model)}#{best}; train it there: --set visft.model.until={best}"

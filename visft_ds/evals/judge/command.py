"""Work of `visft evaluate benchmarks` and `layers`: several models in one table, or all blocks of one."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from visft_ds.evals.charts import block_chart, interval_chart
from visft_ds.evals.judge.intervals import LEVEL
from visft_ds.evals.judge.kinds import parse_benchmarks
from visft_ds.evals.judge.layers import END, Choice, choose, judge_blocks
from visft_ds.evals.judge.models import parse_arms, parse_model
from visft_ds.evals.judge.protocol import Benchmark, Score
from visft_ds.evals.judge.scoring import Settings, judge
from visft_ds.evals.judge.table import Row, rows_of, section, verdict
from visft_ds.evals.records import BENCHMARKS, PICTURES
from visft_ds.files import read_bytes, reading
from visft_ds.flags import EVAL, check_extra, check_least
from visft_ds.interop.weights import write_atomically
from visft_ds.monitor.console import Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.ops import use_numerics
from visft_ds.parallel import distributed
from visft_ds.prepare.model import choose_precision
from visft_ds.redaction import redacted
from visft_ds.tasks.pictures import save_png

CHART, CACHE = "differences.svg", "cache"
LAYERS_RECORD, LAYERS_CHART = "layers.json", "layers.svg"
_SHOWN = 8  # images of a sheet


def run_benchmarks(given: argparse.Namespace) -> None:
    """Judge the models of a command line and write table, record and charts. Collective.

    Raises:
        ValueError: wrong usage, or whatever is wrong with models and data.
    """
    began, settings = time.perf_counter(), settings_of(given)
    arms = parse_arms(given.model)
    _check_folder(given.out, BENCHMARKS, given.primary)
    benchmarks = parse_benchmarks(given.benchmark, given.primary)
    _start(benchmarks)
    results, moved = judge([model for models in arms.values() for model in models], benchmarks, settings)
    distributed.close()
    if not distributed.is_main():
        return
    members = {label: [model.label for model in models] for label, models in arms.items()}
    rows = rows_of(results, members, given.primary)
    shifts = {arm: [moved[label] for label in labels if label in moved] for arm, labels in members.items()}
    mean_shift = {arm: sum(of) / len(of) for arm, of in shifts.items() if of}
    pictures = _pictures(given.out, benchmarks, {arm: results[of[0]] for arm, of in members.items()})
    record = {
        "format": "visft_ds benchmarks",
        "models": {model.label: str(model) for models in arms.values() for model in models},
        "arms": members,
        "primary": given.primary,
        "rows": [asdict(row) for row in rows],
        "moved": mean_shift,
        "pictures": pictures,
    }
    labels = list(members)
    chart = _chart(rows, labels) if len(labels) > 1 else ""
    _write(given, BENCHMARKS, record, CHART, chart, began)
    parts = [Section("models", list(record["models"].items())), section(rows, labels, given.primary)]
    if given.primary and len(labels) > 1:
        said = [(label, verdict(row, label)) for row in rows if row.name == given.primary for label in row.shown]
        parts.append(Section(f"primary: {given.primary}", said or [("not decided: too few of the models have it",)]))
    if mean_shift:
        title = f"feature shift on {benchmarks[0].label}: |f - f0| / |f0 - mean of f0|"
        parts.append(Section(title, [(arm, f"{value:.3f}") for arm, value in mean_shift.items()]))
    print_plan("visft_ds benchmarks", [*parts, Section("written", [(str(given.out),)])])


def run_layers(given: argparse.Namespace) -> None:
    """Judge every block of a model and write table, record and chart. Collective. Raises as `run_benchmarks`."""
    began, settings = time.perf_counter(), settings_of(given)
    spec = parse_model(given.model)
    _check_folder(given.out, LAYERS_RECORD, given.primary)
    benchmarks = parse_benchmarks(given.benchmark, given.primary)
    _start(benchmarks)
    results = judge_blocks(spec, benchmarks, settings)
    distributed.close()
    if not distributed.is_main():
        return
    levels = {block: {row.name: row.values[block] for row in rows_of({block: of})} for block, of in results.items()}
    numbers = list(next(iter(levels.values())))
    primary = given.primary or numbers[0]
    choices = {choice.number: choice for choice in choose(results)}
    best = choices[primary].block
    chart = block_chart(levels, title=f"{spec.label}, read after each block")
    record = {
        "format": "visft_ds layers",
        "model": {spec.label: str(spec)},
        "levels": {block: {name: asdict(value) for name, value in of.items()} for block, of in levels.items()},
        "choices": [asdict(choice) for choice in choices.values()],
        "primary": given.primary,
        "best": best,
    }
    _write(given, LAYERS_RECORD, record, LAYERS_CHART, chart, began)
    lines = [[block, *(f"{100 * of[name].value:.2f}" for name in numbers)] for block, of in levels.items()]
    title = f"best block: chosen on one half of the test images, judged on the other, with {LEVEL:.0%} intervals"
    judged = [_judged(choice) for choice in choices.values()]
    number = list(results).index(best)
    reading_it = f"--model {redacted(given.model)}#{number}; train it there: --set visft.model.layers=[{number}]"
    parts = [
        Section("percent, all test images", lines, ["", *numbers]),
        Section(title, judged, ["", "block", "there", "end of the model", "difference"]),
        Section(f"by {primary}", [("best", best), ("read it", "the model as it is" if best == END else reading_it)]),
    ]
    print_plan("visft_ds layers", [*parts, Section("written", [(str(given.out),)])])


def settings_of(given: argparse.Namespace) -> Settings:
    """Settings by the flags. Raises ValueError for numbers out of range and packages that are not installed."""
    check_extra("a benchmark", "eval", EVAL)
    check_least(given, batch_size=1, threads=0)
    device = distributed.local_device()
    precision, _ = choose_precision(given.precision, device)
    use_numerics(device, tf32=precision != "fp32")
    return Settings(device, precision, given.cache or given.out / CACHE, given.batch_size, given.threads)


def _check_folder(out: Path, record: str, primary: str | None) -> None:
    """Raise ValueError for an --out of something else, or of a start with another primary number."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in (CACHE, record)):
        raise ValueError(f"{out} is not empty and not of an earlier start of this command: choose another --out")
    if (out / record).is_file():
        with reading(out / record, "a record of this command"):
            named = orjson.loads(read_bytes(out / record))["primary"]
        if named != primary:
            raise ValueError(f"{out} has results whose primary number was {named or 'not named'}: choose another --out")


def _start(benchmarks: Sequence[Benchmark]) -> None:
    """Join the other processes, which must see the same data."""
    if distributed.world_size() == 1:
        return
    from visft_ds.parallel.engine import start_process_group  # imports deepspeed, which costs seconds

    start_process_group()
    distributed.assert_same_on_all_ranks(
        {
            f"{benchmark.label}, {name}": f"{images.fingerprint[:12]} ({len(images)} images)"
            for benchmark in benchmarks
            for name, images in benchmark.sets.items()
        }
    )


def _write(
    given: argparse.Namespace, name: str, record: Mapping[str, Any], chart_name: str, chart: str, began: float
) -> None:
    about = {
        "settings": {key: redacted(value) for key, value in vars(given).items()},
        "processes": distributed.world_size(),
        "seconds": round(time.perf_counter() - began, 3),
        "versions": versions(),
        "command": [redacted(word) for word in sys.argv],
    }
    content = orjson.dumps({**record, **about}, option=orjson.OPT_INDENT_2)
    write_atomically(given.out / name, lambda file: file.write(content))
    if chart:
        write_atomically(given.out / chart_name, lambda file: file.write(chart.encode()))


def _chart(rows: Sequence[Row], labels: Sequence[str]) -> str:
    base, *others = labels
    bars = [
        (row.name if len(others) == 1 else f"{label}: {row.name}", change, row.shown.get(label, change.sure))
        for row in rows
        for label, change in row.differences.items()
    ]
    title = f"{others[0] if len(others) == 1 else 'each model'} minus {base}"
    return interval_chart(bars, title=title, x_label="percentage points, with 95% intervals")


def _pictures(out: Path, benchmarks: Sequence[Benchmark], results: Mapping[str, Mapping[str, Score]]) -> list[str]:
    """Write a sheet for each segmentation; returns their names."""
    written = []
    for benchmark in benchmarks:
        name = f"{benchmark.label} linear mIoU"
        seen = {label: of[name] for label, of in results.items() if name in of}
        picture = benchmark.sheet(seen, _SHOWN) if benchmark.sheet else None
        if picture is not None:
            written.append(f"{PICTURES}/{re.sub('[^A-Za-z0-9_.@]+', '-', name)}.png")
            save_png(picture, out / written[-1])
    return written


def _judged(choice: Choice) -> list[str]:
    levels = [f"{100 * of.value:.2f} [{100 * of.low:.2f}, {100 * of.high:.2f}]" for of in (choice.value, choice.end)]
    change = choice.difference
    return [choice.number, choice.block, *levels, "–" if change is None else change.text(shown=change.sure)]

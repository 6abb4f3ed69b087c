"""Work of `visft judge`: models that were trained further beside the one they began as."""

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
import torch

from visft_ds.evals.charts import interval_chart
from visft_ds.evals.judge.dose import at_dose
from visft_ds.evals.judge.kinds import parse_benchmarks
from visft_ds.evals.judge.models import parse_arms
from visft_ds.evals.judge.protocol import Benchmark, Score
from visft_ds.evals.judge.scoring import Settings, judge
from visft_ds.evals.judge.table import Row, rows_of, section, verdict
from visft_ds.evals.records import JUDGED, PICTURES
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

CHART, SCORES = "differences.svg", "scores"
_SHOWN = 8  # images of a sheet


def run_judge(given: argparse.Namespace) -> None:
    """Judge the models of a command line and write table, record and charts. Collective.

    Raises:
        ValueError: wrong usage, or whatever is wrong with models and data.
    """
    began, settings = time.perf_counter(), settings_of(given)
    arms = parse_arms([given.base, *given.tuned, *given.control])
    base, first, *_ = arms
    if len(arms[base]) > 1:
        raise ValueError(f"BASE is one model, and {base} has {len(arms[base])}")
    controls = list(arms)[1 + len(given.tuned) :]
    benchmarks, primary = parse_benchmarks(given.on, given.primary)
    _check_folder(given.out, primary)
    _start(benchmarks)
    for label in controls:
        arms[label] = at_dose(arms[label], arms[first], benchmarks[0], settings)
    results, moved = judge([model for models in arms.values() for model in models], benchmarks, settings)
    distributed.close()
    if not distributed.is_main():
        return
    members = {label: [model.label for model in models] for label, models in arms.items()}
    rows = rows_of(results, members, primary)
    against = {one: rows_of(results, {one: members[one], first: members[first]}, primary) for one in controls}
    shifts = {arm: [moved[label] for label in labels if label in moved] for arm, labels in members.items()}
    mean_shift = {arm: sum(of) / len(of) for arm, of in shifts.items() if of}
    record: dict[str, Any] = {
        "format": "visft_ds judge",
        "models": {model.label: str(model) for models in arms.values() for model in models},
        "arms": members,
        "controls": controls,
        "primary": primary,
        "rows": [asdict(row) for row in rows],
        "against": {label: [asdict(row) for row in of] for label, of in against.items()},
        "moved": mean_shift,
        "pictures": _pictures(given.out, benchmarks, {arm: results[of[0]] for arm, of in members.items()}),
    }
    labels = list(members)
    _write(given, record, _chart(rows, labels), began)
    parts = [Section("models", list(record["models"].items())), section(rows, labels, primary)]
    parts += [section(of, [label, first], primary) for label, of in against.items()]
    said = [(label, verdict(row, label)) for row in rows if row.name == primary for label in row.shown]
    parts.append(Section(f"primary: {primary}", said or [("not decided: too few of the models have it",)]))
    if mean_shift:
        title = f"feature shift on {benchmarks[0].label}: |f - f0| / |f0 - mean of f0|"
        parts.append(Section(title, [(arm, f"{value:.3f}") for arm, value in mean_shift.items()]))
    print_plan("visft_ds judge", [*parts, Section("written", [(str(given.out),)])])


def settings_of(given: argparse.Namespace) -> Settings:
    """Settings by the flags. Raises ValueError for numbers out of range and packages that are not installed."""
    check_extra("visft judge", "eval", EVAL)
    check_least(given, batch_size=1, threads=0)
    device = distributed.local_device() if given.device == "auto" else torch.device(given.device)
    precision, _ = choose_precision(given.precision, device)
    use_numerics(device, tf32=precision != "fp32")
    return Settings(device, precision, given.cache or given.out / SCORES, given.batch_size, given.threads)


def _check_folder(out: Path, primary: str) -> None:
    """Raise ValueError for an --out of something else, or of a start with another primary number."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in (SCORES, JUDGED)):
        raise ValueError(f"{out} is not empty and not of an earlier start of this command: choose another --out")
    if (out / JUDGED).is_file():
        with reading(out / JUDGED, "a record of visft judge"):
            named = orjson.loads(read_bytes(out / JUDGED))["primary"]
        if named != primary:
            raise ValueError(f"{out} was judged by {named}: for another --primary choose another --out")


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


def _write(given: argparse.Namespace, record: Mapping[str, Any], chart: str, began: float) -> None:
    about = {
        "settings": {key: redacted(value) for key, value in vars(given).items()},
        "processes": distributed.world_size(),
        "seconds": round(time.perf_counter() - began, 3),
        "versions": versions(),
        "command": [redacted(word) for word in sys.argv],
    }
    content = orjson.dumps({**record, **about}, option=orjson.OPT_INDENT_2)
    write_atomically(given.out / JUDGED, lambda file: file.write(content))
    write_atomically(given.out / CHART, lambda file: file.write(chart.encode()))


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

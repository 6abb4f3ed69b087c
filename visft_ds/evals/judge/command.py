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

from visft_ds.evals.judge.dose import at_dose
from visft_ds.evals.judge.kinds import parse_benchmarks
from visft_ds.evals.judge.models import parse_arms
from visft_ds.evals.judge.page import judge_page
from visft_ds.evals.judge.protocol import Benchmark, Score
from visft_ds.evals.judge.scoring import Settings, judge
from visft_ds.evals.judge.table import Trial, rows_of, section
from visft_ds.evals.judge.verdict import judged
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
from visft_ds.tasks.pictures import Picture, save_png

PAGE, SCORES = "judge.html", "scores"
_SHOWN = 6  # images of a sheet


def run_judge(given: argparse.Namespace) -> None:
    """Judge the models of a command line and write record and page. Collective.

    Raises:
        ValueError: wrong usage, or whatever is wrong with models and data.
    """
    began, settings = time.perf_counter(), settings_of(given)
    arms = parse_arms([given.base, *given.tuned, *given.control])
    base, first, *_ = arms
    if len(arms[base]) > 1:
        raise ValueError(f"BASE is one model, and {base} has {len(arms[base])}")
    tuned, controls = list(arms)[1 : 1 + len(given.tuned)], list(arms)[1 + len(given.tuned) :]
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
    shifts = {arm: [moved[label] for label in labels if label in moved] for arm, labels in members.items()}
    doses = {arm: sum(of) / len(of) for arm, of in shifts.items() if of}
    trials = [Trial(arm, tuple(controls) if arm == first else (), None, doses.get(arm)) for arm in tuned]
    rows = rows_of(results, members, trials, primary)
    verdicts = judged(rows, trials, primary, base, best=False)
    sheets = _sheets(benchmarks, {arm: results[of[0]] for arm, of in members.items()})
    record: dict[str, Any] = {
        "format": "visft_ds judge",
        "models": {model.label: str(model) for models in arms.values() for model in models},
        "arms": members,
        "trials": [asdict(trial) for trial in trials],
        "primary": primary,
        "protocol": "quick",
        "best": False,
        "layers": {},
        "doses": doses,
        "notes": [],
        "rows": [asdict(row) for row in rows],
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "pictures": [f"{PICTURES}/{name}" for name in sheets],
        "settings": {key: redacted(value) for key, value in vars(given).items()},
        "processes": distributed.world_size(),
        "seconds": round(time.perf_counter() - began, 3),
        "versions": versions(),
        "command": [redacted(word) for word in sys.argv],
    }
    _write(given.out, record, sheets)
    parts = [Section("verdict", [(of.arm, f"{of.word}: {' '.join(of.sentences)}") for of in verdicts])]
    parts += [Section("models", list(record["models"].items())), section(rows, list(members), primary)]
    if doses:
        title = f"feature shift on {benchmarks[0].label}: |f - f0| / |f0 - mean of f0|"
        parts.append(Section(title, [(arm, f"{value:.3f}") for arm, value in doses.items()]))
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


def _sheets(benchmarks: Sequence[Benchmark], results: Mapping[str, Mapping[str, Score]]) -> dict[str, Picture]:
    """Name of a file -> what models see in some images, of each segmentation."""
    found = {}
    for benchmark in benchmarks:
        name = f"{benchmark.label} in-context mIoU"
        seen = {label: of[name] for label, of in results.items() if name in of}
        picture = benchmark.sheet(seen, _SHOWN) if benchmark.sheet else None
        if picture is not None:
            found[f"{re.sub('[^A-Za-z0-9_.@]+', '-', name)}.png"] = picture
    return found


def _write(out: Path, record: Mapping[str, Any], sheets: Mapping[str, Picture]) -> None:
    """Write the record and the page made of it."""
    content = orjson.dumps(record, option=orjson.OPT_INDENT_2)
    page = judge_page(orjson.loads(content), list(sheets.values())).encode()
    for name, picture in sheets.items():
        save_png(picture, out / PICTURES / name)
    write_atomically(out / PAGE, lambda file: file.write(page))
    write_atomically(out / JUDGED, lambda file: file.write(content))

"""Work of `visft judge`: models that were trained further beside the one they began as."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import orjson
import torch

from visft_ds.evals.judge.judging import Judging, hours_of
from visft_ds.evals.judge.kinds import parse_benchmarks
from visft_ds.evals.judge.models import parse_arms
from visft_ds.evals.judge.protocols import PUBLISHED, QUICK
from visft_ds.evals.judge.scoring import Settings
from visft_ds.evals.judge.table import rows_of, section
from visft_ds.evals.judge.verdict import judged
from visft_ds.evals.pages import judge_page
from visft_ds.evals.records import JUDGE, JUDGED, read_judged
from visft_ds.flags import EVAL, check_extra, check_least
from visft_ds.interop.weights import write_atomically
from visft_ds.monitor.console import Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.ops import use_numerics
from visft_ds.parallel import distributed
from visft_ds.prepare.model import choose_precision
from visft_ds.redaction import redacted

PAGE, SCORES = "judge.html", "scores"
_SHOWN = 6  # images of a sheet


def run_judge(given: argparse.Namespace) -> None:
    """Judge the models of a command line; write record and page, print verdict and table.

    Raises:
        ValueError: wrong usage, or whatever is wrong with models and data.
    """
    began, settings = time.perf_counter(), _settings(given)
    arms = parse_arms([given.base, *given.tuned, *given.control])
    protocol = QUICK if given.quick else PUBLISHED
    benchmarks, primary = parse_benchmarks(given.on, given.primary, protocol)
    _check_folder(given.out, primary)
    published = sum(one.published is not None for one in benchmarks)
    if published and settings.device.type == "cpu" and given.device == "auto":
        models = sum(map(len, arms.values())) * (3 if given.layers == "all" else 1)  # with noise and half
        hours = hours_of(arms[next(iter(arms))][0], published * models, settings)
        raise ValueError(
            f"published protocols take some {hours:,.0f} hours without a GPU: add --quick, or --device cpu"
        )
    judging = Judging(arms, len(given.tuned), benchmarks, primary, settings, best=given.layers == "all")
    results, last = judging.scores()
    if not distributed.is_main():
        return
    base, members = judging.arms[0].name, {arm.name: [one.label for one in arm.models] for arm in judging.arms}
    rows = rows_of(results, members, judging.trials, primary, last if judging.best else None)
    verdicts = judged(rows, judging.trials, primary, base)
    moved = {arm.name: arm for arm in judging.arms if arm.shift is not None}
    record: dict[str, Any] = {
        "format": JUDGE,
        "models": {one.label: str(one) for arm in judging.arms for one in arm.models},
        "arms": members,
        "trials": [asdict(one) for one in judging.trials],
        "primary": primary,
        "protocol": protocol.name,
        "best": judging.best,
        "layers": judging.layers,
        "shifts": {name: arm.shift for name, arm in moved.items()},
        "scales": {name: fmean(one.scale for one in arm.models) for name, arm in moved.items()},
        "notes": judging.notes,
        "rows": [asdict(row) for row in rows],
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "settings": {key: redacted(value) for key, value in vars(given).items()},
        "processes": distributed.world_size(),
        "seconds": round(time.perf_counter() - began, 3),
        "versions": versions(),
        "command": [redacted(word) for word in ("visft", "judge", *sys.argv[2:])],
    }
    content = orjson.dumps(record, option=orjson.OPT_INDENT_2)
    write_atomically(given.out / JUDGED, lambda file: file.write(content))
    shown = (base, *(trial.arm for trial in judging.trials))
    sheets = [
        one.sheet({arm: results[members[arm][0]][one.names[0]] for arm in shown}, _SHOWN)
        for one in benchmarks
        if one.sheet
    ]
    page = judge_page(orjson.loads(content), sheets)
    write_atomically(given.out / PAGE, lambda file: file.write(page.encode()))
    read = [(name, *(f"{arm}: {of['chosen']}" for arm, of in each.items())) for name, each in judging.layers.items()]
    shifts = [(name, f"{shift:.3f}", f"A = {record['scales'][name]:.3g}") for name, shift in record["shifts"].items()]
    parts = [
        Section("verdict", [(one.arm, one.word, " ".join(one.sentences)) for one in verdicts]),
        Section("models", list(record["models"].items())),
        Section("best layer, by held-out training images", read),
        section(rows, list(members), primary),
        Section("feature shift: |f - f0| / |f0 - mean of f0|", shifts),
        Section("notes", [(note,) for note in judging.notes]),
        Section("written", [(str(given.out / PAGE),)]),
    ]
    print_plan("visft judge", [part for part in parts if part.rows])


def _settings(given: argparse.Namespace) -> Settings:
    """Settings by the flags. Raises ValueError for numbers out of range and packages that are not installed."""
    check_extra("visft judge", "eval", EVAL)
    check_least(given, batch_size=1, threads=0)
    if distributed.world_size() != distributed.processes_here():
        raise ValueError("several machines: visft judge shares its work among the processes of one")
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
    if (out / JUDGED).is_file() and (named := read_judged(out)["primary"]) != primary:
        raise ValueError(f"{out} was judged by {named}: for another --primary choose another --out")

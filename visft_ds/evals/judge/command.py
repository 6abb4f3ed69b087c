"""Work of `visft judge`: models that were trained further beside the one they began as."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import torch

from visft_ds import distributed
from visft_ds.evals.judge.benchmark import Number
from visft_ds.evals.judge.comparison import Comparison
from visft_ds.evals.judge.kinds import parse_benchmarks
from visft_ds.evals.judge.models import parse_arms
from visft_ds.evals.judge.protocol import PUBLISHED, QUICK
from visft_ds.evals.judge.rehearsal import published_hours, rehearsal
from visft_ds.evals.judge.scoring import Settings
from visft_ds.evals.judge.table import rows_of, section
from visft_ds.evals.judge.verdict import judged
from visft_ds.evals.pages import judge_page
from visft_ds.evals.records import JUDGE, JUDGED, read_judged
from visft_ds.files import write_bytes, write_text
from visft_ds.flags import EVAL, check_extra, check_least
from visft_ds.monitor.console import Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.ops import use_numerics
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
    arms = parse_arms([given.base, *given.tuned, *given.control], download=given.download)
    protocol = QUICK if given.quick else PUBLISHED
    wanted = [name.strip() for name in given.numbers.split(",")] if given.numbers else []
    benchmarks, primary = parse_benchmarks(given.on, given.primary, protocol, wanted)
    _check_folder(given.out, primary)
    best = given.layers == "all"
    if given.dry_run:
        if distributed.is_main():  # the others would wait for facts in folders of their own
            with TemporaryDirectory() as scratch:
                nowhere = replace(settings, cache=Path(scratch))
                comparison = Comparison(arms, len(given.tuned), benchmarks, primary, nowhere)
                print_plan("visft judge --dry-run", rehearsal(comparison, best=best))
        return
    published = [benchmark for benchmark in benchmarks if benchmark.published is not None]
    if published and settings.device.type == "cpu" and given.device == "auto":
        models = sum(map(len, arms.values())) * (3 if best else 1)  # with noise and half
        hours = published_hours(arms[next(iter(arms))][0], published, models, settings)
        raise ValueError(
            f"published protocols take some {hours:,.0f} hours without a GPU: add --quick, or --device cpu"
        )
    comparison = Comparison(arms, len(given.tuned), benchmarks, primary, settings)
    if best:
        comparison.choose_layers()
    comparison.match_shifts(noise=best)
    scores = comparison.score()
    if not distributed.is_main():
        return
    base = comparison.base.name
    trials = comparison.trials
    members = {arm.name: [spec.label for spec in arm.models] for arm in comparison.arms}
    numbers: dict[str, Number] = {}
    for benchmark in benchmarks:
        numbers |= {benchmark.full_name(number): number for number in benchmark.numbers}
    last = scores.last if best else None
    rows = rows_of(scores.chosen, members, trials, primary, last, scores.cut, numbers)
    verdicts = judged(rows, trials, primary, base)
    moved = {arm.name: arm for arm in comparison.arms if arm.shift is not None}
    record: dict[str, Any] = {
        "format": JUDGE,
        "models": {spec.label: str(spec) for arm in comparison.arms for spec in arm.models},
        "arms": members,
        "trials": [asdict(trial) for trial in trials],
        "primary": primary,
        "protocol": protocol.name,
        "best": best,
        "layers": comparison.layers,
        "shifts": {name: arm.shift for name, arm in moved.items()},
        "scales": {name: fmean(spec.scale for spec in arm.models) for name, arm in moved.items()},
        "notes": comparison.notes,
        "numbers": [
            number.described(quick=given.quick) for number in dict.fromkeys(numbers[row.name] for row in rows)
        ],
        "rows": [asdict(row) for row in rows],
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "settings": {key: redacted(value) for key, value in vars(given).items()},
        "processes": distributed.world_size(),
        "seconds": round(time.perf_counter() - began, 3),
        "versions": versions(),
        "command": [redacted(word) for word in ("visft", "judge", *sys.argv[2:])],
    }
    content = orjson.dumps(record, option=orjson.OPT_INDENT_2)
    write_bytes(given.out / JUDGED, content)
    shown = [base, *(trial.arm for trial in trials)]
    sheets = []
    for benchmark in benchmarks:
        if benchmark.sheet:
            of_arms = {arm: scores.chosen[members[arm][0]][benchmark.full_names[0]] for arm in shown}
            sheets.append(benchmark.sheet(of_arms, _SHOWN))
    page = judge_page(orjson.loads(content), sheets)
    write_text(given.out / PAGE, page)
    read = []
    for name, choices in comparison.layers.items():
        read.append((name, ", ".join(f"{arm}: {choice['chosen']}" for arm, choice in choices.items())))
    shifts = [
        (name, f"{shift:.3f}", f"A = {record['scales'][name]:.3g}")
        for name, shift in record["shifts"].items()
    ]
    parts = [
        Section(
            "verdict", [(verdict.arm, verdict.word, " ".join(verdict.sentences)) for verdict in verdicts]
        ),
        Section("models", list(record["models"].items())),
        Section("best layer, by held-out training images", read),
        section(rows, list(members), primary),
        Section("feature shift: |u - u0|, features of length 1", shifts),
        Section("notes", [(note,) for note in comparison.notes]),
        Section("written", [(str(given.out / PAGE),)]),
    ]
    print_plan("visft judge", [part for part in parts if part.rows])


def _settings(given: argparse.Namespace) -> Settings:
    """Settings by the flags. Raises ValueError for numbers out of range and packages that are not
    installed.
    """
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
        raise ValueError(
            f"{out} is not empty and not of an earlier start of this command: choose another --out"
        )
    if (out / JUDGED).is_file() and (named := read_judged(out)["primary"]) != primary:
        raise ValueError(f"{out} was judged by {named}: for another --primary choose another --out")

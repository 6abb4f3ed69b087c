"""Work of `visft judge`: models that were trained further beside the one they began as."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import orjson
import torch

from visft_ds import distributed
from visft_ds.evals.judge.comparison import Comparison
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.kinds import parse_benchmarks
from visft_ds.evals.judge.model_text import ModelSpec, parse_variants
from visft_ds.evals.judge.models import bands_read
from visft_ds.evals.judge.protocol import PUBLISHED, QUICK
from visft_ds.evals.judge.rehearsal import rehearsal
from visft_ds.evals.judge.table import Results, Row, rows_of, section
from visft_ds.evals.judge.verdict import Verdict, judged
from visft_ds.evals.pages import judge_page
from visft_ds.evals.records import JUDGE, JUDGED, Record, read_judged
from visft_ds.files import write_bytes, write_text
from visft_ds.flags import EVAL, check_extra, check_least
from visft_ds.monitor.console import Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.ops import keep_freed_memory, use_numerics
from visft_ds.prepare.model import choose_precision
from visft_ds.redaction import redacted
from visft_ds.settings.bands import Bands, in_words
from visft_ds.tasks.pictures import Picture

PAGE = "judge.html"
SCORES = "scores"
_SHOWN = 6  # images of a sheet


def run_judge(flags: argparse.Namespace) -> None:
    """Judge the models of a command line; write record and page, print verdict and table.

    Raises:
        ValueError: wrong usage, or whatever is wrong with models and data.
    """
    began = time.perf_counter()
    settings = _settings(flags)
    variants = parse_variants([flags.base, *flags.tuned, *flags.control], download=flags.download)
    protocol = QUICK if flags.quick else PUBLISHED
    only = [name.strip() for name in flags.numbers.split(",")] if flags.numbers else []
    bands = _bands(variants, quick=flags.quick)
    benchmarks, primary = parse_benchmarks(flags.on, flags.primary, protocol, only, bands)
    _check_folder(flags.out, primary)
    best = flags.layers == "all"
    if flags.dry_run:
        if distributed.is_main():  # the others would wait for facts in folders of their own
            with TemporaryDirectory() as scratch:
                nowhere = replace(settings, cache=Path(scratch))
                comparison = Comparison(variants, len(flags.tuned), benchmarks, primary, nowhere, best)
                print_plan("visft judge --dry-run", rehearsal(comparison))
        return
    is_published = any(benchmark.published is not None for benchmark in benchmarks)
    if is_published and not flags.quick and settings.device.type == "cpu" and flags.device == "auto":
        raise ValueError(
            "published protocols take long without a GPU (--dry-run tells how long): add --quick, or "
            "--device cpu"
        )

    comparison = Comparison(variants, len(flags.tuned), benchmarks, primary, settings, best)
    if best:
        comparison.choose_layers()
    comparison.match_shifts()
    scores = comparison.score()
    if not distributed.is_main():
        return

    trials = comparison.trials
    members = comparison.members
    rows = rows_of(scores.chosen, members, trials, primary, scores.last, scores.cut, comparison.numbers)
    verdicts = judged(rows, trials, primary, comparison.base.name)
    record = _record(comparison, rows, verdicts, flags)
    record["protocol"] = protocol.name
    record["seconds"] = round(time.perf_counter() - began, 3)
    content = orjson.dumps(record, option=orjson.OPT_INDENT_2)
    write_bytes(flags.out / JUDGED, content)
    page = judge_page(orjson.loads(content), _sheets(comparison, scores.chosen))
    write_text(flags.out / PAGE, page)
    table = section(rows, list(members), primary)
    print_plan("visft judge", _sections(record, table, flags.out / PAGE))


def _settings(flags: argparse.Namespace) -> Settings:
    """Settings by the flags. Raises ValueError for numbers out of range and packages that are not
    installed.
    """
    check_extra("visft judge", "eval", EVAL)
    check_least(flags, batch_size=1)
    if distributed.world_size() != distributed.processes_here():
        raise ValueError("several machines: visft judge shares its work among the processes of one")
    device = distributed.local_device() if flags.device == "auto" else torch.device(flags.device)
    precision, _ = choose_precision(flags.precision, device)
    use_numerics(device, tf32=precision != "fp32")
    keep_freed_memory(device)
    cache = flags.cache or flags.out / SCORES
    return Settings(device, precision, cache, flags.batch_size, min(8, distributed.cores()))


def _bands(variants: Mapping[str, Sequence[ModelSpec]], *, quick: bool) -> Bands | None:
    """The bands that all models read; None: three colours of 8 bits.

    Raises ValueError for models of different bands, and for bands without --quick.
    """
    first, *others = [spec for models in variants.values() for spec in models]
    bands = bands_read(first)
    of_first = f"{first.label} reads {in_words(bands)}"
    for spec in others:
        own = in_words(bands_read(spec))
        if own != in_words(bands):
            raise ValueError(f"{of_first}, and {spec.label} {own}: give models of the same bands")
    if bands is not None and not quick:
        raise ValueError(f"{of_first}, and published protocols change colours: add --quick")
    return bands


def _check_folder(out: Path, primary: str) -> None:
    """Raise ValueError for an --out of something else, or of a start with another primary number."""
    of_a_start = (out / SCORES).exists() or (out / JUDGED).exists()
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not of_a_start):
        raise ValueError(
            f"{out} is not empty and not of an earlier start of this command: choose another --out"
        )
    if (out / JUDGED).is_file():
        named = read_judged(out)["primary"]
        if named != primary:
            raise ValueError(f"{out} was judged by {named}: for another --primary choose another --out")


def _record(
    comparison: Comparison, rows: Sequence[Row], verdicts: Sequence[Verdict], flags: argparse.Namespace
) -> Record:
    """Content of judge.json."""
    numbers = dict.fromkeys(comparison.numbers[row.name] for row in rows)  # those of several data sets once
    variants = comparison.variants
    moved = [variant for variant in variants if variant.shift is not None]
    return {
        "format": JUDGE,
        "models": {spec.label: str(spec) for variant in variants for spec in variant.models},
        "variants": comparison.members,
        "trials": [asdict(trial) for trial in comparison.trials],
        "primary": comparison.primary,
        "best": comparison.best,
        "layers": comparison.layers,
        "shifts": {variant.name: variant.shift for variant in moved},
        "scales": {variant.name: fmean(spec.scale for spec in variant.models) for variant in moved},
        "notes": comparison.notes,
        "numbers": [number.described(quick=flags.quick) for number in numbers],
        "rows": [asdict(row) for row in rows],
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "settings": {key: redacted(value) for key, value in vars(flags).items()},
        "processes": distributed.world_size(),
        "versions": versions(),
        "command": [redacted(word) for word in ("visft", "judge", *sys.argv[2:])],
    }


def _sheets(comparison: Comparison, scores: Results) -> list[Picture]:
    """Pictures of what the base and tuned models see, of each benchmark that can draw them."""
    shown = [comparison.base.name, *(trial.variant for trial in comparison.trials)]
    sheets = []
    for benchmark in comparison.benchmarks:
        if benchmark.sheet is None:
            continue
        first = benchmark.full_names[0]
        of_variants = {name: scores[comparison.members[name][0]][first] for name in shown}
        if all(score.maps is not None for score in of_variants.values()):
            sheets.append(benchmark.sheet(of_variants, _SHOWN))
    return sheets


def _sections(record: Record, table: Section, page: Path) -> list[Section]:
    """Tables for the console."""
    verdicts = []
    for verdict in record["verdicts"]:
        verdicts.append((verdict["variant"], verdict["word"], " ".join(verdict["sentences"])))
    layers = []
    for name, choices in record["layers"].items():
        blocks = ", ".join(f"{variant}: {choice['chosen']}" for variant, choice in choices.items())
        layers.append((name, blocks))
    scales = record["scales"]
    shifts = [(name, f"{shift:.3f}", f"A = {scales[name]:.3g}") for name, shift in record["shifts"].items()]
    return [
        Section("verdict", verdicts),
        Section("models", list(record["models"].items())),
        Section("best layer, by held-out training images", layers),
        table,
        Section("feature shift: |u - u0|, features of length 1", shifts),
        Section("notes", [(note,) for note in record["notes"]]),
        Section("written", [(str(page),)]),
    ]

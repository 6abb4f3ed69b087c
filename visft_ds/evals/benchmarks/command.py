"""The sub-command `benchmarks` of visft evaluate: its flags, and what it writes."""

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

from visft_ds import program
from visft_ds.config.records import read_record
from visft_ds.evals.benchmarks.arms import Contender, parse_arms
from visft_ds.evals.benchmarks.dense import Dense, segmentation_sheet
from visft_ds.evals.benchmarks.encoders import NORMALISATIONS, POOLS
from visft_ds.evals.benchmarks.kinds import KINDS, averages, check_numbers, parse_benchmarks
from visft_ds.evals.benchmarks.models import LoadOptions
from visft_ds.evals.benchmarks.protocol import Benchmark, Score
from visft_ds.evals.benchmarks.retrieval import ForeignRecord
from visft_ds.evals.benchmarks.run import Dose, Settings, check_same_everywhere, dose, encode_all, score
from visft_ds.evals.benchmarks.table import Row, as_json, order, rows_of, section, seeds_section, sheet, verdict
from visft_ds.evals.charts import Bar, interval_chart
from visft_ds.flags import EVAL, Parser, check_extra, check_least
from visft_ds.interop.writing import write_atomically
from visft_ds.models.eva_vit import PRESETS
from visft_ds.monitor.console import Gauge, Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.parallel import distributed
from visft_ds.prepare.model import choose_precision
from visft_ds.redaction import redacted, redacted_words
from visft_ds.resilience.errors import met_by_one_rank, tell
from visft_ds.tasks.pictures import save_png

FORMAT, VERSION = "visft_ds benchmarks", 1
RECORD, CHART, PICTURES, CACHE = "benchmarks.json", "differences.svg", "pictures", "cache"
USAGE = """Out-of-domain benchmarks of any number of models, in one table with bootstrap intervals.

    visft evaluate benchmarks --model base=base.pt --model visft=base.pt+RUN/export/adapter \\
        --benchmark zero_shot=imagenet-a --benchmark digits --benchmark retrieval=coco --out OUT
    visft evaluate benchmarks --model open_clip:ViT-B-32:laion2b_s34b_b79k --benchmark probe=FOLDER --out OUT
    visft evaluate benchmarks --model base=base.pt --model seeds=RUN1,RUN2,RUN3 --benchmark dense=coco \\
        --benchmark retention=coco --primary "dense/coco objects knn" --out OUT
    visft evaluate benchmarks --model base=base.pt --model half=RUN@0.5 --model visft=RUN ...
    deepspeed --num_gpus 8 --module visft_ds evaluate benchmarks ...

The first model is what the others are compared with; runs of one recipe with different seeds are one arm. Features and
scores are kept in OUT/cache by hashes of weights and data: the same command goes on where it was stopped, and another
benchmark or model costs only itself.
"""


class EarlierRecord(ForeignRecord):
    """Record of an earlier start in the same folder."""

    primary: str | None = None


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0 fine, 2 wrong usage or unusable input."""
    given = _parser().parse_args(arguments)
    try:
        arms, benchmarks, settings = _prepare(given)
        with met_by_one_rank():
            _measure(given, arms, benchmarks, settings)
    except (ValueError, OSError, RuntimeError) as error:
        return tell(error, "evaluate")
    return 0


def _measure(
    given: argparse.Namespace, arms: Sequence[Contender], benchmarks: Sequence[Benchmark], settings: Settings
) -> None:
    """Encode on all ranks, score and write on the main one."""
    began = time.perf_counter()
    if distributed.world_size() > 1:
        from visft_ds.parallel.engine import start_process_group  # imports deepspeed, which costs seconds

        start_process_group()
        check_same_everywhere(benchmarks)
    main = distributed.is_main()
    facts: dict[str, Mapping[str, str]] = {}
    encoded = encode_all([model for arm in arms for model in arm.models], benchmarks, settings, facts.__setitem__)
    distributed.close()  # before scoring, which the main process does alone
    if not main:
        return
    results: dict[str, dict[str, Score]] = {label: {} for label in encoded}
    doses: dict[str, dict[str, Dose]] = {}
    with Gauge("scoring", len(encoded) * len(benchmarks), "benchmarks") as gauge:
        for label, of_model in encoded.items():
            for benchmark, features, of_base in zip(benchmarks, of_model, next(iter(encoded.values())), strict=True):
                gauge.show(gauge.done, f", now {benchmark.label} of {label}")
                results[label] |= score(benchmark, features, of_base, settings.cache)
                if features is not of_base and (change := dose(of_base, features)):
                    doses.setdefault(label, {})[benchmark.label] = change
                gauge.add()
    _write(given, arms, facts, benchmarks, results, doses, time.perf_counter() - began)


def _prepare(given: argparse.Namespace) -> tuple[list[Contender], list[Benchmark], Settings]:
    settings = settings_of(given)
    check_least(given, images=0)
    arms = parse_arms(given.model)
    check_folder(given.out, RECORD, given.primary)
    benchmarks = parse_benchmarks(given.benchmark)
    check_numbers([given.primary] if given.primary else [], benchmarks)
    return arms, benchmarks, settings


def check_folder(out: Path, record: str, primary: str | None) -> None:
    """Raise ValueError for an --out of something else, or of a start with another primary number."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in (CACHE, record)):
        raise ValueError(f"{out} is not empty and not of an earlier start of this command: choose another --out")
    if (out / record).is_file() and (named := read_record(out / record, EarlierRecord).primary) != primary:
        raise ValueError(
            f"{out} has results, whose primary number was {named or 'not named'}: it is named before results are seen; "
            f"choose another --out"
        )


def settings_of(given: argparse.Namespace) -> Settings:
    """Settings by the flags of `add_flags`. Raises ValueError for numbers out of range and libraries that lack."""
    check_extra("a benchmark", "eval", EVAL)
    check_least(given, batch_size=1, threads=0, image_size=1)
    device = distributed.local_device()
    precision, _ = choose_precision(given.precision, device)
    load = LoadOptions(precision, given.preset, given.text, given.image_size, given.normalisation, given.pool)
    return Settings(device, precision, given.cache or given.out / CACHE, given.batch_size, given.threads, load)


def _parser() -> argparse.ArgumentParser:
    kinds = "\n".join(f"    {name:10} {kind.help} ({', '.join(kind.options)})" for name, kind in KINDS.items())
    parser = Parser(
        prog=f"{program('evaluate')} benchmarks",
        description=f"{USAGE}\nkinds of benchmarks (and their keys):\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="MODEL",
        help="[LABEL=]FILE[+ADAPTER][@SCALE], [LABEL=]RUN, [LABEL=]open_clip:NAME:WEIGHTS, [LABEL=]timm:NAME[:FILE]; "
        "LABEL=MODEL,MODEL,... for seeds of one recipe",
    )
    parser.add_argument(
        "--primary",
        metavar="NUMBER",
        help='the number that decides, such as "dense/coco objects knn", named before it is seen; others by Holm',
    )
    how = add_flags(parser)
    how.add_argument("--images", type=int, default=12, metavar="N", help="in each picture (default %(default)s)")
    return parser


def add_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Flags of all commands that encode images. Returns the group of those about how."""
    parser.add_argument(
        "--benchmark", action="append", required=True, metavar="KIND=SOURCE", help="or digits, mnist5000, fashion_mnist"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new, empty, or of an earlier start")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="shared by several --out (default OUT/cache)")
    own = parser.add_argument_group("backbones of ours")
    own.add_argument("--text", type=Path, metavar="FILE", help="EVA-CLIP or open_clip file with the text side")
    own.add_argument("--preset", choices=sorted(PRESETS), help="where a file does not tell the number of heads")
    own.add_argument("--image-size", type=int, metavar="PIXELS", help="default: the one that the positions belong to")
    own.add_argument("--normalisation", choices=sorted(NORMALISATIONS), default="clip", help="default %(default)s")
    own.add_argument("--pool", choices=POOLS, default="auto", help="features of probes: class token or mean of patches")
    how = parser.add_argument_group("how")
    how.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    how.add_argument("--batch-size", type=int, default=64, metavar="N", help="of one process (default %(default)s)")
    how.add_argument("--threads", type=int, default=4, metavar="N", help="that decode (default %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher may add it
    return how


def _write(
    given: argparse.Namespace,
    arms: Sequence[Contender],
    facts: Mapping[str, Mapping[str, str]],
    benchmarks: Sequence[Benchmark],
    results: Mapping[str, Mapping[str, Score]],
    doses: Mapping[str, Mapping[str, Dose]],
    seconds: float,
) -> None:
    members, out = {arm.label: [model.label for model in arm.models] for arm in arms}, given.out
    labels, primary = list(members), given.primary
    rows = rows_of(results, averages(benchmarks), members, primary)
    gain = next((row for row in rows if row.name == primary), None)
    moved = {arm: sum(of) / len(of) for arm, each in members.items() if (of := _moved(doses, each))}
    seen = {of[0]: results[of[0]] for of in members.values()}
    pictures = _pictures(out, benchmarks, seen, given.images)
    if len(labels) > 1:
        chart = _chart(rows, labels).encode()
        write_atomically(out / CHART, lambda file: file.write(chart), overwrite=True)
    chosen = {label: {name: dict(s.settings) for name, s in of.items() if s.settings} for label, of in results.items()}
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "models": {label: dict(of) for label, of in facts.items()},
        "arms": members,
        "primary": primary,
        "benchmarks": {
            each.label: {name: {"images": len(s), "fingerprint": s.fingerprint} for name, s in each.sets.items()}
            for each in benchmarks
        },
        "rows": as_json(rows),
        "chosen": chosen,
        "moved": moved,
        "doses": {label: {name: asdict(one) for name, one in of.items()} for label, of in doses.items()},
        "settings": {name: redacted(value) for name, value in vars(given).items()},
        "processes": distributed.world_size(),
        "seconds": round(seconds, 3),
        "pictures": pictures,
        "versions": versions(),
        "command": redacted_words(sys.argv),
    }
    content = orjson.dumps(record, option=orjson.OPT_INDENT_2)
    write_atomically(out / RECORD, lambda file: file.write(content), overwrite=True)
    models = [(f"{label}: {name}", text) for label, of in facts.items() for name, text in of.items()]
    written = [RECORD, *([CHART] if len(labels) > 1 else [])]
    written += [f"{PICTURES}/"] if pictures else []
    rest = [("seconds", f"{seconds:.1f}"), ("written", f"{out}: {', '.join(written)}")]
    parts = [Section("models", models), section(rows, labels, primary)]
    parts += [seeds] if (seeds := seeds_section(rows)) else []
    parts += [
        Section(f"primary: {row.name}", [(label, verdict(row, label)) for label in row.shown])
        for row in ([gain] if gain and gain.shown else [])
    ]
    if moved:
        lines = [(arm, f"{value:.3f}") for arm, value in moved.items()]
        parts.append(Section(f"how far features of {benchmarks[0].label} moved: |f - f0| / |f0 - mean of f0|", lines))
    print_plan("visft_ds benchmarks", [*parts, Section("run", rest)])


def _moved(doses: Mapping[str, Mapping[str, Dose]], labels: Sequence[str]) -> list[float]:
    """How far the features of the first benchmark moved, by each model of an arm."""
    return [next(iter(doses[label].values())).change for label in labels if doses.get(label)]


def _chart(rows: Sequence[Row], labels: Sequence[str]) -> str:
    base, *others = labels
    bars = []
    for row in rows:
        for label, change in row.differences.items():
            name = row.name if len(others) == 1 else f"{label}: {row.name}"
            bars.append(Bar(name, 100 * change.value, 100 * change.low, 100 * change.high, row.shown.get(label)))
    title = f"{others[0] if len(others) == 1 else 'each model'} minus {base}"
    return interval_chart(bars, title=title, x_label="percentage points, with 95% intervals")


def _pictures(
    out: Path, benchmarks: Sequence[Benchmark], results: Mapping[str, Mapping[str, Score]], count: int
) -> list[str]:
    """Write a sheet for each number whose answers can be shown; returns their names."""
    written = []
    names = list(dict.fromkeys(name for scores in results.values() for name in scores))
    for benchmark in benchmarks:
        for name in (name for name in names if name.startswith(f"{benchmark.label} ")):
            if isinstance(benchmark, Dense):
                scores = {label: of[name] for label, of in results.items() if name in of and of[name].maps is not None}
                picture = segmentation_sheet(benchmark, scores, count)
            else:
                picture = sheet(benchmark, order(list(results), results, name), count)
            if picture is not None:
                written.append(f"{PICTURES}/{re.sub('[^A-Za-z0-9_.@]+', '-', name)}.png")
                save_png(picture, out / written[-1])
    return written

import sys, os.path as o; sys.path[:] = [o.dirname(o.dirname(o.realpath(__file__)))] + [p for p in sys.path if o.realpath(p) != o.dirname(o.realpath(__file__))]  # noqa: E401, E501, E702, I001  # fmt: skip
"""COCO average precision of a trained run, or of any backbone + heads (+ adapter), with results and pictures.

    python tools/evaluate.py --run runs/stage2-debug
    python tools/evaluate.py --run runs/stage2-debug --backbone merged.safetensors --out evaluation/merged
    python tools/evaluate.py --backbone base.safetensors --heads runs/stage1-eva_e/export --adapter none \\
        --coco COCO --out evaluation/base
    deepspeed --num_gpus 8 tools/evaluate.py --run runs/stage2-eva_e

Writes metrics.json, <task>_results.json (COCO results format) and pictures/ into a new or empty folder. With several
processes each image is evaluated once. Exit status: 0 fine, 2 wrong usage or unusable input.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from visft_ds.config.schema import TaskConfig
from visft_ds.data.convert import Options, build
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader
from visft_ds.evals.model import (
    EvaluationModel,
    ModelFiles,
    check_categories,
    files_of_run,
    heads_in,
    load_model,
    task_settings,
)
from visft_ds.evals.pictures import grid, save_png
from visft_ds.evals.report import FORMAT, METRICS, PICTURES, VERSION, results_name
from visft_ds.evals.runner import TaskEvaluation, as_metrics, draw_examples, evaluate
from visft_ds.models.eva_vit import PRESETS
from visft_ds.monitor.console import Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.parallel import distributed
from visft_ds.run_folder import recorded_config
from visft_ds.stages import choose_precision

DEFAULT_BATCH = 8  # without a run that tells


@dataclass(frozen=True)
class Job:
    """What is to be evaluated, on what, how; known before any weight is read."""

    files: ModelFiles
    tasks: Mapping[str, TaskConfig]
    shards: Path | None  #: None: make them from a COCO tree
    split: str
    out: Path
    precision: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = _parser().parse_args(arguments)
    rank = distributed.rank()
    try:
        job = _job(given)
        _refuse_filled(job.out)
    except ValueError as error:  # the same on every rank
        return _complain(error, 0) if rank == 0 else 2
    try:
        if distributed.world_size() > 1:
            from visft_ds.parallel.engine import start_process_group  # imports deepspeed: seconds that one process saves

            start_process_group()
        _run(job, given)
        distributed.close()
    except (ValueError, OSError) as error:  # may have happened on this rank alone
        return _complain(error, rank)
    return 0


def _complain(error: Exception, rank: int) -> int:
    print(f"evaluate: {f'[rank {rank}] ' if rank else ''}{error}", file=sys.stderr, flush=True)
    return 2


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("model: a run, and files that replace the run's")
    model.add_argument("--run", type=Path, metavar="RUN", help="folder of a finished stage-1 or stage-2 run")
    model.add_argument("--backbone", type=Path, metavar="FILE", help="base or merged weights, any known layout")
    model.add_argument("--heads", type=Path, metavar="DIR", help="folder with detection.safetensors (RUN/export)")
    model.add_argument("--adapter", metavar="DIR", help="adapter folder (RUN/export/adapter), or none")
    model.add_argument("--model", choices=sorted(PRESETS), help="preset, where the backbone file does not tell")
    model.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), help="default: the run's, or auto")
    data = parser.add_argument_group("data: by default the run's")
    data.add_argument("--data", type=Path, metavar="DIR", help="shards made by tools/make_shards.py")
    data.add_argument("--coco", type=Path, metavar="DIR", help="an ordinary COCO tree instead, packed on the fly")
    data.add_argument("--split", metavar="NAME", help="default: the run's validation split, or val")
    data.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    data.add_argument("--image-size", type=int, metavar="PIXELS", help="resize to squares (default: as the run, or 800)")
    data.add_argument("--batch-size", type=int, metavar="N", help="of one process (default: the run's, or 8)")
    data.add_argument("--threads", type=int, default=2, metavar="N", help="that decode (default %(default)s)")
    out = parser.add_argument_group("results")
    out.add_argument("--out", type=Path, metavar="DIR", help="new or empty folder (default RUN/evaluation-SPLIT)")
    out.add_argument("--images", type=int, default=8, metavar="N", help="pictures to draw (default %(default)s)")
    out.add_argument("--threshold", type=float, default=0.5, help="least score in pictures (default %(default)s)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher may add it
    return parser


def _job(given: argparse.Namespace) -> Job:
    for name, least in (("limit", 1), ("image_size", 14), ("batch_size", 1), ("threads", 0), ("images", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not allowed: give at least {least}")
    if given.data and given.coco:
        raise ValueError("--data and --coco both say where the images are: give one of them")
    if given.run:
        config = recorded_config(given.run)
        visft = config.visft
        files = _replaced(lambda: files_of_run(given.run, visft), given)
        tasks = {name: _resized(task, given) for name, task in visft.tasks.enabled().items()}
        shards, split, precision = Path(visft.data.root), visft.data.val, visft.model.precision
    else:
        missing = [f"--{name}" for name in ("backbone", "heads", "out") if getattr(given, name) is None]
        missing += [] if given.data or given.coco else ["--data or --coco"]
        if missing:
            raise ValueError(f"without --run these are needed: {', '.join(missing)}")
        files = ModelFiles(given.backbone, given.heads, _adapter(given, None), {})
        batch = given.batch_size or DEFAULT_BATCH
        tasks = dict(task_settings(heads_in(given.heads), batch_size=batch, fixed_size=given.image_size))
        shards, split, precision = given.data, "val", "auto"
    split = given.split or split
    return Job(
        files=files,
        tasks=tasks,
        shards=None if given.coco else given.data or shards,
        split=split,
        out=given.out or given.run / f"evaluation-{split}",
        precision=given.precision or precision,
    )

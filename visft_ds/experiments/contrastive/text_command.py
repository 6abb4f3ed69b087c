"""The sub-command `text` of visft contrast: a CLIP's text tower on new captions."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from torch import Tensor

from visft_ds.evals.benchmarks.encoders import NORMALISATIONS, Encoder
from visft_ds.evals.benchmarks.encoding import Worker, encode_together
from visft_ds.evals.benchmarks.models import LoadOptions, ModelSpec, load_encoder, parse_model
from visft_ds.evals.benchmarks.retrieval import CaptionSet
from visft_ds.evals.benchmarks.run import Settings, worker_of
from visft_ds.experiments.contrastive.captions import Tokens, encode_captions, recall, tokens_of
from visft_ds.experiments.contrastive.flags import (
    add_data,
    add_recipe,
    check_common,
    data_section,
    finished,
    read_sets,
    recipe_of,
)
from visft_ds.experiments.contrastive.output import Result, staged, write_result
from visft_ds.experiments.contrastive.pairs import PairOrder
from visft_ds.experiments.contrastive.text import DEFAULT_RECIPE, TextTuning, Trained, Tuned, check_ranks, tune_text
from visft_ds.experiments.contrastive.text_sides import TextSide, text_side, write_side
from visft_ds.flags import check_least
from visft_ds.interop.files import base_identity, open_weights, sha256_file
from visft_ds.interop.open_clip import FILE
from visft_ds.models.eva_vit import PRESETS
from visft_ds.monitor.console import Section, print_plan
from visft_ds.parallel import distributed
from visft_ds.prepare.model import choose_precision


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `text`."""
    parser.add_argument(
        "--model", required=True, metavar="MODEL", help="FILE[+ADAPTER][@SCALE], RUN, or open_clip:NAME:TAG|FILE"
    )
    add_data(parser)
    default = TextTuning()
    what = parser.add_argument_group("what trains (the temperature always does)")
    what.add_argument("--train", choices=get_args(Trained), default=default.train, help="default %(default)s")
    what.add_argument("--rank", type=int, default=default.rank, help="of LoRA on q and v (default %(default)s)")
    what.add_argument("--alpha", type=float, default=default.alpha, help="of LoRA: times alpha / rank (%(default)g)")
    add_recipe(parser, DEFAULT_RECIPE)
    how = parser.add_argument_group("how")
    how.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="default: bf16 on a GPU")
    how.add_argument("--micro-batch", type=int, metavar="N", help="texts kept for the backward pass (default: all)")
    how.add_argument("--encode-batch", type=int, default=64, metavar="N", help="images at once (default %(default)s)")
    how.add_argument("--threads", type=int, default=4, metavar="N", help="that decode (default %(default)s)")
    how.add_argument("--cache", type=Path, metavar="DIR", help="keep image features there (default: not kept)")
    how.add_argument("--preset", choices=sorted(PRESETS), help="where a file does not tell the number of heads")
    how.add_argument("--image-size", type=int, metavar="PIXELS", help="default: the one that the positions belong to")
    how.add_argument("--normalisation", choices=sorted(NORMALISATIONS), default="clip", help="default %(default)s")
    parser.set_defaults(run=run_text)


@dataclass(frozen=True)
class _TextJob:
    given: argparse.Namespace
    how: TextTuning
    spec: ModelSpec
    encoder: Encoder
    side: TextSide
    train: CaptionSet
    validation: CaptionSet | None
    tokens: Tokens
    order: PairOrder
    settings: Settings


def run_text(given: argparse.Namespace) -> None:
    """Train a text tower. Raises ValueError for whatever the user can cause."""
    began = time.perf_counter()
    job = _prepare(given)
    print_plan("visft_ds contrastive training of a text tower", _plan(job), enabled=distributed.is_main())
    if given.dry_run:
        return
    if distributed.world_size() > 1:
        from visft_ds.parallel.engine import start_process_group  # imports deepspeed, which costs seconds

        start_process_group()
    try:
        _train(job, began)
        distributed.close()
    finally:
        if given.cache is None and distributed.is_main():
            shutil.rmtree(job.settings.cache, ignore_errors=True)


def _prepare(given: argparse.Namespace) -> _TextJob:
    check_common(given)
    check_least(given, encode_batch=1, threads=0, image_size=1)
    device = distributed.local_device()
    precision, _ = choose_precision(given.precision, device)
    if precision == "fp16":
        raise ValueError("this GPU has no bf16, and fp16 would need a loss scale: give --precision fp32")
    how = TextTuning(
        given.train, recipe_of(given), given.rank, given.alpha, given.micro_batch, bf16=precision == "bf16"
    )
    check_ranks(how)
    spec = parse_model(given.model)
    train, validation = read_sets(given)
    order = PairOrder(train.owners, how.recipe.batch_size, how.recipe.seed)
    options = LoadOptions(precision, given.preset, None, given.image_size, given.normalisation)
    encoder = load_encoder(spec, options)
    side = text_side(spec.library, spec.name, encoder)
    tokens = tokens_of(side.tower, train.captions)
    if how.train == "projection":
        side.projection()
    cache = given.cache or given.out.with_name(f".{given.out.name}.features")
    settings = Settings(device, precision, cache, given.encode_batch, given.threads, options)
    return _TextJob(given, how, spec, encoder, side, train, validation, tokens, order, settings)


def _plan(job: _TextJob) -> list[Section]:
    facts = [(name, text) for name, text in job.encoder.facts.items()]
    values = sum(value.numel() for value in job.side.parameters.values())
    processes = distributed.world_size()
    return [
        Section("model", [*facts, ("text", f"{job.side.tower.source}, {values:,} values")]),
        data_section(job.given, job.train, job.validation, job.order, "each image is encoded once"),
        Section(
            "training",
            [
                ("trains", f"{_what(job.how)} and the temperature; the vision tower is frozen"),
                ("captions", f"{job.tokens.cut} as long as the tower reads or longer, whose end is lost"),
                ("processes", f"{processes}, each with {job.order.batch_size // processes} texts of a step"),
                ("precision", "bf16" if job.how.bf16 else "fp32"),
            ],
        ),
    ]


def _what(how: TextTuning) -> str:
    if how.train == "lora":
        return f"LoRA of rank {how.rank} on q and v of the text tower"
    return "all of the text tower" if how.train == "all" else "the text projection"


def _train(job: _TextJob, began: float) -> None:
    worker = worker_of(job.encoder, "model", job.settings)
    job.side.logit_scale.data = job.side.logit_scale.data.to(job.settings.device)
    images = _features(worker, job.train)
    judge = None if job.validation is None else (_features(worker, job.validation), job.validation)
    before = _measure(job.side, judge)
    tuned = tune_text(job.side, images, job.tokens, job.order, job.how, log_every=job.given.log_every)
    after = _measure(job.side, judge)
    if distributed.is_main():
        _write(job, tuned, {"before": before, "after": after}, time.perf_counter() - began)


def _features(worker: Worker, captions: CaptionSet) -> Tensor:
    return encode_together([worker], captions.images, ("clip",))[0].read()["clip"]


def _measure(side: TextSide, judge: tuple[Tensor, CaptionSet] | None) -> dict[str, float]:
    """On the main process; the others go on and wait at the next thing that all do."""
    if judge is None or not distributed.is_main():
        return {}
    images, captions = judge
    return recall(images, encode_captions(side.tower, captions.captions), captions.owners)


def _write(job: _TextJob, tuned: Tuned, recalls: Mapping[str, Mapping[str, float]], seconds: float) -> None:
    file = Path(job.spec.name)
    source = sha256_file(file) if job.spec.library == "visft_ds" else None
    result = Result("text", job.how.recipe, tuned.curve, recalls, seconds)
    with staged(job.given.out) as folder:
        vision_of = base_identity(open_weights(file)) if source else None
        configs = write_side(job.side, tuned.trained, folder, named=job.given.out, vision_of=vision_of)
        write_result(folder, job.given.out.name, result, _facts(job, tuned), configs, source)
    finished(recalls, seconds, job.given.out / FILE)


def _facts(job: _TextJob, tuned: Tuned) -> dict[str, str]:
    spec = job.spec
    facts = {"made from": Path(spec.name).name if spec.library == "visft_ds" else f"{spec.library} {spec.name}"}
    if spec.adapter is not None:
        facts["adapter of the vision tower while it was trained (not in this file)"] = (
            f"{spec.adapter.name}, times {spec.scale:g}"
        )
    return facts | {
        "what trained": f"{_what(job.how)} and the temperature, {tuned.count:,} values",
        "data": f"{len(job.train.images)} images, {len(job.train.captions)} captions, fingerprint "
        f"{job.train.images.fingerprint[:12]}",
        "captions as long as the tower reads, or longer": str(job.tokens.cut),
        "temperature": f"1 / {float(job.side.logit_scale.detach().exp()):.1f}",
    }

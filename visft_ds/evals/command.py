"""Evaluation of a run or of any files: the model, the data, the measurements and what is written of them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from visft_ds.config.task_schema import Stream
from visft_ds.data.manifest import Manifest, splits_in
from visft_ds.data.shards import ShardReader
from visft_ds.data.store import CacheOptions, StoreFailed
from visft_ds.evals.captions import TOKENIZER
from visft_ds.evals.compare import FORMAT, METRICS, PICTURES, VERSION, results_name
from visft_ds.evals.examples import draw_examples
from visft_ds.evals.model import (
    DEFAULT_BATCH,
    EvaluationModel,
    ModelFiles,
    chosen_streams,
    decoding_of,
    files_of_run,
    heads_in,
    load_model,
    recorded_words,
    resized,
    streams_without_run,
    tasks_of,
)
from visft_ds.evals.pictures import Picture, grid, save_png
from visft_ds.evals.runner import TaskEvaluation, as_metrics, check_truth, collect, measure
from visft_ds.interop.heads import check_categories, classes_of_heads
from visft_ds.monitor.console import Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.parallel import distributed
from visft_ds.prepare.datasets import cache_of
from visft_ds.prepare.model import choose_precision
from visft_ds.prepare.places import data_of_run
from visft_ds.prepare.streams import read_vocabulary
from visft_ds.run.folder import recorded_config
from visft_ds.shards.build import Options, build
from visft_ds.tasks import TASKS, Results

_LEAST = {"limit": 1, "image_size": 14, "batch_size": 1, "beam_size": 1, "threads": 0, "images": 0}


@dataclass(frozen=True)
class Job:
    """Model, data and options of an evaluation; known before any weight is read."""

    files: ModelFiles
    streams: Mapping[str, Stream]
    decoding: Mapping[str, Mapping[str, Any]]  #: task -> what its head is also called with
    vocabulary: Path | None  #: word map of a head that brings no words along
    shards: str | None  #: folder or URL; None: make them from a COCO tree
    cache: CacheOptions | None  #: of remote shards
    split: str
    out: Path
    precision: str
    packed: bool  #: images of different sizes pass through the backbone without padding

    @property
    def tasks(self) -> list[str]:
        """All that is evaluated."""
        return tasks_of(self.streams)


def evaluate(given: argparse.Namespace) -> int:
    """Measure what the flags of `visft_ds.evals.cli` ask for; returns the exit status."""
    rank = distributed.rank()
    try:
        job = _job(given)
        _refuse_filled(job.out)
        precision, why = choose_precision(job.precision, distributed.local_device())
        manifest = Manifest.load(job.shards, job.split, cache=job.cache) if job.shards else None
        model = load_model(
            job.files,
            job.tasks,
            precision=precision,
            device=distributed.local_device(),
            preset=given.model,
            vocabulary=read_vocabulary(job.vocabulary) if job.vocabulary else None,
            decoding=job.decoding,
            packed=job.packed,
            allow_other_base=given.allow_other_base,
        )
        classes = classes_of_heads(model.heads)
        job = replace(job, streams={name: replace(one, classes=classes) for name, one in job.streams.items()})
    except (ValueError, StoreFailed) as error:  # every rank runs into the same
        return _complain(error, 0) if rank == 0 else 2
    try:
        if distributed.world_size() > 1:
            _start_process_group()
        with _packed(manifest, job, given.coco) as ready:
            remedy = "Evaluate it on data of its own categories"
            check_categories(model.heads, ready.categories, str(given.coco or ready.root), remedy)
            _check_truth(job.tasks, ready, given.limit)
            problems = _evaluate(job, given, model, ready, f"{precision} ({why})")
    except (ValueError, OSError, StoreFailed) as error:  # may have happened on this rank alone
        return _complain(error, rank)
    for problem in problems:
        _complain(ValueError(problem), rank)
    return 2 if problems else 0


def _start_process_group() -> None:
    from visft_ds.parallel.engine import start_process_group  # imports deepspeed, which costs seconds

    start_process_group()


def _check_truth(tasks: Sequence[str], manifest: Manifest, limit: int | None) -> None:
    """Refuse data that a task cannot be judged by, before anything is computed."""
    for task in tasks:
        selection = TASKS[task].learns_from
        if not (manifest.select(selection) < (limit or len(manifest))).any():
            others = ",".join(other for other in tasks if other != task)
            first = f"the first {limit} images of " if limit else ""
            raise ValueError(
                f"{first}{manifest.root}/{manifest.split} {'have' if limit else 'has'} no {selection}, which {task} is "
                f"compared with: give other data" + (f", or leave {task} out with --tasks {others}" if others else "")
            )
    with ShardReader(manifest) as reader:
        check_truth(tasks, reader, limit)


def _complain(error: Exception, rank: int) -> int:
    print(f"evaluate: {f'[rank {rank}] ' if rank else ''}{error}", file=sys.stderr, flush=True)
    return 2


def _job(given: argparse.Namespace) -> Job:
    for name, least in _LEAST.items():
        value = getattr(given, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is not allowed: give at least {least}")
    if given.data and given.coco:
        raise ValueError("--data and --coco both say where the images are: give one of them")
    coco = given.coco
    if coco is not None and splits_in(coco) and not (coco / "annotations").is_dir():  # --coco takes shards as well
        given.data, coco = str(coco), None
    if given.run:
        visft = recorded_config(given.run).visft
        streams = _chosen(
            {
                name: resized(stream, side=given.image_size, batch_size=given.batch_size)
                for name, stream in visft.streams().items()
            },
            given,
        )
        files = files_of_run(
            given.run,
            visft,
            tasks_of(streams),
            backbone=given.backbone,
            heads=given.heads,
            adapter=_adapter(given),
            use_adapter=given.adapter != "none",
        )
        split, precision = given.split or visft.data.val, visft.model.precision
        shards = given.data if given.data or coco else data_of_run(given.run, visft, split)
    else:
        missing = [f"--{name}" for name in ("backbone", "heads", "out") if getattr(given, name) is None]
        missing += [] if given.data or given.coco else ["--data or --coco"]
        if missing:
            raise ValueError(f"without --run these are needed: {', '.join(missing)}")
        files = ModelFiles(given.backbone, given.heads, _adapter(given), {})
        batch = given.batch_size or DEFAULT_BATCH
        streams = streams_without_run(heads_in(given.heads), batch_size=batch, side=given.image_size)
        streams = _chosen(streams, given)
        shards, split, precision = given.data, given.split or "val", "auto"
    return Job(
        files=files,
        streams=streams,
        decoding=decoding_of(visft if given.run else None, given.beam_size),
        vocabulary=given.vocabulary or (recorded_words(given.run, visft) if given.run else None),
        shards=shards,
        cache=cache_of(visft.data) if given.run else None,
        split=split,
        out=given.out or given.run / f"evaluation-{split}",
        precision=given.precision or precision,
        packed=visft.model.packed if given.run else False,
    )


def _adapter(given: argparse.Namespace) -> Path | None:
    return None if given.adapter in (None, "none") else Path(given.adapter)


def _chosen(streams: Mapping[str, Stream], given: argparse.Namespace) -> dict[str, Stream]:
    names = None if given.tasks is None else given.tasks.split(",")
    return chosen_streams(streams, names, given.heads, given.heads or given.run)


def _refuse_filled(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and nothing in it is overwritten: choose another --out, or remove it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")


def _evaluate(
    job: Job, given: argparse.Namespace, model: EvaluationModel, manifest: Manifest, precision: str
) -> list[str]:
    """Collective; the main process writes, prints, and returns a line for each task that could not be judged."""
    where = f"{given.coco or manifest.root}/{job.split}"
    count = min(given.limit or len(manifest), len(manifest))
    if distributed.is_main():
        _print_start(model, precision, f"{where}: {count} of {len(manifest)} images")
    with ShardReader(manifest) as reader:
        began = time.perf_counter()
        collected = collect(
            model.predict, reader, job.streams, model.vocabulary, limit=given.limit, threads=given.threads
        )
        seconds = time.perf_counter() - began
        pictures = draw_examples(
            model.predict,
            reader,
            job.streams,
            model.vocabulary,
            given.images,
            threshold=given.threshold,
            limit=given.limit,
        )
        distributed.close()  # before measuring, which the main process does alone
        if collected is None:
            return []
        outcome, problems = measure(collected, reader, limit=given.limit, per_category=True)
        record = {
            "model": dict(model.facts),
            "precision": model.precision,
            "data": {"where": where, "split": job.split, "images": count, "fingerprint": manifest.fingerprint},
            "settings": {name: dict(stream.image) for name, stream in job.streams.items()},
            **({"caption_tokenizer": TOKENIZER, "decoding": job.decoding} if "captioning" in job.tasks else {}),
            "processes": distributed.world_size(),
            "seconds": round(seconds, 3),
            **({"problems": problems} if problems else {}),
        }
        _write(job.out, collected, outcome, record, _save_pictures(pictures, job.out))
    _print_results(job.out, list(collected), outcome, count / seconds)
    return problems


@contextmanager
def _packed(manifest: Manifest | None, job: Job, coco: Path | None) -> Iterator[Manifest]:
    """The split; where there is none yet, the main process packs it out of a COCO tree and removes it at the end."""
    if manifest is not None:
        yield manifest
        return
    assert coco is not None
    if not distributed.is_main():
        folder = distributed.broadcast_object(None)
        if folder is None:
            raise ValueError("the main process could not pack the images")
        yield Manifest.load(folder, job.split)
        distributed.barrier()
        return
    job.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{job.out.name}-shards-", dir=job.out.parent) as folder:
        packed = False
        try:
            _pack(coco, job.split, Path(folder))
            packed = True
        finally:
            distributed.broadcast_object(folder if packed else None)
        yield Manifest.load(folder, job.split)
        distributed.barrier()


def _pack(coco: Path, split: str, out: Path) -> None:
    images, annotations = coco / f"{split}2017", coco / "annotations"
    instances, captions = (annotations / f"{kind}_{split}2017.json" for kind in ("instances", "captions"))
    missing = [str(path) for path in (images, instances) if not path.exists()]
    if missing:
        found = ", ".join(sorted(path.stem.split("_", 1)[1] for path in annotations.glob("instances_*.json")))
        raise ValueError(
            f"not found: {', '.join(missing)}. --coco needs SPLIT2017/ and annotations/instances_SPLIT2017.json; "
            f"annotated there: {found or 'nothing'}. Pack other trees with visft shards and give --data"
        )
    options = Options(images, instances, captions if captions.is_file() else None, out, split)
    build(options, workers=os.cpu_count() or 1)


def _save_pictures(pictures: Mapping[str, Mapping[int, Picture]], out: Path) -> dict[str, list[dict[str, Any]]]:
    """Write the examples; returns what stands where, by task."""
    written: dict[str, list[dict[str, Any]]] = {}
    for task, by_image in pictures.items():
        names = {image_id: f"{PICTURES}/{task}-{image_id:012d}.png" for image_id in by_image}
        for image_id, picture in by_image.items():
            save_png(picture, out / names[image_id])
        if by_image:
            save_png(grid(list(by_image.values()), columns=2), out / f"{task}.png")
        written[task] = [{"image_id": image_id, "file": name} for image_id, name in names.items()]
    return written


def _write(
    out: Path,
    collected: Mapping[str, Results],
    outcome: Sequence[TaskEvaluation],
    record: Mapping[str, Any],
    pictures: Mapping[str, Any],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for task, results in collected.items():
        (out / results_name(task)).write_bytes(orjson.dumps(results))
    whole = {
        "format": FORMAT,
        "version": VERSION,
        "metrics": as_metrics(outcome),
        **record,
        "pictures": pictures,
        "versions": versions(),
        "command": sys.argv,
    }
    # Last: a folder without it was not finished.
    (out / METRICS).write_bytes(orjson.dumps(whole, option=orjson.OPT_INDENT_2))


def _print_start(model: EvaluationModel, precision: str, data: str) -> None:
    processes = distributed.world_size()
    rows = [*model.facts.items(), ("data", data), ("precision", f"{precision}, {processes} process(es)")]
    print_plan("visft_ds evaluation", [Section("model and data", rows)])


def _print_results(out: Path, tasks: Sequence[str], outcome: Sequence[TaskEvaluation], speed: float) -> None:
    named = {name: value for name, value in as_metrics(outcome).items() if name.count("/") == 1}
    # -1 is COCO's mark for "there is nothing of this kind to find".
    rows = [(name, "no such objects" if value < 0 else f"{value:.4f}") for name, value in named.items()]
    if any(part.task == "captioning" for part in outcome):
        rows.append(("words of captions", f"cut by {TOKENIZER}"))
    files = [*(results_name(task) for task in tasks), METRICS, f"{PICTURES}/"]
    rows += [("images/s", f"{speed:.1f}"), ("written", f"{out}: {', '.join(files)}")]
    print_plan("results", [Section("name and value", rows)])

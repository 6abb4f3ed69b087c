"""Evaluation of a run or of any files: the model, the data, the measurements and what is written of them."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from visft_ds.config.backbones import named
from visft_ds.config.layers import AnyPath
from visft_ds.config.preflight import folder_of_run
from visft_ds.config.schema import DataConfig, VisftConfig
from visft_ds.data.fetch import Cache
from visft_ds.data.shards import Manifest, ShardReader, splits_in
from visft_ds.evals.examples import draw_examples
from visft_ds.evals.model import (
    DEFAULT_BATCH,
    EvaluationModel,
    ModelSource,
    chosen_streams,
    decoding_of,
    files_without_run,
    heads_in,
    source_of_run,
    streams_without_run,
)
from visft_ds.evals.records import FORMAT, METRICS, PICTURES, VERSION, results_name
from visft_ds.evals.runner import as_metrics, collect, measure
from visft_ds.flags import check_least
from visft_ds.interop.heads import check_categories
from visft_ds.monitor.console import Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.parallel import distributed
from visft_ds.prepare.datasets import cache_of, needs_vocabulary, workers_of
from visft_ds.prepare.model import choose_precision
from visft_ds.prepare.places import data_of_run
from visft_ds.redaction import redacted
from visft_ds.resilience.errors import met_by_one_rank
from visft_ds.run.folder import recorded_config, refuse_filled
from visft_ds.shards.build import Options, build
from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.pictures import Picture, grid, save_png


@dataclass(frozen=True)
class Job:
    """Model and data of an evaluation; known before any weight is read."""

    source: ModelSource
    shards: str | None  #: folder or URL; None: make them from a COCO tree
    cache: Cache | None  #: of remote shards
    split: str
    out: Path | None  #: None: nothing is written


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers of an evaluation and what they were computed from; empty but on the main process."""

    metrics: Mapping[str, float]  #: AP, BLEU and ROUGE-L in [0, 1], CIDEr in [0, 10]; -1: the data has no such objects
    results: Mapping[str, Results]  #: task -> predictions in COCO's results format, in the order of the data
    problems: Sequence[str] = ()  #: a line for each task that could not be judged
    out: Path | None = None  #: folder of what was written


@dataclass(frozen=True)
class Request:
    """Model, data and options that are asked for; each as the parameter of `evaluate` or the flag of that name."""

    run: Path | None
    backbone: AnyPath | None
    download: bool
    heads: Path | None
    adapter: AnyPath | None
    allow_other_base: bool
    model: str | None
    tasks: str | Sequence[str] | None
    vocabulary: Path | None
    beam_size: int | None
    precision: str | None
    data: str | None
    coco: Path | None
    split: str | None
    limit: int | None
    image_size: int | None
    batch_size: int | None
    workers: int | None
    out: Path | None
    images: int
    threshold: float
    command: bool  #: print what is evaluated and found
    recorded: VisftConfig | None = None  #: of the run, where it has been read


def evaluate(
    run: AnyPath | None = None,
    *,
    backbone: AnyPath | None = None,
    download: bool = False,
    heads: AnyPath | None = None,
    adapter: AnyPath | None = None,
    allow_other_base: bool = False,
    model: str | None = None,
    tasks: str | Sequence[str] | None = None,
    vocabulary: AnyPath | None = None,
    beam_size: int | None = None,
    precision: str | None = None,
    data: AnyPath | None = None,
    coco: AnyPath | None = None,
    split: str | None = None,
    limit: int | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    out: AnyPath | None = None,
    images: int = 8,
    threshold: float = 0.5,
) -> EvaluationResult:
    """Measure a run, or any backbone with heads, as visft evaluate does.

    With several processes, all call it; each image is evaluated once.

    Args:
        run: folder of a finished run; the rest replaces what it says. Without it give backbone, heads and data or coco.
        backbone: file of base or merged weights, of any known layout; or a name, as `fit` takes it.
        download: fetch named weights that are not here from the Hugging Face hub.
        heads: folder of heads: RUN/export, or ViSFT's published files.
        adapter: folder of an adapter, or "none": leave the run's out.
        allow_other_base: go on although the heads learnt from another base.
        model: preset, where the file of the backbone does not tell.
        tasks: names, in a list or with commas; by default every task that has a head.
        vocabulary: word map of a published captioning head.
        beam_size: of captions; by default the run's, or 1 (greedy).
        precision: "auto", "fp32", "bf16" or "fp16"; by default the run's, or "auto".
        data: folder or URL of shards.
        coco: a COCO tree, packed on the fly, or shards.
        split: by default the run's validation split, or "val".
        limit: only the first so many images.
        image_size: resize to squares of so many pixels.
        batch_size: of one process; by default the run's, or 8.
        workers: processes that decode; None: chosen for the machine.
        out: new or empty folder for metrics.json, results and pictures; by default nothing is written.
        images: pictures to draw into `out`.
        threshold: least score in pictures.

    Raises:
        ValueError: missing or damaged files, parts that do not belong together, data that a task cannot be judged by.
    """
    request = Request(
        run=_path(run),
        backbone=backbone,
        download=download,
        heads=_path(heads),
        adapter=adapter,
        allow_other_base=allow_other_base,
        model=model,
        tasks=tasks,
        vocabulary=_path(vocabulary),
        beam_size=beam_size,
        precision=precision,
        data=None if data is None else os.fspath(data),
        coco=_path(coco),
        split=split,
        limit=limit,
        image_size=image_size,
        batch_size=batch_size,
        workers=workers,
        out=_path(out),
        images=images if out is not None else 0,
        threshold=threshold,
        command=False,
    )
    distributed.keep_open()
    return answer(request)


def _path(path: AnyPath | None) -> Path | None:
    return None if path is None else Path(path)


def answer(given: Request) -> EvaluationResult:
    """Measure what is asked for. Collective.

    Raises:
        ValueError: on every rank; a `RankError` on one alone.
        OSError: a file cannot be read or written.
        StoreFailed: a server of the data does not answer.
    """
    job = _job(given)
    if job.out is not None:
        refuse_filled(job.out)
    device = distributed.local_device()
    precision, why = choose_precision(job.source.precision, device)
    manifest = Manifest.load(job.shards, job.split, cache=job.cache) if job.shards else None
    model, streams = job.source.build(precision, device, preset=given.model, allow_other_base=given.allow_other_base)
    job = replace(job, source=replace(job.source, streams=streams))
    with ExitStack() as stack:
        with met_by_one_rank():
            if distributed.world_size() > 1:
                from visft_ds.parallel.engine import start_process_group  # imports deepspeed, which costs seconds

                start_process_group()
            ready = stack.enter_context(_packed(manifest, job, given.coco))
        remedy = "Evaluate it on data of its own categories"
        check_categories(model.heads, ready.categories, str(given.coco or ready.root), remedy)
        _check_truth(job.source.tasks, ready, given.limit)
        with met_by_one_rank():
            return _evaluate(job, given, model, ready, f"{precision} ({why})")


def _check_truth(tasks: Sequence[str], manifest: Manifest, limit: int | None) -> None:
    """Refuse data that a task cannot be judged by, before anything is computed."""
    for task in tasks:
        selection = TASKS[task].config.learns_from
        if not (manifest.having(selection) < (limit or len(manifest))).any():
            others = ",".join(other for other in tasks if other != task)
            first = f"the first {limit} images of " if limit else ""
            raise ValueError(
                f"{first}{manifest.root}/{manifest.split} {'have' if limit else 'has'} no {selection}, which {task} is "
                f"compared with: give other data" + (f", or leave {task} out with --tasks {others}" if others else "")
            )
        if (problem := TASKS[task].data_problem(manifest)) is not None:
            raise ValueError(problem)


def _job(given: Request) -> Job:
    check_least(given, limit=1, image_size=14, batch_size=1, beam_size=1, workers=0, images=0)
    if given.data and given.coco:
        raise ValueError("--data and --coco both say where the images are: give one of them")
    data, coco = given.data, given.coco
    if coco is not None and splits_in(coco) and not (coco / "annotations").is_dir():  # --coco takes shards as well
        data, coco = str(coco), None
    chosen = None if given.backbone is None else named(os.fspath(given.backbone), download=given.download)
    backbone = None if chosen is None else chosen.file(download=given.download)
    if given.run:
        visft = given.recorded or recorded_config(folder_of_run(given.run)).visft
        source = source_of_run(
            given.run,
            visft,
            where=given.run,
            tasks=given.tasks,
            backbone=backbone,
            heads=given.heads,
            adapter=given.adapter,
            vocabulary=given.vocabulary,
            beam_size=given.beam_size,
            precision=given.precision,
            side=given.image_size,
            batch_size=given.batch_size,
        )
        split = given.split or visft.data.val
        shards = data if data or coco else data_of_run(folder_of_run(given.run), visft, split)
    else:
        needed = ("backbone", "heads", *(["out"] if given.command else []))
        missing = [f"--{name}" for name in needed if getattr(given, name) is None]
        missing += [] if given.data or given.coco else ["--data or --coco"]
        if missing or chosen is None or backbone is None or given.heads is None:
            raise ValueError(f"without --run these are needed: {', '.join(missing)}")
        files = files_without_run(chosen, backbone, given.heads, given.adapter)
        batch = given.batch_size or DEFAULT_BATCH
        streams = streams_without_run(heads_in(given.heads), batch_size=batch, side=given.image_size)
        streams = chosen_streams(streams, given.tasks, given.heads, given.heads)
        decoding = decoding_of(None, given.beam_size)
        source = ModelSource(files, streams, given.vocabulary, decoding, given.precision or "auto")
        shards, split = data, given.split or "val"
    return Job(source, shards, cache_of(visft.data) if given.run else None, split, given.out)


def _evaluate(job: Job, given: Request, model: EvaluationModel, manifest: Manifest, precision: str) -> EvaluationResult:
    """Collective; the main process writes, and prints for the command."""
    source, where = job.source, f"{given.coco or manifest.root}/{job.split}"
    count = min(given.limit or len(manifest), len(manifest))
    if given.command and distributed.is_main():
        _print_start(model, precision, f"{where}: {count} of {len(manifest)} images")
    with ShardReader(manifest) as reader:
        began = time.perf_counter()
        collected = collect(
            model.predict,
            reader,
            source.streams,
            model.vocabulary,
            limit=given.limit,
            num_workers=workers_of(DataConfig(num_workers=given.workers)),
        )
        seconds = time.perf_counter() - began
        pictures = draw_examples(
            model.predict,
            reader,
            source.streams,
            model.vocabulary,
            given.images,
            threshold=given.threshold,
            limit=given.limit,
        )
        distributed.close()  # before measuring, which the main process does alone
        if collected is None:
            return EvaluationResult({}, {})
        outcome, problems = measure(collected, reader, limit=given.limit, per_category=True)
        record = {
            "model": dict(model.facts),
            "precision": model.precision,
            "data": {"where": where, "split": job.split, "images": count, "total": len(manifest)}
            | {"fingerprint": manifest.fingerprint},
            "settings": {name: dict(stream.image) for name, stream in source.streams.items()},
            **_facts(source.tasks),
            **({"decoding": source.decoding} if needs_vocabulary(source.tasks) else {}),
            "processes": distributed.world_size(),
            "seconds": round(seconds, 3),
            **({"problems": problems} if problems else {}),
        }
        if job.out is not None:
            _write(job.out, collected, outcome, record, _save_pictures(pictures, job.out))
    if given.command and job.out is not None:
        _print_results(job.out, list(collected), outcome, count / seconds)
    return EvaluationResult(as_metrics(outcome), collected, problems, job.out)


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
    if job.out is not None:
        job.out.parent.mkdir(parents=True, exist_ok=True)
    # Without a folder of results, that of the system's temporary files.
    name, place = (f".{job.out.name}", job.out.parent) if job.out is not None else ("visft", None)
    with tempfile.TemporaryDirectory(prefix=f"{name}-shards-", dir=place) as folder:
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
    outcome: Mapping[str, Mapping[str, float]],
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
        "command": [redacted(word) for word in sys.argv],
    }
    # Last: a folder without it was not finished.
    (out / METRICS).write_bytes(orjson.dumps(whole, option=orjson.OPT_INDENT_2))


def _facts(tasks: Sequence[str]) -> dict[str, Any]:
    """Name -> whatever else the numbers of these tasks depend on."""
    return {name: value for task in tasks for name, value in TASKS[task].facts.items()}


def _print_start(model: EvaluationModel, precision: str, data: str) -> None:
    processes = distributed.world_size()
    rows = [*model.facts.items(), ("data", data), ("precision", f"{precision}, {processes} process(es)")]
    print_plan("visft_ds evaluation", [Section("model and data", rows)])


def _print_results(out: Path, tasks: Sequence[str], outcome: Mapping[str, Mapping[str, float]], speed: float) -> None:
    named = {name: value for name, value in as_metrics(outcome).items() if name.count("/") == 1}
    # -1 is COCO's mark for "there is nothing of this kind to find".
    rows = [(name, "no such objects" if value < 0 else f"{value:.4f}") for name, value in named.items()]
    rows += [(name.replace("_", " "), str(value)) for name, value in _facts(list(outcome)).items()]
    files = [*(results_name(task) for task in tasks), METRICS, f"{PICTURES}/"]
    rows += [("images/s", f"{speed:.1f}"), ("written", f"{out}: {', '.join(files)}")]
    print_plan("results", [Section("name and value", rows)])

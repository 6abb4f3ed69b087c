"""Evaluation of a run or of any files: the model, the data, the measurements and what is written of them."""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson

from visft_ds import distributed
from visft_ds.config.record import recorded_config
from visft_ds.config.resolve import AnyPath
from visft_ds.config.schema import DataConfig
from visft_ds.data.fetch import Cache
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.records import FORMAT, METRICS, VERSION, VISUALIZATIONS, Record, counted
from visft_ds.evaluation import collect, draw_examples, measure
from visft_ds.files import write_bytes
from visft_ds.flags import check_least, speaking_python
from visft_ds.interop.heads import check_categories
from visft_ds.monitor.console import Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.predict.loading import LoadedModel, ModelSource, source_of
from visft_ds.prepare.data import workers_of
from visft_ds.prepare.datasets import check_bands
from visft_ds.prepare.model import choose_precision
from visft_ds.redaction import redacted
from visft_ds.run.folder import refuse_filled
from visft_ds.run_files import folder_of_run
from visft_ds.settings.task_schema import Stream
from visft_ds.tasks import TASKS, Numbers, Results
from visft_ds.tasks.pictures import Picture, grid, save_picture

_Drawn = dict[str, list[dict[str, Any]]]  # task -> [{"image_id", "file"}, ...]


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers of an evaluation and what they were computed from; empty but on the main process.

    Example:
        >>> result = visft_ds.evaluate("runs/stage2", tasks="detection", limit=2)
        >>> list(result.results), -1 <= result.metrics["box/AP"] <= 1
        (['detection'], True)
    """

    #: AP, BLEU and ROUGE-L in [0, 1], CIDEr in [0, 10]; -1 if the data has no such objects
    metrics: Mapping[str, float]
    results: Mapping[str, Results]  #: task to predictions in COCO's results format, in the order of the data
    out: Path | None = None  #: folder of what was written


@speaking_python()
def evaluate(
    run: AnyPath | None = None,
    *,
    backbone: AnyPath | None = None,
    download: bool = False,
    heads: AnyPath | None = None,
    adapter: AnyPath | None = None,
    tasks: str | Sequence[str] | None = None,
    vocabulary: AnyPath | None = None,
    beam_size: int | None = None,
    data: AnyPath | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    out: AnyPath | None = None,
    visualizations: int = 8,
    command: bool = False,
) -> EvaluationResult:
    """Measure a run, or any backbone with heads, as visft evaluate does.

    Collective: with several processes all call it, and each image is evaluated once.

    Args:
        run: folder of a run, or RUN/checkpoints/step_N; the rest replaces what it says. Without it give
            backbone, heads and data.
        backbone: file of base or merged weights, of any known layout; or a name, as `fit` takes it.
        download: download missing weights from the Hugging Face hub.
        heads: folder of heads: RUN/export, or ViSFT's published files.
        adapter: folder of an adapter, or "none": leave the run's out.
        tasks: names, in a list or with commas; by default every task that has a head.
        vocabulary: word map of a published captioning head.
        beam_size: beams for captions; by default the run's, or 1 (greedy).
        data: folder or URL of shards.
        split: by default the run's validation split, or "val".
        limit: evaluate only the first images, this many.
        batch_size: images per batch of a process; by default the run's, or 8.
        out: new or empty folder for metrics.json, results and visualizations; by default nothing is written.
        visualizations: number of images to draw into `out`, ground truth beside predictions.
        command: print what is evaluated and the results; `out` is RUN/evaluation-SPLIT by default, and
            of a checkpoint RUN/evaluation-SPLIT-step_N.

    Raises:
        ValueError: missing or damaged files, parts that do not belong together, data that a task cannot be
            judged by (predictions are written all the same).

    Example:
        >>> visft_ds.evaluate("runs/stage2", limit=1, out="numbers").out
        PosixPath('numbers')
    """
    counts = SimpleNamespace(
        limit=limit, batch_size=batch_size, beam_size=beam_size, visualizations=visualizations
    )
    check_least(counts, limit=1, batch_size=1, beam_size=1, visualizations=0)
    if run is None and None in (backbone, heads, data):
        raise ValueError("give --run, or --backbone, --heads and --data")
    run = None if run is None else Path(run)
    source = source_of(
        run,
        tasks=tasks,
        backbone=backbone,
        download=download,
        heads=heads,
        adapter=adapter,
        vocabulary=vocabulary,
        beam_size=beam_size,
        batch_size=batch_size,
    )
    folder = None if out is None else Path(out)
    cache = None
    if run is not None:
        run_folder = folder_of_run(run)
        of_run = recorded_config(run_folder).visft.data
        split = split or of_run.val
        data = data or of_run.root
        cache = Cache(of_run.cache, of_run.cache_bytes)
        if command and folder is None:
            step = "" if run == run_folder else f"-{run.name}"
            folder = run_folder / f"evaluation-{split}{step}"
    if folder is not None:
        refuse_filled(folder)
    assert data is not None
    if not command:
        distributed.keep_open()
    precision, why = choose_precision(source.precision, distributed.local_device())
    manifest = Manifest.load(os.fspath(data), split or "val", cache=cache)
    model, streams = source.build(precision, distributed.local_device())
    evaluation = _Evaluation(source, model, streams, manifest, limit, folder, visualizations)
    evaluation.check_data()
    if command and distributed.is_main():
        evaluation.print_plan(why)
    return evaluation.run(command=command)


@dataclass(frozen=True)
class _Evaluation:
    """A model, the images that it is evaluated on, and what is written."""

    source: ModelSource
    model: LoadedModel
    streams: Mapping[str, Stream]
    manifest: Manifest
    limit: int | None
    folder: Path | None
    visualizations: int

    @property
    def images(self) -> int:
        """Number of images that are evaluated."""
        return min(self.limit or len(self.manifest), len(self.manifest))

    @property
    def where(self) -> str:
        return str(self.manifest)

    @property
    def task_facts(self) -> dict[str, Any]:
        """Other facts that decide numbers, such as the tokenizer of captions."""
        facts: dict[str, Any] = {}
        for task in self.source.tasks:
            facts |= TASKS[task].facts
        return facts

    def check_data(self) -> None:
        """Refuse data whose images a task cannot be judged by, before anything is computed."""
        manifest = self.manifest
        check_bands(manifest, self.model.module.backbone.bands)
        remedy = "Evaluate it on data of its own categories"
        check_categories(self.model.heads, manifest.every_category, str(manifest.root), remedy)
        for task in self.source.tasks:
            config = TASKS[task].config
            if lacking := config.misleads(manifest.counts, manifest.findings):
                raise ValueError(f"{self.where} has no {lacking}")
            has_some = (manifest.having(config.learns_from) < self.images).any()
            if config.labels not in manifest.labels or not has_some:
                raise ValueError(
                    f"no {config.labels} in {self.images} images of {self.where}, which {task} is compared "
                    "with: give other data or other --tasks"
                )

    def print_plan(self, why_precision: str) -> None:
        processes = f"{distributed.world_size()} process(es)"
        facts = [
            *self.model.facts.items(),
            ("data", f"{self.where}: {counted(self.images, len(self.manifest))}"),
            ("precision", f"{self.model.precision} ({why_precision}), {processes}"),
        ]
        print_plan("visft_ds evaluation", [Section("model and data", facts)])

    def record(self, metrics: Numbers, drawn: _Drawn, seconds: float) -> Record:
        """The content of metrics.json."""
        decoding = {}
        if any(TASKS[task].uses_vocabulary for task in self.source.tasks):
            decoding["decoding"] = self.source.decoding
        return {
            "format": FORMAT,
            "version": VERSION,
            "metrics": metrics,
            "model": dict(self.model.facts),
            "precision": self.model.precision,
            "data": {
                "where": self.where,
                "split": self.manifest.split,
                "images": self.images,
                "total": len(self.manifest),
                "fingerprint": self.manifest.fingerprint,
            },
            "settings": {name: dict(stream.image) for name, stream in self.streams.items()},
            **self.task_facts,
            **decoding,
            "processes": distributed.world_size(),
            "seconds": round(seconds, 3),
            "visualizations": drawn,
            "versions": versions(),
            "command": [redacted(word) for word in sys.argv],
        }

    def run(self, *, command: bool) -> EvaluationResult:
        """Predict, measure, and write into the folder, if there is one. Collective."""
        folder = self.folder
        with ShardReader(self.manifest) as reader:
            collected, seconds = self._predict(reader)
            if collected is None:
                return EvaluationResult({}, {})
            drawn: _Drawn = {}
            if folder is not None:  # first: hours of predictions must not be lost with a number
                folder.mkdir(parents=True, exist_ok=True)
                for task, results in collected.items():
                    write_bytes(folder / f"{task}_results.json", orjson.dumps(results))
                drawn = self._draw(collected, reader, folder)
            heads = {task: info.settings() for task, info in self.model.heads.items()}
            metrics, problems = measure(collected, reader, heads, limit=self.limit, of_record=True)
        if folder is not None:
            record = self.record(metrics, drawn, seconds)
            # Last: a folder without it was not finished.
            write_bytes(folder / METRICS, orjson.dumps(record, option=orjson.OPT_INDENT_2))
            if command:
                self.print_results(metrics, collected, seconds)
        if problems:
            raise ValueError("; ".join(problems))
        return EvaluationResult(metrics, collected, folder)

    def _predict(self, reader: ShardReader) -> tuple[dict[str, Results] | None, float]:
        """Results of all ranks on the main process (None elsewhere), and the seconds that they took."""
        if distributed.world_size() > 1:
            from visft_ds.parallel.engine import start_process_group  # imports deepspeed, which costs seconds

            start_process_group()
        began = time.perf_counter()
        collected = collect(
            self.model.predict,
            reader,
            self.streams,
            self.model.vocabulary,
            limit=self.limit,
            num_workers=workers_of(DataConfig()),
        )
        seconds = time.perf_counter() - began
        distributed.close()  # before measuring, which the main process does alone
        return collected, seconds

    def _draw(self, collected: Mapping[str, Results], reader: ShardReader, folder: Path) -> _Drawn:
        """Write drawings of examples; returns what was written."""
        written: _Drawn = {}
        files: dict[Path, Picture] = {}
        drawings = draw_examples(collected, reader, self.visualizations, limit=self.limit)
        for task, by_image in drawings.items():
            written[task] = []
            for image_id, drawing in by_image.items():
                name = f"{VISUALIZATIONS}/{task}-{image_id:012d}.jpg"
                files[folder / name] = drawing
                written[task].append({"image_id": image_id, "file": name})
            if by_image:
                files[folder / f"{task}.jpg"] = grid(list(by_image.values()))
        with ThreadPoolExecutor() as pool:
            list(pool.map(save_picture, files.values(), files))
        return written

    def print_results(self, metrics: Numbers, results: Mapping[str, Results], seconds: float) -> None:
        """Print all numbers, those of single classes in a line each."""
        rows = [(task, "found nothing: no result of any score") for task in results if not results[task]]
        by_category = defaultdict[str, list[str]](list)
        for name, value in metrics.items():
            task, metric, *category = name.split("/", 2)
            if not category:
                # -1 is COCO's mark for "there is nothing of this kind".
                rows.append((name, "no such objects" if value < 0 else f"{value:.4f}"))
            elif value >= 0:
                by_category[f"{task}/{metric}"].append(f"{category[0]} {value:.2f}")
        rows += [(f"{name} by class", ", ".join(values)) for name, values in by_category.items()]
        rows += [(name.replace("_", " "), str(value)) for name, value in self.task_facts.items()]
        files = ", ".join([*(f"{task}_results.json" for task in results), METRICS, f"{VISUALIZATIONS}/"])
        rows += [("images/s", f"{self.images / seconds:.1f}"), ("written", f"{self.folder}: {files}")]
        print_plan("results", [Section(f"on {counted(self.images, len(self.manifest))}", rows)])

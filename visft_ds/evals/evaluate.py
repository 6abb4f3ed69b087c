"""Evaluation of a run or of any files: the model, the data, the measurements and what is written of them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
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
from visft_ds.evals.model import source_of
from visft_ds.evals.records import FORMAT, METRICS, PICTURES, VERSION, counted
from visft_ds.evaluation import collect, draw_examples, measure
from visft_ds.flags import check_least
from visft_ds.interop.heads import check_categories
from visft_ds.monitor.console import Section, print_plan
from visft_ds.monitor.metrics import versions
from visft_ds.prepare.data import workers_of
from visft_ds.prepare.datasets import needs_vocabulary
from visft_ds.prepare.model import choose_precision
from visft_ds.redaction import redacted
from visft_ds.run.folder import refuse_filled
from visft_ds.run_files import folder_of_run
from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.pictures import grid, save_png


@dataclass(frozen=True)
class EvaluationResult:
    """Numbers of an evaluation and what they were computed from; empty but on the main process."""

    metrics: Mapping[
        str, float
    ]  #: AP, BLEU and ROUGE-L in [0, 1], CIDEr in [0, 10]; -1: the data has no such objects
    results: Mapping[str, Results]  #: task -> predictions in COCO's results format, in the order of the data
    out: Path | None = None  #: folder of what was written


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
    pictures: int = 8,
    command: bool = False,
) -> EvaluationResult:
    """Measure a run, or any backbone with heads, as visft evaluate does.

    Collective: with several processes all call it, and each image is evaluated once.

    Args:
        run: folder of a run, or RUN/checkpoints/step_N; the rest replaces what it says. Without it give
        backbone,
            heads and data.
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
        out: new or empty folder for metrics.json, results and pictures; by default nothing is written.
        pictures: number to draw into `out`.
        command: print what is evaluated and found; of a run, `out` is RUN/evaluation-SPLIT by default.

    Raises:
        ValueError: missing or damaged files, parts that do not belong together, data that a task cannot be
        judged by
            (predictions are written all the same).
    """
    counts = SimpleNamespace(limit=limit, batch_size=batch_size, beam_size=beam_size, pictures=pictures)
    check_least(counts, limit=1, batch_size=1, beam_size=1, pictures=0)
    out, cache = None if out is None else Path(out), None
    if run is None and None in (backbone, heads, data, out if command else ""):
        raise ValueError(
            f"without --run give --backbone, --heads{', --data and --out' if command else ' and --data'}"
        )
    source = source_of(
        None if run is None else Path(run),
        tasks=tasks,
        backbone=backbone,
        download=download,
        heads=heads,
        adapter=adapter,
        vocabulary=vocabulary,
        beam_size=beam_size,
        batch_size=batch_size,
    )
    if run is not None:
        place = folder_of_run(Path(run))
        visft = recorded_config(place).visft
        split, data = split or visft.data.val, data or visft.data.root
        cache = Cache(visft.data.cache, visft.data.cache_bytes)
        if command and out is None:
            out = place / "-".join(["evaluation", split, *([Path(run).name] if Path(run) != place else [])])
    split = split or "val"
    assert data is not None
    if out is not None:
        refuse_filled(out)
    if not command:
        distributed.keep_open()
    precision, why = choose_precision(source.precision, distributed.local_device())
    manifest = Manifest.load(os.fspath(data), split, cache=cache)
    model, streams = source.build(precision, distributed.local_device())
    if distributed.world_size() > 1:
        from visft_ds.parallel.engine import start_process_group  # imports deepspeed, which costs seconds

        start_process_group()
    check_categories(
        model.heads, manifest.categories, str(manifest.root), "Evaluate it on data of its own categories"
    )
    count, where = min(limit or len(manifest), len(manifest)), f"{manifest.root}/{split}"
    _check_truth(source.tasks, manifest, count)
    if command and distributed.is_main():
        facts = [*model.facts.items(), ("data", f"{where}: {counted(count, len(manifest))}")]
        facts.append(("precision", f"{precision} ({why}), {distributed.world_size()} process(es)"))
        print_plan("visft_ds evaluation", [Section("model and data", facts)])
    with ShardReader(manifest) as reader:
        began, workers = time.perf_counter(), workers_of(DataConfig())
        collected = collect(
            model.predict, reader, streams, model.vocabulary, limit=limit, num_workers=workers
        )
        seconds = time.perf_counter() - began
        distributed.close()  # before measuring, which the main process does alone
        if collected is None:
            return EvaluationResult({}, {})
        drawn, files = dict[str, Any](), {task: f"{task}_results.json" for task in collected}
        if out is not None:  # first: hours of predictions must not be lost with a number
            out.mkdir(parents=True, exist_ok=True)
            for task, results in collected.items():
                (out / files[task]).write_bytes(orjson.dumps(results))
            drawn = _draw(collected, reader, pictures, limit, out)
        metrics, problems = measure(collected, reader, limit=limit, per_category=True)
    if out is not None:
        facts_of = {name: value for task in collected for name, value in TASKS[task].facts.items()}
        record = {
            "format": FORMAT,
            "version": VERSION,
            "metrics": metrics,
            "model": dict(model.facts),
            "precision": model.precision,
            "data": {"where": where, "split": split, "images": count, "total": len(manifest)}
            | {"fingerprint": manifest.fingerprint},
            "settings": {name: dict(stream.image) for name, stream in streams.items()},
            **facts_of,
            **({"decoding": source.decoding} if needs_vocabulary(source.tasks) else {}),
            "processes": distributed.world_size(),
            "seconds": round(seconds, 3),
            "pictures": drawn,
            "versions": versions(),
            "command": [redacted(word) for word in sys.argv],
        }
        # Last: a folder without it was not finished.
        (out / METRICS).write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))
        if command:
            # Names of a category's numbers have two strokes; -1 is COCO's mark for "there is nothing of this
            # kind".
            shown = {name: value for name, value in metrics.items() if name.count("/") == 1}
            rows = [
                (name, "no such objects" if value < 0 else f"{value:.4f}") for name, value in shown.items()
            ]
            rows += [(name.replace("_", " "), str(value)) for name, value in facts_of.items()]
            written = [*files.values(), METRICS, f"{PICTURES}/"]
            rows += [("images/s", f"{count / seconds:.1f}"), ("written", f"{out}: {', '.join(written)}")]
            print_plan("results", [Section(f"of {counted(count, len(manifest))}", rows)])
    if problems:
        raise ValueError("; ".join(problems))
    return EvaluationResult(metrics, collected, out)


def _check_truth(tasks: Sequence[str], manifest: Manifest, count: int) -> None:
    """Refuse data whose first `count` images a task cannot be judged by, before anything is computed."""
    where = f"{manifest.root}/{manifest.split}"
    for task in tasks:
        config = TASKS[task].config
        if lacking := config.misleads(manifest.counts, manifest.findings):
            raise ValueError(f"{where} has no {lacking}")
        if not (manifest.having(config.learns_from) < count).any():
            lacking = f"no {config.learns_from} in {count} images of {where}"
            raise ValueError(f"{lacking}, which {task} is compared with: give other data or other --tasks")


def _draw(
    collected: Mapping[str, Results], reader: ShardReader, pictures: int, limit: int | None, out: Path
) -> dict[str, list[dict[str, Any]]]:
    """Write pictures of examples; returns {task: [{"image_id", "file"}, ...]}."""
    written: dict[str, list[dict[str, Any]]] = {}
    for task, by_image in draw_examples(collected, reader, pictures, limit=limit).items():
        written[task] = []
        for image_id, picture in by_image.items():
            name = f"{PICTURES}/{task}-{image_id:012d}.png"
            save_png(picture, out / name)
            written[task].append({"image_id": image_id, "file": name})
        if by_image:
            save_png(grid(list(by_image.values()), columns=2), out / f"{task}.png")
    return written

"""What kept features are worth: steps through the backbone beside steps on features that were kept.

Both kinds are made by one engine, in turn. Their cost is the time of this process, data threads included: where the
backbone does not run, reading is what is left.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from visft_ds.config import ResolvedConfig
from visft_ds.costs.hardware import describe
from visft_ds.data.features import FeatureCache, StoredFeatures
from visft_ds.monitor.console import Section
from visft_ds.monitor.metrics import versions
from visft_ds.parallel import distributed
from visft_ds.profiling.session import Session, StreamRun, make_step, open_session
from visft_ds.profiling.timing import Spread, synchronize

FORMAT, VERSION = "visft_ds feature profile", 1
BACKBONE, KEPT = "through the backbone", "on kept features"


def measure_features(config: ResolvedConfig, *, repeats: int, synthetic: bool) -> dict[str, Any] | None:
    """Seconds of an image in both kinds of step, by stream; on the main process, None on the others.

    Raises:
        ValueError: a stage that trains the backbone, or several processes.
    """
    if config.visft.stage != 1 or distributed.world_size() > 1:
        raise ValueError("kept features are measured in stage 1, on one process: give --stage 1, without a launcher")
    settings = config.visft.features
    storage = "bf16" if settings is None else settings.storage
    with (
        tempfile.TemporaryDirectory(prefix="visft-features-") as name,
        open_session(config, synthetic=synthetic) as run,
    ):
        cache = FeatureCache(Path(name), {}, storage)
        run.engine.module.feature_cache = cache
        streams = {one: _measure(run, one, cache, repeats) for one in config.visft.streams()}
        record = {
            "format": FORMAT,
            "version": VERSION,
            "hardware": describe(run.engine.device),
            "versions": versions(),
            "model": config.visft.model.name,
            "precision": run.precision,
            "notes": list(run.notes),
            "storage": storage,
            "streams": streams,
        }
    distributed.close()
    return record


def _measure(session: Session, name: str, cache: FeatureCache, repeats: int) -> dict[str, Any]:
    """Both kinds of step of a stream, in turn, on the same samples."""
    plain, kept = session.of_stream(name), session.of_stream(name)
    kept.loader.keep_features(cache)
    whole = plain.loader.plan.step(0)
    device, made = session.engine.device, 0
    filling = _seconds(kept, 0, made, device)
    walls: dict[str, list[float]] = {BACKBONE: [], KEPT: []}
    processors: dict[str, list[float]] = {BACKBONE: [], KEPT: []}
    for turn in range(repeats + 1):
        for kind, run in ((BACKBONE, plain), (KEPT, kept)):
            made += 1
            wall, processor = _seconds(run, 0, made, device)
            if turn:  # the first turn warms up
                walls[kind].append(wall)
                processors[kind].append(processor)
    images = len(whole.indices)
    view = cache.get(int(whole.keys[0]), int(whole.indices[0]))
    assert view is not None and view.features is not None
    ratios = [b / k for b, k in zip(processors[BACKBONE], processors[KEPT], strict=True)]
    return {
        "images": images,
        "filling_seconds": filling[0],
        "wall_seconds": {kind: asdict(Spread.of(times)) for kind, times in walls.items()},
        "cpu_seconds": {kind: asdict(Spread.of(times)) for kind, times in processors.items()},
        "ratio_wall": asdict(Spread.of([b / k for b, k in zip(walls[BACKBONE], walls[KEPT], strict=True)])),
        "ratio_cpu": asdict(Spread.of(ratios)),
        "bytes_per_image": view.features.values.nbytes,
        "rounding": _rounding(session, plain),
    }


def _seconds(run: StreamRun, first: int, made: int, device: torch.device) -> tuple[float, float]:
    """(wall, CPU) seconds of reading and making step `first`, as the `made`-th of the engine."""
    synchronize(device)
    began = time.perf_counter(), time.process_time()
    ((_, batches),) = run.loader.steps(first, first + 1)
    make_step(run, made, batches)
    synchronize(device)
    return time.perf_counter() - began[0], time.process_time() - began[1]


def _rounding(session: Session, run: StreamRun) -> dict[str, float]:
    """Relative error (root of the sum of squares) of the features of a batch, by storage."""
    ((_, batches),) = run.loader.steps(0, 1)
    one = replace(batches[0].to(session.engine.device), views=None)
    with torch.no_grad():
        features = session.engine.module.features(one)[0][0].permute(1, 2, 0)
    return {
        storage: float((StoredFeatures.pack(features, storage).unpack() - features).norm() / features.norm())
        for storage in ("bf16", "int8")
    }


def make_title(record: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    return f"profile: kept features, {record['model']} in {record['precision']}, kept as {record['storage']}"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables."""
    rows: list[Sequence[str]] = []
    for name, stream in record["streams"].items():
        for kind in (BACKBONE, KEPT):
            wall, processor = (1e3 * stream[what][kind]["median"] for what in ("wall_seconds", "cpu_seconds"))
            rows.append((name, kind, f"{wall / stream['images']:.1f}", f"{processor / stream['images']:.1f}"))
    found = []
    for name, stream in record["streams"].items():
        ratio, error = stream["ratio_cpu"], stream["rounding"]
        text = (
            f"{ratio['median']:.1f} times as fast in CPU time ({ratio['low']:.1f} .. {ratio['high']:.1f}), "
            f"{stream['ratio_wall']['median']:.1f} by the clock; {stream['bytes_per_image'] / 2**20:.2f} MiB an image; "
            f"rounding {100 * error['bf16']:.2f} % in bf16, {100 * error['int8']:.2f} % in int8"
        )
        found.append((name, text))
    head = ("stream", "step", "ms per image", "CPU ms per image")
    notes = [("-", note) for note in record["notes"]]
    sections = [Section("kinds of steps", rows, head), Section("what keeping features gives", found)]
    return [*sections, Section("notes", notes)] if notes else sections

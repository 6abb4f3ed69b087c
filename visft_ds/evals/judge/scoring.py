"""A model and a benchmark -> scores of single items, kept on disk under a hash of what they depend on.

A batch goes to one process whatever their number, so that numbers do not depend on it. A killed command has lost what
it was at: one benchmark by one model. All processes need the same folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from visft_ds.config.fields import Precision
from visft_ds.evals.judge.encoders import Encoder, square_preprocess
from visft_ds.evals.judge.kept import load_classifier
from visft_ds.evals.judge.models import ModelSpec, load_encoder
from visft_ds.evals.judge.protocol import Benchmark, Features, ImageSet, Score
from visft_ds.interop.weights import write_atomically
from visft_ds.monitor.console import gauge
from visft_ds.ops import DTYPES
from visft_ds.parallel import distributed

VERSION = 1  #: changes when the same model and data would give other scores
SAMPLE = 64  #: test images on which it is measured how far features moved
MOVED = ("patches", "pooled", "clip")  #: kinds of features whose movement is measured, the first that is there
#: Rows that a feature map is pooled to for a sequence of columns: upper and lower halves of letters stay apart.
COLUMN_ROWS = 2
_AHEAD = 3  # batches that are decoded before they are needed


@dataclass(frozen=True)
class Settings:
    """Settings by which models are run, and the place of scores."""

    device: torch.device
    precision: Precision
    cache: Path
    batch_size: int
    threads: int


def judge(
    specs: Sequence[ModelSpec], benchmarks: Sequence[Benchmark], settings: Settings
) -> tuple[dict[str, dict[str, Score]], dict[str, float]]:
    """(label -> name -> score, label -> how far features moved from the first model's), on the main process.

    Collective; one model is in memory at a time.

    Raises:
        ValueError: a model that lacks what a benchmark needs, an image that cannot be read, features that are NaN.
    """
    found: dict[tuple[str, str], tuple[list[Score], Tensor]] = {}
    for spec in specs:
        paths = {each.label: settings.cache / f"{_key(spec, specs[0], each, settings)}.npz" for each in benchmarks}
        missing = distributed.from_all_ranks([label for label, path in paths.items() if not path.is_file()])[0]
        encoder = load_encoder(spec, settings.precision) if missing else None
        for benchmark in benchmarks:
            if encoder is not None and not benchmark.answers:
                check_fits(encoder, spec.label, benchmark)
        for benchmark in benchmarks:
            path = paths[benchmark.label]
            if encoder is not None and benchmark.label in missing:
                asked = load_classifier(spec, specs[0]) if benchmark.answers else encoder
                features = encode(asked, benchmark, settings, f"{spec.label}: {benchmark.label}")
                if distributed.is_main():
                    _save(path, list(benchmark.scores(features, benchmark.numbers)), sample_of(features))
                while not path.is_file():  # no collective: scoring may take longer than its time limit
                    time.sleep(0.5)
            if distributed.is_main():
                found[spec.label, benchmark.label] = _load(path)
    if not distributed.is_main():
        return {}, {}
    results: dict[str, dict[str, Score]] = {spec.label: {} for spec in specs}
    moved_by: dict[str, float] = {}
    for benchmark in benchmarks:
        base, sample = found[specs[0].label, benchmark.label]
        for spec in specs:
            scores, own = found[spec.label, benchmark.label]
            if benchmark.answers:  # whose scores are the answers themselves
                pairs = zip(scores, base, strict=True)
                scores = [replace(one, values=(one.values == of.values).astype(float)) for one, of in pairs]
            results[spec.label] |= {f"{benchmark.label} {score.name}": score for score in scores}
            if benchmark is benchmarks[0] and spec is not specs[0] and own.numel() and own.shape == sample.shape:
                moved_by[spec.label] = moved(sample, own)
    return results, moved_by


def check_fits(encoder: Encoder, label: str, benchmark: Benchmark) -> None:
    """Raise ValueError for a model that lacks what a benchmark needs."""
    if not _kinds(encoder, benchmark):
        raise ValueError(f"{benchmark.label} needs {' or '.join(benchmark.kinds)}, which {label} does not have")
    if benchmark.needs_text and encoder.text is None:
        raise ValueError(f"{label} has no text side, which {benchmark.label} compares with: give a whole CLIP file")


def _kinds(encoder: Encoder, benchmark: Benchmark) -> list[str]:
    having = {*encoder.kinds, *(["columns"] if "patches" in encoder.kinds else [])}
    return [kind for kind in benchmark.kinds if kind in having]


def encode(encoder: Encoder, benchmark: Benchmark, settings: Settings, what: str) -> Features:
    """Everything that a benchmark reads of a model, on the main process. Collective."""
    kinds, found = _kinds(encoder, benchmark), {}
    for name, images in benchmark.sets.items():
        # Texts are compared with what is judged alone.
        wanted = [kind for kind in kinds if not (name == "train" and kind.startswith("clip"))]
        found[name] = encode_images(encoder, images, wanted, settings, f"{what} {name}")
    if benchmark.texts and encoder.text is not None and distributed.is_main():
        found["texts"] = {"clip": encoder.text.encode(benchmark.texts, settings.device)}
    return found


def encode_images(
    encoder: Encoder, images: ImageSet, kinds: Collection[str], settings: Settings, what: str
) -> dict[str, Tensor]:
    """Kind -> (images, ...) on the main process; each process encodes every so many-th batch. Collective."""
    size, rank, world = settings.batch_size, distributed.rank(), distributed.world_size()
    batches = [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
    encoder.module.to(settings.device)
    found: dict[str, Tensor] = {}
    with gauge(what, len(images), "images", enabled=distributed.is_main()) as bar:
        own = batches[rank::world]
        for batch, pixels in zip(own, pictures(encoder, images, own, settings.threads), strict=True):
            for kind, value in forward(encoder, pixels, kinds, settings).items():
                if not torch.isfinite(value.sum()):
                    where = f"{kind} of {images.names[batch[0]]} or of the {len(batch) - 1} images after it"
                    raise ValueError(f"{where} is NaN or infinite in {settings.precision}: try --precision fp32")
                found[f"{batch[0]:09d} {kind}"] = value
            bar.update(min(len(batch) * world, len(images) - bar.n))
    if world > 1:  # through files: NCCL would gather on the GPU
        part = settings.cache / f"part-{rank}.safetensors"
        settings.cache.mkdir(parents=True, exist_ok=True)
        save_file(found, part)
        distributed.barrier()
        if distributed.is_main():
            for other in range(1, world):
                found |= load_file(settings.cache / f"part-{other}.safetensors")
        distributed.barrier()
        part.unlink()
    names = sorted(found) if distributed.is_main() else []
    of_kind: dict[str, list[Tensor]] = {}
    for name in names:
        of_kind.setdefault(name[10:], []).append(found.pop(name))
    return {kind: torch.cat(parts) for kind, parts in of_kind.items()}


@torch.inference_mode()
def forward(encoder: Encoder, pixels: Tensor, kinds: Collection[str], settings: Settings) -> dict[str, Tensor]:
    """Kind -> features of a batch of images, float32 on the CPU; "columns": (images, COLUMN_ROWS * D, w)."""
    wanted = {"patches" if kind == "columns" else kind for kind in kinds}
    dtype = DTYPES[settings.precision]
    with torch.autocast(settings.device.type, dtype, enabled=dtype != torch.float32):
        found = encoder.module(pixels.to(settings.device, non_blocking=True), wanted)
    for name in [name for name in found if name.split(" ")[-1] == "patches"] if "columns" in kinds else ():
        columns = F.adaptive_avg_pool2d(found.pop(name).float(), (COLUMN_ROWS, None)).flatten(1, 2)
        found[name.replace("patches", "columns")] = columns
    return {name: value.float().cpu().contiguous() for name, value in found.items()}


def pictures(encoder: Encoder, images: ImageSet, batches: Sequence[range], threads: int) -> Iterator[Tensor]:
    """Batches as the model takes them, (n, 3, side, side); the next ones are decoded meanwhile."""
    stretched = square_preprocess(encoder.side, *encoder.normalisation)  # a model's own may cut off the borders

    def load(place: int) -> Tensor:
        image = images.read(place)
        if images.stretched:
            return stretched(image.resize((encoder.side, encoder.side), Image.Resampling.BICUBIC))
        return encoder.preprocess(image)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        waiting = deque([pool.submit(load, place) for place in batch] for batch in batches[:_AHEAD])
        try:
            for number in range(len(batches)):
                yield torch.stack([part.result() for part in waiting.popleft()])
                waiting.extend(
                    [pool.submit(load, place) for place in batch] for batch in batches[number + _AHEAD :][:1]
                )
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def sample_of(features: Features) -> Tensor:
    """Features of the first SAMPLE test images, in half precision; empty without any kind of MOVED."""
    of = features.get("test") or next(iter(features.values()))
    kinds = [kind for kind in MOVED if kind in of]
    return of[kinds[0]][:SAMPLE].half() if kinds else torch.empty(0)


def moved(old: Tensor, new: Tensor) -> float:
    """|f - f0| / |f0 - mean of f0| of features (n, D, ...), the mean of each channel."""
    old, new = old.float(), new.float()
    mean = old.mean(dim=[axis for axis in range(old.ndim) if axis != 1], keepdim=True)
    return float((new - old).norm() / (old - mean).norm().clamp(min=1e-12))


def _key(spec: ModelSpec, first: ModelSpec, benchmark: Benchmark, settings: Settings) -> str:
    """A name for scores: of the files of a model, of the images and of the protocol."""
    what: dict[str, Any] = {
        "version": VERSION,
        "model": spec.identity,
        "classifier": first.identity if benchmark.answers else None,
        "precision": settings.precision,
        "device": settings.device.type,
        "images": {name: images.fingerprint for name, images in benchmark.sets.items()},
        "benchmark": benchmark.settings,
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def _save(path: Path, scores: Sequence[Score], sample: Tensor) -> None:
    arrays: dict[str, Any] = {"names": np.array([score.name for score in scores]), "sample": sample.numpy()}
    for number, score in enumerate(scores):
        assert np.isfinite(score.values).all() and len(score.values), score.name
        parts = {"values": score.values, "groups": score.groups, "maps": score.maps, "retrained": score.retrained}
        arrays |= {f"{number}.{name}": value for name, value in parts.items() if value is not None}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def _load(path: Path) -> tuple[list[Score], Tensor]:
    with np.load(path, allow_pickle=False) as file:
        part = {name: file[name] for name in file.files}
    scores = [
        Score(str(name), part[f"{n}.values"], part.get(f"{n}.groups"), part.get(f"{n}.maps"))
        for n, name in enumerate(part["names"])
    ]
    return scores, torch.from_numpy(part["sample"])

"""Images and texts -> features, batched, decoded ahead of the model, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from visft_ds.config.schema import Precision
from visft_ds.costs.hardware import DTYPES
from visft_ds.evals.benchmarks.cache import Chunk, Stored, fill
from visft_ds.evals.benchmarks.encoders import Encoder, square_preprocess
from visft_ds.evals.benchmarks.protocol import ImageSet
from visft_ds.monitor.console import Gauge
from visft_ds.parallel import distributed

#: Changes when the same model and data would give other features than before.
VERSION = 1
_AHEAD = 3  # batches that are decoded before they are needed
#: Rows that a feature map is pooled to for a sequence of columns: upper and lower halves of letters stay apart.
COLUMN_ROWS = 2


@dataclass(frozen=True)
class Worker:
    """A model on its device, and where its features are kept."""

    encoder: Encoder
    device: torch.device
    precision: Precision
    cache: Path
    batch_size: int
    threads: int  #: that decode; 0: the caller decodes
    label: str  #: name of the model, for people
    images: str  #: hash of the image side
    texts: str | None  #: hash of the text side
    before: Callable[[], None] | None = None  #: called before its forwards, where several share a module


def _what(worker: Worker, images: ImageSet, kinds: Collection[str]) -> dict[str, Any]:
    return {
        "version": VERSION,
        "model": worker.images,
        "settings": dict(worker.encoder.settings),
        "precision": worker.precision,
        "device": worker.device.type,
        "images": images.fingerprint,
        "count": len(images),
        "stretched": "whole" if images.stretched else False,
        "kinds": sorted(kinds),
    }


def encode_together(
    workers: Sequence[Worker], images: ImageSet, kinds: Collection[str], name: str = "images"
) -> list[Stored]:
    """Kind -> (images, ...) float32 of each worker, in the cache; images are decoded once for all. Collective.

    A batch never reaches over the end of a chunk, so that its numbers are the same for any number of processes. The
    size of the batch decides their last bits, and is no part of the key.

    Args:
        workers: of one preprocessing.
        kinds: of `encoders.KINDS`, and "columns": (images, COLUMN_ROWS * D, w), the feature map as a sequence.
        name: of the images, for people.

    Raises:
        ValueError: an image that cannot be read, or a model that answers with NaN.
    """

    worker, *others = workers

    def compute(chunks: Iterable[range]) -> Iterator[Sequence[Chunk]]:
        batches = [
            [chunk[start : start + worker.batch_size] for start in range(0, len(chunk), worker.batch_size)]
            for chunk in chunks
        ]
        flat = [batch for chunk in batches for batch in chunk]
        name_of_all = f"{name}, {len(workers)} models at once" if others else name
        decoded = _gauged(worker, name_of_all, pictures(worker, images, flat), sum(map(len, flat)))
        for chunk in batches:
            pieces = [[forward(each, batch, kinds) for each in workers] for batch in islice(decoded, len(chunk))]
            found = []
            for parts in zip(*pieces, strict=True):
                features = {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}
                for kind, value in features.items():
                    if not torch.isfinite(value.sum()):
                        raise ValueError(
                            f"{kind} of {images.names[chunk[0].start]} or one of the next {len(value) - 1} images is "
                            f"no finite number in {worker.precision}: the weights are damaged, or need --precision fp32"
                        )
                found.append(features)
            yield found

    several = [Stored(each.cache / "images", _what(each, images, kinds), len(images)) for each in workers]
    fill(several, compute)
    return several


def encode_texts(worker: Worker, texts: Sequence[str]) -> Stored:
    """ "texts" -> (texts, E) float32 of length 1, in the cache. Collective. Computed in float32."""
    tower = worker.encoder.text
    assert tower is not None

    def compute(chunks: Iterable[range]) -> Iterator[Sequence[Chunk]]:
        chunks = list(chunks)
        encoded = (tower.encode([texts[place] for place in chunk]).cpu() for chunk in chunks)
        for part in _gauged(worker, "texts", encoded, sum(map(len, chunks))):
            yield [{"texts": part}]

    content = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()
    what = {"version": VERSION, "model": worker.texts, "device": worker.device.type, "texts": content}
    what |= {key: value for key, value in worker.encoder.settings.items() if key == "architecture"}
    stored = Stored(worker.cache / "texts", what, len(texts))
    fill([stored], compute)
    return stored


def _gauged(worker: Worker, name: str, parts: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """Yield parts of `count` items, and show how many of this process's share are done."""
    with Gauge(f"{worker.label}: encoding {name}", count, enabled=distributed.is_main()) as gauge:
        for part in parts:
            yield part
            gauge.add(len(part))


@torch.inference_mode()
def forward(worker: Worker, batch: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
    """Kind -> features of a batch of images, float32 on the CPU; kinds as `encode_together`."""
    wanted = {"patches" if kind == "columns" else kind for kind in kinds}
    dtype = DTYPES[worker.precision]
    if worker.before is not None:
        worker.before()
    with torch.autocast(worker.device.type, dtype, enabled=dtype != torch.float32):
        found = worker.encoder.module(batch.to(worker.device, non_blocking=True), wanted)
    if "columns" in kinds:
        pooled = torch.nn.functional.adaptive_avg_pool2d(found.pop("patches").float(), (COLUMN_ROWS, None))
        found["columns"] = pooled.flatten(1, 2)
    return {name: value.float().cpu().contiguous() for name, value in found.items()}


def pictures(worker: Worker, images: ImageSet, batches: Sequence[range]) -> Iterator[Tensor]:
    """Images as the model takes them, (n, 3, side, side); with threads, the next ones are decoded meanwhile."""
    encoder = worker.encoder
    stretched = square_preprocess(encoder.side, *encoder.normalisation)  # a model's own may cut off the borders

    def load(place: int) -> Tensor:
        image = images.read(place)
        if images.stretched:
            return stretched(image.resize((encoder.side, encoder.side), Image.Resampling.BICUBIC))
        return encoder.preprocess(image)

    if not worker.threads:
        for batch in batches:
            yield torch.stack([load(place) for place in batch])
        return
    with ThreadPoolExecutor(worker.threads) as pool:
        waiting = deque([pool.submit(load, place) for place in batch] for batch in batches[:_AHEAD])
        try:
            for number in range(len(batches)):
                yield torch.stack([part.result() for part in waiting.popleft()])
                if number + _AHEAD < len(batches):
                    waiting.append([pool.submit(load, place) for place in batches[number + _AHEAD]])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

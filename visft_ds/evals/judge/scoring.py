"""A model and a data set -> scores of single items, kept on disk under a hash of what they depend on.

A batch goes to one process whatever their number, so that numbers do not depend on it. A killed command has lost what
it was at: one data set by one model. All processes need the same folder.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from visft_ds.config.fields import Precision
from visft_ds.evals.judge.encoders import Encoder, square_preprocess
from visft_ds.evals.judge.protocol import Benchmark, Features, ImageSet, Score
from visft_ds.interop.weights import write_atomically, write_text
from visft_ds.monitor.console import gauge
from visft_ds.ops import DTYPES
from visft_ds.parallel import distributed

VERSION = 3  #: changes when the same model and data would give other scores
#: Rows that a feature map is pooled to for a sequence of columns: upper and lower halves of letters stay apart.
COLUMN_ROWS = 2
_DERIVED: dict[str, Callable[[Tensor], Tensor]] = {  # of patches (images, D, h, w)
    "columns": lambda patches: F.adaptive_avg_pool2d(patches, (COLUMN_ROWS, None)).flatten(1, 2),
    "mean": lambda patches: patches.mean(dim=(2, 3)),
}
_PARTS = ("values", "groups", "maps", "retrained")  # arrays of a score
T = TypeVar("T")
_AHEAD = 3  # batches that are decoded before they are needed


@dataclass(frozen=True)
class Settings:
    """Settings by which models are run, and the place of scores."""

    device: torch.device
    precision: Precision
    cache: Path
    batch_size: int
    threads: int


def remembered(what: Mapping[str, Any], settings: Settings, make: Callable[[], T]) -> T:
    """Result of `make` on the main process, in JSON's types, computed once for the same `what`. Collective."""
    path = settings.cache / f"{_hash(what, settings)}.json"
    if distributed.from_all_ranks(not path.is_file())[0]:
        value = make()
        if distributed.is_main():
            write_text(path, json.dumps(value))
        _wait_for(path)
    found: T = json.loads(path.read_text(encoding="utf-8"))
    return found


def score(
    load: Callable[[], Encoder],
    key: Mapping[str, Any],
    benchmark: Benchmark,
    wanted: Collection[str],
    settings: Settings,
    label: str,
) -> list[Score]:
    """The wanted numbers of a model, on the main process. Collective.

    Args:
        load: gives the model, read where it is to be.
        key: all that it depends on, in JSON's types.
        label: name of the model in messages.

    Raises:
        ValueError: a model that lacks what the benchmark needs, an image that cannot be read, features that are NaN.
    """
    names = sorted(wanted)
    images = {name: images.fingerprint for name, images in benchmark.sets.items()}
    of = {"model": key, "images": images, "benchmark": benchmark.settings, "numbers": names}
    path = settings.cache / f"{_hash(of, settings)}.npz"
    if distributed.from_all_ranks(not path.is_file())[0]:
        encoder = load()
        check_fits(encoder, label, benchmark)
        if benchmark.published is None:
            features = encode(encoder, benchmark, settings, f"{label}: {benchmark.label}")
            scores = benchmark.scores(features, wanted)
        else:
            scores = benchmark.published(encoder, settings, wanted)
        if distributed.is_main():
            _save(path, [one for one in scores if one.name in wanted])
        _wait_for(path)
    return _load(path) if distributed.is_main() else []


def _wait_for(path: Path) -> None:
    """Wait until the main process has written a file; no collective: that may take longer than its time limit."""
    while not path.is_file():
        time.sleep(0.5)


def check_fits(encoder: Encoder, label: str, benchmark: Benchmark) -> None:
    """Raise ValueError for a model that lacks what a benchmark needs."""
    if not kinds_of(encoder, benchmark):
        raise ValueError(f"{benchmark.label} needs {' or '.join(benchmark.kinds)}, which {label} does not have")
    if benchmark.needs_text and encoder.text is None:
        raise ValueError(f"{label} has no text side, which {benchmark.label} compares with: give a whole CLIP file")


def kinds_of(encoder: Encoder, benchmark: Benchmark) -> list[str]:
    """The kinds of features that a benchmark reads of a model, with those that come out of its patches."""
    return [
        kind for kind in benchmark.kinds if kind in encoder.kinds or ("patches" in encoder.kinds and kind in _DERIVED)
    ]


def encode(encoder: Encoder, benchmark: Benchmark, settings: Settings, what: str) -> Features:
    """Everything that a benchmark reads of a model, on the main process. Collective."""
    kinds, found = kinds_of(encoder, benchmark), {}
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
                if not (finite := value.reshape(len(value), -1).isfinite().all(dim=1)).all():
                    where = images.names[batch[int(finite.logical_not().nonzero()[0])]]
                    raise ValueError(
                        f"{kind} of {where}: NaN or infinite in {settings.precision}; try --precision fp32"
                    )
                found[f"{batch[0]:09d} {kind}"] = value.cpu().contiguous()
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
    """Kind -> features of a batch of images, float32 on the device."""
    wanted = {"patches" if kind in _DERIVED else kind for kind in kinds}
    dtype = DTYPES[settings.precision]
    with torch.autocast(settings.device.type, dtype, enabled=dtype != torch.float32):
        found = encoder.module(pixels.to(settings.device, non_blocking=True), wanted)
    for name in [name for name in found if name.endswith("patches")]:
        patches, begin = found[name].float(), name.removesuffix("patches")
        found |= {f"{begin}{kind}": _DERIVED[kind](patches) for kind in kinds if kind in _DERIVED}
        if "patches" not in kinds:
            del found[name]
    return {name: value.float() for name, value in found.items()}


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


def _hash(what: Mapping[str, Any], settings: Settings) -> str:
    """A name for what depends on these things, and on how models are run."""
    all_of_it = {**what, "version": VERSION, "precision": settings.precision, "device": settings.device.type}
    return hashlib.sha256(json.dumps(all_of_it, sort_keys=True).encode()).hexdigest()[:24]


def _save(path: Path, scores: Sequence[Score]) -> None:
    lower = [score.lower for score in scores]
    arrays: dict[str, Any] = {"names": np.array([score.name for score in scores]), "lower": np.array(lower)}
    for number, score in enumerate(scores):
        assert np.isfinite(score.values).all() and len(score.values), score.name
        parts = {name: getattr(score, name) for name in _PARTS}
        arrays |= {f"{number}.{name}": value for name, value in parts.items() if value is not None}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def _load(path: Path) -> list[Score]:
    with np.load(path, allow_pickle=False) as file:
        part = {name: file[name] for name in file.files}
    found = []
    for number, name in enumerate(part["names"]):
        arrays: Any = {one: part.get(f"{number}.{one}") for one in _PARTS}
        found.append(Score(str(name), lower=bool(part["lower"][number]), **arrays))
    return found

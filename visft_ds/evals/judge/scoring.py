"""A model and a data set -> scores of single items, kept on disk under a hash of what they depend on.

Several processes share the folder: each makes its share of all results and reads those of the others. A
killed command has lost what it was at: one data set by one model.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from visft_ds import distributed
from visft_ds.errors import RankError
from visft_ds.evals.judge.benchmark import Benchmark, Features, ImageSet, Score
from visft_ds.evals.judge.encoders import Encoder, square_preprocess
from visft_ds.files import write_text, writing
from visft_ds.monitor.console import gauge
from visft_ds.ops import DTYPES
from visft_ds.settings.fields import Precision

VERSION = 6  #: changes when the same model and data would give other scores
#: Rows that a feature map is pooled to for a sequence of columns: upper and lower halves of letters stay
#: apart.
COLUMN_ROWS = 2
_DERIVED: dict[str, Callable[[Tensor], Tensor]] = {  # of patches (images, D, h, w)
    "columns": lambda patches: F.adaptive_avg_pool2d(patches, (COLUMN_ROWS, None)).flatten(1, 2),
    "mean": lambda patches: patches.mean(dim=(2, 3)),
}
_PARTS = ("values", "groups", "maps", "retrained")  # arrays of a score
T = TypeVar("T")
MOST = 8 * 2**30  #: bytes of features of several blocks that are read together
_AHEAD = 3  # batches that are decoded before they are needed


@dataclass(frozen=True)
class Settings:
    """Settings by which models are run, and the place of scores."""

    device: torch.device
    precision: Precision
    cache: Path
    batch_size: int
    threads: int


def shared(calls: Sequence[Callable[[bool], T]], what: str) -> list[T]:
    """Results of calls that keep them on disk; each is made by one of the processes.

    Args:
        calls: given True, to make what is not there; given False, to wait until another process has made it.
        what: is made, for the line that shows how many are there.
    """
    rank, world = distributed.rank(), distributed.world_size()
    made: dict[int, T] = {}
    with gauge(what, len(calls), "results") as bar:
        try:
            for number in range(rank, len(calls), world):
                made[number] = calls[number](True)
                bar.update()
        except ValueError as error:
            raise RankError(str(error)) from error  # the others, which wait, do not meet it
        for number, call in enumerate(calls):
            if number not in made:
                made[number] = call(False)
                bar.update()
    return [made[number] for number in range(len(calls))]


def remembered(
    what: Mapping[str, Any], settings: Settings, make: Callable[[], T], own: bool | None = None
) -> T:
    """Result of `make`, in JSON's types, computed once for the same `what`.

    Args:
        own: it is made here if it is not there, and otherwise by another process; None: by the main process.
    """
    path = settings.cache / f"{_hash(what, settings)}.json"
    if (distributed.is_main() if own is None else own) and not path.is_file():
        write_text(path, json.dumps(make()))
    found: T = json.loads(_present(path).read_text(encoding="utf-8"))
    return found


def score(
    load: Callable[..., Encoder],
    key: Mapping[str, Any],
    benchmark: Benchmark,
    wanted: Mapping[str, Collection[str]],
    sizes: Mapping[str, int],
    settings: Settings,
    label: str,
    own: bool,
) -> dict[str, list[Score]]:
    """Block -> the numbers of a model that are wanted of it. Images are encoded once for all blocks that fit.

    Args:
        load: (blocks) -> the model, read after them; of several, names of features begin with `BLOCK `.
        key: all that it depends on beside the block, in JSON's types.
        wanted: block -> numbers.
        sizes: block -> bytes of an image's map, where it is known.
        label: name of the model in messages.
        own: see `remembered`.

    Raises:
        ValueError: a model that lacks what the benchmark needs, an image that cannot be read, features that
        are NaN.
    """
    images = {name: images.fingerprint for name, images in benchmark.sets.items()}
    data = {"model": key, "images": images, "benchmark": benchmark.settings}
    paths = {
        block: settings.cache / f"{_hash({**data, 'block': block, 'numbers': sorted(numbers)}, settings)}.npz"
        for block, numbers in wanted.items()
    }
    missing = [block for block, path in paths.items() if own and not path.is_file()]
    count = sum(len(images) for images in benchmark.sets.values())
    if benchmark.published is not None:
        for block in missing:
            encoder = load(block)
            _check(encoder, benchmark, label)
            _save(paths[block], benchmark.published(encoder, settings, wanted[block]), wanted[block])
        missing = []
    for blocks in groups({block: sizes.get(block, 0) for block in missing}, count):
        encoder = load(*blocks)
        _check(encoder, benchmark, label)
        features = encode(encoder, benchmark, settings, f"{label}: {benchmark.label}")
        for block in blocks:
            own_features = of_block(features, block) if len(blocks) > 1 else features
            _save(paths[block], benchmark.scores(own_features, wanted[block]), wanted[block])
    return {block: _load(_present(path)) for block, path in paths.items()}


def groups(sizes: Mapping[str, int], images: int) -> Iterator[list[str]]:
    """Blocks whose features of so many images fit into MOST bytes together, in order; at least one."""
    group: list[str] = []
    for block, size in sizes.items():
        if group and (sum(sizes[name] for name in group) + size) * images > MOST:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def of_block(features: Mapping[str, Mapping[str, Tensor]], block: str) -> dict[str, dict[str, Tensor]]:
    """What was read after one of several blocks."""
    begin = f"{block} "
    return {
        name: {
            kind.removeprefix(begin): value
            for kind, value in kinds.items()
            if kind.startswith(begin) or name == "texts"
        }
        for name, kinds in features.items()
    }


def _check(encoder: Encoder, benchmark: Benchmark, label: str) -> None:
    """Raise ValueError if a model lacks what a benchmark needs."""
    if not kinds_of(encoder, benchmark):
        raise ValueError(
            f"{benchmark.label} needs {' or '.join(benchmark.kinds)}, which {label} does not have"
        )
    if benchmark.needs_text and encoder.text is None:
        raise ValueError(f"{label} has no text side, which {benchmark.label} needs: give a whole CLIP file")


def _present(path: Path) -> Path:
    """The same path, once a process has written it; a process that fails ends them all."""
    while not path.is_file():
        time.sleep(0.5)
    return path


class HasKinds(Protocol):
    """A model, or what is known of it."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of features that it can compute."""


def kinds_of(model: HasKinds, benchmark: Benchmark) -> list[str]:
    """The kinds of features that a benchmark reads of a model, with those that come out of its patches."""
    return [
        kind
        for kind in benchmark.kinds
        if kind in model.kinds or ("patches" in model.kinds and kind in _DERIVED)
    ]


def encode(encoder: Encoder, benchmark: Benchmark, settings: Settings, what: str) -> Features:
    """Everything that a benchmark reads of a model."""
    kinds, found = kinds_of(encoder, benchmark), {}
    for name, images in benchmark.sets.items():
        # Texts are compared with what is judged alone.
        wanted = [kind for kind in kinds if not (name == "train" and kind == "clip")]
        found[name] = encode_images(encoder, images, wanted, settings, f"{what} {name}")
        if benchmark.layer_choice is not None:
            found[name] = brought_near(found[name], settings)
    if benchmark.texts and encoder.text is not None:
        found["texts"] = {"clip": encoder.text.encode(benchmark.texts, settings.device)}
    return found


def brought_near(features: dict[str, Tensor], settings: Settings) -> dict[str, Tensor]:
    """The same features on the GPU, if there is one and they take at most a quarter of its free memory."""
    if settings.device.type != "cuda":
        return features
    needed = sum(value.numel() * value.element_size() for value in features.values())
    if needed > torch.cuda.mem_get_info(settings.device)[0] / 4:
        return features
    return {kind: value.to(settings.device) for kind, value in features.items()}


def encode_images(
    encoder: Encoder, images: ImageSet, kinds: Collection[str], settings: Settings, what: str
) -> dict[str, Tensor]:
    """Kind -> (images, ...) float32 on the CPU."""
    encoder.module.to(settings.device)
    found: dict[str, list[Tensor]] = {}
    with gauge(what, len(images), "images") as bar:
        for batch, pixels in enumerate(pictures(encoder, images, settings)):
            for kind, value in forward(encoder, pixels, kinds, settings).items():
                if not (finite := value.reshape(len(value), -1).isfinite().all(dim=1)).all():
                    where = images.names[batch * settings.batch_size + int(finite.logical_not().nonzero()[0])]
                    raise ValueError(
                        f"{kind} of {where}: NaN or infinite in {settings.precision}; try --precision fp32"
                    )
                found.setdefault(kind, []).append(value.cpu())
            bar.update(len(pixels))
    return {kind: torch.cat(parts) for kind, parts in found.items()}


@torch.inference_mode()
def forward(
    encoder: Encoder, pixels: Tensor, kinds: Collection[str], settings: Settings
) -> dict[str, Tensor]:
    """Kind -> features of a batch of images, float32 on the device."""
    wanted = {"patches" if kind in _DERIVED else kind for kind in kinds}
    dtype = DTYPES[settings.precision]
    with torch.autocast(settings.device.type, dtype, enabled=dtype != torch.float32):
        # Convolutions on a CPU take 60 % of the time when the channels of a pixel lie together.
        given = pixels.to(settings.device, non_blocking=True, memory_format=torch.channels_last)
        found = encoder.module(given, wanted)
    for name in [name for name in found if name.endswith("patches")]:
        patches, begin = found[name].float(), name.removesuffix("patches")
        found |= {f"{begin}{kind}": _DERIVED[kind](patches) for kind in kinds if kind in _DERIVED}
        if "patches" not in kinds:
            del found[name]
    return {name: value.float() for name, value in found.items()}


def pictures(
    encoder: Encoder,
    images: ImageSet,
    settings: Settings,
    most: int | None = None,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Iterator[Tensor]:
    """Batches of the first images as the model takes them, (n, 3, side, side); the next ones are decoded
    meanwhile.
    """
    stretched = square_preprocess(
        encoder.side, *encoder.normalisation
    )  # a model's own may cut off the borders
    places = range(len(images))[:most]
    batches = iter(
        [places[start : start + settings.batch_size] for start in range(0, len(places), settings.batch_size)]
    )

    def load(place: int) -> Tensor:
        image = images.read(place)
        if images.stretched:
            return stretched(image.resize((encoder.side, encoder.side), resample))
        return encoder.preprocess(image)

    with ThreadPoolExecutor(max(1, settings.threads)) as pool:
        waiting = deque([pool.submit(load, place) for place in batch] for batch in islice(batches, _AHEAD))
        try:
            while waiting:
                yield torch.stack([part.result() for part in waiting.popleft()])
                waiting.extend([pool.submit(load, place) for place in batch] for batch in islice(batches, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _hash(what: Mapping[str, Any], settings: Settings) -> str:
    """A name for what depends on these things, and on how models are run."""
    all_of_it = {**what, "version": VERSION, "precision": settings.precision, "device": settings.device.type}
    return hashlib.sha256(json.dumps(all_of_it, sort_keys=True).encode()).hexdigest()[:24]


def _save(path: Path, made: Iterable[Score], wanted: Collection[str]) -> None:
    scores = [score for score in made if score.name in wanted]
    arrays: dict[str, Any] = {"names": np.array([score.name for score in scores])}
    for number, score in enumerate(scores):
        assert np.isfinite(score.values).all() and len(score.values), score.name
        parts = {name: getattr(score, name) for name in _PARTS}
        arrays |= {f"{number}.{name}": value for name, value in parts.items() if value is not None}
    with writing(path) as file:
        np.savez_compressed(file, **arrays)


def _load(path: Path) -> list[Score]:
    with np.load(path, allow_pickle=False) as file:
        part = {name: file[name] for name in file.files}
    found = []
    for number, name in enumerate(part["names"]):
        arrays: Any = {one: part.get(f"{number}.{one}") for one in _PARTS}
        found.append(Score(str(name), **arrays))
    return found

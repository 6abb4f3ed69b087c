"""Images -> features: what models compute of the images of a benchmark, batch by batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from visft_ds.evals.judge.benchmark import Benchmark, ImageSet
from visft_ds.evals.judge.encoders import Encoder, square_preprocess
from visft_ds.monitor.console import gauge
from visft_ds.ops import DTYPES
from visft_ds.settings.fields import Precision

#: Rows that a feature map is pooled to for a sequence of columns: upper and lower halves of letters stay
#: apart.
COLUMN_ROWS = 2
CELLS = 14  #: rows and columns at most, that a feature map is pooled to where all of it is kept
MOST = 8 * 2**30  #: bytes of features of several blocks that are read together


_OF_PATCHES: dict[str, Callable[[Tensor], Tensor]] = {  # kinds made of patches (images, D, h, w)
    "patches": lambda patches: patches,
    "columns": lambda patches: F.adaptive_avg_pool2d(patches, (COLUMN_ROWS, None)).flatten(1, 2),
    "mean": lambda patches: patches.mean(dim=(2, 3)),
    "cells": lambda patches: F.adaptive_avg_pool2d(
        patches, (min(CELLS, patches.shape[2]), min(CELLS, patches.shape[3]))
    ),
}
ByKind = dict[str, Tensor]  #: kind of features -> those of images (images, ...)
ByBlock = dict[str, ByKind]  #: block, or set of images -> features
_AHEAD = 3  # batches that are decoded before they are needed


@dataclass(frozen=True)
class Settings:
    """Settings by which models are run, and the place of scores."""

    device: torch.device
    precision: Precision
    cache: Path
    batch_size: int
    threads: int  #: that decode images


def kinds_read(benchmark: Benchmark, of_model: Collection[str]) -> list[str]:
    """The kinds of features that a benchmark reads of a model that computes some; others come out of its
    patches.
    """
    known = set(of_model)
    if "patches" in known:
        known |= _OF_PATCHES.keys()
    return [kind for kind in benchmark.kinds if kind in known]


def groups(sizes: Mapping[str, int], images: int) -> Iterator[list[str]]:
    """Blocks whose features of so many images fit into MOST bytes together, in order; at least one."""
    group: list[str] = []
    for block in sizes:
        together = sum(sizes[name] for name in [*group, block])
        if group and together * images > MOST:
            yield group
            group = []
        group.append(block)
    if group:
        yield group


def encode(
    encoder: Encoder, blocks: Sequence[str], benchmark: Benchmark, settings: Settings, what: str
) -> dict[str, ByBlock]:
    """Block -> everything that a benchmark reads of a model after it (`benchmark.Features`).

    Args:
        encoder: read after the blocks.
        what: is done, for the line that shows how many images are encoded.
    """
    features: dict[str, ByBlock] = {block: {} for block in blocks}
    for name, images in benchmark.sets_for(has_text=encoder.text is not None).items():
        kinds = kinds_read(benchmark, encoder.kinds)
        if name == "train":  # texts are compared with what is judged alone
            kinds = [kind for kind in kinds if kind != "clip"]
        if name in benchmark.text_sets:
            kinds = ["clip"]
        of_set = encode_images(encoder, images, kinds, settings, f"{what} {name}")
        if benchmark.layer_choice is not None:
            of_set = brought_near(of_set, settings)
        for block, own in by_block(of_set, blocks).items():
            features[block][name] = own
    if benchmark.texts and encoder.text is not None:
        texts = encoder.text.encode(benchmark.texts, settings.device)
        for of_block in features.values():
            of_block["texts"] = {"clip": texts}
    return features


def by_block(features: ByKind, blocks: Sequence[str]) -> ByBlock:
    """Block -> kind -> features, of what an encoder gives that is read after blocks."""
    if len(blocks) == 1:
        return {blocks[0]: features}
    split: ByBlock = {block: {} for block in blocks}
    for name, value in features.items():
        block, _, kind = name.rpartition(" ")
        split[block][kind] = value
    return split


def brought_near(features: ByKind, settings: Settings) -> ByKind:
    """The same features on the GPU, if there is one and they take at most a quarter of its free memory."""
    if settings.device.type != "cuda":
        return features
    needed = sum(value.numel() * value.element_size() for value in features.values())
    if needed > torch.cuda.mem_get_info(settings.device)[0] / 4:
        return features
    return {kind: value.to(settings.device) for kind, value in features.items()}


def encode_images(
    encoder: Encoder, images: ImageSet, kinds: Collection[str], settings: Settings, what: str
) -> ByKind:
    """Kind -> (images, ...) float32 on the CPU. Raises ValueError for features that are not finite."""
    encoder.module.to(settings.device)
    batches: dict[str, list[Tensor]] = {}
    with gauge(what, len(images), "images") as bar:
        for pixels in pictures(encoder, images, settings):
            for kind, value in forward(encoder, pixels, kinds, settings).items():
                is_finite = value.reshape(len(value), -1).isfinite().all(dim=1)
                if not is_finite.all():
                    first = sum(map(len, batches.get(kind, ()))) + is_finite.tolist().index(False)
                    raise ValueError(
                        f"{kind} of {images.names[first]}: NaN or infinite in {settings.precision}; "
                        "try --precision fp32"
                    )
                batches.setdefault(kind, []).append(value.cpu())
            bar.update(len(pixels))
    return {kind: torch.cat(values) for kind, values in batches.items()}


@torch.inference_mode()
def forward(encoder: Encoder, pixels: Tensor, kinds: Collection[str], settings: Settings) -> ByKind:
    """Kind -> features of a batch of images, float32 on the device."""
    of_model = {"patches" if kind in _OF_PATCHES else kind for kind in kinds}
    dtype = DTYPES[settings.precision]
    with torch.autocast(settings.device.type, dtype, enabled=dtype != torch.float32):
        # Convolutions on a CPU take 60 % of the time when the channels of a pixel lie together.
        images = pixels.to(settings.device, non_blocking=True, memory_format=torch.channels_last)
        outputs = encoder.module(images, of_model)
    features: ByKind = {}
    for name, output in outputs.items():
        value = output.float()
        if not name.endswith("patches"):
            features[name] = value
            continue
        begin = name.removesuffix("patches")  # a block, if it is read after several
        for kind in kinds:
            if kind in _OF_PATCHES:
                features[f"{begin}{kind}"] = _OF_PATCHES[kind](value)
    return features


def pictures(
    encoder: Encoder,
    images: ImageSet,
    settings: Settings,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Iterator[Tensor]:
    """Batches of images as the model takes them, (n, C, side, side); the next ones are decoded meanwhile."""
    side = encoder.side
    square = square_preprocess(side, *encoder.normalisation)  # a model's own may cut off the borders

    def load(number: int) -> Tensor:
        if images.read_bands is not None:
            bands = images.read_bands(number)
            if images.stretched:
                bands = resize(bands, [side, side], InterpolationMode.BICUBIC)
            return square(bands)
        image = images.read(number)
        if images.stretched:
            return square(image.resize((side, side), resample))
        return encoder.preprocess(image)

    numbers = range(len(images))
    starts = numbers[:: settings.batch_size]
    with ThreadPoolExecutor(max(1, settings.threads)) as pool:
        batches = (
            [pool.submit(load, number) for number in numbers[start : start + settings.batch_size]]
            for start in starts
        )
        decoding = deque(islice(batches, _AHEAD))
        try:
            while decoding:
                yield torch.stack([image.result() for image in decoding.popleft()])
                decoding.extend(islice(batches, 1))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

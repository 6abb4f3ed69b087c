"""Depth by a linear head on a frozen feature map, as DINOv2 and DINOv3 measure it on NYU Depth v2.

256 depths from 1 mm to 10 m, each with the weight (relu + 0.1) / sum, give a place its own; the loss is SILog,
https://arxiv.org/abs/1406.2283. RMSE in metres and delta1, the share of pixels within a factor of 1.25, are means over
the test images of what is measured in each.

Data: `images/<split>` and `depth/<split>`, 16-bit PNG files of millimetres, called as the images; 0 is not known. In
maps of 480 x 640 pixels the part counts that Eigen et al. named.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge import heads
from visft_ds.evals.judge.dense_sets import every, parts_of
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.heads import BATCH, Batches, Heads, Loss, Recipe, enlarged, fit, order_of
from visft_ds.evals.judge.images import chosen, digest, from_files, image_files
from visft_ds.evals.judge.protocol import Benchmark, Features, ImageSet, Score, fifth
from visft_ds.evals.judge.protocols import QUICK, Protocol, shortened
from visft_ds.evals.judge.published import Sight
from visft_ds.evals.judge.scoring import Settings
from visft_ds.files import read_bytes, reading

NUMBERS = ("RMSE", "delta1")
BINS, NEAREST, FARTHEST = 256, 1e-3, 10.0  #: metres
_SIDE = 224  # of the maps that quick heads learn from, pixels
_PLAIN_STEPS = 100  # before the variance counts
_NYU = (480, 640)  # height and width
_EIGEN = slice(45, 471), slice(41, 601)
_TAUGHT = slice(45, 472), slice(43, 608)  # without the white border of training images
_CROP = (416, 544)

Metres = npt.NDArray[np.float32]  # (H, W); 0: not known


@dataclass(frozen=True)
class DepthSet:
    """Images and how far away all in them is."""

    images: ImageSet
    files: tuple[Path, ...]
    inner: tuple[slice, slice]  #: rows and columns that count in maps of NYU's size

    def depth(self, place: int) -> Metres:
        """Of an image; 0 wherever it does not count."""
        path = self.files[place]
        with reading(path, "a depth map"), Image.open(io.BytesIO(read_bytes(path)), formats=("PNG",)) as image:
            if not image.mode.startswith("I"):
                raise ValueError(f"it is a picture of mode {image.mode}: give millimetres as 16-bit grey PNG")
            metres = np.asarray(image).astype(np.float32) / np.float32(1000)
            metres[(metres < NEAREST) | (metres > FARTHEST)] = 0
            if metres.shape == _NYU:
                counting = np.zeros_like(metres)
                counting[self.inner] = metres[self.inner]
                metres = counting
            if not metres.any():
                raise ValueError(f"it has no depth between {NEAREST:g} and {FARTHEST:g} m")
            return metres

    def part(self, places: list[int]) -> DepthSet:
        """Some of the images."""
        files = tuple(self.files[place] for place in places)
        return replace(self, images=chosen(self.images, places), files=files)


def read_depth(
    most: Mapping[str, int], source: str, train: str | None = None, test: str | None = None
) -> tuple[DepthSet, DepthSet]:
    """(images to train heads on, images to judge them on). Raises ValueError for a part without images or maps."""
    root, found = Path(source), []
    parts = sorted(path.name for path in root.glob("depth/*/"))
    for name, part, inner in zip(most, parts_of(source, parts, train, test), (_TAUGHT, _EIGEN), strict=True):
        files = image_files(root / "images" / part)
        kept = [files[place] for place in every(len(files), most[name])]
        maps = [root / "depth" / part / f"{path.stem}.png" for path in kept]
        if not kept:
            raise ValueError(f"{root / 'images' / part} has no images")
        images = from_files(kept, root)
        stamp = digest((images.fingerprint, from_files(maps, root).fingerprint))
        found.append(DepthSet(replace(images, stretched=True, fingerprint=stamp), tuple(maps), inner))
    return found[0], found[1]


def depth(label: str, train: DepthSet, test: DepthSet, protocol: Protocol) -> Benchmark:
    """RMSE and delta1 of a linear head."""

    def scores(features: Features, wanted: Collection[str] = NUMBERS) -> Iterator[Score]:
        yield from _quick(train, features["train"]["patches"], test, features["test"]["patches"], protocol.depth)

    few = train.part(every(len(train.images), QUICK.images["train"]))

    def held_out(features: Mapping[str, Tensor], number: str) -> float:
        maps, (rest, held), brief = features["patches"], fifth(len(few.images)), shortened(QUICK.depth)
        found = _quick(few.part(rest), maps[rest], few.part(held), maps[held], brief, resampled=False)
        return next(-score.value if score.lower else score.value for score in found if score.name == number)

    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        ("patches",),
        NUMBERS,
        {"benchmark": "depth 1", "protocol": asdict(protocol)},
        scores,
        held_out=held_out,
        choosing=few.images,
        published=None if protocol.name == QUICK.name else partial(_published, train, test, protocol.depth),
    )


def _quick(
    train: DepthSet, learnt: Tensor, test: DepthSet, judged: Tensor, recipe: Recipe, resampled: bool = True
) -> list[Score]:
    """Both scores by maps (images, D, h, w) of the images."""
    squares = [
        Image.fromarray(train.depth(place)).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        for place in range(len(learnt))
    ]
    truth = torch.stack([torch.from_numpy(np.array(square)) for square in squares])
    draws = heads.RESAMPLES * resampled
    fitted = _fitted(learnt[:1], len(learnt), lambda drawn: (learnt[drawn], truth[drawn]), recipe, draws)
    with torch.no_grad():
        return _measured((one for part in judged.split(BATCH) for one in metres(fitted(part))), test)


def _fitted(example: Tensor, images: int, batches: Batches, recipe: Recipe, draws: int) -> Heads:
    """Heads trained on maps like the example (1, D, h, w)."""
    untrained = Heads(1 + draws, example.shape[1], BINS, recipe.dropout).to(example.device)
    return fit(untrained, images, batches, silog(recipe.stride), recipe)


def metres(outputs: Tensor) -> Tensor:
    """(..., BINS, h, w) -> (..., h, w)."""
    weights = torch.relu(outputs) + 0.1
    bins = torch.linspace(NEAREST, FARTHEST, BINS).to(outputs)
    return torch.einsum("...bhw,b->...hw", weights, bins) / weights.sum(dim=-3)


def silog(stride: int) -> Loss:
    """sqrt(var g + 0.15 mean(g)^2) of g, the logarithms' difference, over the pixels whose depth is known."""
    steps = count()

    def loss(outputs: Tensor, truth: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        step = min(stride, *truth.shape[1:])
        row, column = torch.randint(step, (2,), generator=generator).tolist()
        seen = truth[:, None, row::step, column::step]
        said = enlarged(metres(outputs), (truth.shape[1], truth.shape[2]), step, (row, column))
        error = said.log() - seen.clamp(min=NEAREST).log()
        share = (seen > 0) * weights.T[:, :, None, None]
        total = share.sum(dim=(0, 2, 3)).clamp(min=1e-6)
        mean = (share * error).sum(dim=(0, 2, 3)) / total
        variance = (share * (error - mean[:, None, None]) ** 2).sum(dim=(0, 2, 3)) / total
        return (variance * (next(steps) >= _PLAIN_STEPS) + 0.15 * mean**2 + 1e-12).sqrt().sum()

    return loss


def _measured(seen: Iterable[Tensor], test: DepthSet) -> list[Score]:
    """Scores of the metres (heads, h, w) that are seen in each test image."""
    found = []
    for place, one in enumerate(seen):
        truth = torch.from_numpy(test.depth(place)).to(one)
        known = truth > 0
        said = enlarged(one, (truth.shape[0], truth.shape[1]))[:, known].clamp(NEAREST, FARTHEST).double()
        error, ratio = said - truth[known], said / truth[known]
        within = torch.maximum(ratio, 1 / ratio) < 1.25
        found.append(torch.stack([(error**2).mean(dim=1).sqrt(), within.double().mean(dim=1)]).cpu())
    values = torch.stack(found, dim=2).numpy()  # (numbers, heads, images)
    pairs = zip(NUMBERS, values, strict=True)
    return [Score(name, of[0], retrained=of[1:].mean(axis=1), lower=name == "RMSE") for name, of in pairs]


def _published(
    train: DepthSet, test: DepthSet, recipe: Recipe, encoder: Encoder, settings: Settings, wanted: Collection[str]
) -> Iterator[Score]:
    """On crops, without a border where images are NYU's; an image and its mirror image are judged."""
    sight, size = Sight(encoder, settings), len(train.images)

    def change(image: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
        if truth.shape == _NYU:
            image, truth = image[(..., *_TAUGHT)], truth[_TAUGHT]
        crop = transforms.Compose([transforms.RandomCrop(_CROP, pad_if_needed=True), transforms.RandomHorizontalFlip()])
        both: tuple[Tensor, Tensor] = crop(tv_tensors.Image(image), tv_tensors.Mask(truth))
        return both

    crops = sight.crops(train.images, train.depth, order_of(size, recipe.steps).tolist(), BATCH, change)
    example = sight.see(torch.zeros(1, 3, *_CROP, dtype=torch.uint8))
    fitted = _fitted(example, size, lambda drawn: next(crops), recipe, heads.RESAMPLES)

    def seen() -> Iterator[Tensor]:
        for place in range(len(test.images)):
            pixels = pixels_of.pil_to_tensor(test.images.read(place))
            both = metres(fitted(sight.see(torch.stack([pixels, pixels.flip(2)]))))
            yield (both[0] + both[1].flip(2)) / 2

    with torch.no_grad():
        yield from _measured(seen(), test)

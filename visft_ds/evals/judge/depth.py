"""Depth by a linear head on a frozen feature map, as facebookresearch/dinov3 measures it on NYU Depth v2.

dinov3/eval/depth/{train,eval,loss,metrics,transforms,schedulers}.py with configs/config-nyu.yaml. 256 depths
from 1 mm to 10 m, each with the weight (relu + 0.1) / sum, give a patch its own; the loss is SILog,
https://arxiv.org/abs/1406.2283. RMSE in metres and delta1, the share of pixels within a factor of 1.25, are
means over the test images of what is measured in each. In maps of NYU's size the part counts that Eigen et
al. named.

Differs from the source in: pixels are normalised as the model was trained; crops of images that are smaller
than 416 x 544 are filled up (there refused); Eigen's part is cut out of maps of 480 x 640 alone (there of any
size, scaled).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.benchmark import Benchmark, Number, Score
from visft_ds.evals.judge.crops import View
from visft_ds.evals.judge.dense_probes import Source, at_labels, probe, trained
from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.evals.judge.heads import BATCH, Recipe, sampled
from visft_ds.evals.judge.protocol import NORMALISED, PUBLISHED, QUICK, SIZES, Protocol

RMSE = Number(
    "RMSE",
    how="Batch normalisation and a linear layer on patches give 256 bins of depth, by AdamW at 3e-4. Metres, on "
    "Eigen's crop, mean over images.",
    published="38,400 steps of 16 crops of 416 x 544 pixels; flips are averaged.",
    quick=f"{QUICK.depth.steps:,} steps of {BATCH} images. {SIZES}",
    source="https://github.com/facebookresearch/dinov3, eval/depth",
    differs=f"{NORMALISED}; images smaller than a crop are filled up (there refused); Eigen's crop is cut out of "
    "maps of 480 x 640 alone",
    lower=True,
    chooses_layer=True,
    trained=True,
    crops=PUBLISHED.depth.steps * BATCH,
)
DELTA1 = Number(
    "delta1",
    how="The share of pixels whose depth is within a factor of 1.25, by the head of RMSE.",
    source=RMSE.source,
)
NUMBERS = (RMSE, DELTA1)
BINS = 256
NEAREST = 1e-3  #: metres
FARTHEST = 10.0  #: metres
_EPSILON = 1e-3  # metres, added before a logarithm is taken
_PLAIN_STEPS = 100  # before the variance counts
_CROP = (416, 544)
_NYU = (480, 640)  # height and width
_EIGEN = slice(45, 471), slice(41, 601)
_TAUGHT = slice(45, 472), slice(43, 608)  # without the white border of training images
_ROTATION = 2.5  # degrees, either way, of half of the crops
_GAMMA = (0.9, 1.1)  # of half of the crops, with the two below
_BRIGHTNESS = (0.75, 1.25)
_COLOUR = (0.9, 1.1)  # of each channel for itself
_FIRST = 1e-3  # of the rate, at the first step
_LAST = 1 / 25 / 1000  # of the rate, at the end
_BETA1 = (0.85, 0.95)  # behind the warm-up, in which it is 0
_Mask = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.bool_]]


def depth(label: str, train: DenseSet, test: DenseSet, protocol: Protocol) -> Benchmark:
    """RMSE and delta1 of a linear head."""
    return probe(label, "depth 2", NUMBERS, taught(train), judged(test), protocol, _scores)


def taught(data: DenseSet) -> DenseSet:
    """Training images: what is known teaches, in maps of NYU's size without their border."""
    return _within(data, _TAUGHT, lambda metres: metres > 0)


def judged(data: DenseSet) -> DenseSet:
    """Test images: what lies between NEAREST and FARTHEST counts, in maps of NYU's size in Eigen's part."""
    return _within(data, _EIGEN, lambda metres: (metres > NEAREST) & (metres < FARTHEST))


def _within(data: DenseSet, part: tuple[slice, slice], counts: _Mask) -> DenseSet:
    """The same with 0 where a depth does not count."""

    def label(number: int) -> npt.NDArray[np.float32]:
        metres = data.label(number)
        inner = part if metres.shape == _NYU else (slice(None), slice(None))
        kept = np.zeros_like(metres)
        kept[inner] = np.where(counts(metres), metres, 0)[inner]
        if not kept.any():
            raise ValueError(
                f"{data.images.names[number]} has no depth between {NEAREST:g} and {FARTHEST:g} m"
            )
        return kept

    return replace(data, label=label)


def _scores(source: Source, wanted: Collection[str]) -> Iterator[Score]:
    head = trained(source, BINS, silog, source.protocol.depth, crop, schedule)
    return _measured(wanted, source.flipped(lambda maps: metres(head(maps))), source.test)


def crop(image: Image.Image, truth: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """A crop of the published size, whatever the side of the view; of NYU's images without their border."""
    pixels = pixels_of.to_dtype(pixels_of.pil_to_tensor(image), torch.float32, scale=True)
    if tuple(truth.shape) == _NYU:
        pixels, truth = pixels[:, *_TAUGHT], truth[*_TAUGHT]
    if torch.rand(()) < 0.5:
        angle = torch.empty(()).uniform_(-_ROTATION, _ROTATION).item()
        pixels = pixels_of.rotate(pixels, angle, interpolation=transforms.InterpolationMode.BILINEAR)
        truth = pixels_of.rotate(truth[None], angle)[0]
    if torch.rand(()) < 0.5:
        pixels, truth = pixels.flip(-1), truth.flip(-1)
    missing = [max(0, length - there) for length, there in zip(_CROP, truth.shape, strict=True)]
    pixels, truth = (F.pad(map_, (0, missing[1], 0, missing[0])) for map_ in (pixels, truth))
    top, left = (
        int(torch.randint(there - length + 1, ())) for length, there in zip(_CROP, truth.shape, strict=True)
    )
    part = ..., slice(top, top + _CROP[0]), slice(left, left + _CROP[1])
    pixels, truth = coloured(pixels[part]), truth[part]
    return pixels_of.normalize(pixels, list(view.mean), list(view.std)), truth


def coloured(pixels: Tensor) -> Tensor:
    """(3, H, W) in [0, 1], in half of the cases with another gamma, brightness and colour, clipped."""
    if torch.rand(()) >= 0.5:
        return pixels
    gamma, brightness = (torch.empty(()).uniform_(*limits) for limits in (_GAMMA, _BRIGHTNESS))
    colours = torch.empty(3, 1, 1).uniform_(*_COLOUR)
    return ((pixels * 255) ** gamma * brightness * colours).clamp(0, 255) / 255


def schedule(recipe: Recipe, step: int) -> tuple[float, float]:
    """(learning rate, beta1): both by a cosine, the rate over all steps, also in the warm-up, beta1 behind
    it.
    """
    if step < recipe.warm_up:
        fallen = (1 + math.cos(math.pi * step / recipe.steps)) / 2
        return recipe.rate * (_FIRST + fallen * step / recipe.warm_up), 0.0
    fallen = (1 + math.cos(math.pi * (step + 1) / recipe.steps)) / 2
    risen = (1 - math.cos(math.pi * (step - recipe.warm_up) / (recipe.steps - recipe.warm_up))) / 2
    return recipe.rate * (_LAST + (1 - _LAST) * fallen), _BETA1[0] + (_BETA1[1] - _BETA1[0]) * risen


def metres(outputs: Tensor) -> Tensor:
    """(..., BINS, h, w) -> (..., h, w)."""
    weights = torch.relu(outputs) + 0.1
    bins = torch.linspace(NEAREST, FARTHEST, BINS).to(outputs)
    return torch.einsum("...bhw,b->...hw", weights, bins) / weights.sum(dim=-3)


def silog(
    outputs: Tensor, truth: Tensor, weights: Tensor, generator: torch.Generator, stride: int, step: int
) -> Tensor:
    """sqrt(var g + 0.15 mean(g)^2) of g, the logarithms' difference, over the pixels whose depth is known."""
    said, seen = sampled(metres(outputs), truth.unsqueeze(1), stride, generator)
    error = (said + _EPSILON).log() - (seen + _EPSILON).log()
    share = (seen > 0) * weights.T[:, :, None, None]
    total = share.sum(dim=(0, 2, 3))
    mean = (share * error).sum(dim=(0, 2, 3)) / total.clamp(min=1)
    squares = (share * (error - mean[:, None, None]) ** 2).sum(dim=(0, 2, 3))
    variance = squares / (total - 1).clamp(min=1)
    return (variance * (step >= _PLAIN_STEPS) + 0.15 * mean**2).clamp(min=1e-12).sqrt().sum()


def _measured(wanted: Collection[str], seen: Iterable[Tensor], test: DenseSet) -> Iterator[Score]:
    """Scores of the metres (heads, h, w) that are seen in each test image."""
    each = []
    for large, truth in at_labels(seen, test):
        known = truth > 0
        said = large[:, known].clamp(NEAREST, FARTHEST).double()
        error = said - truth[known]
        ratio = said / truth[known]
        within = torch.maximum(ratio, 1 / ratio) < 1.25
        each.append(torch.stack([(error**2).mean(dim=1).sqrt(), within.double().mean(dim=1)]).cpu())
    values = torch.stack(each, dim=2).numpy()  # (numbers, heads, images)
    for number, (first, *others) in zip(NUMBERS, values, strict=True):
        if number.name in wanted:
            yield Score(number.name, first, retrained=np.array([other.mean() for other in others]))

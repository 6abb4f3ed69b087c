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

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.benchmark import Benchmark, BoolArray, Names, Number, Score, Scores
from visft_ds.evals.judge.crops import coin, filled_up, label_of, random_part
from visft_ds.evals.judge.dense_probes import Source, probe, trained
from visft_ds.evals.judge.dense_sets import DenseSet, read_depth
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.heads import BATCH, Recipe, enlarged, half_cosine, sampled
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.protocol import NORMALISED, PUBLISHED, QUICK, SIZES, Protocol
from visft_ds.tasks.depth.head import metres_of

RMSE = Number(
    "RMSE",
    how="Batch normalisation and a linear layer on patches give 256 bins of depth, by AdamW at 3e-4. Metres, "
    "on Eigen's crop, mean over images.",
    published="38,400 steps of 16 crops of 416 x 544 pixels; flips are averaged.",
    quick=f"{QUICK.depth.steps:,} steps of {BATCH} images. {SIZES}",
    source="https://github.com/facebookresearch/dinov3, eval/depth",
    differs=f"{NORMALISED}; images smaller than a crop are filled up (there refused); Eigen's crop is cut "
    "out of maps of 480 x 640 alone",
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
_WITHOUT_BORDER = slice(45, 472), slice(43, 608)  # of training images, which is white
_ROTATION = 2.5  # degrees, either way, of half of the crops
_GAMMA = (0.9, 1.1)  # of half of the crops, with the two below
_BRIGHTNESS = (0.75, 1.25)
_COLOUR = (0.9, 1.1)  # of each channel for itself
_FIRST = 1e-3  # of the rate, at the first step
_LAST = 1 / 25 / 1000  # of the rate, at the end
_FIRST_BETA1 = 0.85  # behind the warm-up, in which it is 0
_LAST_BETA1 = 0.95
_Metres = npt.NDArray[np.float32]


def benchmark(request: Request) -> Benchmark:
    """Depth of the images that a command line names."""
    train, test = read_depth(request)
    return depth(request.label, train, test, request.protocol)


def depth(label: str, train: DenseSet, test: DenseSet, protocol: Protocol) -> Benchmark:
    """RMSE and delta1 of a linear head."""
    return probe(label, "depth 2", NUMBERS, taught(train), judged(test), protocol, _scores)


def taught(data: DenseSet) -> DenseSet:
    """Training images: what is known teaches, in maps of NYU's size without their border."""
    return _restricted(data, _WITHOUT_BORDER, lambda metres: metres > 0)


def judged(data: DenseSet) -> DenseSet:
    """Test images: what lies between NEAREST and FARTHEST counts, in maps of NYU's size in Eigen's part."""
    return _restricted(data, _EIGEN, lambda metres: (metres > NEAREST) & (metres < FARTHEST))


def _restricted(
    data: DenseSet, part: tuple[slice, slice], counts: Callable[[_Metres], BoolArray]
) -> DenseSet:
    """The same with 0 where a depth does not count, or lies outside of the part of a map of NYU's size."""

    def label(number: int) -> _Metres:
        metres = data.label(number)
        does_count = counts(metres)
        if metres.shape == _NYU:
            inside = np.zeros(_NYU, dtype=bool)
            inside[part] = True
            does_count &= inside
        if not does_count.any():
            name = data.images.names[number]
            raise ValueError(f"{name} has no depth between {NEAREST:g} and {FARTHEST:g} m")
        return np.where(does_count, metres, np.float32(0))

    return replace(data, label=label)


def _scores(source: Source, names: Names) -> Scores:
    heads = trained(source, BINS, silog, source.protocol.depth, crop, schedule)
    outputs = source.flipped(lambda maps: metres(heads(maps)))
    return _measured(outputs, source.test)


def crop(image: Image.Image, truth: Tensor, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """A crop of the published size, whatever the encoder's side; of NYU's images without their border."""
    pixels = pixels_of.to_dtype(pixels_of.pil_to_tensor(image), torch.float32, scale=True)
    if tuple(truth.shape) == _NYU:
        pixels = pixels[:, *_WITHOUT_BORDER]
        truth = truth[*_WITHOUT_BORDER]
    if coin():
        angle = torch.empty(()).uniform_(-_ROTATION, _ROTATION).item()
        pixels = pixels_of.rotate(pixels, angle, interpolation=transforms.InterpolationMode.BILINEAR)
        truth = pixels_of.rotate(truth[None], angle)[0]
    both = torch.cat([pixels, truth[None]])  # (4, H, W): moved together from here on
    if coin():
        both = both.flip(-1)
    both = filled_up(both, _CROP)
    rows, columns = random_part(both.shape[1:], _CROP)
    both = both[:, rows, columns]
    return encoder.normalised(coloured(both[:3])), both[3]


def coloured(pixels: Tensor) -> Tensor:
    """(3, H, W) in [0, 1], in half of the cases with another gamma, brightness and colour, clipped."""
    if not coin():
        return pixels
    gamma = torch.empty(()).uniform_(*_GAMMA)
    brightness = torch.empty(()).uniform_(*_BRIGHTNESS)
    colours = torch.empty(3, 1, 1).uniform_(*_COLOUR)
    changed = (pixels * 255) ** gamma * brightness * colours
    return changed.clamp(0, 255) / 255


def schedule(recipe: Recipe, step: int) -> tuple[float, float]:
    """(learning rate, beta1): both by a cosine, the rate over all steps, also in the warm-up, beta1 behind
    it.
    """
    if step < recipe.warm_up:
        warm = step / recipe.warm_up
        return recipe.rate * (_FIRST + half_cosine(step / recipe.steps) * warm), 0.0
    fallen = half_cosine((step + 1) / recipe.steps)
    rate = recipe.rate * (_LAST + (1 - _LAST) * fallen)
    risen = 1 - half_cosine((step - recipe.warm_up) / (recipe.steps - recipe.warm_up))
    beta1 = _FIRST_BETA1 + (_LAST_BETA1 - _FIRST_BETA1) * risen
    return rate, beta1


def metres(outputs: Tensor) -> Tensor:
    """(..., BINS, h, w) -> (..., h, w)."""
    return metres_of(outputs, NEAREST, FARTHEST)


def silog(
    outputs: Tensor, truth: Tensor, weights: Tensor, generator: torch.Generator, stride: int, step: int
) -> Tensor:
    """sqrt(var g + 0.15 mean(g)^2) of g, the logarithms' difference, over the pixels whose depth is known."""
    predicted, metres_there = sampled(metres(outputs), truth.unsqueeze(1), stride, generator)
    error = (predicted + _EPSILON).log() - (metres_there + _EPSILON).log()
    share = (metres_there > 0) * weights.T[:, :, None, None]
    pixels = (0, 2, 3)  # of all images, by heads
    total = share.sum(dim=pixels)
    mean = (share * error).sum(dim=pixels) / total.clamp(min=1)
    deviation = error - mean[:, None, None]
    loss = 0.15 * mean**2
    if step >= _PLAIN_STEPS:
        squares = (share * deviation**2).sum(dim=pixels)
        loss = squares / (total - 1).clamp(min=1) + loss
    return loss.clamp(min=1e-12).sqrt().sum()


def _measured(outputs: Iterable[Tensor], test: DenseSet) -> Scores:
    """Scores of metres (heads, h, w) for each test image."""
    rmse = []
    delta1 = []
    for number, maps in enumerate(outputs):
        truth = label_of(test, number).to(maps.device)
        does_count = truth > 0
        large = enlarged(maps, truth.shape)
        predicted = large[:, does_count].clamp(NEAREST, FARTHEST).double()
        actual = truth[does_count]
        error = predicted - actual
        ratio = predicted / actual
        within = torch.maximum(ratio, 1 / ratio) < 1.25
        rmse.append((error**2).mean(dim=1).sqrt().cpu())
        delta1.append(within.double().mean(dim=1).cpu())
    for name, values in ((RMSE.name, rmse), (DELTA1.name, delta1)):
        of_heads = torch.stack(values, dim=1).numpy()  # (heads, images)
        yield Score(name, of_heads[0], retrained=of_heads[1:].mean(axis=1))

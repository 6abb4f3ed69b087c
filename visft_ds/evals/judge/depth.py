"""Depth by a linear head on a frozen feature map, as DINOv2 and DINOv3 measure it on NYU Depth v2.

256 depths from 1 mm to 10 m, each with the weight (relu + 0.1) / sum, give a place its own; the loss is SILog,
https://arxiv.org/abs/1406.2283. RMSE in metres and delta1, the share of pixels within a factor of 1.25, are means over
the test images of what is measured in each. In maps of NYU's size the part counts that Eigen et al. named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2 as transforms

from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.evals.judge.heads import sampled
from visft_ds.evals.judge.protocol import Benchmark, Score
from visft_ds.evals.judge.protocols import Protocol, Source, at_labels, probe, trained

NUMBERS = ("RMSE", "delta1")
BINS, NEAREST, FARTHEST = 256, 1e-3, 10.0  #: metres
_PLAIN_STEPS = 100  # before the variance counts
_CROP = (416, 544)
_NYU = (480, 640)  # height and width
_EIGEN = slice(45, 471), slice(41, 601)
_TAUGHT = slice(45, 472), slice(43, 608)  # without the white border of training images


def depth(label: str, train: DenseSet, test: DenseSet, protocol: Protocol) -> Benchmark:
    """RMSE and delta1 of a linear head."""
    train, test = known(train, _TAUGHT), known(test, _EIGEN)
    return probe(label, "depth 1", NUMBERS, train, test, protocol, _scores)


def known(data: DenseSet, counting: tuple[slice, slice]) -> DenseSet:
    """The same with 0 where the depth is not known, or in maps of NYU's size not within the part that counts."""

    def label(place: int) -> npt.NDArray[np.float32]:
        given = data.label(place)
        inner = counting if given.shape == _NYU else ...
        found = np.zeros_like(given)
        found[inner] = np.where((given >= NEAREST) & (given <= FARTHEST), given, 0)[inner]
        if not found.any():
            raise ValueError(f"{data.images.names[place]} has no depth between {NEAREST:g} and {FARTHEST:g} m")
        return found

    return replace(data, label=label)


def _scores(source: Source, wanted: Collection[str]) -> Iterator[Score]:
    head = trained(source, BINS, silog, source.protocol.depth, _cropped)
    return _measured(wanted, source.said(lambda maps: metres(head(maps)), in_windows=False), source.test)


def _cropped(_: int, image: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """A crop of the published size, whatever the side; of NYU's images without their border."""
    if truth.shape == _NYU:
        image, truth = (tv_tensors.wrap(one[(..., *_TAUGHT)], like=one) for one in (image, truth))
    crop = transforms.Compose([transforms.RandomCrop(_CROP, pad_if_needed=True), transforms.RandomHorizontalFlip()])
    both: tuple[Tensor, Tensor] = crop(image, truth)
    return both


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
    error = said.log() - seen.clamp(min=NEAREST).log()
    share = (seen > 0) * weights.T[:, :, None, None]
    total = share.sum(dim=(0, 2, 3)).clamp(min=1e-6)
    mean = (share * error).sum(dim=(0, 2, 3)) / total
    variance = (share * (error - mean[:, None, None]) ** 2).sum(dim=(0, 2, 3)) / total
    return (variance * (step >= _PLAIN_STEPS) + 0.15 * mean**2 + 1e-12).sqrt().sum()


def _measured(wanted: Collection[str], seen: Iterable[Tensor], test: DenseSet) -> Iterator[Score]:
    """Scores of the metres (heads, h, w) that are seen in each test image."""
    found = []
    for large, truth in at_labels(seen, test):
        known = truth > 0
        said = large[:, known].clamp(NEAREST, FARTHEST).double()
        error, ratio = said - truth[known], said / truth[known]
        within = torch.maximum(ratio, 1 / ratio) < 1.25
        found.append(torch.stack([(error**2).mean(dim=1).sqrt(), within.double().mean(dim=1)]).cpu())
    values = torch.stack(found, dim=2).numpy()  # (numbers, heads, images)
    for name, (first, *others) in zip(NUMBERS, values, strict=True):
        if name in wanted:
            retrained = np.array([other.mean() for other in others])
            yield Score(name, first, retrained=retrained, lower=name == "RMSE")

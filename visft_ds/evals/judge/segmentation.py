"""Segmentation by frozen feature maps: in context, by a linear head, and what the outlined objects are.

    in-context mIoU  by the nearest patches of training images, `in_context`
    linear mIoU      BatchNorm and a 1 x 1 convolution, `heads`
    objects kNN      features averaged over an object's outline, the 20 nearest vote with exp(cosine / 0.07)

mIoU is the mean over classes of intersection over union, both summed over the images, at the labels' own size; pixels
without a class count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge import heads, in_context
from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.heads import BATCH, Heads, cross_entropy, enlarged, fit, order_of, windows
from visft_ds.evals.judge.in_context import Memory, recall, remember, vote
from visft_ds.evals.judge.protocol import Benchmark, Features, FloatArray, Label, Score, hits, mean_ratio, rank_of
from visft_ds.evals.judge.protocols import QUICK, Protocol
from visft_ds.evals.judge.scoring import Settings, forward, pictures
from visft_ds.monitor.console import gauge
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.pictures import Picture, grid, palette, side_by_side

SIDE = 224  #: of the labels that quick heads learn from, and of a picture on a sheet, pixels
IN_CONTEXT, LINEAR, OBJECTS = "in-context mIoU", "linear mIoU", "objects kNN"
_KEPT = 112  # pixels of the side of a segmentation that is kept for the sheet
_PASSES = 2  # over the training images, of the published memory
_STRIDE = 2 / 3  # of windows, in sides


def segmentation(label: str, train: DenseSet, test: DenseSet, protocol: Protocol) -> Benchmark:
    """In-context and linear mIoU and, where objects are known, their kNN."""
    numbers = (IN_CONTEXT, LINEAR, *([OBJECTS] if test.things and train.things else []))

    def scores(features: Features) -> Iterator[Score]:
        for name in numbers:
            yield _quick(name, train, features["train"]["patches"], test, features["test"]["patches"], protocol)

    def held_out(features: Mapping[str, Tensor], number: str) -> float:
        maps, places = features["patches"], np.arange(len(train.images))
        held, rest = places[4::5].tolist(), places[places % 5 != 4].tolist()
        if not held:
            raise ValueError(f"{label} has {len(places)} training images; a layer is chosen with five or more")
        shorter = replace(QUICK.segmentation, steps=QUICK.segmentation.steps // 4, warm_up=QUICK.segmentation.warm_up // 4)
        few = replace(QUICK, memory=QUICK.memory // 4, segmentation=shorter)
        return _quick(number, train.part(rest), maps[rest], train.part(held), maps[held], few, alone=True).value

    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        ("patches",),
        numbers,
        {"benchmark": "segmentation 1", "protocol": asdict(protocol), "classes": test.classes},
        scores,
        sheet=partial(segmentation_sheet, test),
        held_out=held_out,
        published=None if protocol.name == "quick" else partial(_published, numbers, train, test, protocol),
    )


def _quick(
    name: str, train: DenseSet, learnt: Tensor, test: DenseSet, judged: Tensor, protocol: Protocol, alone: bool = False
) -> Score:
    """A number by maps (images, D, h, w) of each image; `alone`: without resamples."""
    if name == OBJECTS:
        return named(pooled(learnt, train), train, pooled(judged, test), test)
    if name == IN_CONTEXT:
        images = ((place, one, train.label(place)) for place, one in enumerate(learnt))
        memory = remember(images, len(train.classes), max(1, protocol.memory // len(learnt)))
        return overlapping(name, recall(memory, judged, 0 if alone else in_context.RESAMPLES), test)
    truth = torch.from_numpy(np.stack([_square(train.label(place)) for place in range(len(learnt))]))
    recipe, count = protocol.segmentation, 1 if alone else 1 + heads.RESAMPLES
    fitted = fit(
        Heads(count, learnt.shape[1], len(train.classes), recipe.dropout),
        len(learnt),
        lambda drawn: (learnt[drawn], truth[drawn]),
        cross_entropy(recipe.stride),
        recipe,
    )
    with torch.no_grad():
        return overlapping(name, (one for part in judged.split(BATCH) for one in fitted(part)), test)


def overlapping(name: str, seen: Iterable[Tensor], test: DenseSet) -> Score:
    """Score of what is seen in each test image, (1 + resamples, classes, h, w), the largest of a place its class."""
    found, maps, classes = [], [], len(test.classes)
    for place, one in enumerate(seen):
        label = torch.from_numpy(test.label(place)).to(one.device)
        said = enlarged(one, (label.shape[0], label.shape[1])).argmax(dim=1)
        known = label != VOID
        pairs = said[:, known] + classes * label[known] + classes**2 * torch.arange(len(said)).to(label.device)[:, None]
        counts = torch.bincount(pairs.flatten(), minlength=len(said) * classes**2).view(-1, classes, classes)
        both = counts.diagonal(dim1=1, dim2=2)
        found.append(torch.stack([both, counts.sum(dim=1) + counts.sum(dim=2) - both], dim=1).cpu())
        maps.append(F.interpolate(said[:1, None].float(), (_KEPT, _KEPT), mode="nearest-exact")[0, 0].cpu())
    values = torch.stack(found, dim=1).double().numpy()
    retrained = mean_ratio(values[1:].sum(axis=1))
    return Score(name, values[0], maps=torch.stack(maps).to(torch.int16).numpy(), retrained=retrained)


def named(known: Tensor, train: DenseSet, asked: Tensor, test: DenseSet) -> Score:
    """Score of naming the objects of test images (n, D) by those of the training images (m, D)."""
    owners, labels = (torch.tensor([getattr(one, name) for one in train.things]) for name in ("owner", "label"))
    memory = Memory(F.normalize(known, dim=1), F.one_hot(labels, len(train.classes)).to(known), owners.to(known.device))
    votes = vote(memory, asked, in_context.VOTERS, in_context.WARMTH).cpu()
    truth = torch.tensor([one.label for one in test.things])
    right = np.stack([hits(rank_of(one, truth), 1) for one in votes])
    groups = np.array([one.owner for one in test.things], dtype=np.int64)
    return Score(OBJECTS, right[0], groups, retrained=right[1:].mean(axis=1))


def pooled(maps: Iterable[Tensor], of: DenseSet) -> Tensor:
    """(objects, D), the mean of each object's part of the map (D, h, w) of its image."""
    by_image: dict[int, list[Any]] = {}
    for thing in of.things:
        by_image.setdefault(thing.owner, []).append(thing)
    found = []
    for place, one in enumerate(maps):
        for thing in by_image.get(place, ()):
            share = F.interpolate(thing.mask()[None, None], one.shape[-2:], mode="area")[0, 0].to(one)
            found.append((one * share).sum(dim=(1, 2)) / share.sum())
    return torch.stack(found)


def _square(label: Label) -> Label:
    return np.asarray(Image.fromarray(label).resize((SIDE, SIDE), Image.Resampling.NEAREST))


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Augmented images and their labels: the n-th is the same for every model."""

    def __init__(self, data: DenseSet, order: Iterable[int], change: Callable[[Any, Any], tuple[Tensor, Tensor]]) -> None:
        self.data, self.order, self.change = data, list(order), change

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        place = self.order[number]
        image = tv_tensors.Image(pixels_of.pil_to_tensor(self.data.images.read(place)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            return self.change(image, tv_tensors.Mask(torch.from_numpy(self.data.label(place))))


def _published(
    numbers: Iterable[str], train: DenseSet, test: DenseSet, protocol: Protocol, encoder: Encoder, settings: Settings
) -> Iterator[Score]:
    side, device = encoder.side, settings.device
    mean, std = encoder.normalisation
    store = torch.float16 if device.type == "cuda" else torch.float32

    def see(pixels: Tensor) -> Tensor:
        return forward(encoder, pixels, ("patches",), settings)["patches"].to(device)

    def seen(crop: Tensor) -> Tensor:
        scaled = pixels_of.to_dtype(crop, torch.float32, scale=True)
        return see(pixels_of.normalize(scaled, list(mean), list(std)))

    def maps(data: DenseSet) -> Iterator[Tensor]:
        size, count = settings.batch_size, len(data.images)
        batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
        for pixels in pictures(encoder, data.images, batches, settings.threads):
            yield see(pixels)

    def crops(order: Iterable[int], size: int, change: Any) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(Crops(train, order, change), size, num_workers=settings.threads)
        return ((seen(images), labels.to(device)) for images, labels in loader)

    encoder.module.to(device)
    for name in numbers:
        if name == OBJECTS:
            known, asked = (pooled(chain.from_iterable(maps(data)), data) for data in (train, test))
            yield named(known, train, asked, test)
        elif name == IN_CONTEXT:
            order = list(range(len(train.images))) * _PASSES
            jitter = transforms.RandomApply([transforms.ColorJitter(0.1, 0.1, 0.1, 0.1)], 0.5)
            change = transforms.Compose([transforms.RandomResizedCrop(side, (0.5, 2.0)), jitter])
            passes = crops(gauge("in-context memory", len(order), "images", order), settings.batch_size, change)
            taught = chain.from_iterable(zip(images.to(store), labels, strict=True) for images, labels in passes)
            memory = remember(
                ((place, one, label.cpu().numpy()) for place, (one, label) in zip(order, taught, strict=True)),
                len(train.classes),
                max(1, protocol.memory // len(order)),
            )
            yield overlapping(name, chain.from_iterable(recall(memory, part) for part in maps(test)), test)
        else:
            yield overlapping(name, _in_windows(...), test)

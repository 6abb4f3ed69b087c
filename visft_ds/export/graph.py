"""A task's whole model as a module of tensors alone: pictures of any size -> answers in their pixels.

The size that the network sees is fixed in it; pictures are scaled to that inside, as training scaled them.
Letters: B pictures, H W their pixels, h w grid of a map, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Map, valid_region
from visft_ds.data.transforms import Op, Pad, Resize, Size
from visft_ds.export.answers import ANSWERS, Outputs, Picture, dense_with_masks, quotient
from visft_ds.model import whole_cells, with_prefixes
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import Linear
from visft_ds.models.lora import LoRALinear, dense_update, lora_layers
from visft_ds.ops import at_least_float32
from visft_ds.settings.bands import Bands
from visft_ds.tasks.captioning.head import CaptioningHead, pool_valid
from visft_ds.tasks.detection.dense import DenseHead
from visft_ds.tasks.segmentation.head import choosing

#: torch scales bytes with weights of 16 bits: the largest of a size has as many digits as fit, at most 22.
_LARGEST_WEIGHT = 2**15
_MOST_DIGITS = 22


class Frame(NamedTuple):
    """Part of a picture's frame that the network sees."""

    size: Size  #: (height, width) in pixels that a picture is scaled to
    padded: Size  #: (height, width) of the whole cells that show it, upper left

    @classmethod
    def of(cls, ops: Sequence[Op], cell: int) -> Frame:
        """The frame of an evaluation's operations. Raises ValueError for others than scaling and padding."""
        size = padded = (0, 0)
        for op in ops:
            if isinstance(op, Resize):
                size = padded = (op.height, op.width)
            elif isinstance(op, Pad) and op.outside:
                padded = (op.height, op.width)
            else:
                raise ValueError(f"pictures are prepared by {op}, which no export has")
        return cls(size, whole_cells(padded, cell))


@dataclass(frozen=True)
class FrameMap(Map):
    """Map of pictures that all fill the same part of a frame."""

    part: tuple[int, int] = (0, 0)  #: rows and columns of cells that show them

    def has_empty_cells(self) -> bool:
        return self.part != tuple(self.features.shape[-2:])

    def parts(self) -> list[tuple[int, int]]:
        return [self.part]


class Maps(nn.Module):
    """Pictures (B, H, W, 3) uint8, or values (B, H, W, n) of the bands that a backbone reads, -> its maps; in
    16 bits its weights and products are fp16.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, frame: Frame, *, half: bool = False) -> None:
        super().__init__()
        self.frame = frame
        self.half_precision = half
        self.backbone = copy.deepcopy(backbone).half() if half else backbone
        self.register_buffer("mean", 255 * torch.tensor(backbone.pixel_mean).view(-1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(backbone.pixel_std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> list[FrameMap]:
        height, width = self.frame.size
        values = images.float().permute(0, 3, 1, 2)
        if self.backbone.bands is None:
            levels = resized(values, self.frame.size)
        else:
            levels = resized_levels(levels_of(values, self.backbone.bands), self.frame.size)
        normalised = (levels - self.mean) / self.std
        whole_height, whole_width = self.frame.padded
        pixels = F.pad(normalised, (0, whole_width - width, 0, whole_height - height))
        if self.half_precision:
            pixels = pixels.half()
        tensors = [at_least_float32(tensor) for tensor in self.backbone(pixels, prefixes=True)]
        return [self._map(map_, prefix) for map_, prefix in with_prefixes(tensors)]

    def _map(self, features: Tensor, prefix: Tensor | None) -> FrameMap:
        batch, _, rows, columns = features.shape
        height, width = self.frame.size
        whole_height, whole_width = self.frame.padded
        part = (-(-height * rows // whole_height), -(-width * columns // whole_width))
        valid = valid_region(torch.tensor([self.frame.size]), self.frame.padded, (rows, columns))
        valid = valid.to(features.device).expand(batch, -1, -1)
        cells = torch.tensor([[height * rows / whole_height, width * columns / whole_width]])
        return FrameMap(features, valid, cells.expand(batch, -1), prefix, part)


class Features(nn.Module):
    """Pictures -> maps of the backbone by name, (B, D, h, w)."""

    def __init__(self, maps: Maps) -> None:
        super().__init__()
        self.maps = maps
        self.names = ["features"]
        if len(maps.backbone.shapes) > 1:
            self.names = [f"map_{number}" for number in maps.backbone.layers_read]

    def forward(self, images: Tensor) -> Outputs:
        maps = self.maps(images)
        return {name: map_.features for name, map_ in zip(self.names, maps, strict=True)}


class Answer(nn.Module):
    """Pictures -> what a head says of them, by name; see the functions in `answers`."""

    def __init__(self, task: str, maps: Maps, head: nn.Module, ids: Sequence[int]) -> None:
        super().__init__()
        self.task = task
        self.maps = maps
        self.head = head
        self.ids = tuple(ids)  #: of the categories that the data has, by label

    def forward(self, images: Tensor) -> Outputs:
        maps = self.maps(images)
        picture = Picture(images.shape[1], images.shape[2], *self.maps.frame, self.ids)
        if isinstance(self.head, DenseHead) and self.head.masks is not None:
            return dense_with_masks(self.head, maps, picture)
        attended: list[Tensor] = []

        def keep(_: Tensor, covered: Tensor) -> Tensor:
            attended.append(covered)
            return covered

        with choosing(self.head, keep):
            output = self.head(maps)
        answer = ANSWERS.get((self.task, type(output)))
        if answer is None:
            raise ValueError(f"the {self.task} head has no export: leave it out with --tasks")
        decoded = answer(output, picture)
        if attended:
            decoded["attended"] = torch.stack(attended, dim=1)
        return decoded


class CaptionEncoder(nn.Module):
    """Pictures -> what the steps of a caption begin with: pooled cells, their keys, and two states."""

    def __init__(self, maps: Maps, head: CaptioningHead) -> None:
        super().__init__()
        self.maps = maps
        self.head = head

    def forward(self, images: Tensor) -> Outputs:
        map_ = self.maps(images)[-1]
        cells = pool_valid(map_.features, map_.valid, self.head.encoded_image_size)
        mean = cells.mean(dim=1)
        return {
            "cells": cells,
            "keys": self.head.encoder_att(cells),
            "hidden": self.head.init_h(mean),
            "state": self.head.init_c(mean),
        }


class CaptionStep(nn.Module):
    """Last word ids (B,) and states -> the most probable next words `caption_ids` (B,), and their states."""

    def __init__(self, head: CaptioningHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, words: Tensor, cells: Tensor, keys: Tensor, hidden: Tensor, state: Tensor) -> Outputs:
        embedded = self.head.embedding(words).unsqueeze(1)
        states, _, next_state = self.head.recurrence(embedded, cells, keys, hidden, state)
        next_hidden = states[:, 0]
        banned, _, _ = self.head._rules(next_hidden)
        logits = self.head.fc(next_hidden) + banned
        return {
            "caption_ids": logits.argmax(dim=1),
            "logits": logits,
            "next_hidden": next_hidden,
            "next_state": next_state,
        }


@contextmanager
def merged_adapters(backbone: Backbone) -> Iterator[None]:
    """Have the updates of adapted linear layers in their weights: a graph has one product for each."""
    layers = lora_layers(backbone).items()
    adapted = {name: layer for name, layer in layers if isinstance(layer, LoRALinear)}
    for name, layer in adapted.items():
        with torch.no_grad():
            update = dense_update(layer.out_features, layer.lora_A, layer.lora_B, layer.slices, layer.scale)
            weight = layer.weight + update
        merged = Linear(layer.in_features, layer.out_features, device="meta")
        merged.weight = nn.Parameter(weight)
        merged.register_parameter("bias", layer.bias)
        backbone.set_submodule(name, merged)
    try:
        yield
    finally:
        for name, layer in adapted.items():
            backbone.set_submodule(name, layer)


def resized(levels: Tensor, size: Size) -> Tensor:
    """Pictures (B, 3, H, W), whole numbers from 0 to 255, at this size, exactly as torch scales bytes.

    Bilinear with antialias: first columns, then rows, each rounded to bytes. Sums stay below 2**24, up to
    where fp32 is exact, as long as a side becomes at most a hundred times as short.
    """
    height, width = size
    columns = _scaling(levels.shape[3], width, levels.device)
    narrow = _bytes(levels @ columns.coarse.T, levels @ columns.fine.T, columns.unit)
    rows = _scaling(levels.shape[2], height, levels.device)
    return _bytes(rows.coarse @ narrow, rows.fine @ narrow, rows.unit)


def _bytes(coarse: Tensor, fine: Tensor, unit: Tensor) -> Tensor:
    """(256 coarse + fine) / unit, rounded, where all three are whole and the unit is a multiple of 512."""
    return torch.floor((coarse + torch.floor(fine / 256)) / (unit / 256) + 0.5).clamp(0, 255)


def levels_of(values: Tensor, bands: Bands) -> Tensor:
    """Values float32 -> levels, as `data.decode.levels` gives them."""
    low, high = bands.range
    scaled = (values - low) * (255 / (high - low))
    if bands.kind == "float32":
        scaled = torch.where(scaled == scaled, scaled, 0.0)  # NaN
    return scaled.clamp(0, 255)


def resized_levels(levels: Tensor, size: Size) -> Tensor:
    """Levels (B, n, H, W) of bands at this size, as torch scales floats: bilinear with antialias."""
    height, width = size
    columns = _scaling_of_floats(levels.shape[3], width, levels)
    rows = _scaling_of_floats(levels.shape[2], height, levels)
    return rows @ (levels @ columns.T)


def _scaling_of_floats(pixels: int, new_pixels: int, like: Tensor) -> Tensor:
    """Matrix (new_pixels, pixels) of a triangle around each new pixel, with the roundings of torch."""
    scale = torch.ones_like(like[0, 0, 0, 0]) * pixels / new_pixels
    centres = (torch.arange(new_pixels, device=like.device)[:, None] + 0.5) * scale
    distances = torch.arange(pixels, device=like.device)[None] - centres + 0.5
    reach = torch.maximum(scale, torch.ones_like(scale))
    weights = 1 - (distances / reach).abs()
    weights = torch.maximum(weights, torch.zeros_like(weights))
    return weights / weights.sum(dim=1, keepdim=True)


class Weights(NamedTuple):
    """Whole numbers (new_pixels, pixels), 256 coarse + fine, and their unit."""

    coarse: Tensor
    fine: Tensor
    unit: Tensor


def _scaling(pixels: int, new_pixels: int, device: torch.device) -> Weights:
    """Weights of a triangle around each new pixel, rounded as torch rounds them.

    All is computed in whole numbers, which no runtime rounds otherwise, up to quotients that are whole.
    """
    new = 2 * torch.arange(new_pixels, device=device)[:, None] + 1
    old = 2 * torch.arange(pixels, device=device)[None] + 1
    distances = (old * new_pixels - new * pixels).abs()
    reach: Any = 2 * torch.sym_max(pixels, new_pixels)  # a number, which may be that of the graph
    heights = torch.maximum(reach - distances, torch.zeros_like(distances))
    sums = heights.sum(dim=1, keepdim=True)
    largest = (heights.float() / sums.float()).max()
    scales = 2 ** torch.arange(1, _MOST_DIGITS + 1, device=device)
    fitting = torch.floor(largest * scales.float() + 0.5) < _LARGEST_WEIGHT
    unit = torch.where(fitting, scales, 1).max()
    # TensorRT has no operators for the quotient of whole numbers, nor for their clamp above.
    weights = quotient(2 * heights * unit + sums, 2 * sums)
    coarse = torch.floor(weights / 256)
    return Weights(coarse, weights - 256 * coarse, unit.float())


def modules_of(task: str, maps: Maps, head: nn.Module, ids: Sequence[int]) -> dict[str, nn.Module]:
    """Name of a file -> module: one for most heads, two of captions."""
    if isinstance(head, CaptioningHead):
        return {f"{task}_encoder": CaptionEncoder(maps, head), f"{task}_step": CaptionStep(head)}
    return {task: Answer(task, maps, head, ids)}

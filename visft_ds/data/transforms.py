"""Geometry of images: operations, what draws them for an image, and their effect on pixels and boxes.

The geometry of a sample (flip, crop, sizes) is drawn from the sample's random numbers and the stored image
size alone, before any pixel is looked at. A process that reads labels only therefore arrives at the same
targets as one that also has the image.

Shape letters: H W pixels, n boxes of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # (height, width)
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Flip:
    """Mirror left and right."""


@dataclass(frozen=True)
class Resize:
    """Scale to exactly this size, bilinear with antialias."""

    height: int
    width: int


@dataclass(frozen=True)
class Crop:
    """Cut out a rectangle; what it shows beyond the image, as zooms do, is grey (128)."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Pad:
    """Extend right and bottom to this size with a value, 0 to 255.

    The extension is part of the image from then on, or `outside`: no targets and no other operation see it.
    """

    height: int
    width: int
    value: int
    outside: bool = False


Op = Flip | Resize | Crop | Pad


class Geometry(Protocol):
    """Geometric operations that images of a stream get."""

    def draw(self, size: Size, train: bool, generator: np.random.Generator) -> list[Op]:
        """Operations for an image of `size`, in order; evaluation draws nothing from `generator`."""
        ...


def final_size(size: Size, ops: Sequence[Op]) -> Size:
    """(height, width) after `ops`."""
    for op in ops:
        if not isinstance(op, Flip):
            size = (op.height, op.width)
    return size


def apply_to_image(image: npt.NDArray[Any], ops: Sequence[Op]) -> Tensor:
    """(H, W, 3) uint8 -> (3, H', W') uint8; (H, W, n) float32, levels of bands -> (n, H', W') float32.

    The channels-first tensor is a view of the decoded array: resizing that view is measurably faster than
    resizing a contiguous copy, and gives the same values.
    """
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    for op in ops:
        if isinstance(op, Flip):
            tensor = tensor.flip(2)
        elif isinstance(op, Crop):
            tensor = _crop(tensor, op)
        elif isinstance(op, Pad):
            _, height, width = tensor.shape
            tensor = _pad(tensor, [0, op.width - width, 0, op.height - height], op.value)
        else:
            tensor = _resize(tensor, op)
    return tensor.contiguous()


def _resize(tensor: Tensor, resize: Resize) -> Tensor:
    """As torchvision's, which is not imported: it brings torch's compiler, more than a second."""
    size = (resize.height, resize.width)
    if tensor.shape[1:] == size:
        return tensor
    return F.interpolate(tensor[None], size, mode="bilinear", antialias=True)[0]


def _crop(tensor: Tensor, crop: Crop) -> Tensor:
    _, height, width = tensor.shape
    bottom = crop.top + crop.height
    right = crop.left + crop.width
    inside = tensor[:, max(0, crop.top) : bottom, max(0, crop.left) : right]
    beyond = [-crop.left, right - width, -crop.top, bottom - height]
    return _pad(inside, [max(0, side) for side in beyond], value=128)


def _pad(tensor: Tensor, sides: list[int], value: int) -> Tensor:
    """The image with so many pixels of a value more at the left, right, top and bottom."""
    return F.pad(tensor, sides, value=value) if any(sides) else tensor


def apply_to_boxes(boxes: FloatArray, size: Size, ops: Sequence[Op]) -> FloatArray:
    """(n, 4) xyxy in pixels of an image of `size` -> the same boxes after `ops`, cut at the borders of every
    crop.
    """
    boxes = boxes.copy()
    for op in ops:
        height, width = size
        if isinstance(op, Flip):
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        elif isinstance(op, Crop):
            boxes -= [op.left, op.top, op.left, op.top]
            boxes = boxes.clip(0, [op.width, op.height, op.width, op.height])
        elif isinstance(op, Resize):
            scale_x = op.width / width
            scale_y = op.height / height
            boxes *= [scale_x, scale_y, scale_x, scale_y]
        size = final_size(size, [op])
    return boxes


def short_side_size(size: Size, short_side: int, max_long: int | None) -> Size:
    """The size with the given short side and the same shape; a smaller one if the long side would pass
    `max_long`.

    The rule is the reference's: the short side is rounded to what `max_long` allows, the long side is cut off
    to an integer (DETR, https://arxiv.org/abs/2005.12872, its public training recipe).
    """
    height, width = size
    small = min(size)
    large = max(size)
    if max_long is not None and large / small * short_side > max_long:
        short_side = round(max_long * small / large)
    long_side = int(short_side * large / small)
    if short_side < 1:  # a strip of 1 x 10,000 pixels
        assert max_long is not None
        short_side = 1
        long_side = max_long
    return (short_side, long_side) if height <= width else (long_side, short_side)


@dataclass(frozen=True)
class Square:
    """Scaling to a square of `size` pixels, whatever the shape of the image, without augmentation."""

    size: int

    def draw(self, size: Size, train: bool, generator: np.random.Generator) -> list[Op]:
        return [Resize(self.size, self.size)]


@dataclass(frozen=True)
class ShortSides:
    """Mirroring and scaling of whole images by the short side.

    Training: mirror with probability `flip`, scale the short side to one of `min_size_train`, the long one to
    at most `max_size_train`. Evaluation: short side `min_size_test`, long side at most `max_size_test`. With
    `fixed_size`, both scale to a square of that many pixels, with `keep_shape` to a long side of as many, and
    training also mirrors and, five times of six, zooms: it takes a window with sides of `zoom` times those of
    the image, smallest to largest, up to 15 % wider or narrower, in or around the image.
    """

    min_size_train: Sequence[int]
    max_size_train: int
    flip: float
    min_size_test: int
    max_size_test: int
    fixed_size: int | None
    keep_shape: bool = False
    zoom: tuple[float, float] | None = None

    def draw(self, size: Size, train: bool, generator: np.random.Generator) -> list[Op]:
        ops = list[Op]()
        if train:
            window = self._window(size, generator)
            if generator.random() < self.flip:
                ops.append(Flip())
            ops += window
        return [*ops, self.scale(final_size(size, ops), train, generator)]

    def _window(self, size: Size, generator: np.random.Generator) -> list[Op]:
        """The zoom of an image of `size`, or none."""
        if not self.fixed_size or not self.zoom or generator.random() < 1 / 6:
            return []
        smallest, largest = np.log(self.zoom)
        factor = np.exp(generator.uniform(smallest, largest))
        stretch = np.exp(generator.uniform(-0.15, 0.15) / 2)
        height, width = size
        window_height = max(1, round(height * factor / stretch))
        window_width = max(1, round(width * factor * stretch))
        top = offset(height - window_height, generator)
        left = offset(width - window_width, generator)
        return [Crop(top, left, window_height, window_width)]

    def scale(self, size: Size, train: bool, generator: np.random.Generator) -> Resize:
        """The last operation of an image of `size`."""
        if self.fixed_size is not None:
            height, width = size
            if not self.keep_shape:
                return Resize(self.fixed_size, self.fixed_size)
            scale = self.fixed_size / max(size)
            return Resize(max(1, round(scale * height)), max(1, round(scale * width)))
        if not train:
            return Resize(*short_side_size(size, self.min_size_test, self.max_size_test))
        side = self.min_size_train[int(generator.integers(0, len(self.min_size_train)))]
        return Resize(*short_side_size(size, side, self.max_size_train))


def offset(spare: int, generator: np.random.Generator) -> int:
    """Random place of a window along an axis that is `spare` pixels longer or shorter than it."""
    return int(generator.integers(min(0, spare), max(0, spare) + 1))


def of_options(kind: Callable[..., _T], options: Mapping[str, Any]) -> _T:
    """An instance of a dataclass whose fields are named as options; other options are left."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: options[name] for name in names})

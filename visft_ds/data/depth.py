"""Depth maps: 16-bit PNG files called as the images, byte for byte in the labels of shards.

A number times the unit is metres along the camera's axis; 0 is not known. Maps without a unit are relative,
as MiDaS and Depth Anything predict them: the nearer the larger, of any scale and offset.

A label has {"depth": {"png": base64 of the file, "metres": unit, or null}}.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from visft_ds.data.masks import pixels_of_png, png_of, text_of_png
from visft_ds.files import read_bytes, reading

MILLIMETRES = 0.001  #: the usual unit, in metres
UNIT_FILE = "unit.txt"  #: in the folder `depth`: metres of a number, or RELATIVE
RELATIVE = "relative"
_LARGEST = 65_535  # of 16 bits
_KITTI = 1 / 256  # metres, for depths that millimetres cannot say in 16 bits

Values = npt.NDArray[np.float32]
Stored = Mapping[str, Any]  #: as a label has it


def read_unit(folder: Path) -> float | None:
    """Metres of a number in the maps of a folder `depth`, by its `unit.txt`; None: the maps are relative."""
    path = folder / UNIT_FILE
    if not path.is_file():
        return MILLIMETRES
    with reading(path, f"metres of a number in these depth maps, or the word {RELATIVE}"):
        text = read_bytes(path).decode("utf-8-sig").strip()
        if text == RELATIVE:
            return None
        unit = float(text)
        if not 0 < unit < math.inf:
            raise ValueError(f"{text} is not a number above 0")
        return unit


def read_numbers(data: bytes) -> npt.NDArray[np.uint16]:
    """(H, W) numbers of a 16-bit grey PNG. Raises ValueError for another picture."""
    what = "16-bit grey PNG"
    modes = ("I", "I;16")
    return pixels_of_png(data, "depth map", f"a {what}", modes, f"give {what}, such as millimetres").astype(
        np.uint16
    )


def stored_depth(data: bytes, metres: float | None) -> dict[str, Any]:
    """A PNG of a unit as a label has it."""
    return {"png": text_of_png(data), "metres": metres}


def values_of(depth: Stored) -> Values:
    """(H, W) metres, or numbers of a relative map, of a depth map in a label; 0 where nothing is known."""
    numbers = read_numbers(png_of(depth))
    unit = depth["metres"]
    return numbers.astype(np.float32) if unit is None else in_metres(numbers, unit)


def in_metres(numbers: npt.NDArray[Any], unit: float) -> Values:
    """Numbers of a map times its unit; of whole fractions of a metre the quotient is exact."""
    return numbers.astype(np.float32) / np.float32(1 / unit)


def encoded(metres: Values) -> dict[str, Any]:
    """Metres (H, W) as a label has them: in millimetres, or 1/256 m where a depth exceeds 65.5 m."""
    unit = MILLIMETRES if metres.max() < _LARGEST * MILLIMETRES else _KITTI
    return _packed(metres.astype(np.float64) / unit, unit)


def encoded_relative(values: Values) -> dict[str, Any]:
    """Values (H, W) above 0 without a unit, the nearer the larger, as a label has them: the largest is 65535,
    none is 0.
    """
    return _packed((values.astype(np.float64) * (_LARGEST / values.max())).clip(min=1), None)


def _packed(numbers: npt.NDArray[np.float64], unit: float | None) -> dict[str, Any]:
    file = io.BytesIO()
    whole = numbers.round().clip(0, _LARGEST).astype(np.uint16)
    Image.fromarray(whole).save(file, "PNG", compress_level=1)
    return stored_depth(file.getvalue(), unit)


def is_depth(depth: Any) -> bool:
    """Return True for a depth map as labels have them."""
    if not isinstance(depth, dict) or not isinstance(depth.get("png"), str) or "metres" not in depth:
        return False
    unit = depth["metres"]
    return unit is None or (type(unit) in (int, float) and 0 < unit < math.inf)

"""Pictures that are more, or deeper, than three colours of 8 bits, in a build: their form, their bytes in a
shard, and what their values are like.

A shard holds the bands that are read as a TIFF with a page for each, deflated, with the values of the source.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from visft_ds.files import image_frame, read_bands
from visft_ds.settings.bands import Bands, Kind
from visft_ds.shards.common import Json

Range = tuple[float, float]
_LOOKED_AT = 20  #: pictures that decide what all of a split have to be
_BEYOND = "picture with values beyond the range (cut off there)"


@dataclass(frozen=True)
class Form:
    """Form of all pictures of a split."""

    count: int  #: bands of a file
    kind: Kind  #: of values
    numbers: tuple[int, ...]  #: of the bands that are read, from 1
    range: Range | None  #: None: that of the values

    def chosen(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The bands that are read, of the values (H, W, bands) of a picture. Raises ValueError for others."""
        count = values.shape[2]
        if (count, str(values.dtype)) != (self.count, self.kind):
            raise ValueError(
                f"other bands than most pictures: {count} of {values.dtype}, not {self.count} of {self.kind}"
            )
        return values[..., [number - 1 for number in self.numbers]]


def form_of(paths: Sequence[Path], value_range: Range | None, numbers: Sequence[int] | None) -> Form | None:
    """The form of most of the first pictures; None: three colours of 8 bits, and nothing else was asked for.

    Raises ValueError for bands that they do not have, and for floats without a range.
    """
    is_asked = value_range is not None or numbers is not None
    forms = Counter[tuple[int, str] | None]()
    problem: ValueError | None = None
    for path in paths[:_LOOKED_AT]:
        if not is_asked and not _is_deep(path):
            forms[None] += 1
            continue
        try:
            values = read_bands(path)
        except ValueError as error:
            problem = error
        else:
            forms[values.shape[2], str(values.dtype)] += 1
    if not forms and problem is not None:
        raise problem
    most_common = forms.most_common(1)[0][0] if forms else None
    if most_common is None:
        return None
    count, kind = most_common
    if numbers is not None and max(numbers) > count:
        text = ",".join(map(str, numbers))
        raise ValueError(
            f"--bands {text}: {paths[0]} and others have {count} bands: give numbers from 1 to {count}"
        )
    if value_range is None and kind == "uint8":
        value_range = (0.0, 255.0)
    if value_range is None and kind == "float32":
        raise ValueError(
            f"{paths[0]} and others have values that are no bytes or numbers of 16 bits, and no file "
            "states their range: give the values of black and white, such as --range 0,1"
        )
    (kind_of_value,) = [known for known in get_args(Kind) if known == kind]
    return Form(count, kind_of_value, tuple(numbers or range(1, count + 1)), value_range)


def _is_deep(path: Path) -> bool:
    """Return True for a picture of more than colours of 8 bits."""
    try:
        return bool(image_frame(path).beyond)
    except ValueError:
        return False  # no picture at all, which is named when shards are built


def tiff_of(values: npt.NDArray[Any]) -> bytes:
    """Values (H, W, bands) as a TIFF with a page for each band."""
    from tifffile import imwrite

    file = io.BytesIO()
    pages = np.moveaxis(values, -1, 0)
    imwrite(file, pages, photometric="minisblack", compression="zlib", metadata=None, software=False)
    return file.getvalue()


class Statistics:
    """Range, mean and spread of the values of the pictures of a shard."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.pixels = 0
        self.lowest = math.inf
        self.highest = -math.inf
        self.sums = np.zeros(len(form.numbers))
        self.squares = np.zeros(len(form.numbers))

    def add(self, values: npt.NDArray[Any]) -> list[str]:
        """Count a picture (H, W, n); returns what is odd about it."""
        known = np.nan_to_num(values.astype(np.float64).reshape(-1, values.shape[2]))
        odd = []
        if self.form.range is not None:
            low, high = self.form.range
            if known.min() < low or known.max() > high:
                odd.append(_BEYOND)
            known = known.clip(low, high)
        self.pixels += len(known)
        self.lowest = min(self.lowest, float(known.min()))
        self.highest = max(self.highest, float(known.max()))
        self.sums += known.sum(axis=0)
        self.squares += np.square(known).sum(axis=0)
        return odd

    def record(self) -> Json:
        """All numbers, for the record of a shard."""
        return {
            "pixels": self.pixels,
            "lowest": self.lowest,
            "highest": self.highest,
            "sums": self.sums.tolist(),
            "squares": self.squares.tolist(),
        }


def bands_of(form: Form, records: Sequence[Json]) -> Bands:
    """The bands of a split, of the records of its shards.

    Raises ValueError for a band that has the same value everywhere.
    """
    pixels = sum(record["pixels"] for record in records)
    low, high = form.range or (
        min(record["lowest"] for record in records),
        max(record["highest"] for record in records),
    )
    means = np.sum([record["sums"] for record in records], axis=0) / pixels
    squares = np.sum([record["squares"] for record in records], axis=0) / pixels
    spreads = np.sqrt((squares - means**2).clip(0))
    for number, spread, mean in zip(form.numbers, spreads, means, strict=True):
        if spread <= 1e-6 * (high - low):
            raise ValueError(
                f"band {number} is {mean:g} in all pictures within the range from {low:g} to {high:g}: leave "
                "it out with --bands, or give another --range"
            )
    return Bands(
        count=form.count,
        kind=form.kind,
        numbers=form.numbers,
        range=(low, high),
        mean=tuple(((means - low) / (high - low)).tolist()),
        std=tuple((spreads / (high - low)).tolist()),
    )

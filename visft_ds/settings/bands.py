"""Bands of pictures that are more, or deeper, than three colours of 8 bits: as shards have them and a model
reads them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from visft_ds.settings.fields import Above, Fraction, Positive, Problems, StrictModel

Kind = Literal["uint8", "uint16", "float32"]  #: type of a value
#: weights of the first convolution for bands that are new to a backbone of three colours
NewBands = Literal["mean", "zero"]
Value = Annotated[float, Field(ge=-3e38, le=3e38)]  #: of float32


class Bands(StrictModel):
    """`visft.model.bands`: bands that the backbone reads, decided by the shards.

    A value becomes a level: 0 at the lower end of the range and below, 255 at the upper end and above.
    """

    count: Positive  #: number of bands in the file of a picture
    #: numbers of the bands that are read, from 1, in this order
    numbers: Annotated[tuple[Positive, ...], Field(min_length=1)]
    kind: Kind  #: type of the values in the file: uint8, uint16 or float32
    range: tuple[Value, Value]  #: values that count as black and as white
    mean: tuple[Fraction, ...]  #: mean of each band that is read, as a share of the range
    std: tuple[Above, ...]  #: standard deviation of each band that is read, as a share of the range
    #: initial weights for bands that are new to the backbone, mean or zero, as visft.model.new_bands
    new: NewBands = Field(default="mean", exclude_if=lambda new: new == "mean")

    def contradictions(self) -> Problems:
        """Bands that are not there, statistics of others, and a range without a width."""
        if max(self.numbers) > self.count:
            yield "numbers", f"a picture has bands 1 to {self.count}"
        if not len(self.numbers) == len(self.mean) == len(self.std):
            yield "mean", "needs, as std, a number for each band"
        if self.range[0] >= self.range[1]:
            yield "range", "must be [lowest, highest]"
        if self.new == "zero" and len(self.numbers) <= 3:
            yield "new", "zero is for more than three bands, of which the first three are no new ones"

    @classmethod
    def of(cls, value: Any) -> Bands | None:
        """Those of a value in a JSON file; None of null."""
        return None if value is None else cls.model_validate(value, strict=False)


def in_words(bands: Bands | None) -> str:
    """Content of pictures, for a message; all but statistics. None: what any photograph is."""
    if bands is None:
        return "three colours of 8 bits"
    low, high = bands.range
    numbers = ",".join(map(str, bands.numbers))
    return f"bands {numbers} of {bands.count} ({bands.kind}, {low:g} to {high:g})"

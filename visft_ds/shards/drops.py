"""Annotations that are lost, by cause. A file that loses more than a tenth of them is of another form than COCO's.

A few bad entries are findings like others; but where one field is written otherwise than COCO has it, all annotations
of a data set vanish, and training on the rest fails late or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SHARE = 10  # one in so many may be lost
_NAMES: Mapping[type, str] = {
    str: "text",
    int: "an integer",
    float: "a number with a decimal point",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "an object",
}


class TooManyDropsError(ValueError):
    """More than a tenth of the annotations would be lost; the message says why."""


class Drops:
    """Losses among the annotations of one file, each cause with its number and first example."""

    def __init__(self, place: str | Path, word: str) -> None:
        self._place, self._word = place, word
        self._causes: dict[str, tuple[int, str]] = {}
        self._strangers = 0
        self.kept = 0  #: annotations that are not lost
        self.spared = 0  #: annotations that were not asked for

    def add(self, cause: str, example: str, number: int = 1, *, stranger: bool = False) -> None:
        """Count annotations that are lost; of a stranger, which has no image, nobody knows whether it was asked for."""
        count, first = self._causes.get(cause, (0, example))
        self._causes[cause] = count + number, first
        self._strangers += stranger

    def refuse_too_many(self, note: str = "") -> None:
        """Raise TooManyDropsError if more than a tenth is lost, of the whole file or of what was asked for."""
        lost = sum(count for count, _ in self._causes.values())
        chosen, total = lost - self._strangers, lost + self.kept + self.spared
        if lost * _SHARE > total:
            parts = f"{lost} of {total} {self._word} of {self._place}"
        elif chosen * _SHARE > chosen + self.kept:
            parts = f"{chosen} of {chosen + self.kept} {self._word} of {self._place} that were asked for"
        else:
            return
        causes = (
            f"\n  {count:>7} x {cause}\n            {example}" for cause, (count, example) in self._causes.items()
        )
        raise TooManyDropsError(
            f"{parts} cannot be used as they are (allowed is a tenth):{''.join(causes)}{note}\n"
            "  Nothing was written. Mend the file, or give --allow-drops: entries that cannot be used are left out, "
            "boxes of another form kept as given."
        )


def wrong_kind(entry: Mapping[str, Any], key: str, wanted: str) -> str:
    """Reason why a field of a JSON object is of another type than COCO's, for messages."""
    if key not in entry:
        return f"there is no {key!r}; COCO wants {wanted}"
    return f"{key!r} is {_NAMES[type(entry[key])]}; COCO wants {wanted}"


def wrong_integer(entry: Mapping[str, Any], key: str) -> str:
    """Reason why a field of a JSON object is no integer of 64 bits, for messages."""
    if type(entry.get(key)) is int:
        return f"{key!r} is out of range; allowed are 64 bits"
    return wrong_kind(entry, key, "an integer")


def wrong_box(entry: Mapping[str, Any]) -> str:
    """Reason why the `bbox` of a JSON object is no list of four numbers, for messages."""
    box = entry.get("bbox")
    if not isinstance(box, list):
        return wrong_kind(entry, "bbox", "four numbers")
    if len(box) != 4:
        return "'bbox' is no list of four numbers: x y width height"
    strange = next(value for value in box if type(value) not in (int, float))
    return f"'bbox' holds {_NAMES[type(strange)]}; COCO wants four numbers"

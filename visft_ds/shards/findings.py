"""Everything that a conversion looks for, what it does about it, and how often it was found.

A few bad entries are findings like others; but where one field is written otherwise than COCO has it, all annotations
of a data set vanish, and training on the rest fails late or not at all. So a file that loses more than a tenth of them
is of another form than COCO's, and refused with the causes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Everything that is looked for -> what is done about it.
FINDINGS: Mapping[str, str] = {
    "image entry malformed": "left out",
    "image id twice": "the first entry kept",
    "annotation malformed": "dropped: its id or category id is no integer",
    "annotation without image": "dropped",
    "annotation of two images": "dropped: two file names have its image id",
    "annotation id twice": "the first kept",
    "unknown category": "annotation dropped",
    "category name twice": "kept: two classes that tables and pictures name alike",
    "category dropped": "annotation dropped, as --categories asks",
    "box malformed": "annotation dropped",
    "crowd flag malformed": "annotation dropped: iscrowd is neither 0 nor 1",
    "box without area": "kept in the shard, left out in training",
    "box beyond the image": "kept as given, cut at the border in training",
    "box looks like x1 y1 x2 y2": "kept as given; COCO wants x y width height",
    "box looks normalised to 0..1": "kept as given; COCO wants pixels",
    "area missing": "width x height of the box used",
    "polygon under three points": "polygon dropped: readers take two points for a box",
    "polygon malformed": "polygon dropped: it must be a flat list of finite numbers, two for each point",
    "mask malformed": "mask dropped, box kept: neither polygons nor a run-length code that fills the image",
    "run-length code of another size": "mask dropped, box kept",
    "uncompressed run-length code": "kept, compressed so that every reader can use it",
    "instance without mask": "kept",
    "ignore flag": "kept as an ordinary instance: COCO's evaluation knows iscrowd alone",
    "more fields": "not in shards: heads learn from boxes, masks and categories",
    "label without image": "left out",
    "crowd": "kept in the shard, left out in training, used in evaluation",
    "crowd dropped": "dropped, as --crowd drop asks",
    "caption without image": "dropped",
    "caption of two images": "dropped: two file names have its image id",
    "caption empty": "dropped",
    "caption in one piece": "kept as one word: words are found by the spaces between them",
    "caption over 50 words": "kept; learnt from only where visft.tasks.captioning.image.max_words allows it",
    "image without instances": "kept",
    "image without captions": "kept",
    "empty image dropped": "left out, as --empty drop asks",
    "EXIF rotation": "ignored: the annotations fit the pixels as stored",
    "grey image": "kept, decoded as RGB",
    "CMYK image": "kept, decoded as RGB",
    "PNG named otherwise": "kept, stored as .png",
    "WebP converted": "stored as JPEG, as --reencode asks",
    "quarantined": "left out, listed with reasons under 'quarantine' in the manifest",
}
MOST_OF_A_BOX = 1e9  #: pixels; the area of a box with shorter sides fits into 64 bits
_EXAMPLES = 3
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


class Findings:
    """Counts of what was found, with the first few examples of each kind."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, kind: str, example: str) -> None:
        """Count one more; the example is kept if it is among the first."""
        assert kind in FINDINGS, kind
        self._counts[kind] = self._counts.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(example)

    def extend(self, found: Iterable[Sequence[str]]) -> None:
        """Add (kind, example) pairs."""
        for kind, example in found:
            self.add(kind, example)

    def first(self, kind: str) -> tuple[int, str]:
        """(how often it was found, the first example)."""
        return self._counts.get(kind, 0), self._examples.get(kind, [""])[0]

    def listed(self) -> list[dict[str, Any]]:
        """List an entry per kind that was found, in the order of `FINDINGS`: kind, count, examples, action."""
        return [
            {"kind": kind, "count": self._counts[kind], "examples": self._examples[kind], "action": action}
            for kind, action in FINDINGS.items()
            if kind in self._counts
        ]


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
    """Reason why the `bbox` of a JSON object is no list of four numbers of pixels, for messages."""
    box = entry.get("bbox")
    if not isinstance(box, list):
        return wrong_kind(entry, "bbox", "four numbers")
    if len(box) != 4:
        return "'bbox' is no list of four numbers: x y width height"
    strange = [value for value in box if type(value) not in (int, float)]
    if not strange:
        return f"'bbox' is out of range; allowed are numbers below {MOST_OF_A_BOX:,.0f}"
    return f"'bbox' holds {_NAMES[type(strange[0])]}; COCO wants four numbers"

"""Everything that a conversion looks for, what it does about it, and how often it was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: Everything that is looked for -> what is done about it.
FINDINGS: Mapping[str, str] = {
    "image entry malformed": "left out",
    "image id twice": "the first entry kept",
    "annotation malformed": "dropped: its id or category id is no integer",
    "annotation without image": "dropped",
    "annotation id twice": "the first kept",
    "unknown category": "annotation dropped",
    "category name twice": "kept: two classes that tables and pictures name alike",
    "category dropped": "annotation dropped, as --categories asks",
    "box malformed": "annotation dropped",
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
    "crowd": "kept in the shard, left out in training, used in evaluation",
    "crowd dropped": "dropped, as --crowd drop asks",
    "caption without image": "dropped",
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
_EXAMPLES = 3


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

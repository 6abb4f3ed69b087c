"""Content of a shard, read from the tar alone, and its problems."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isal import isal_zlib

from visft_ds.data.decode import MOST_PIXELS, decode_image, image_format, image_size
from visft_ds.data.labels import parse_label, stored_size, trainable
from visft_ds.shards.tar_scan import BLOCK, Damage, Member, TarScan
from visft_ds.tasks.vocabulary import caption_words

#: Extensions of members that are read; any other is a problem.
ALLOWED = ("jpg", "jpeg", "png", "json")
_MAX_NAME = 255
_SHOWN = 5  # names in a message
_NAME = re.compile(r"([^./\\\0][^./\\\0]*)\.([^./\\\0]+)")
#: Payload offset -> the index's entry for it: (part, key).
Places = dict[int, tuple[str, str]]


@dataclass(frozen=True)
class Problem:
    """A problem of a file of a split."""

    file: str
    message: str
    keys: tuple[str, ...] = ()  #: of the samples concerned, where it is known
    offset: int | None = None  #: in the file, in bytes
    fix: str = ""  #: what to do about it


def some(names: Sequence[str]) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@dataclass
class ShardContent:
    """Everything that a walk over a shard finds."""

    name: str
    bytes: int = 0
    sha256: str = ""
    rows: list[dict[str, int]] = field(default_factory=list)  #: index rows of complete samples
    members: dict[int, tuple[str, int, int]] = field(default_factory=dict)  #: offset -> key, size, crc32
    problems: list[Problem] = field(default_factory=list)
    blamed: set[str] = field(default_factory=set)  #: keys that a problem already names
    damaged: bool = False  #: its structure as a tar is damaged
    counts: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    categories: set[int] = field(default_factory=set)  #: raw ids that annotations use

    def blame(self, message: str, *keys: str, offset: int | None = None) -> None:
        """Note a problem."""
        self.problems.append(Problem(self.name, message, keys, offset))
        self.blamed.update(keys)


def read_shard(
    path: Path,
    *,
    plain: bool = False,
    decode: bool = False,
    places: Places | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> ShardContent:
    """Read every byte of a shard; whatever is wrong with it is in `problems`, nothing is raised for it.

    Args:
        plain: accept tars that other programs have written, see `TarScan`, with keys that are not image ids.
        decode: decode every image with the decoder of training.
        places: expected offsets of payloads, to name the sample that damage concerns.
        on_bytes: called with the bytes read since the last call; may raise to stop.

    Raises:
        OSError: the file cannot be read.
    """
    content = ShardContent(path.name)
    reading = _Reading(content, plain=plain, decode=decode, places=places or {})
    with open(path, "rb") as file:
        content.bytes = path.stat().st_size
        scan = TarScan(file, content.bytes, plain=plain)
        reported = 0
        for found in scan:
            if isinstance(found, Damage):
                reading.damage(found)
            else:
                reading.member(found)
            on_bytes(scan.offset - reported)
            reported = scan.offset
        reading.end()
        on_bytes(scan.offset - reported)
        content.sha256 = scan.sha256
    return content


class _Reading:
    """Assembles members into samples: an image, directly followed by its label."""

    def __init__(self, content: ShardContent, *, plain: bool, decode: bool, places: Places) -> None:
        self._content, self._plain, self._places = content, plain, places
        self._decode = decode
        self._image: tuple[str, str, Member] | None = None  # key, extension, member: waits for its label
        self._keys: set[str] = set()

    def damage(self, found: Damage) -> None:
        """Note a damage; where the index knows the place, with the sample that it concerns."""
        self._content.damaged = True
        part, key = self._places.get(found.offset + BLOCK, ("", ""))
        if key:
            where = f"{part} of {key} at offset {found.offset}"
            what = f"{where}: {found.message}" if found.cut else f"header of the {where} is damaged: {found.message}"
            self._content.blame(what, key, offset=found.offset)
        else:
            self._content.blame(f"at offset {found.offset}: {found.message}", offset=found.offset)

    def member(self, found: Member) -> None:
        """Take a member."""
        content = self._content
        name = _NAME.fullmatch(found.name.removeprefix("./") if self._plain else found.name)
        plain = found.name.isprintable() and len(found.name) <= _MAX_NAME
        if name is None or name[2].lower() not in ALLOWED or not plain:
            allowed = "a key without dots and folders, then .jpg, .png or .json"
            content.blame(f"member {found.name[:_MAX_NAME]!r} is not allowed: {allowed}", offset=found.header)
            return
        key, extension = name[1], name[2].lower()
        content.members[found.offset] = (key, len(found.payload), isal_zlib.crc32(found.payload))
        if extension != "json":
            self._lonely_image()
            if key in self._keys:
                content.blame(f"image of {key} at offset {found.offset}: this key is there twice", key)
            self._keys.add(key)
            self._image = key, extension, found
        elif self._image is not None and self._image[0] == key:
            _, image_extension, image = self._image
            self._image = None
            self._sample(key, image_extension, image, found)
        elif key not in content.blamed:
            twice = "this key is there twice" if key in self._keys else "its image does not come directly before it"
            content.blame(f"label of {key} at offset {found.offset}: {twice}", key, offset=found.offset)

    def end(self) -> None:
        """Finish: no more members follow."""
        self._lonely_image()

    def _lonely_image(self) -> None:
        if self._image is not None and self._image[0] not in self._content.blamed:
            key, _, image = self._image
            message = f"image of {key} at offset {image.offset}: no label directly behind it"
            self._content.blame(message, key, offset=image.offset)
        self._image = None

    def _sample(self, key: str, extension: str, image: Member, label_file: Member) -> None:
        content = self._content
        try:
            label = parse_label(label_file.payload)
            self._check_key(key, label["image_id"])
        except ValueError as error:
            content.blame(f"label of {key} at offset {label_file.offset}: {error}", key, offset=label_file.offset)
            return
        try:
            size = self._check_image(extension, image.payload)
        except ValueError as error:
            content.blame(f"image of {key} at offset {image.offset}: {error}", key, offset=image.offset)
            return
        expected = stored_size(label)
        if size != expected:
            stated = f"{expected[1]} x {expected[0]}"
            message = f"image of {key} at offset {image.offset}: {size[1]} x {size[0]} pixels, the label says {stated}"
            content.blame(message, key, offset=image.offset)
            return
        self._take(image, label_file, label)

    def _check_key(self, key: str, image_id: int) -> None:
        if key != f"{image_id:012d}" and not (self._plain and not (key.isdecimal() and int(key) != image_id)):
            raise ValueError(f"it says image_id {image_id}, which does not fit the key")

    def _check_image(self, extension: str, data: bytes) -> tuple[int, int]:
        """(height, width) after checking the type, and with `decode` all pixels."""
        kind = image_format(data)
        if kind != {"jpeg": "jpg"}.get(extension, extension):
            raise ValueError(f"it is named .{extension}, but its content is {kind}")
        size = image_size(data)
        if self._decode:
            pixels = decode_image(data, max_pixels=MOST_PIXELS)
            size = (pixels.shape[0], pixels.shape[1])
        return size

    def _take(self, image: Member, label_file: Member, label: dict[str, Any]) -> None:
        content = self._content
        annotations, captions = label["annotations"], label["captions"]
        useful = trainable(label)
        row = {"width": label["width"], "height": label["height"], "image_id": label["image_id"]}
        row |= {"num_annotations": useful, "num_captions": len(captions)}
        for part, member in (("image", image), ("label", label_file)):
            _, size, crc32 = content.members[member.offset]
            row |= {f"{part}_offset": member.offset, f"{part}_size": size, f"{part}_crc32": crc32}
        content.rows.append(row)
        content.counts.update(
            images=1,
            annotations=len(annotations),
            crowds=sum(annotation["iscrowd"] for annotation in annotations),
            trainable=useful,
            captions=len(captions),
            images_without_trainable=int(useful == 0),
            images_without_captions=int(not captions),
            empty=int(not annotations and not captions),
        )
        content.words.update(word for caption in captions for word in caption_words(caption))
        content.categories.update(annotation["category_id"] for annotation in annotations)

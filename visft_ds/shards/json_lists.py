"""The lists of a large JSON object, a part at a time.

As Python objects, a COCO file takes ten times its size. So the text is cut where a list has `}, {` and each part is
parsed alone. No text is trusted to be a border: a part counts only if it is valid JSON as a list of its own, which a
part that begins or ends inside a string or an element is not. All parts together, and what is around them, are checked
to be the whole object; so this accepts what a parser of the whole accepts, and gives the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import orjson

PART = 1 << 20  #: bytes of text that are parsed at once; 16 MB take twice the memory in all, and an eighth more time
_BORDER = re.compile(rb"\}\s*,\s*\{")
_TRIES = 100  # borders that are tried before the rest is parsed at once

Parts = Iterator[list[Any]]


def read_lists(data: bytes, names: Sequence[str], part: int = PART) -> dict[str, Callable[[], Parts]]:
    """Name -> a function that gives the list of that name in parts; names that are no list of an object are left out.

    Raises orjson.JSONDecodeError for what is not JSON; for a list in parts, only when the bad part's turn comes.
    """
    places = _places(data, names)
    segments = None if places is None or len(data) <= part else _segments(data, places, part)
    if segments is None:
        return _whole(data, names)
    found: dict[str, Callable[[], Parts]] = {}
    for name, (start, end) in segments.items():
        opening = re.compile(rb'"%b"\s*:\s*\[\s*' % name.encode()).match(data, start, end)
        if end - start <= part or opening is None:
            value = orjson.loads(b"{%b}" % data[start:end])[name]
            if isinstance(value, list):
                found[name] = _once(value)
        else:
            found[name] = _cut(data, opening.end(), end, part)
    return found


def _whole(data: bytes, names: Sequence[str]) -> dict[str, Callable[[], Parts]]:
    content = orjson.loads(data)
    if not isinstance(content, dict):
        return {}
    return {name: _once(content[name]) for name in names if isinstance(content.get(name), list)}


def _once(value: list[Any]) -> Callable[[], Parts]:
    return lambda: iter((value,))


def _places(data: bytes, names: Sequence[str]) -> dict[str, int] | None:
    """Name -> where its key is; None if one is there more than once, so that only a parser can tell which is meant."""
    places = {}
    for name in names:
        key = b'"%b"' % name.encode()
        place = data.find(key)
        if place >= 0:
            if data.find(key, place + 1) >= 0:
                return None
            places[name] = place
    return places


def _segments(data: bytes, places: Mapping[str, int], part: int) -> dict[str, tuple[int, int]] | None:
    """Name -> (start, end) of its key, its value and perhaps other members; None if that is not how the file is.

    Small segments are parsed to be sure, the rest when their turn comes.
    """
    end = len(data.rstrip())
    ordered = sorted(places, key=places.__getitem__)
    if not ordered or data[end - 1 : end] != b"}":
        return None
    starts = [places[name] for name in ordered]
    ends = [_before_comma(data, start) for start in starts[1:]] + [end - 1]
    head = data[: starts[0]].rstrip()
    if None in ends or not head.endswith((b"{", b",")) or not _is_object(head.removesuffix(b",") + b"}"):
        return None
    segments = {
        name: (start, stop) for name, start, stop in zip(ordered, starts, ends, strict=True) if stop is not None
    }
    small = [span for span in segments.values() if span[1] - span[0] <= part]
    return segments if all(_is_object(b"{%b}" % data[start:stop]) for start, stop in small) else None


def _before_comma(data: bytes, start: int) -> int | None:
    """Where the comma in front of a place is, if there is one."""
    place = start
    while place and data[place - 1 : place].isspace():
        place -= 1
    return place - 1 if data[place - 1 : place] == b"," else None


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


def _cut(data: bytes, start: int, end: int, part: int) -> Callable[[], Parts]:
    """Parts of the list whose elements begin at `start`, in a segment that ends at `end`."""

    def parts() -> Parts:
        place = start
        while end - place > part:
            border = _next_border(data, place, end, part)
            if border is None:
                break
            value, place = border
            yield value
        try:
            rest = orjson.loads(b'{"list":[%b}' % data[place:end])
        except orjson.JSONDecodeError:
            orjson.loads(data)  # says where in the file it is wrong
            raise
        yield rest["list"]

    return parts


def _next_border(data: bytes, start: int, end: int, part: int) -> tuple[list[Any], int] | None:
    """(the elements up to a border behind `part` bytes, where the next element begins)."""
    for tried, border in enumerate(_BORDER.finditer(data, start + part, end)):
        if tried == _TRIES:
            break
        try:
            return orjson.loads(b"[%b]" % data[start : border.start() + 1]), border.end() - 1
        except orjson.JSONDecodeError:
            continue
    return None

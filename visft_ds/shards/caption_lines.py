"""A folder of images with captions -> COCO's lists: JSON lines of `file_name` and `text`, as image folders of the
Hugging Face Hub have them (metadata.jsonl). `caption` or `captions` do as well, each a text or a list of texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from visft_ds.config.records import parse_json
from visft_ds.shards.images import stored_frame
from visft_ds.shards.inputs import MadeJson, read_bounded

_TEXTS = ("text", "caption", "captions")
_MOST_BYTES = 1 << 31
_SHOWN = 5  # wrong lines in a message


def read_lines(path: Path) -> MadeJson:
    """The captions as a COCO file; images lie beside the file, and more lines of one image are more captions.

    Raises:
        ValueError: no line, or lines that are wrong: the first few by their numbers.
    """
    numbers: dict[str, int] = {}
    captions: list[dict[str, Any]] = []
    wrong: list[str] = []
    for place, line in enumerate(read_bounded(path, _MOST_BYTES).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        try:
            if line.strip():
                name, texts, others = _entry(parse_json(line, "it"))
                image = numbers.setdefault(name, len(numbers) + 1)
                captions += [{**others, "id": place, "image_id": image, "caption": text} for text in texts]
        except ValueError as error:
            wrong.append(f"\n  line {place}: {error}")
    if wrong:
        more = f"\n  and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(f"{path}: wrong lines: {len(wrong)}{''.join(wrong[:_SHOWN])}{more}")
    if not numbers:
        raise ValueError(f'{path} has no line such as {{"file_name": "a.jpg", "text": "A dog."}}')
    images = []
    for name, number in numbers.items():
        height, width, _ = stored_frame(path.parent / name)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
    return MadeJson(f"{path.name} as COCO JSON", orjson.dumps({"images": images, "annotations": captions}))


def _entry(line: Any) -> tuple[str, list[str], Mapping[str, Any]]:
    """(file name, captions, what else is in it) of a line. Raises ValueError with the reason."""
    if not isinstance(line, dict) or not isinstance(line.get("file_name"), str):
        raise ValueError("it must be an object with a text `file_name`")
    given = [line[key] for key in _TEXTS if key in line]
    texts = [text for one in given for text in (one if isinstance(one, list) else [one])]
    if not given:
        raise ValueError(f"{', '.join(_TEXTS[:-1])} and {_TEXTS[-1]} are missing; it has {', '.join(line)[:200]}")
    strange = [text for text in texts if not isinstance(text, str)]
    if strange:
        raise ValueError(f"{strange[0]!s:.40} is no caption: give a text, or a list of texts")
    others = {key: value for key, value in line.items() if key not in ("file_name", *_TEXTS)}
    return line["file_name"], texts, others

"""COCO JSON files -> one finished label per image, with a list of all irregularities.

What can be kept is kept as given: crowds and boxes without area belong to the data set, training leaves them out.
What no reader could use (unknown category, no image, malformed box) is dropped and counted.

The annotations of a large data set are millions of Python objects, ten times the size of their file. So each becomes
JSON text again as soon as it is checked, and what is left of an image is its label; of a file beyond 1 GiB the objects
exist only one at a time.
"""

from __future__ import annotations

import codecs
import gc
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from visft_ds.data.labels import has_area
from visft_ds.data.shards import Category
from visft_ds.redaction import redacted
from visft_ds.shards.categories import CategoryMap, map_categories
from visft_ds.shards.findings import MOST_OF_A_BOX, Drops, Findings, wrong_box, wrong_integer, wrong_kind
from visft_ds.shards.inputs import MadeJson, read_file
from visft_ds.shards.reencode import Reencoding
from visft_ds.shards.remote import short_name
from visft_ds.shards.segmentations import FORMS, other_form, stored_segmentation

#: Path or URL of a COCO file, or one that was made.
CocoFile = str | Path | MadeJson
#: Files up to this size are parsed at once; of larger ones the entries come one by one, which takes longer.
_AT_ONCE = 1 << 30  # bytes
#: Fields of an annotation that a label has, or that stand in the label of its image.
_STORED = frozenset(("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "ignore"))
_OF_A_CAPTION = frozenset(("id", "image_id", "caption"))
#: More words than a caption is learnt with by default; characters beyond which a caption without spaces is no word.
_MANY_WORDS, _LONG_WORD = 50, 8
#: COCO's boxes pass the border by rounding; only more than this many pixels is a finding.
_BORDER = 1.0
#: What a JSON file has for numbers; the parser refuses those that are not finite.
_NUMBERS = frozenset((int, float))
#: Rules for categories that are words; anything else is a file.
CATEGORY_RULES = ("keep", "coco80")
#: What the numbers of an image may be: shards hold ids of 63 bits, and sides of 31.
_IMAGE_NUMBERS = {"id": (0, (1 << 63) - 1), "width": (1, (1 << 31) - 1), "height": (1, (1 << 31) - 1)}
_ASKED_FOR = ("category dropped", "crowd dropped")
_NO_IMAGE = "'image_id' is not among the ids of 'images'"
_TWO_IMAGES = "'image_id' belongs to two images"


@dataclass(frozen=True)
class SourceSelection:
    """Selection of annotations and images."""

    categories: str = "keep"  #: "keep", "coco80", or a path or URL of a JSON file, see `categories.map_categories`
    keep_crowd: bool = True
    keep_empty: bool = True  #: images with neither annotation nor caption
    ids: str | Path | None = None  #: a file of image ids or file names, one a line: only these images
    licenses: tuple[int, ...] | None = None  #: only images with one of these licence ids
    reencoding: Reencoding | None = None
    allow_drops: bool = False  #: go on where more than a tenth of the annotations is lost


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image of a COCO data set with its label, captions and counts."""

    image_id: int
    file_name: str
    width: int
    height: int
    label: bytes  #: the JSON file of this sample in a shard
    captions: tuple[str, ...]
    annotations: int
    crowds: int
    trainable: int  #: annotations that are neither crowd nor without area inside the image


@dataclass(frozen=True)
class CocoSource:
    """A COCO data set, images by ascending id."""

    images: list[SourceImage]
    categories: tuple[Category, ...]
    findings: Findings
    files: Mapping[str, Mapping[str, Any]]  #: role -> name, bytes, sha256 of each file that was read


def read_source(instances: CocoFile | None, captions: CocoFile | None, selection: SourceSelection) -> CocoSource:
    """Read and check COCO JSON files; without instances, the images are those of the captions file.

    Raises:
        ValueError: a file is missing, is no JSON or lacks the parts of a COCO file; names the file and the reason. A
            file of ids names images that do not exist. Nothing is left after the selection.
        TooManyDropsError: one of these; more than a tenth of the annotations cannot be used, and `selection` does not
            allow it.
    """
    assert instances is not None or captions is not None
    findings = Findings()
    files: dict[str, Mapping[str, Any]] = {}
    table: tuple[Category, ...] = ()
    for file in (instances, captions):
        findings.extend(file.findings if isinstance(file, MadeJson) else ())
    with _no_garbage_collection():
        if instances is not None:
            lists = _load(instances, "instances", ("images", "annotations", "categories"), files)
            rules = _category_map(list(lists["categories"]), selection.categories, instances, files)
            table, shown = rules.categories, redacted(instances)
            drafts = _selected(_images(shown, lists["images"], findings), selection, files)
            drops = Drops(shown, "annotations")
            findings.extend(_namesakes(table))
            _add_annotations(lists["annotations"], drafts, rules, selection.keep_crowd, findings, drops)
            del lists  # and with it the text
            if not selection.allow_drops:
                drops.refuse_too_many(_lost_images(findings))
        if captions is not None:
            needed = ("annotations",) if instances is not None else ("images", "annotations")
            lists = _load(captions, "captions", needed, files)
            if instances is None:
                drafts = _selected(_images(redacted(captions), lists["images"], findings), selection, files)
            drops = Drops(redacted(captions), "captions")
            _add_captions(lists["annotations"], drafts, findings, drops)
            del lists
            if not selection.allow_drops:
                drops.refuse_too_many(_lost_images(findings))
        chosen = [draft for draft in map(drafts.get, sorted(drafts)) if draft is not None]
        if not selection.keep_empty:
            empty = [draft for draft in chosen if not draft.count and not draft.captions]
            findings.extend(("empty image dropped", f"image {draft.image_id}") for draft in empty)
            chosen = [draft for draft in chosen if draft.count or draft.captions]
        kinds = (instances is not None, captions is not None)
        images = [_finished(draft, kinds, selection.reencoding, findings) for draft in chosen]
    if not images:
        flags = {"--ids": selection.ids, "--license": selection.licenses, "--empty drop": not selection.keep_empty}
        given = " and ".join(flag for flag, value in flags.items() if value)
        raise ValueError(f"the data set has {len(drafts)} images; none is left by {given}")
    return CocoSource(images, table, findings, files)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable the collector of cycles: parsed JSON has none, and searching for them takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    except orjson.JSONEncodeError as error:
        raise ValueError(f"a value of the COCO files is nested too deep: {error}") from error
    finally:
        if enabled:
            gc.enable()


@dataclass(slots=True)
class _Draft:
    """An image while its annotations come in."""

    image_id: int
    file_name: str
    width: int
    height: int
    kept: dict[str, Any]  #: more fields of the label
    license: Any
    #: JSON, with a comma in front of each annotation but the first: one growing buffer leaves no holes in the memory
    annotations: bytearray = field(default_factory=bytearray)
    captions: list[str] = field(default_factory=list)
    count: int = 0  #: of annotations
    crowds: int = 0
    trainable: int = 0
    shared: bool = False  #: another image has the same id: nobody knows whose its annotations are


def _finished(
    draft: _Draft, kinds: tuple[bool, bool], reencoding: Reencoding | None, findings: Findings
) -> SourceImage:
    """The image with its label; `kinds`: whether there is a file of instances, and one of captions."""
    if kinds[0] and not draft.count:
        findings.add("image without instances", f"image {draft.image_id}")
    if kinds[1] and not draft.captions:
        findings.add("image without captions", f"image {draft.image_id}")
    fields: dict[str, Any] = {
        "image_id": draft.image_id,
        "file_name": draft.file_name,
        "width": draft.width,
        "height": draft.height,
        **draft.kept,
    }
    if reencoding is not None:
        fields["stored_height"], fields["stored_width"] = reencoding.size(draft.height, draft.width)
    fields["annotations"] = orjson.Fragment(b"[%b]" % bytes(draft.annotations))
    image = SourceImage(
        image_id=draft.image_id,
        file_name=draft.file_name,
        width=draft.width,
        height=draft.height,
        label=orjson.dumps({**fields, "captions": draft.captions}),
        captions=tuple(draft.captions),
        annotations=draft.count,
        crowds=draft.crowds,
        trainable=draft.trainable,
    )
    draft.annotations = bytearray()
    return image


def _load(
    place: CocoFile, role: str, needed: Sequence[str], files: dict[str, Mapping[str, Any]]
) -> dict[str, Iterator[dict[str, Any]]]:
    """The needed lists of a COCO file; errors in their entries are raised as they are read. Raises ValueError."""
    data = read_file(place)
    files[role] = _described(place, data)
    place, data = redacted(place), data.removeprefix(codecs.BOM_UTF8)
    if len(data) > _AT_ONCE:
        return {name: _objects(place, name, _one_by_one(place, name, data)) for name in needed}
    try:
        content = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from error
    missing = [name for name in needed if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if missing:
        raise ValueError(_lacks(place, missing))
    return {name: _objects(place, name, content[name]) for name in needed}


def _one_by_one(place: str | Path, name: str, data: bytes) -> Iterator[Any]:
    """The entries of a list of a file that is too large to be parsed at once."""
    import ijson  # loaded only where it is needed

    empty = True
    try:
        for entry in ijson.items(io.BytesIO(data), f"{name}.item", use_float=True):
            empty = False
            yield entry
        if empty and (name, "start_array", None) not in ijson.parse(io.BytesIO(data)):
            raise ValueError(_lacks(place, [name]))
    except ijson.JSONError as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from error


def _lacks(place: str | Path, missing: Sequence[str]) -> str:
    return f"{place} is no COCO file of this kind: it has no list {', '.join(map(repr, missing))}"


def _objects(place: str | Path, name: str, entries: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        if type(entry) is not dict:
            raise ValueError(f"{place} is no COCO file: every entry of {name!r} must be an object")
        yield entry


def _described(place: CocoFile, data: bytes) -> dict[str, Any]:
    return {"name": short_name(str(place)), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _category_map(
    entries: Sequence[Mapping[str, Any]], rule: str, instances: CocoFile, files: dict[str, Mapping[str, Any]]
) -> CategoryMap:
    file = None
    if rule not in CATEGORY_RULES:
        file = read_file(rule)
        files["categories"] = _described(rule, file)
    return map_categories(entries, redacted(rule), file, redacted(instances))


def _images(place: str | Path, entries: Iterable[dict[str, Any]], findings: Findings) -> dict[int, _Draft]:
    """Image id -> image. Raises ValueError if there is none."""
    drafts: dict[int, _Draft] = {}
    for entry in entries:
        wrong = _wrong_image(entry)
        if wrong:
            name, number = entry.get("file_name"), entry.get("id")
            findings.add("image entry malformed", f"image {number!r:.40} ({name!s:.80}): {wrong}")
            continue
        image_id, width, height, name = (entry[key] for key in ("id", "width", "height", "file_name"))
        if image_id in drafts:
            findings.add("image id twice", f"image {image_id} ({name})")
            drafts[image_id].shared |= name != drafts[image_id].file_name
        else:
            # Whoever shows an image must be able to name its author and licence.
            kept = {key: entry[key] for key in ("license", "flickr_url") if entry.get(key) is not None}
            drafts[image_id] = _Draft(image_id, name, width, height, kept, entry.get("license"))
    if not drafts:
        raise ValueError(
            f"{place} has no usable image: {_lost_images(findings).strip() or 'its list of images is empty'}"
        )
    return drafts


def _wrong_image(entry: Mapping[str, Any]) -> str | None:
    """Reason why an entry of `images` is unusable, None for a valid one."""
    for key, (least, most) in _IMAGE_NUMBERS.items():
        value: Any = entry.get(key)
        if not _is_int(value):
            return wrong_integer(entry, key)
        if not least <= value <= most:
            return f"{key!r} is {value}; allowed are integers from {least} to {most}"
    return None if isinstance(entry.get("file_name"), str) else wrong_kind(entry, "file_name", "text")


def _lost_images(findings: Findings) -> str:
    """A line about images whose entries are malformed, which may be why annotations have none."""
    count, example = findings.first("image entry malformed")
    return f"\n  {count} entries of 'images' are left out, for instance {example}" if count else ""


def _add_annotations(
    entries: Iterable[dict[str, Any]],
    drafts: Mapping[int, _Draft | None],
    categories: CategoryMap,
    keep_crowd: bool,
    findings: Findings,
    drops: Drops,
) -> None:
    """Check annotations and give each kept one to its image as JSON."""
    seen: set[int] = set()
    for place, entry in enumerate(entries):
        draft, known = _get(drafts, entry.get("image_id"))
        if known and draft is None:
            drops.spared += 1
            continue  # of an image that was not asked for
        number: Any = entry.get("id")
        category: Any = entry.get("category_id")
        reason = ""
        if not _is_int(number) or not _is_int(category):
            kind = "annotation malformed"
        elif draft is None:
            kind = "annotation without image"
        elif draft.shared:
            kind = "annotation of two images"
        elif number in seen:
            kind = "annotation id twice"
        elif category not in categories.ids:
            kind, reason = "unknown category", f": category {category}"
        elif categories.ids[category] is None:
            kind, reason = "category dropped", f": category {category}"
        elif not _is_box(entry.get("bbox")):
            kind, reason = "box malformed", f": {entry.get('bbox')!r}"
        elif entry.get("iscrowd") not in (None, 0, 1):
            kind, reason = "crowd flag malformed", f": {entry['iscrowd']!r:.40}"
        elif entry.get("iscrowd") and not keep_crowd:
            kind = "crowd dropped"
        else:
            seen.add(number)
            if draft.count:
                draft.annotations += b","
            label, misread = _checked(entry, draft, categories.ids[category], findings)
            draft.annotations += orjson.dumps(label)
            draft.count += 1
            if misread:
                drops.add(f"{misread}; COCO wants {FORMS[misread]}", _example(place, entry, "bbox", draft))
            else:
                drops.kept += 1
            continue
        findings.add(kind, f"{_where(entry)}{reason}")
        if kind in _ASKED_FOR:
            drops.spared += 1
        else:
            key, cause = _loss(kind, entry, categories)
            drops.add(cause, _example(place, entry, key), stranger=draft is None)


def _loss(kind: str, entry: Mapping[str, Any], categories: CategoryMap) -> tuple[str, str]:
    """(the field for which an annotation is lost, why)."""
    if kind == "annotation malformed":
        key = "category_id" if _is_int(entry.get("id")) else "id"
        return key, wrong_integer(entry, key)
    if kind == "annotation without image":
        return "image_id", _no_image(entry)
    if kind == "annotation of two images":
        return "image_id", _TWO_IMAGES
    if kind == "annotation id twice":
        return "id", "'id' is that of an earlier entry"
    if kind == "unknown category":
        known = f" ({min(categories.ids)} to {max(categories.ids)})" if categories.ids else ""
        return "category_id", f"'category_id' is not among the ids of 'categories'{known}"
    if kind == "crowd flag malformed":
        return "iscrowd", wrong_kind(entry, "iscrowd", "0 or 1")
    return "bbox", wrong_box(entry)


def _no_image(entry: Mapping[str, Any]) -> str:
    if not _is_int(entry.get("image_id")):
        return wrong_integer(entry, "image_id")
    return _NO_IMAGE


def _example(place: int, entry: Mapping[str, Any], key: str, draft: _Draft | None = None) -> str:
    value = f": {key!r} is {orjson.dumps(entry[key]).decode():.100}" if key in entry else ""
    size = f" in {draft.width} x {draft.height}" if draft is not None else ""
    return f"entry {place} of 'annotations' (id {orjson.dumps(entry.get('id')).decode():.40}){value}{size}"


def _where(entry: Mapping[str, Any]) -> str:
    return f"annotation {entry.get('id')} of image {entry.get('image_id')}"


def _checked(
    entry: Mapping[str, Any], draft: _Draft, category: int | None, findings: Findings
) -> tuple[dict[str, Any], str | None]:
    """(the stored form of an annotation that is kept, the kind of finding if its box is of another form)."""
    x, y, width, height = bbox = entry["bbox"]
    crowd = bool(entry.get("iscrowd"))
    right, bottom = x + width, y + height
    useful = has_area(bbox, draft.width, draft.height)
    draft.crowds += crowd
    draft.trainable += useful and not crowd
    segmentation, kinds = stored_segmentation(entry.get("segmentation"), draft.height, draft.width)
    if not useful:
        kinds.append("box without area")
    beyond = max(-x, -y, right - draft.width, bottom - draft.height) > _BORDER
    if beyond:
        kinds.append("box beyond the image")
    area = entry.get("area") if _is_number(entry.get("area")) else None
    misread = None
    if beyond or max(bbox) <= 1:  # no other box gives a reason to doubt it
        misread = other_form(bbox, draft.height, draft.width, area, segmentation)
        kinds += [misread] if misread else []
    if area is None:
        area = width * height
        kinds.append("area missing")
    if crowd:
        kinds.append("crowd")
    elif not segmentation:
        kinds.append("instance without mask")
    if entry.get("ignore"):
        kinds.append("ignore flag")
    if not _STORED.issuperset(entry):
        findings.add("more fields", f"{_where(entry)}: {', '.join(sorted(map(str, entry.keys() - _STORED)))}")
    for kind in kinds:
        shown = f": {bbox} in {draft.width} x {draft.height}" if kind.startswith("box") else ""
        findings.add(kind, f"{_where(entry)}{shown}")
    stored = {"id": entry["id"], "bbox": bbox, "category_id": category, "iscrowd": int(crowd), "area": area}
    if segmentation is not None:
        stored["segmentation"] = segmentation
    return stored, misread


def _namesakes(categories: Iterable[Category]) -> Iterator[tuple[str, str]]:
    """Findings for names that more than one category has."""
    ids: dict[str, list[int]] = {}
    for category in categories:
        ids.setdefault(category.name, []).append(category.coco_id)
    for name, found in ids.items():
        if len(found) > 1:
            yield "category name twice", f"{name!r}: {', '.join(map(str, found))}"


def _add_captions(
    entries: Iterable[dict[str, Any]], drafts: Mapping[int, _Draft | None], findings: Findings, drops: Drops
) -> None:
    strangers, example = 0, ""
    for place, entry in enumerate(entries):
        draft, known = _get(drafts, entry.get("image_id"))
        caption = entry.get("caption")
        if draft is None:
            drops.spared += known
            if known:
                continue  # of an image that was not asked for
            findings.add("caption without image", f"caption {entry.get('id')} of image {entry.get('image_id')}")
            if not _is_int(entry.get("image_id")):
                drops.add(_no_image(entry), _example(place, entry, "image_id"))
            else:
                strangers, example = strangers + 1, example or _example(place, entry, "image_id")
        elif draft.shared:
            findings.add("caption of two images", f"caption {entry.get('id')} of image {entry.get('image_id')}")
            drops.add(_TWO_IMAGES, _example(place, entry, "image_id"))
        elif not isinstance(caption, str) or not caption.strip():
            findings.add("caption empty", f"caption {entry.get('id')} of image {entry.get('image_id')}")
            wrong = "'caption' is empty" if isinstance(caption, str) else wrong_kind(entry, "caption", "text")
            drops.add(wrong, _example(place, entry, "caption"))
        else:
            draft.captions.append(caption)
            drops.kept += 1
            if not _OF_A_CAPTION.issuperset(entry):
                more = ", ".join(sorted(map(str, entry.keys() - _OF_A_CAPTION)))
                findings.add("more fields", f"caption {entry.get('id')} of image {entry.get('image_id')}: {more}")
            words = len(caption.split())
            if words > _MANY_WORDS or (words == 1 and len(caption) > _LONG_WORD):
                kind = "caption in one piece" if words == 1 else f"caption over {_MANY_WORDS} words"
                findings.add(kind, f"caption {entry.get('id')} of image {entry.get('image_id')}: {caption[:20]}...")
    if drops.kept:  # of a smaller set of images the captions of all may be given
        drops.spared += strangers
    elif strangers:
        drops.add(_NO_IMAGE, example, strangers)


def _selected(
    drafts: dict[int, _Draft], selection: SourceSelection, files: dict[str, Mapping[str, Any]]
) -> dict[int, _Draft | None]:
    """The images that were asked for; of the others only the ids are left, as None."""
    chosen = list(drafts.values())
    if selection.ids is not None:
        data = read_file(selection.ids)
        files["ids"] = _described(selection.ids, data)
        chosen = _listed(chosen, data, redacted(selection.ids))
    if selection.licenses is not None:
        chosen = [draft for draft in chosen if draft.license in selection.licenses]
    return {**dict.fromkeys(drafts), **{draft.image_id: draft for draft in chosen}}


def _listed(drafts: Sequence[_Draft], data: bytes, where: str) -> list[_Draft]:
    try:
        wanted = {line.strip() for line in data.decode("utf-8-sig").splitlines()} - {""}
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text file: {error}") from error
    known = {str(draft.image_id) for draft in drafts} | {draft.file_name for draft in drafts}
    strangers = sorted(wanted - known)
    if strangers:
        raise ValueError(
            f"{where}: {len(strangers)} of {len(wanted)} lines name no image of the data set, for instance "
            f"{', '.join(map(repr, strangers[:3]))}; give one image id or file name a line"
        )
    return [draft for draft in drafts if str(draft.image_id) in wanted or draft.file_name in wanted]


def _get(drafts: Mapping[int, _Draft | None], image_id: Any) -> tuple[_Draft | None, bool]:
    """(the image if it was asked for, whether there is one with this id)."""
    return (drafts.get(image_id), image_id in drafts) if _is_int(image_id) else (None, False)


def _is_int(value: Any) -> bool:
    """Return True if a value out of a JSON file is an integer that fits into 64 bits, signed; a bool is none."""
    return type(value) is int and -(1 << 63) <= value < 1 << 63


def _is_number(value: Any) -> bool:
    return type(value) in _NUMBERS


def _is_box(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 4 and {*map(type, value)} <= _NUMBERS
    return numbers and all(abs(number) < MOST_OF_A_BOX for number in value)

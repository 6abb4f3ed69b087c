"""Corrections of labels, which the page of `visft labels` writes: a COCO file of what becomes other.

`annotations` are labels that are new or changed; a changed one has `replaces`, what it was. `removed` are
labels that go. A box is known by its image's file name, its class and its place: ids may be numbers of lines;
a region of a label map by its pixels, a caption by its text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2

from visft_ds.data.labels import is_numbers
from visft_ds.data.masks import object_of
from visft_ds.files import read_bytes, reading, shown_name
from visft_ds.shards.common import Findings, FolderSplit, Json

FORMAT = "visft_ds corrections"
VERSION = 1
_NEAR = 0.02  # pixels between a box and the same one as a correction names it


def parse_corrections(data: bytes, path: Path) -> Json:
    """The content of the file `path` of corrections. Raises ValueError: it is none."""
    with reading(path, "corrections of labels"):
        content: Json = orjson.loads(data)
        info = content["info"]
        if (info["format"], info["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is not of version {VERSION}")
        for name in ("images", "categories", "annotations", "removed"):
            if not isinstance(content[name], list):
                raise ValueError(f"{name} is no list")
        if not isinstance(info["split"], str):
            raise ValueError("split is no name")
    return content


def with_corrections(splits: Sequence[FolderSplit], files: Sequence[Path]) -> list[FolderSplit]:
    """The splits, each with the file that corrects it.

    Raises ValueError: a file of a split that is not among these, two of one split, or of one without such
    labels.
    """
    by_name = {split.name: split for split in splits}
    for path in files:
        with reading(path, "corrections of labels"):
            data = read_bytes(path)
        content = parse_corrections(data, path)
        name = content["info"]["split"]
        split = by_name.get(name)
        if split is None:
            raise ValueError(f"{path} corrects the split {shown_name(name)}; there is {', '.join(by_name)}")
        if split.corrections is not None:
            raise ValueError(f"{path} and {split.corrections} both correct the split {name}: give one")
        of_captions = {is_caption(label) for label in [*content["annotations"], *content["removed"]]}
        if True in of_captions and split.captions is None:
            raise ValueError(f"{path}: the split {name} has no captions to correct")
        if False in of_captions and split.instances is split.maps is None:
            raise ValueError(f"{path}: the split {name} has no boxes or label maps to correct")
        by_name[name] = replace(split, corrections=path)
    return list(by_name.values())


def corrected(
    annotations: Sequence[Any],
    images: Mapping[str, int],
    categories: Mapping[int, str],
    corrections: Mapping[str, Any],
    findings: Findings,
) -> list[Any]:
    """The annotations of a COCO data set, corrected; what was done is counted in `findings`.

    Args:
        images: file name -> id, of the data set.
        categories: id -> name, of the data set.
        corrections: of `parse_corrections`.

    Raises ValueError: an image, a class or a label that is to be corrected is not there.
    """
    changes = _changes(corrections, images, categories)
    of_image = defaultdict[int, list[int]](list)
    numbers = [0]
    for position, annotation in enumerate(annotations):
        of_image[annotation.get("image_id")].append(position)
        if type(annotation.get("id")) is int:
            numbers.append(annotation["id"])
    gone = set[int]()
    added = list[Json]()
    for change in changes:
        if change.given is not None:
            for position in of_image[change.image_id]:
                if position not in gone and _is_same(annotations[position], change.given):
                    gone.add(position)
                    break
            else:
                label = change.given
                raise _gone(change, f"label {categories[label['category_id']]} at {label['bbox']}")
        if change.proposed is not None:
            number = max(numbers) + 1 + len(added)
            added.append({**change.proposed, "id": number, "image_id": change.image_id})
        findings.add(f"label {change.words} by corrections", change.file_name)
    return [annotation for position, annotation in enumerate(annotations) if position not in gone] + added


def corrected_captions(
    annotations: Sequence[Any],
    images: Mapping[str, int],
    corrections: Mapping[str, Any],
    findings: Findings,
) -> list[Any]:
    """The same of captions, which are removed only."""
    left = list(annotations)
    for change in _changes(corrections, images, None):
        assert change.given is not None
        text = change.given["caption"]
        for position, entry in enumerate(left):
            if entry.get("image_id") == change.image_id and entry.get("caption") == text:
                del left[position]
                break
        else:
            raise _gone(change, f"caption {shown_name(text)}")
        findings.add("caption removed by corrections", change.file_name)
    return left


def corrected_maps(
    annotations: Sequence[Any],
    images: Mapping[str, int],
    categories: Mapping[int, str],
    corrections: Mapping[str, Any],
    findings: Findings,
) -> list[Any]:
    """The same of label maps, an annotation for each class of an image: regions become of another class, or
    of none.
    """
    changes = _changes(corrections, images, categories)
    concerned = {change.image_id for change in changes}
    masks = dict[tuple[int, int], npt.NDArray[np.bool_]]()
    left = list[Any]()
    for annotation in annotations:
        if annotation["image_id"] in concerned:
            key = annotation["image_id"], annotation["category_id"]
            masks[key] = coco_mask.decode(annotation["segmentation"]).astype(bool)
        else:
            left.append(annotation)
    for change in changes:
        if change.given is None:
            raise ValueError(f"{change.file_name}: a region that is new says not what it was before")
        own = masks.get((change.image_id, change.given["category_id"]))
        region = coco_mask.decode(change.given["segmentation"]).astype(bool)
        if own is None or own.shape != region.shape or (region & ~own).any():
            name = categories[change.given["category_id"]]
            raise _gone(change, f"region {name} at {change.given['bbox']}")
        own &= ~region
        if change.proposed is not None:
            key = change.image_id, change.proposed["category_id"]
            masks[key] = masks.get(key, False) | region
        findings.add(f"region {change.words} by corrections", change.file_name)
    number = max((annotation["id"] for annotation in annotations), default=0)
    for (image_id, category_id), mask in masks.items():
        if mask.any():
            number += 1
            left.append({"id": number, "image_id": image_id, "category_id": category_id, **object_of(mask)})
    return left


@dataclass(frozen=True)
class _Change:
    """Label that becomes another one, or new, or goes."""

    image_id: int  #: of the data set
    file_name: str
    given: Mapping[str, Any] | None  #: None: it is new
    proposed: Mapping[str, Any] | None  #: None: it goes

    @property
    def words(self) -> str:
        if self.proposed is None:
            return "removed"
        return "added" if self.given is None else "changed"


def _changes(
    corrections: Mapping[str, Any], images: Mapping[str, int], categories: Mapping[int, str] | None
) -> list[_Change]:
    """The changes of captions, or of labels with one of the `categories`.

    Raises ValueError: an image or a class is not one of the data set.
    """
    if categories is not None:
        for category in corrections["categories"]:
            if categories.get(category["id"]) != category["name"]:
                raise ValueError(
                    f"its class {category['name']} ({category['id']}) is not one of the data set"
                )
    file_names = {image["id"]: image["file_name"] for image in corrections["images"]}
    ids = {number: _id_of(name, images) for number, name in file_names.items()}
    changes = list[_Change]()
    for entry in corrections["annotations"]:
        proposed = {key: value for key, value in entry.items() if key != "replaces"}
        number = entry["image_id"]
        changes.append(_Change(ids[number], file_names[number], entry.get("replaces"), proposed))
    for entry in corrections["removed"]:
        number = entry["image_id"]
        changes.append(_Change(ids[number], file_names[number], entry, None))
    wants_captions = categories is None
    return [change for change in changes if is_caption(change.given) is wants_captions]


def is_caption(label: Mapping[str, Any] | None) -> bool:
    """Return True for what corrections say of a caption rather than of a box or a region."""
    return label is not None and "caption" in label


def _gone(change: _Change, what: str) -> ValueError:
    remedy = "run `visft labels` on shards of these labels"
    return ValueError(f"{change.file_name} has no {what} any more: {remedy}")


def _id_of(name: str, images: Mapping[str, int]) -> int:
    """Id of an image, which the data set may call by a path of another machine that ends with this name."""
    if name in images:
        return images[name]
    longer = [other for other in images if other.replace("\\", "/").endswith(f"/{name}")]
    if len(longer) != 1:
        raise ValueError(f"its image {shown_name(name)} is not one of the data set")
    return images[longer[0]]


def _is_same(annotation: Mapping[str, Any], label: Mapping[str, Any]) -> bool:
    if annotation.get("category_id") != label["category_id"] or not is_numbers(annotation.get("bbox"), 4):
        return False
    return bool(np.allclose(annotation["bbox"], label["bbox"], rtol=0, atol=_NEAR))

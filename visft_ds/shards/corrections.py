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
from visft_ds.shards.common import Corrections, Findings, FolderSplit, Json, source_of

FORMAT = "visft_ds corrections"
VERSION = 1
_NEAR = 0.02  # pixels between a box and the same one as a correction names it


def _read(path: Path) -> Corrections:
    """The content of a file of corrections. Raises ValueError: it is none."""
    with reading(path, "corrections of labels"):
        data = read_bytes(path)
        content: Json = orjson.loads(data)
        info = content["info"]
        if (info["format"], info["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is not of version {VERSION}")
        for name in ("images", "categories", "annotations", "removed"):
            if not isinstance(content[name], list):
                raise ValueError(f"{name} is no list")
        if not isinstance(info["split"], str):
            raise ValueError("split is no name")
    return Corrections(path, source_of(path.name, data), content)


def with_corrections(splits: Sequence[FolderSplit], files: Sequence[Path]) -> list[FolderSplit]:
    """The splits, each with the corrections of its file.

    Raises ValueError: a file of a split that is not among these, two of one split, or of one without such
    labels.
    """
    by_name = {split.name: split for split in splits}
    for path in files:
        corrections = _read(path)
        content = corrections.content
        name = content["info"]["split"]
        split = by_name.get(name)
        if split is None:
            raise ValueError(f"{path} corrects the split {shown_name(name)}; there is {', '.join(by_name)}")
        if split.corrections is not None:
            other = split.corrections.path
            raise ValueError(f"{path} and {other} both correct the split {name}: give one")
        of_captions = {"caption" in label for label in [*content["annotations"], *content["removed"]]}
        if True in of_captions and split.captions is None:
            raise ValueError(f"{path}: the split {name} has no captions to correct")
        if False in of_captions and split.instances is split.maps is None:
            raise ValueError(f"{path}: the split {name} has no boxes or label maps to correct")
        by_name[name] = replace(split, corrections=corrections)
    return list(by_name.values())


def corrected(
    role: str,
    annotations: Sequence[Any],
    images: Mapping[str, int],
    categories: Mapping[int, str],
    corrections: Corrections,
    findings: Findings,
) -> list[Any]:
    """The annotations of a COCO file of a role, corrected; what was done is counted in `findings`.

    Args:
        images: file name -> id, of the data set.
        categories: id -> name, of the data set.

    Raises ValueError: an image, a class or a label that is to be corrected is not there.
    """
    with reading(corrections.path, "corrections of these labels"):
        changes = _changes(corrections.content, images, categories)
        own = [change for change in changes if change.of_caption == (role == "captions")]
        result = (_with_regions if role == "maps" else _with_labels)(annotations, own, categories)
    kinds = {"maps": "region", "captions": "caption"}
    for change in own:
        findings.add(f"{kinds.get(role, 'label')} {change.words} by corrections", change.file_name)
    return result


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

    @property
    def of_caption(self) -> bool:
        """Return True for a caption rather than a box or a region."""
        return self.given is not None and "caption" in self.given


def _changes(corrections: Json, images: Mapping[str, int], categories: Mapping[int, str]) -> list[_Change]:
    """All changes. Raises ValueError: an image or a class is not one of the data set."""
    for category in corrections["categories"]:
        if categories.get(category["id"]) != category["name"]:
            raise ValueError(f"its class {category['name']} ({category['id']}) is not one of the data set")
    file_names = {image["id"]: image["file_name"] for image in corrections["images"]}
    ids = {number: _id_of(name, images) for number, name in file_names.items()}
    pairs = [(entry.get("replaces"), entry) for entry in corrections["annotations"]]
    pairs += [(entry, None) for entry in corrections["removed"]]
    changes = list[_Change]()
    for given, proposed in pairs:
        number = (proposed or given)["image_id"]
        changes.append(_Change(ids[number], file_names[number], given, proposed))
    return changes


def _with_labels(
    annotations: Sequence[Any], changes: Sequence[_Change], categories: Mapping[int, str]
) -> list[Any]:
    """The boxes or captions after the changes."""
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
                raise _gone(change, _name_of(change.given, categories))
        if change.proposed is not None:
            label = {key: value for key, value in change.proposed.items() if key != "replaces"}
            number = max(numbers) + 1 + len(added)
            added.append({**label, "id": number, "image_id": change.image_id})
    return [annotation for position, annotation in enumerate(annotations) if position not in gone] + added


def _with_regions(
    annotations: Sequence[Any], changes: Sequence[_Change], categories: Mapping[int, str]
) -> list[Any]:
    """The label maps, an annotation for each class of an image, after the changes: regions become of another
    class, or of none.
    """
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
    number = max((annotation["id"] for annotation in annotations), default=0)
    for (image_id, category_id), mask in masks.items():
        if mask.any():
            number += 1
            left.append({"id": number, "image_id": image_id, "category_id": category_id, **object_of(mask)})
    return left


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


def _name_of(label: Mapping[str, Any], categories: Mapping[int, str]) -> str:
    if "caption" in label:
        return f"caption {shown_name(label['caption'])}"
    return f"label {categories[label['category_id']]} at {label['bbox']}"


def _is_same(annotation: Mapping[str, Any], label: Mapping[str, Any]) -> bool:
    if "caption" in label:
        return bool(annotation.get("caption") == label["caption"])
    if annotation.get("category_id") != label["category_id"] or not is_numbers(annotation.get("bbox"), 4):
        return False
    return bool(np.allclose(annotation["bbox"], label["bbox"], rtol=0, atol=_NEAR))

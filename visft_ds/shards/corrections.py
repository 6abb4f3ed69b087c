"""Corrections of labels, which the page of `visft labels` writes: a COCO file of what becomes other.

`annotations` are labels that are new or changed; a changed one has `replaces`, what it was. `removed` are
labels that go. A label is known by its image's file name, its class and its box: ids may be numbers of lines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from visft_ds.data.labels import is_numbers
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

    Raises ValueError: a file of a split that is not among these, two of one split, or of one without boxes.
    """
    by_name = {split.name: split for split in splits}
    for path in files:
        with reading(path, "corrections of labels"):
            data = read_bytes(path)
        name = parse_corrections(data, path)["info"]["split"]
        split = by_name.get(name)
        if split is None:
            raise ValueError(f"{path} corrects the split {shown_name(name)}; there is {', '.join(by_name)}")
        if split.corrections is not None:
            raise ValueError(f"{path} and {split.corrections} both correct the split {name}: give one")
        if split.instances is None:
            raise ValueError(f"{path}: the split {name} has no boxes to correct")
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
    for category in corrections["categories"]:
        if categories.get(category["id"]) != category["name"]:
            raise ValueError(f"its class {category['name']} ({category['id']}) is not one of the data set")
    file_names = {image["id"]: image["file_name"] for image in corrections["images"]}
    ids = {number: _id_of(name, images) for number, name in file_names.items()}
    of_image = defaultdict[int, list[int]](list)
    numbers = [0]
    for position, annotation in enumerate(annotations):
        of_image[annotation.get("image_id")].append(position)
        if type(annotation.get("id")) is int:
            numbers.append(annotation["id"])
    gone = set[int]()

    def remove(label: Mapping[str, Any]) -> None:
        image_id = label["image_id"]
        for position in of_image[ids[image_id]]:
            if position not in gone and _is_same(annotations[position], label):
                gone.add(position)
                return
        what = f"{categories[label['category_id']]} at {label['bbox']}"
        remedy = "run `visft labels` on shards of these labels"
        raise ValueError(f"{file_names[image_id]} has no label {what} any more: {remedy}")

    added = list[Json]()
    for number, correction in enumerate(corrections["annotations"], start=max(numbers) + 1):
        label = {**correction, "id": number, "image_id": ids[correction["image_id"]]}
        replaces = label.pop("replaces", None)
        kind = "label added by corrections"
        if replaces is not None:
            remove(replaces)
            kind = "label changed by corrections"
        findings.add(kind, file_names[correction["image_id"]])
        added.append(label)
    for label in corrections["removed"]:
        remove(label)
        findings.add("label removed by corrections", file_names[label["image_id"]])
    return [annotation for position, annotation in enumerate(annotations) if position not in gone] + added


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

"""`visft labels`: a run looks at labels, its own training data's or others', and a page shows its doubts."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from visft_ds.config.record import recorded_config
from visft_ds.data.dataset import coco_dataset, read_raw
from visft_ds.data.decode import as_rgb
from visft_ds.data.fetch import Cache, is_url
from visft_ds.data.shards import Manifest, ShardReader, splits_in
from visft_ds.evals.evaluate import evaluate
from visft_ds.evals.labels.captions import caption_doubts
from visft_ds.evals.labels.doubts import (
    KINDS,
    Doubt,
    doubts_of,
    region_doubts,
    with_probabilities,
)
from visft_ds.evals.pages import embedded, render
from visft_ds.files import shown_name, write_bytes, write_text
from visft_ds.monitor.console import Section, print_plan
from visft_ds.predict.likeness import compare_splits
from visft_ds.predict.model import load_backbone
from visft_ds.run_files import folder_of_run
from visft_ds.shards.common import Json
from visft_ds.shards.corrections import FORMAT, VERSION
from visft_ds.tasks import Annotation, Names, Truth, config_class
from visft_ds.tasks.classes import category_name
from visft_ds.tasks.masks.rasters import decode_mask
from visft_ds.tasks.pictures import scaled

_MARGIN = 0.75  # around boxes in a picture, of their longer side
_LEAST_MARGIN = 24  # pixels
_SIDE = 360  # of a picture on the page, pixels
_PRINTED = 10  # doubts
_OUTLINE = (255, 0, 200)  # colour of the border of a region


#: Tasks whose heads look at labels -> those, and the metric by them, see `_LEARNT`.
_TASKS = {
    "detection": ("boxes", "box/AP50"),
    "semantic": ("regions", "semantic/mIoU"),
    "captioning": ("captions", ""),
}
_LEARNT = 0.5  # of a metric, below which nothing was measured that would speak for doubts
#: Words of a manifest's sources that stand for the command that built it.
_FOLDER = "MYFOLDER"


def check_labels(
    run: Path, data: str | None, split: str | None, limit: int | None, most: int, out: Path | None
) -> None:
    """Write a page for each split, and print the first doubts.

    Args:
        data: folder or URL of shards; None: those of the run.
        split: None: the training and the validation split.
        limit: look at the first images only, this many.
        most: doubts of each task on a page.
        out: folder for pages; None: RUN/labels.

    Raises:
        ValueError: the run has no head of a task of `_TASKS`, or the data no labels of one.
    """
    config = recorded_config(folder_of_run(run)).visft
    of_run = config.data
    root = data or of_run.root
    assert root is not None
    tasks = [task for task in _TASKS if task in config.tasks.enabled()]
    if not tasks:
        raise ValueError(f"{run} has no head that looks at labels: train one of {', '.join(_TASKS)}")
    splits = [split] if split is not None else [of_run.train, of_run.val]
    if split is None and not is_url(root):
        splits = [name for name in splits if name in splits_in(Path(root))]
    folder = out or folder_of_run(run) / "labels"
    cache = Cache(of_run.cache, of_run.cache_bytes)
    manifests = [Manifest.load(os.fspath(root), name, cache=cache) for name in dict.fromkeys(splits)]
    for manifest in manifests:
        _check_split(run, tasks, manifest, limit, most, folder)
    if len(manifests) == 2:
        train, validation = manifests
        section = compare_splits(load_backbone(run), train, validation, limit)
        print_plan("visft_ds labels", [section])


def _check_split(
    run: Path, tasks: Sequence[str], manifest: Manifest, limit: int | None, most: int, folder: Path
) -> None:
    looked_at = [task for task in tasks if config_class(task).labels in manifest.labels]
    if not looked_at:
        kinds = ", ".join(f"{_TASKS[task][0]} of {task}" for task in tasks)
        raise ValueError(f"{manifest} has no labels that the run looks at: {kinds}")
    shown = list[Doubt]()
    sections = list[Section]()
    with ShardReader(manifest) as reader:
        content = coco_dataset(reader, range(min(limit or len(manifest), len(manifest))))
        names = {category["id"]: category["name"] for category in content["categories"]}
        images = {image["id"]: image for image in content["images"]}
        for task in looked_at:
            doubts, facts = _look(task, run, reader, content, limit)
            rows = []
            for number, doubt in enumerate(doubts[:_PRINTED], start=1):
                file_name = shown_name(images[doubt.image_id]["file_name"])
                rows.append((f"{number}. {KINDS[doubt.kind]}", _words(doubt, file_name, names)))
            counts = Counter(KINDS[doubt.kind] for doubt in doubts if doubt.score > 0.5)
            of_kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
            rows += [*facts, ("above 0.5", of_kinds or "none")]
            rows.append(("on the page", f"the first {min(most, len(doubts))} of {len(doubts)}"))
            title = f"{manifest}: {_TASKS[task][0]}, the most doubtful first"
            sections.append(Section(title, rows))
            shown += doubts[:most]
        page = _write(folder, shown, content, names, reader)
    sections.append(Section("written", [("page", str(page))]))
    print_plan("visft_ds labels", sections)


def _look(
    task: str, run: Path, reader: ShardReader, content: Truth, limit: int | None
) -> tuple[list[Doubt], list[tuple[str, str]]]:
    """The doubts of a task about the labels of a split, and what is said of the model that has them."""
    manifest = reader.manifest
    if task == "captioning":
        doubts = caption_doubts(run, reader, range(len(content["images"])))
        own = sum(doubt.score < 0.5 for doubt in doubts)
        return doubts, [
            ("the model", f"{own} of {len(doubts)} captions fit their own picture better than others")
        ]
    evaluation = evaluate(run, data=os.fspath(manifest.root), split=manifest.split, tasks=task, limit=limit)
    results = evaluation.results[task]
    metric = _TASKS[task][1]
    value = evaluation.metrics.get(metric, 0.0)
    caution = "" if value >= _LEARNT else ": a model that finds so little says little of labels"
    facts = [("the model", f"{metric} {value:.2f} by these labels{caution}")]
    if task == "semantic":
        return region_doubts(content, results), facts
    doubts = doubts_of(content["annotations"], results)
    if value >= _LEARNT:
        doubts = with_probabilities(doubts)
    probabilities = [doubt.probability for doubt in doubts if doubt.probability is not None]
    if probabilities:
        wrong = f"some {sum(probabilities):.0f} of {len(probabilities)} labels, a cautious estimate"
        facts.append(("wrong", wrong))
    return doubts, facts


def _words(doubt: Doubt, file_name: str, names: Names) -> str:
    given = _label_in_words(doubt.given, names)
    proposed = _label_in_words(doubt.proposed, names)
    score = f"{doubt.score:.2f}"
    if doubt.probability is not None:
        score += f", wrong {doubt.probability:.0%}"
    return f"{score}  {file_name}: {given} -> {proposed}"


def _label_in_words(label: Annotation | None, names: Names) -> str:
    if label is None:
        return "nothing"
    if "caption" in label:
        return shown_name(label["caption"])
    x, y, width, height = label["bbox"]
    name = shown_name(category_name(label["category_id"], names))
    return f"{name} {width:.0f}x{height:.0f} at {x:.0f},{y:.0f}"


def _write(
    folder: Path,
    doubts: Sequence[Doubt],
    content: Truth,
    names: Names,
    reader: ShardReader,
) -> Path:
    """Write the page, and the file that it would give if all proposals were taken; returns its path.

    Args:
        content: the labels as a COCO dictionary.
        names: of the categories.
    """
    manifest = reader.manifest
    concerned = {doubt.image_id for doubt in doubts}
    images = [image for image in content["images"] if image["id"] in concerned]
    file_names = {image["id"]: image["file_name"] for image in images}
    positions = {int(row["image_id"]): position for position, row in enumerate(manifest.index)}
    rows = []
    for doubt in doubts:
        image = read_raw(reader, positions[doubt.image_id], "images").image
        assert image is not None
        rows.append({"file_name": file_names[doubt.image_id], **_row(doubt, as_rgb(image), names)})
    info = {"format": FORMAT, "version": VERSION, "split": manifest.split}
    head = {"info": info, "categories": content["categories"]}
    probability = "it is no probability"
    if any(doubt.probability is not None for doubt in doubts):
        probability = "the probability that a label is wrong is a cautious estimate"
    corrections = f"corrections-{manifest.split}.json"
    text = render(
        "labels/page.html.j2",
        title=f"Labels of {manifest.root}, {manifest.split}",
        about=f"The {len(doubts)} most doubtful labels, by a trained model. A score ranks labels of a kind; "
        f"{probability}.",
        command=shlex.join(["visft", "shards", _FOLDER, "--corrections", corrections, "--replace"]),
        file=corrections,
        rows=rows,
        images=images,
        head=head,
    )
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{manifest.split}.html"
    write_text(page, text)
    proposals = {**head, "images": images, **_all_taken(doubts)}
    path = folder / f"proposals-{manifest.split}.json"
    write_bytes(path, orjson.dumps(proposals, option=orjson.OPT_INDENT_2))
    return page


def _row(doubt: Doubt, image: Any, names: Names) -> Json:
    """Facts of a doubt for the page: a picture of the place, the label given and the one proposed."""
    labels = [label for label in (doubt.given, doubt.proposed) if label is not None]
    boxes = np.array([label["bbox"] for label in labels if "bbox" in label])
    if doubt.kind == "region":
        image = _outlined(image, labels[0]["segmentation"])
    left = top = 0
    if len(boxes):
        low = boxes[:, :2].min(axis=0)
        high = (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
        margin = max(_LEAST_MARGIN, _MARGIN * float((high - low).max()))
        left, top = np.maximum(0, np.floor(low - margin)).astype(int).tolist()
        right, bottom = np.ceil(high + margin).astype(int).tolist()
        image = image[top:bottom, left:right]
    height, width = image.shape[:2]
    return {
        "kind": KINDS[doubt.kind],
        "score": doubt.score,
        "probability": doubt.probability,
        "image_id": doubt.image_id,
        "picture": embedded(np.asarray(scaled(np.ascontiguousarray(image), _SIDE))),
        "size": [width, height],
        "given": _shown(doubt.given, left, top, names),
        "proposed": _shown(doubt.proposed, left, top, names),
    }


def _shown(label: Annotation | None, left: int, top: int, names: Names) -> Json | None:
    """A label for the page: its name, its box in the picture, and what corrections say of it."""
    if label is None:
        return None
    if "caption" in label:
        return {"name": label["caption"], "shown": None, "label": _entry(label)}
    x, y, width, height = label["bbox"]
    box = [x - left, y - top, width, height]
    return {"name": category_name(label["category_id"], names), "shown": box, "label": _entry(label)}


def _outlined(image: Any, segmentation: Annotation) -> Any:
    """The image with the border of a region."""
    from scipy import ndimage  # a quarter of a second, which boxes do not need

    mask = decode_mask(segmentation, image.shape[:2])
    thickness = max(1, max(image.shape) // _SIDE)
    border = mask & ~ndimage.binary_erosion(mask, iterations=thickness)
    outlined = image.copy()
    outlined[border] = _OUTLINE
    return outlined


def _entry(label: Annotation) -> Json:
    """A label as corrections name it."""
    if "caption" in label:
        return {"caption": label["caption"]}
    x, y, width, height = label["bbox"]
    entry = {
        "category_id": label["category_id"],
        "bbox": [x, y, width, height],
        "area": width * height,
        "iscrowd": 0,
    }
    if label.get("segmentation"):
        entry["segmentation"] = label["segmentation"]
    return entry


def _all_taken(doubts: Sequence[Doubt]) -> dict[str, list[Json]]:
    """The corrections in which every proposal is taken."""
    annotations = list[Json]()
    removed = list[Json]()
    for doubt in doubts:
        of_image = {"image_id": doubt.image_id}
        given = None if doubt.given is None else of_image | _entry(doubt.given)
        if doubt.proposed is None:
            assert given is not None
            removed.append(given)
            continue
        label = {"id": len(annotations) + 1, **of_image, **_entry(doubt.proposed)}
        if given is not None:
            label["replaces"] = given
        annotations.append(label)
    return {"annotations": annotations, "removed": removed}

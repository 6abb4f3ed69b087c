"""`visft labels`: a run looks at labels, its own training data's or others', and a page shows its doubts."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from visft_ds.config.record import recorded_config
from visft_ds.data.dataset import coco_dataset, read_raw
from visft_ds.data.decode import as_rgb
from visft_ds.data.fetch import Cache
from visft_ds.data.shards import Manifest, ShardReader, splits_in
from visft_ds.evals.evaluate import evaluate
from visft_ds.evals.labels.doubts import KINDS, Annotation, Doubt, doubts_of
from visft_ds.evals.pages import embedded, render
from visft_ds.files import shown_name, write_bytes, write_text
from visft_ds.monitor.console import Section, print_plan
from visft_ds.run_files import folder_of_run
from visft_ds.shards.corrections import FORMAT, VERSION
from visft_ds.tasks.classes import category_name
from visft_ds.tasks.pictures import scaled

_MARGIN = 0.75  # around boxes in a picture, of their longer side
_LEAST_MARGIN = 24  # pixels
_SIDE = 360  # of a picture on the page, pixels
_PRINTED = 10  # doubts
_LEARNT = (
    0.5  # box/AP50 by the labels themselves, below which nothing was measured that would speak for doubts
)
#: Words of a manifest's sources that stand for the command that built it.
_FOLDER = "MYFOLDER"


def check_labels(
    run: Path, data: str | None, split: str | None, limit: int | None, most: int, out: Path | None
) -> None:
    """Write a page for each split with boxes, and print the first doubts.

    Args:
        data: folder or URL of shards; None: those of the run.
        split: None: the training and the validation split.
        limit: look at the first images only, this many.
        most: doubts on a page.
        out: folder for pages; None: RUN/labels.

    Raises:
        ValueError: the run has no detection head, or the data no boxes.
    """
    of_run = recorded_config(folder_of_run(run)).visft.data
    root = data or of_run.root
    assert root is not None
    splits = [split] if split is not None else [of_run.train, of_run.val]
    if split is None and not _is_url(root):
        splits = [name for name in splits if name in splits_in(Path(root))]
    folder = out or folder_of_run(run) / "labels"
    for name in dict.fromkeys(splits):
        manifest = Manifest.load(os.fspath(root), name, cache=Cache(of_run.cache, of_run.cache_bytes))
        _check_split(run, manifest, limit, most, folder)


def _is_url(root: str) -> bool:
    return "://" in root


def _check_split(run: Path, manifest: Manifest, limit: int | None, most: int, folder: Path) -> None:
    evaluation = evaluate(
        run, data=os.fspath(manifest.root), split=manifest.split, tasks="detection", limit=limit
    )
    with ShardReader(manifest) as reader:
        labels = coco_dataset(reader, range(min(limit or len(manifest), len(manifest))))
        doubts = doubts_of(labels["annotations"], evaluation.results["detection"])
        names = {category["id"]: category["name"] for category in labels["categories"]}
        images = {image["id"]: image for image in labels["images"]}
        _write(folder, manifest.split, doubts[:most], images, labels["categories"], reader)
    rows = [
        (f"{number}. {KINDS[doubt.kind]}", _words(doubt, images, names))
        for number, doubt in _numbered(doubts)
    ]
    average_precision = evaluation.metrics.get("box/AP50", 0.0)
    learnt = "" if average_precision >= _LEARNT else ": a model that finds so little says little of labels"
    rows.append(("the model", f"box/AP50 {average_precision:.2f} by these labels{learnt}"))
    counts = Counter(KINDS[doubt.kind] for doubt in doubts if doubt.score > 0.5)
    of_kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    rows.append(("above 0.5", of_kinds or "none"))
    rows.append(
        ("page", f"{folder / _page(manifest.split)}: the first {min(most, len(doubts))} of {len(doubts)}")
    )
    title = f"{manifest.root}/{manifest.split}: {len(labels['annotations'])} labels, the most doubtful first"
    print_plan("visft_ds labels", [Section(title, rows)])


def _numbered(doubts: Sequence[Doubt]) -> list[tuple[int, Doubt]]:
    return list(enumerate(doubts[:_PRINTED], start=1))


def _words(doubt: Doubt, images: Mapping[int, Any], names: Mapping[int, str]) -> str:
    file_name = shown_name(images[doubt.image_id]["file_name"])
    given = _label_in_words(doubt.given, names)
    proposed = _label_in_words(doubt.proposed, names)
    return f"{doubt.score:.2f}  {file_name}: {given} -> {proposed}"


def _label_in_words(label: Annotation | None, names: Mapping[int, str]) -> str:
    if label is None:
        return "nothing"
    x, y, width, height = label["bbox"]
    name = shown_name(category_name(label["category_id"], names))
    return f"{name} {width:.0f}x{height:.0f} at {x:.0f},{y:.0f}"


def _page(split: str) -> str:
    return f"{split}.html"


def _corrections(split: str) -> str:
    return f"corrections-{split}.json"


def _write(
    folder: Path,
    split: str,
    doubts: Sequence[Doubt],
    images: Mapping[int, Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    reader: ShardReader,
) -> None:
    """Write the page, and the file that it would give if all proposals were taken."""
    names = {category["id"]: category["name"] for category in categories}
    positions = {int(row["image_id"]): position for position, row in enumerate(reader.manifest.index)}
    rows = []
    for doubt in doubts:
        image = read_raw(reader, positions[doubt.image_id], "images").image
        assert image is not None
        file_name = images[doubt.image_id]["file_name"]
        rows.append({"file_name": file_name, **_row(doubt, as_rgb(image), names)})
    concerned = {doubt.image_id for doubt in doubts}
    listed = [image for number, image in images.items() if number in concerned]
    head = {"info": {"format": FORMAT, "version": VERSION, "split": split}, "categories": categories}
    page = render(
        "labels/page.html.j2",
        title=f"Labels of {reader.manifest.root}, {split}",
        about=f"The {len(doubts)} most doubtful labels, by the predictions of a trained model. "
        "A score ranks them; it is no probability.",
        command=shlex.join(["visft", "shards", _FOLDER, "--corrections", _corrections(split), "--replace"]),
        file=_corrections(split),
        rows=rows,
        images=listed,
        head=head,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / _page(split), page)
    proposals = {**head, "images": listed, **_all_taken(doubts)}
    write_bytes(folder / f"proposals-{split}.json", orjson.dumps(proposals, option=orjson.OPT_INDENT_2))


def _row(doubt: Doubt, image: Any, names: Mapping[int, str]) -> dict[str, Any]:
    """Facts of a doubt for the page: a picture of the place, the label given and the one proposed."""
    boxes = np.array([label["bbox"] for label in (doubt.given, doubt.proposed) if label is not None])
    low = boxes[:, :2].min(axis=0)
    high = (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    margin = max(_LEAST_MARGIN, _MARGIN * float((high - low).max()))
    left, top = np.maximum(0, np.floor(low - margin)).astype(int).tolist()
    right, bottom = np.minimum(image.shape[1::-1], np.ceil(high + margin)).astype(int).tolist()
    crop = Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    shown = dict[str, dict[str, Any] | None]()
    for name, label in (("given", doubt.given), ("proposed", doubt.proposed)):
        shown[name] = None
        if label is not None:
            x, y, width, height = label["bbox"]
            place = [x - left, y - top, width, height]
            shown[name] = {
                "name": category_name(label["category_id"], names),
                "shown": place,
                "label": _entry(label),
            }
    return {
        "kind": KINDS[doubt.kind],
        "score": doubt.score,
        "image_id": doubt.image_id,
        "picture": embedded(np.asarray(scaled(np.asarray(crop), _SIDE))),
        "size": [right - left, bottom - top],
        **shown,
    }


def _entry(label: Annotation) -> dict[str, Any]:
    """A label as corrections name it."""
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


def _all_taken(doubts: Sequence[Doubt]) -> dict[str, list[dict[str, Any]]]:
    """The corrections in which every proposal is taken."""
    annotations = list[dict[str, Any]]()
    removed = list[dict[str, Any]]()
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

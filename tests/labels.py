"""Labels of a small split as files beside it, and all that reads labels: training, evaluation, the judge, a
control.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from faster_coco_eval import mask as coco_mask

from tests.coco_tree import write_tree
from visft_ds.data.dataset import caption_dataset, coco_dataset, labels_of_split, read_raw
from visft_ds.data.shards import Manifest, Role, ShardReader
from visft_ds.data.transforms import Crop, Resize
from visft_ds.evals.judge.benchmark import ImageSet
from visft_ds.evals.judge.dense_sets import _of_outlines
from visft_ds.shards.permute import others
from visft_ds.tasks.average_precision import coco_average_precision
from visft_ds.tasks.captioning.data import caption_targets
from visft_ds.tasks.detection.data import detection_targets
from visft_ds.tasks.masks.data import mask_targets
from visft_ds.tasks.semantic.results import measure_semantic
from visft_ds.tasks.vocabulary import Vocabulary, caption_words

_OPS = (Resize(40, 48), Crop(4, 4, 30, 30))


class Relabelled(ShardReader):
    """A reader of shards whose labels are those in the files beside them: as if the index fitted them."""

    def read(self, index: int, role: Role = "both") -> tuple[bytes | None, bytes | None]:
        image, label = super().read(index, role)
        return image, label and Path(self.manifest.root, f"label{index}.json").read_bytes()


def write_labels(folder: Path) -> None:
    """Shards of six pictures with boxes, polygons, run-length codes and captions, and their labels as
    files.
    """

    def change(content: dict[str, Any]) -> None:
        sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
        for one in content["annotations"][::2]:
            size = sizes[one["image_id"]]
            code = coco_mask.encode(
                np.asfortranarray(np.arange(size[0] * size[1]).reshape(size) % 7 < 3, np.uint8)
            )
            one["segmentation"] = {"size": size, "counts": code["counts"].decode()}

    with TemporaryDirectory() as place:
        tree = write_tree(Path(place, "tree"), 6)
        tree.edit(change)
        reader = ShardReader(tree.pack(folder, "toy"))
    for index in range(len(reader)):
        (folder / f"label{index}.json").write_bytes(reader.read(index, "labels")[1] or b"")


def use_labels(folder: Path) -> None:
    """Read the labels as everything does that reads labels."""
    reader = Relabelled(Manifest.load(folder, "toy"))
    draw, words = np.random.default_rng(0), Vocabulary(("red", "picture"))
    classes = {category.coco_id: category.id for category in reader.manifest.categories}
    for index in range(len(reader)):
        raw = read_raw(reader, index, "labels")
        detection_targets(classes, raw, _OPS, draw)
        mask_targets(classes, raw, _OPS, draw)
        caption_targets(words, True, 50, raw, _OPS, draw)
    truth = coco_dataset(reader)
    coco_average_precision(truth, [])
    coco_average_precision(truth, [], masks=True)
    measure_semantic(truth, [], per_category=True)
    assert all(
        caption_words(annotation["caption"]) is not None
        for annotation in caption_dataset(reader)["annotations"]
    )
    assert len(others(len(truth["images"]), 0)) == len(reader)
    names = [image["file_name"] for image in truth["images"]]
    images = ImageSet(names, lambda position: None, "")  # type: ignore[arg-type, return-value]
    judged = _of_outlines(images, list(labels_of_split(reader)), reader.manifest.categories)
    assert {judged.label(position).dtype for position in range(len(reader))} == {np.dtype(np.uint16)}

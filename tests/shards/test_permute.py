"""Labels of other images: a control whose images have the labels of one another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import orjson
import pytest
from PIL import Image

from tests.map_folder import write_own
from visft_ds.data.dataset import coco_dataset
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.shards.cli import main as shards_main
from visft_ds.shards.permute import others


def test_permuting_is_one_round_through_all() -> None:
    for count in (2, 3, 50):
        places = others(count, 1)
        walked, here = [], 0
        for _ in range(count):
            walked.append(here)
            here = int(places[here])
        assert sorted(walked) == list(range(count)) and here == 0
    assert not np.array_equal(others(50, 1), others(50, 2))
    with pytest.raises(ValueError, match="at least 2"):
        others(1, 0)


def test_labels_lie_beside_another_image_which_takes_their_size(split: Manifest, tmp_path: Path) -> None:
    assert shards_main(["permute", str(split.root), "--out", str(tmp_path / "tree"), "--seed", "3"]) == 0
    reader = ShardReader(split)
    content = orjson.loads((tmp_path / "tree/annotations/instances_toy2017.json").read_bytes())
    captions = orjson.loads((tmp_path / "tree/annotations/captions_toy2017.json").read_bytes())
    labels = [
        orjson.loads(data)
        for data in (reader.read(place, "labels")[1] or b"" for place in range(len(reader)))
    ]
    places = others(len(reader), 3)
    for label, image, place in zip(labels, content["images"], places, strict=True):
        assert (image["id"], image["width"], image["height"]) == (
            label["image_id"],
            label["width"],
            label["height"],
        )
        own = [annotation for annotation in content["annotations"] if annotation["image_id"] == image["id"]]
        assert [one["bbox"] for one in own] == [annotation["bbox"] for annotation in label["annotations"]]
        texts = [
            annotation["caption"]
            for annotation in captions["annotations"]
            if annotation["image_id"] == image["id"]
        ]
        assert texts == label["captions"]
        found, (data, _) = tmp_path / "tree/toy2017" / image["file_name"], reader.read(int(place), "images")
        other = labels[place]
        with Image.open(found) as picture:
            assert picture.size == (label["width"], label["height"])
        assert (found.read_bytes() == data) == (picture.size == (other["width"], other["height"]))
    words = ["--images", str(tmp_path / "tree/toy2017"), "--split", "toy", "--out", str(tmp_path / "again")]
    words += [
        f"--{kind}={tmp_path}/tree/annotations/{kind}_toy2017.json" for kind in ("instances", "captions")
    ]
    assert shards_main(["build", *words]) == 0
    assert len(Manifest.load(tmp_path / "again", "toy")) == len(reader)


def test_label_maps_stay_label_maps(tmp_path: Path) -> None:
    write_own(tmp_path / "data")
    assert shards_main([str(tmp_path / "data"), "--out", str(tmp_path / "shards")]) == 0
    assert shards_main(["permute", str(tmp_path / "shards"), "--out", str(tmp_path / "tree")]) == 0
    assert shards_main([str(tmp_path / "tree"), "--out", str(tmp_path / "again")]) == 0
    for name in ("train", "val"):
        split, again = (Manifest.load(tmp_path / folder, name) for folder in ("shards", "again"))
        assert (
            "maps" in again.labels
            and "annotations" not in again.labels
            and again.categories == split.categories
        )
        before, after = (coco_dataset(ShardReader(one)) for one in (split, again))
        masks = [
            {(a["image_id"], a["category_id"]): a["segmentation"] for a in one["annotations"]}
            for one in (before, after)
        ]
        assert masks[0] == masks[1] and len(after["images"]) == len(again) == len(split)

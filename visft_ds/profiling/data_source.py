"""The data sets that the measurements of the data path read, and the loader as training builds it.

A set is a folder of finished shards, an ordinary COCO tree (repeated until it is large enough to be measured), or
generated images. The last two are packed into a temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from visft_ds.data.dataset import DataSet, SamplePipeline
from visft_ds.data.loader import StepLoader
from visft_ds.data.manifest import Manifest, manifest_path
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.selection import Selection
from visft_ds.data.shards import Role, ShardReader
from visft_ds.data.workers import WorkerKind
from visft_ds.shards.build import Options, build
from visft_ds.shards.reencode import Reencoding
from visft_ds.tasks.transform import JointTransform, collate_joint
from visft_ds.tasks.vocabulary import Vocabulary
from visft_ds.toy.annotations import write_toy_coco

#: Pixels of a side of the plain three-task sample, and the name of its only task.
SIDE, TASK = 224, "joint"
#: Height and width of generated images: COCO's most frequent size.
GENERATED_SIZE = (480, 640)
#: Most shapes of a generated image: 7.3 on average, as many as COCO's have objects.
GENERATED_SHAPES = 18
_SPLIT = "measured"
_SAMPLES_PER_SHARD = 64
#: Generated images that are different; drawing one takes longer than reading it many times.
_DRAWN = 64
#: Between the ids of one repetition of a set and the next; COCO's are below a million.
_REPETITION = 10_000_000


@dataclass(frozen=True)
class MeasuredSet:
    """Shards to measure on: the first of a split that together have enough samples."""

    name: str  #: for tables
    manifest: Manifest
    shards: int

    @classmethod
    def of(cls, name: str, manifest: Manifest, images: int) -> MeasuredSet:
        """As many whole shards as it takes to have `images` samples; all of them where there are fewer."""
        sums = np.cumsum([shard.count for shard in manifest.shards])
        return cls(name, manifest, min(int(np.searchsorted(sums, images)) + 1, len(sums)))

    @property
    def urls(self) -> list[str]:
        """The shards as webdataset takes them."""
        return [f"{self.manifest.root}/{shard.name}" for shard in self.manifest.shards[: self.shards]]

    def __len__(self) -> int:
        """Samples in these shards: the first ones of the index."""
        return sum(shard.count for shard in self.manifest.shards[: self.shards])

    @property
    def rows(self) -> npt.NDArray[Any]:
        """Their rows of the index."""
        return self.manifest.index[: len(self)]

    def facts(self) -> dict[str, Any]:
        """Name and size of the set, and means over its samples that determine their work, for records and tables."""
        rows = self.rows
        return {
            "name": self.name,
            "samples": len(self),
            "shards": self.shards,
            "image_bytes": float(rows["image_size"].mean()),
            "label_bytes": float(rows["label_size"].mean()),
            "pixels": float((rows["width"].astype(np.int64) * rows["height"]).mean()),
            "objects": float(rows["num_annotations"].mean()),
            "captions": float(rows["num_captions"].mean()),
        }

    @property
    def vocabulary(self) -> Vocabulary:
        """Every word of the captions: small sets have few."""
        return Vocabulary.from_counts(self.manifest.vocabulary, min_count=1)


def facts_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """`MeasuredSet.facts` for a person."""
    return [
        ("set", f"{facts['name']}: {facts['samples']:,} samples in {facts['shards']} shards"),
        (
            "a sample",
            f"{facts['image_bytes'] / 1000:.0f} kB, {facts['pixels'] / 1e6:.2f} million pixels, "
            f"{facts['objects']:.1f} objects, {facts['captions']:.1f} captions, labels of "
            f"{facts['label_bytes'] / 1000:.1f} kB",
        ),
    ]


@contextmanager
def open_set(folder: Path | None, split: str, images: int, reencode: Reencoding | None = None) -> Iterator[MeasuredSet]:
    """A set by its folder: shards, a COCO tree, or (None) generated images.

    Args:
        folder: holds `SPLIT.manifest.json`, or `annotations/` beside the folders of images.
        split: name of the shards; "train" also finds `train2017` of a COCO tree.
        images: number of samples wanted. A tree or generated images are repeated until there are as many; of
            finished shards, the first ones are taken.
        reencode: re-encoding of the images of a tree, or of generated ones; None for finished shards.

    Raises:
        ValueError: the folder holds neither; what is found in it is damaged; finished shards and `reencode`.
    """
    if folder is not None and manifest_path(folder, split).is_file():
        if reencode is not None:
            raise ValueError(f"--reencode: {folder} holds finished shards; give a COCO tree, or leave it out")
        yield MeasuredSet.of(f"{folder.name}/{split}", Manifest.load(folder, split), images)
        return
    with tempfile.TemporaryDirectory(prefix="visft-profile-") as temporary:
        work = Path(temporary)
        if folder is None:
            height, width = GENERATED_SIZE
            drawn = min(images, _DRAWN)
            write_toy_coco(work / "coco", train=drawn, val=0, height=height, width=width, max_shapes=GENERATED_SHAPES)
            tree, part, name = work / "coco", "train2017", f"generated {width} x {height}"
        else:
            tree, part, name = folder, _part(folder, split), folder.name
        if reencode is not None:
            side = "" if reencode.short_side is None else f", short side {reencode.short_side}"
            name += f", stored as JPEG of quality {reencode.quality}{side}"
        yield MeasuredSet.of(name, _pack(tree, part, work, images, reencode), images)


def _part(folder: Path, split: str) -> str:
    for part in (split, f"{split}2017"):
        if (folder / "annotations" / f"instances_{part}.json").is_file() and (folder / part).is_dir():
            return part
    raise ValueError(
        f"--data {folder}: neither shards ({split}.manifest.json) nor a COCO tree "
        f"(annotations/instances_{split}2017.json beside {split}2017/); give the folder of one, or leave --data out "
        "and give --synthetic"
    )


def _pack(tree: Path, part: str, work: Path, images: int, reencode: Reencoding | None) -> Manifest:
    """Shards of a COCO tree below `work`, with every image as often as it takes to have `images` samples."""
    instances, captions = (_read(tree / "annotations" / f"{kind}_{part}.json") for kind in ("instances", "captions"))
    repetitions = max(1, -(-images // len(instances["images"])))
    pictures = work / "pictures"
    pictures.mkdir()
    for image in instances["images"]:
        for repetition in range(repetitions):
            (pictures / _file_name(image, repetition)).symlink_to((tree / part / image["file_name"]).resolve())
    for kind, content in (("instances", instances), ("captions", captions)):
        (work / f"{kind}.json").write_bytes(orjson.dumps(_repeated(content, repetitions)))
    build(
        Options(
            images=pictures,
            instances=work / "instances.json",
            captions=work / "captions.json",
            out=work / "shards",
            split=_SPLIT,
            max_count=_SAMPLES_PER_SHARD,
            reencode=reencode,
        )
    )
    return Manifest.load(work / "shards", _SPLIT)


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return content


def _repeated(content: Mapping[str, Any], repetitions: int) -> dict[str, Any]:
    """The same COCO dictionary with every image and annotation that many times, under ids of their own."""
    images = [
        {**image, "id": image["id"] + _REPETITION * turn, "file_name": _file_name(image, turn)}
        for turn in range(repetitions)
        for image in content["images"]
    ]
    annotations = [
        {
            **annotation,
            "id": turn * len(content["annotations"]) + place,
            "image_id": annotation["image_id"] + _REPETITION * turn,
        }
        for turn in range(repetitions)
        for place, annotation in enumerate(content["annotations"], start=1)
    ]
    return {**content, "images": images, "annotations": annotations}


def _file_name(image: Mapping[str, Any], repetition: int) -> str:
    return f"{image['id'] + _REPETITION * repetition:012d}.jpg"


def joint_pipeline(vocabulary: Vocabulary) -> SamplePipeline:
    """The plain three-task sample: boxes, masks of 56 x 56 cells and one caption on a square of 224 pixels."""
    tasks = ("detection", "segmentation", "captioning")
    return SamplePipeline(JointTransform(True, tasks, vocabulary=vocabulary, fixed_size=SIDE), collate_joint)


def our_loader(
    data: MeasuredSet,
    reader: ShardReader,
    pipeline: SamplePipeline,
    batch: int,
    *,
    workers: WorkerKind = "threads",
    num_workers: int,
    role: Role = "both",
    name: str = TASK,
) -> StepLoader:
    """The loader of this project over a set, in global shuffled order; one process has the whole batch."""
    return StepLoader(
        {_SPLIT: DataSet(reader)},
        Plan({name: TaskPlan({_SPLIT: SetPlan(Selection.all(len(data)))}, batch)}, 0),
        {name: {_SPLIT: pipeline}},
        role=role,
        workers=workers,
        num_workers=num_workers,
    )

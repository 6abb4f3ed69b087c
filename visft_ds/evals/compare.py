"""Reading of the folders that visft evaluate writes, and differences between the predictions of two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import ConfigDict, Field, StringConstraints

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Finite, Number, Whole, parse_json, read_record
from visft_ds.data.decode import MOST_PIXELS, decode_image
from visft_ds.tasks import config_class, entries
from visft_ds.tasks.pictures import Picture
from visft_ds.tasks.segmentation.masks import decode_mask

#: What visft evaluate leaves in its folder; METRICS is written last.
FORMAT, VERSION = "visft_ds evaluation", 1
METRICS, PICTURES = "metrics.json", "pictures"

#: Task -> the one number it is known by. Part before the slash: of all its numbers.
MAIN = {name: str(config_class(name).main) for name in entries()}


def results_name(task: str) -> str:
    """Name of the file with a task's results."""
    return f"{task}_results.json"


class DrawnImage(StrictModel):
    """Picture of an image with its predictions."""

    image_id: Number
    file: Annotated[str, StringConstraints(pattern=rf"^{PICTURES}/[^/\\\x00]+$")]  #: from the folder of the evaluation


class MeasuredData(StrictModel):
    """Data of an evaluation; further fields are for people."""

    model_config = ConfigDict(extra="allow")

    where: str
    images: Whole


class EvaluationFile(StrictModel):
    """Content of metrics.json; further fields are for people."""

    model_config = ConfigDict(extra="allow")

    format: Literal["visft_ds evaluation"]
    version: Literal[1]
    metrics: dict[str, Finite]
    data: MeasuredData
    pictures: dict[str, list[DrawnImage]] = Field(default_factory=dict)
    caption_tokenizer: str | None = None


class ImageResult(StrictModel):
    """Prediction for an image in COCO's results format."""

    model_config = ConfigDict(extra="allow")

    image_id: Number


class BoxResult(ImageResult):
    """Predicted box."""

    category_id: Number
    score: Finite
    bbox: Annotated[list[Finite], Field(min_length=4, max_length=4)]


class RunLengths(StrictModel):
    """Run-length code of a mask."""

    size: Annotated[list[Annotated[int, Field(ge=1, le=1 << 20)]], Field(min_length=2, max_length=2)]
    counts: str | list[Whole]


class MaskResult(BoxResult):
    """The same with a mask."""

    segmentation: RunLengths


class CaptionResult(ImageResult):
    """Predicted caption."""

    caption: str


_KINDS: Mapping[str, Any] = {
    "detection": list[BoxResult],
    "segmentation": list[MaskResult],
    "captioning": list[CaptionResult],
}


@dataclass(frozen=True)
class Evaluation:
    """A folder written by visft evaluate."""

    label: str
    folder: Path
    record: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, float]:
        """Name -> value: AP, BLEU and ROUGE-L in [0, 1], CIDEr in [0, 10]; -1 where the data has no such objects."""
        metrics: Mapping[str, float] = self.record["metrics"]
        return metrics

    @property
    def tasks(self) -> list[str]:
        """The tasks that have numbers here, in the order of MAIN."""
        prefixes = {name.partition("/")[0] for name in self.metrics}
        return [task for task, name in MAIN.items() if name.partition("/")[0] in prefixes]

    @property
    def tokenizer(self) -> str | None:
        """Name of the rules by which captions were cut into words; None without captions."""
        name: str | None = self.record.get("caption_tokenizer")
        return name

    def pictures(self, task: str) -> dict[int, Picture]:
        """Image id -> ground truth beside prediction."""
        files = self.record.get("pictures", {}).get(task, ())
        return {entry["image_id"]: read_picture(self.folder / entry["file"]) for entry in files}

    def results(self, task: str) -> list[dict[str, Any]]:
        """A task's predictions in COCO's results format."""
        path = self.folder / results_name(task)
        read_record(path, _KINDS.get(task, list[ImageResult]))
        results: list[dict[str, Any]] = orjson.loads(path.read_bytes())
        return results


def read_evaluation(label: str, folder: Path) -> Evaluation:
    """Open an evaluation.

    Raises:
        ValueError: the folder holds none, or an unfinished one.
    """
    path = folder / METRICS
    try:
        record = parse_json(path.read_bytes(), str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no finished evaluation: {error}; make it with visft evaluate") from error
    if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is no evaluation of this release ({FORMAT} {VERSION})")
    read_record(path, EvaluationFile)
    return Evaluation(label, folder, record)


def read_picture(path: Path) -> Picture:
    """A picture of an evaluation. Raises ValueError where it is missing or damaged."""
    try:
        return decode_image(path.read_bytes(), max_pixels=MOST_PIXELS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


Pair = tuple[Mapping[str, Any], Mapping[str, Any]]  #: the same query of two models


@dataclass(frozen=True)
class Difference:
    """Difference between the predictions of two models on the same images."""

    results: int
    other_class: int = 0  #: results whose best class differs
    score: float = 0.0  #: largest absolute difference of a score
    box: float = 0.0  #: largest absolute difference of a box coordinate, pixels
    pixels: int = 0  #: of all masks together
    other_pixels: int = 0  #: pixels that one mask covers and the other does not
    other_texts: int = 0  #: captions that differ
    example: tuple[str, str] | None = None  #: the first of these
    task: str = "detection"

    def text(self) -> str:
        """Description in a sentence."""
        if self.task == "captioning":
            same = f"{self.results} captions compared: {self.results - self.other_texts} are the same"
            return same + (f", {self.example[0]!r} became {self.example[1]!r}" if self.example else "")
        classes = "the same class everywhere" if not self.other_class else f"{self.other_class} with another class"
        if self.task == "detection":
            return (
                f"{self.results} predictions compared: scores differ by at most {self.score:.1e}, boxes by at most "
                f"{self.box:.1e} pixels, {classes}"
            )
        return (
            f"{self.results} masks compared: scores differ by at most {self.score:.1e}, "
            f"{self.other_pixels} of {self.pixels} pixels are not the same, {classes}"
        )


def compare_results(first: Evaluation, second: Evaluation, task: str = "detection") -> Difference:
    """Compare two result files of a task, query by query or caption by caption.

    Raises:
        ValueError: they are not about the same images.
    """
    pair = [run.results(task) for run in (first, second)]
    images = [[result["image_id"] for result in results] for results in pair]
    if images[0] != images[1]:
        raise ValueError(f"{first.folder} and {second.folder} evaluated other images, or in another order")
    rows = list(zip(*pair, strict=True))
    if task == "captioning":
        return _compare_captions(rows)
    other_class = sum(one["category_id"] != other["category_id"] for one, other in rows)
    score = max((abs(one["score"] - other["score"]) for one, other in rows), default=0.0)
    if task == "segmentation":
        pixels = [_compare_masks(one["segmentation"], other["segmentation"]) for one, other in rows]
        every, changed = (sum(column) for column in zip(*pixels, strict=True)) if pixels else (0, 0)
        return Difference(len(rows), other_class, score, pixels=every, other_pixels=changed, task=task)
    boxes = [abs(a - b) for one, other in rows for a, b in zip(one["bbox"], other["bbox"], strict=True)]
    return Difference(len(rows), other_class, score, box=max(boxes, default=0.0))


def _compare_masks(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[int, int]:
    """Pixels of a mask's image, and how many of them differ."""
    height, width = one["size"]
    if one == other:
        return height * width, 0
    return height * width, int((decode_mask(one, (height, width)) != decode_mask(other, (height, width))).sum())


def _compare_captions(rows: Sequence[Pair]) -> Difference:
    others = [(one["caption"], other["caption"]) for one, other in rows if one["caption"] != other["caption"]]
    example = others[0] if others else None
    return Difference(len(rows), other_texts=len(others), example=example, task="captioning")

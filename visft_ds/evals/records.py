"""Files that visft evaluate leaves in its folders, and reading them. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from visft_ds.files import open_image, read_bytes, reading
from visft_ds.tasks import Numbers, config_class, entries
from visft_ds.tasks.pictures import Picture

#: Files that visft evaluate leaves in its folder; METRICS is written last.
FORMAT = "visft_ds evaluation"
VERSION = 2
METRICS = "metrics.json"
VISUALIZATIONS = "visualizations"  #: key of the record, and folder
#: Of visft judge.
JUDGE = "visft_ds judge 3"
JUDGED = "judge.json"

Record = dict[str, Any]  #: content of metrics.json or judge.json
#: Task -> the one number it is known by. Part before the slash: of all its numbers.
MAIN = {name: str(config_class(name).main) for name in entries()}


def counted(images: int | None, total: int | None) -> str:
    """Number of images that were evaluated, in words: `16 of 200 images`."""
    if images is None:
        return "all images"
    return f"{images} images" if total in (None, images) else f"{images} of {total} images"


def number_text(value: float, percent: bool = True, sign: str = "") -> str:
    """A number as text, in percent or in its own unit; with `sign` "+" never without one."""
    return f"{100 * value:{sign}z.2f}" if percent else f"{value:{sign}z.3f}"


@dataclass(frozen=True)
class Interval:
    """A number with its interval, by percentiles."""

    value: float
    low: float
    high: float

    def text(self, percent: bool = True) -> str:
        """`+4.50 [+2.50, +6.40]`, in percentage points or in the number's own unit."""
        value, low, high = (number_text(end, percent, "+") for end in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


@dataclass(frozen=True)
class Evaluation:
    """Numbers of a model on a split, as visft evaluate or an evaluation during training recorded them."""

    label: str
    folder: Path
    #: AP, BLEU and ROUGE-L in [0, 1], CIDEr in [0, 10]; -1: the data has no such objects.
    metrics: Numbers
    images: str  #: how many were evaluated, in words
    record: Record

    def visualizations(self, task: str) -> dict[int, Picture]:
        """Image id -> ground truth beside prediction. Raises ValueError for a damaged file."""
        drawings = {}
        for entry in self.record.get(VISUALIZATIONS, {}).get(task, ()):
            path = self.folder / VISUALIZATIONS / Path(entry["file"]).name
            drawings[entry["image_id"]] = np.asarray(open_image(path))
        return drawings


def read_evaluation(label: str, folder: Path) -> Evaluation:
    """Open an evaluation. Raises ValueError if the folder holds none, or an unfinished one."""
    path = folder / METRICS
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished evaluation (no {METRICS}); make it with visft evaluate")
    with reading(path, "an evaluation"):
        record = orjson.loads(read_bytes(path))
        if (record["format"], record["version"]) != (FORMAT, VERSION):
            raise ValueError(f"its format is not {FORMAT} {VERSION}")
        data = record["data"]
        metrics = {name: float(value) for name, value in record["metrics"].items()}
        return Evaluation(label, folder, metrics, counted(data["images"], data["total"]), record)


def read_judged(folder: Path) -> Record:
    """The record that visft judge wrote. Raises ValueError for anything else."""
    path = folder / JUDGED
    with reading(path, "a record of visft judge"):
        record: Record = orjson.loads(read_bytes(path))
        if record["format"] != JUDGE:
            raise ValueError(f"its format is not {JUDGE}")
    return record

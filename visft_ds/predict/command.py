"""`visft predict`: every picture through a model, a drawing of each, one JSON file of all.

What is done stands in a record, a line for each image, written when its picture is: the same command goes on from any
point at which it was ended. Another model, or other options that change what is found, are refused in the same folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson
import torch
from pydantic import ConfigDict

from visft_ds.checkpoint.disk import explained
from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Natural, Number, Whole, as_record, parse_json
from visft_ds.monitor.console import Gauge, Section, print_plan
from visft_ds.predict.images import Found, OpenedImage, find_images, open_image, readable
from visft_ds.predict.model import Model, check_options, load
from visft_ds.predict.results import Prediction, category_name
from visft_ds.redaction import redacted
from visft_ds.run.lock import locked
from visft_ds.tasks.pictures import save_png

RECORD, RESULTS, PICTURES = "predictions.jsonl", "predictions.json", "pictures"
FORMAT, VERSION = "visft_ds predictions", 1
_GOES_ON = "What was predicted is kept: the same command goes on"
#: Bytes of the name of an image whose picture has one of 255 bytes, the most of a file system.
_LONGEST = 251


def predict(given: argparse.Namespace) -> int:
    """Predict what the flags of `visft_ds.predict.cli` ask for; returns the exit status."""
    try:
        check_options(given.threshold, given.batch_size)
        found = find_images(given.images, outside=given.out)
        model = load(
            given.model,
            tasks=given.tasks,
            device=given.device,
            precision=given.precision,
            backbone=given.backbone,
            download=given.download,
            heads=given.heads,
            adapter=given.adapter,
            vocabulary=given.vocabulary,
            image_size=given.image_size,
            allow_other_base=given.allow_other_base,
        )
        with locked(given.out):
            return _predict(given, found, model)
    except (ValueError, OSError) as error:
        return _complain(str(error))
    except torch.OutOfMemoryError as error:
        return _complain(f"{str(error).splitlines()[0]} Give a smaller --batch-size than {given.batch_size or 'now'}")


def _complain(text: str) -> int:
    print(f"predict: {redacted(text)}", file=sys.stderr, flush=True)
    return 2


def _predict(given: argparse.Namespace, found: Found, model: Model) -> int:
    with Record(given.out, _identity(given, found, model)) as record:
        rows = [*model.facts.items(), ("precision", f"{model.precision} on {model.device}")]
        left = [file for file in found.files if found.name(file) not in record.done]
        done = len(found.files) - len(left)
        below = f"{len(found.files)} below {readable(found.root)}"
        rows.append(("images", below + (f", {done} done before" if done else "")))
        print_plan("visft_ds prediction", [Section("model and data", rows)])
        skipped: dict[Path, str] = {}
        with Gauge("predicting", len(found.files), "images") as gauge:
            gauge.phase("predicting", len(found.files), "images", done)
            for images in _batches(left, given.batch_size or model.batch_size, skipped, gauge):
                predictions = model.predict_opened(images, threshold=given.threshold, batch_size=given.batch_size)
                for prediction in predictions:
                    assert prediction.path is not None
                    record.add(found.name(prediction.path), prediction, pictures=not given.no_pictures)
                    gauge.add()
        record.finish(model.categories, {found.name(path): why for path, why in skipped.items()})
        written = [RESULTS] if given.no_pictures else [RESULTS, f"{PICTURES}/"]
        rows = [("predicted", f"{len(record.done)} images")]
        if skipped:
            more = ", ..." if len(skipped) > 5 else ""
            rows.append(("skipped", f"{len(skipped)}: {', '.join(map(readable, list(skipped)[:5]))}{more}"))
        print_plan("done", [Section("results", [*rows, ("written", f"{given.out}: {', '.join(written)}")])])
        if not record.done:
            return _complain(f"none of {len(skipped)} files could be predicted")
        return 0


def _identity(given: argparse.Namespace, found: Found, model: Model) -> dict[str, str]:
    """Settings that decide what is found, by name: a folder holds predictions of one model with one set of options."""
    files = [model.files.backbone, *(Path(model.facts[f"{task} head"]) for task in model.tasks)]
    if (adapter := model.files.adapter) is not None:
        files += [adapter] if adapter.is_file() else sorted(path for path in adapter.rglob("*") if path.is_file())
    if given.vocabulary is not None:
        files.append(given.vocabulary)
    stamps = [f"{os.path.abspath(path)} ({path.stat().st_size} bytes of {path.stat().st_mtime:.0f})" for path in files]
    return {
        "--model": ", ".join(stamps),
        "--tasks": ", ".join(model.tasks),
        "--threshold": f"{given.threshold:g}",
        "--precision": model.precision,
        "--image-size": str(given.image_size or "the run's"),
        "pictures": "no" if given.no_pictures else "yes",
        "folder of the images": readable(found.root),
    }


def _batches(files: Sequence[Path], size: int, skipped: dict[Path, str], gauge: Gauge) -> Iterator[list[OpenedImage]]:
    """Decoded images, so many at once; what is none is named and noted in `skipped`."""
    images: list[OpenedImage] = []
    for file in files:
        try:
            images.append(open_image(file))
        except ValueError as error:
            skipped[file] = readable(str(error))
            print(f"skipped {redacted(skipped[file])}", file=sys.stderr, flush=True)
            gauge.add()
        if len(images) == size:
            yield images
            images = []
    if images:
        yield images


def _picture_of(name: str) -> str:
    """Name of the picture of an image; what file systems find too long is cut and kept apart by its hash."""
    parts = name.split("/")
    for place, part in enumerate(parts):
        content = part.encode()
        if len(content) > _LONGEST:
            mark = hashlib.sha256(content).hexdigest()[:16]
            parts[place] = f"{content[: _LONGEST - 17].decode(errors='ignore')}-{mark}"
    return f"{'/'.join(parts)}.png"


class PredictedResult(StrictModel):
    """Result of a task in an image, in COCO's format."""

    model_config = ConfigDict(extra="allow")

    category_id: Number = 0  #: where it has one


class PredictedImage(StrictModel):
    """Line of an image; `found` are its results by task, in COCO's format."""

    id: Whole
    file_name: str
    width: Natural
    height: Natural
    found: dict[str, list[PredictedResult]]


class Record:
    """The record of a folder of predictions, open for more lines; a context manager.

    Args:
        out: the folder.
        identity: what every line in it has in common.

    Raises:
        ValueError: it holds predictions with another identity (each difference is named), or something else.
    """

    def __init__(self, out: Path, identity: Mapping[str, str]) -> None:
        self.out, self._path = out, out / RECORD
        self.done: dict[str, dict[str, Any]] = {}  #: name of an image -> its line
        header = {"format": FORMAT, "version": VERSION, **identity}
        if self._path.exists():
            self._read(header)
        with self._writing():
            self._file = self._path.open("ab")
            if not self._path.stat().st_size:
                self._write(header)

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # of a full disk; the lines themselves were flushed one by one
            self._file.close()

    def _read(self, header: Mapping[str, Any]) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a line that was cut off is written again
        try:
            lines = [parse_json(line, "a line") for line in whole.splitlines()]
            for line in whole.splitlines()[1:]:
                as_record(line, PredictedImage, "a line")
        except ValueError as error:
            raise ValueError(f"{self._path} is damaged ({error}): choose another --out, or remove it") from error
        if lines and lines[0] != header:
            there = lines[0] if isinstance(lines[0], dict) else {}
            names = [name for name in header if there.get(name) != header[name]]
            shown = [f"  {name}: {there.get(name)} -> {header[name]}" for name in names]
            raise ValueError(
                f"{self.out} holds predictions with other settings (there -> here):\n" + "\n".join(shown) + "\nchoose "
                "another --out, or give the settings of those"
            )
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))
        self.done = {line["file_name"]: line for line in lines[1:]}

    def add(self, name: str, prediction: Prediction, *, pictures: bool) -> None:
        """Write the picture of an image, then its line.

        Raises:
            OSError: a full disk, say, in one sentence.
        """
        found = prediction.to_coco(len(self.done) + 1)
        height, width = prediction.image.shape[:2]
        line = {"id": len(self.done) + 1, "file_name": name, "width": width, "height": height, "found": found}
        with self._writing():
            if pictures:
                save_png(np.asarray(prediction.draw()), self.out / PICTURES / _picture_of(name))
            self._write(line)
        self.done[name] = line

    def finish(self, categories: Mapping[int, str], skipped: Mapping[str, str]) -> None:
        """Write `predictions.json` out of all lines. Raises OSError as `add`."""
        lines = list(self.done.values())
        found = [result for line in lines for results in line["found"].values() for result in results]
        ids = {*categories, *(result["category_id"] for result in found if "category_id" in result)}
        whole: dict[str, Any] = {
            "images": [{name: line[name] for name in ("id", "file_name", "width", "height")} for line in lines],
            "categories": [{"id": id_, "name": category_name(id_, categories)} for id_ in sorted(ids)],
            "skipped": [{"file_name": name, "reason": reason} for name, reason in skipped.items()],
        }
        for line in lines:
            for task, results in line["found"].items():
                whole.setdefault(task, []).extend(results)
        with self._writing():
            draft = self.out / f".{RESULTS}.tmp"
            draft.write_bytes(orjson.dumps(whole))
            draft.replace(self.out / RESULTS)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(orjson.dumps(line) + b"\n")
        self._file.flush()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return explained("predictions", self.out, _GOES_ON)

"""`visft predict`: every picture through a model, a drawing of each, one JSON file of all.

Numbers are written picture by picture, as lines of JSON behind a line of settings. At the end they become one
file, and until then the same command goes on where it was interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
import torch
from tqdm import tqdm

from visft_ds.files import read_bytes, reading, write_bytes
from visft_ds.monitor.console import Section, print_plan
from visft_ds.predict.images import OpenedImage, find_images, open_file, printable
from visft_ds.predict.model import Model, check_options, load
from visft_ds.predict.results import Prediction
from visft_ds.redaction import redacted, visible
from visft_ds.run.folder import refuse_filled
from visft_ds.run_files import export_of
from visft_ds.tasks.classes import category_name
from visft_ds.tasks.pictures import save_png

RESULTS, PICTURES = "predictions.json", "pictures"
#: Settings, then a line for each picture that is drawn; gone when `RESULTS` is there.
LINES = "predictions.jsonl"
#: Threads that decode while the model computes.
_THREADS = 2
#: Arguments of `load` that name files.
_PLACES = ("source", "backbone", "heads", "adapter", "vocabulary")


def predict(images: list[str], out: Path, threshold: float, batch_size: int | None, **model: Any) -> None:
    """Write pictures and results of what the flags of `visft_ds.predict.cli` ask for.

    Args:
        model: what `load` takes.

    Raises:
        ValueError: nothing could be predicted, a batch did not fit into the GPU, or `out` has other results.
    """
    check_options(threshold, batch_size=batch_size)
    if (out / RESULTS).exists() or not (out / LINES).exists():
        refuse_filled(out)
    found = find_images(images, outside=out)
    loaded = load(**model)
    settings = {
        "model": dict(loaded.facts),
        "precision": loaded.precision,
        "threshold": threshold,
        "image size": model["image_size"],
        "changed last": {name: _changed_last(Path(model[name])) for name in _PLACES if model[name]},
    }
    done = _continued(out / LINES, settings)
    todo = {name: file for name, file in found.items() if name not in done}
    facts = [("precision", f"{loaded.precision} on {loaded.device}"), ("images", str(len(found)))]
    if done:
        facts.append(("continues", f"{len(found) - len(todo)} of them are done"))
    print_plan("visft_ds prediction", [Section("model and data", [*loaded.facts.items(), *facts])])
    out.mkdir(parents=True, exist_ok=True)
    skipped: dict[str, str] = {}
    with (out / LINES).open("ab") as lines:
        if not lines.tell():
            _append(lines, settings)
        for name, outcome in _predictions(todo, loaded, threshold, batch_size or loaded.batch_size):
            if isinstance(outcome, str):
                skipped[name] = outcome
                continue
            save_png(np.asarray(outcome.draw()), out / PICTURES / f"{name}.png")
            height, width = outcome.image.shape[:2]
            done[name] = {"file_name": name, "width": width, "height": height, "results": outcome.results}
            _append(lines, done[name])  # the picture is whole then
    whole = _joined([done[name] for name in found if name in done], skipped, loaded)
    if not whole["images"]:
        (out / LINES).unlink()
        raise ValueError(f"none of {len(found)} files could be predicted")
    write_bytes(out / RESULTS, orjson.dumps(whole))
    (out / LINES).unlink()
    rows = [("predicted", f"{len(whole['images'])} images")]
    if skipped:
        rows.append(("skipped", f"{len(skipped)} files, named in {RESULTS}"))
    print_plan("done", [Section("results", [*rows, ("written", f"{out}: {RESULTS}, {PICTURES}/")])])


def _predictions(
    files: Mapping[str, Path], loaded: Model, threshold: float, size: int
) -> Iterator[tuple[str, Prediction | str]]:
    """(name, prediction, or reason why it was skipped) of each file; `size` of them go through the model
    together.
    """
    listed = list(files.items())
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(listed), unit=" images", disable=None) as bar:

        def opening(start: int) -> list[Future[OpenedImage]]:
            return [pool.submit(open_file, file) for _, file in listed[start : start + size]]

        coming = opening(0)
        for start in range(0, len(listed), size):
            batch = coming
            coming = opening(start + size)  # while the model computes, the next ones are decoded
            opened: dict[str, OpenedImage] = {}
            for (name, _), future in zip(listed[start : start + size], batch, strict=True):
                try:
                    opened[name] = future.result()
                except (ValueError, OSError) as error:
                    reason = printable(str(error))
                    bar.write(f"skipped {visible(redacted(reason))}", file=sys.stderr)
                    yield name, reason
            try:
                predictions = loaded.predict_opened([*opened.values()], threshold)
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{str(error).splitlines()[0]} Give a smaller --batch-size than {size}: the command continues with "
                    "the pictures that are left"
                ) from error
            yield from zip(opened, predictions, strict=True)
            bar.update(len(batch))


def _append(lines: BinaryIO, record: Mapping[str, Any]) -> None:
    lines.write(orjson.dumps(record) + b"\n")
    lines.flush()


def _continued(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> line of the pictures that are done, of an interrupted command with these settings; none without
    a file.

    A last line that was cut off is taken out of the file. Raises ValueError for other settings, and a damaged
    file.
    """
    if not path.is_file():
        return {}
    content = read_bytes(path)
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    now = orjson.loads(orjson.dumps(settings))
    with reading(path, "predictions of an interrupted command; remove its folder to begin anew"):
        first, *records = [orjson.loads(line) for line in whole.splitlines()] or [now]
        done = {str(record["file_name"]): record for record in records}
        others = [key for key in now if first.get(key) != now[key]]
        different = [f"{key} {first.get(key)!r}, now {now[key]!r}" for key in others]
    if different:
        raise ValueError(
            f"{path.parent} has predictions of an interrupted command with other settings: "
            f"{'; '.join(different)[:600]}. Give that command again, choose another --out, or remove the folder"
        )
    return done


def _changed_last(place: Path) -> int:
    """Time of the last change of a file, or of the files in a folder, of a run in its export; ns, 0 for no
    file.
    """
    folder = export_of(place) if export_of(place).is_dir() else place
    files = [place] if place.is_file() else [path for path in folder.rglob("*") if path.is_file()]
    return max((path.stat().st_mtime_ns for path in files), default=0)


def _joined(records: list[dict[str, Any]], skipped: Mapping[str, str], loaded: Model) -> dict[str, Any]:
    """The content of `RESULTS`: images are numbered from 1 in this order."""
    whole: dict[str, Any] = {
        "images": [],
        "categories": [],
        "skipped": [],
        **{task: [] for task in loaded.tasks},
    }
    ids = set(loaded.categories)
    for number, record in enumerate(records, 1):
        whole["images"].append(
            {"id": number, **{key: record[key] for key in ("file_name", "width", "height")}}
        )
        for task, results in record["results"].items():
            whole[task] += [{**result, "image_id": number} for result in results]
            ids |= {result["category_id"] for result in results if "category_id" in result}
    whole["categories"] = [{"id": id_, "name": category_name(id_, loaded.categories)} for id_ in sorted(ids)]
    whole["skipped"] = [{"file_name": name, "reason": reason} for name, reason in skipped.items()]
    return whole

"""`visft predict`: every image through a model, a drawing of each, one JSON file of all.

Numbers are written image by image, as lines of JSON behind a line of settings. At the end they become one
file, and until then the same command goes on where it was interrupted.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from tqdm import tqdm

from visft_ds.data.depth import RELATIVE, UNIT_FILE
from visft_ds.data.masks import png_of
from visft_ds.data.panoptic import png_of_numbers
from visft_ds.files import read_bytes, reading, write_bytes, write_text
from visft_ds.monitor.console import Section, print_plan
from visft_ds.predict.images import MOST_IN_TILES, OpenedImage, open_file, printable
from visft_ds.predict.model import Model, load
from visft_ds.predict.results import Prediction
from visft_ds.redaction import redacted, visible
from visft_ds.run.folder import refuse_filled
from visft_ds.run_files import export_of
from visft_ds.settings.tiles import Tiles
from visft_ds.tasks import Results
from visft_ds.tasks.classes import category_name
from visft_ds.tasks.masks.regions import by_image, segment_numbers
from visft_ds.tasks.pictures import save_picture

RESULTS = "predictions.json"
VISUALIZATIONS = "visualizations"
DEPTH = "depth"  #: folder of depth maps, 16-bit PNG files
PANOPTIC = (
    "panoptic"  #: folder of panoptic maps, as COCO writes them; with ".json" the file that belongs to it
)
#: Settings, then a line for each image that is drawn; gone when `RESULTS` is there.
LINES = "predictions.jsonl"
#: Threads that decode while the model computes, and that draw.
_THREADS = 2
#: Images whose drawings may wait for their turn.
_WAITING = 16
#: Arguments of `load` that name files.
_FILES = ("source", "backbone", "heads", "adapter", "vocabulary")


def predict(
    files: Mapping[str, Path],
    out: Path,
    threshold: float,
    batch_size: int | None,
    tile: str | None = None,
    **model: Any,
) -> None:
    """Write drawings and results of what the flags of `visft_ds.predict.cli` ask for.

    Args:
        files: name -> image, see `find_images`.
        model: what `load` takes.

    Raises:
        ValueError: nothing could be predicted, a batch did not fit into the GPU, or `out` has other results.
    """
    if (out / RESULTS).exists() or not (out / LINES).exists():
        refuse_filled(out)
    loaded = load(**model)
    tiles = loaded.tiles_of(tile)
    settings = {
        "model": dict(loaded.facts),
        "precision": loaded.precision,
        "threshold": threshold,
        "image size": model["image_size"],
        "tiles": None if tiles is None else list(tiles),
        "changed last": {name: _changed_last(Path(model[name])) for name in _FILES if model[name]},
    }
    drawings = names_of_drawings(files)
    done = _continued(out / LINES, settings)
    todo = {name: file for name, file in files.items() if name not in done}
    facts = [
        *loaded.facts.items(),
        ("precision", f"{loaded.precision} on {loaded.device}"),
        ("images", str(len(files))),
    ]
    if tiles is not None:
        facts.append(("tiles", f"squares of {tiles.side} px that overlap by {tiles.overlap}"))
        warning = loaded.warning_about(tiles)
        if warning is not None:
            facts.append(("caution", warning))
    if done:
        facts.append(("continues", f"{len(files) - len(todo)} of them are done"))
    print_plan("visft_ds prediction", [Section("model and data", facts)])

    write_bytes(out / LINES, b"".join(map(_line, [settings, *done.values()])))
    skipped: dict[str, str] = {}
    waiting: deque[tuple[dict[str, Any], Future[None]]] = deque()

    def finish_drawing() -> None:
        record, drawing = waiting.popleft()
        drawing.result()
        done[record["file_name"]] = record
        lines.write(_line(record))  # the drawing is whole then
        lines.flush()

    with (out / LINES).open("ab") as lines, ThreadPoolExecutor(_THREADS) as pool:
        size = batch_size or loaded.usual_batch(tiles)
        if tiles is None:
            outcomes = _predictions(todo, loaded, threshold, size)
            most_waiting = _WAITING
        else:  # images that may fill the memory
            outcomes = _predictions_by_tiles(todo, loaded, threshold, size, tiles)
            most_waiting = 0
        for name, outcome in outcomes:
            if isinstance(outcome, str):
                skipped[name] = outcome
                continue
            drawing = pool.submit(_draw, outcome, out / VISUALIZATIONS / drawings[name])
            height, width = outcome.image.shape[:2]
            results = _with_depth_file(outcome.results, out, drawings[name])
            if PANOPTIC in results:
                numbers = segment_numbers(results[PANOPTIC], (height, width))
                _write_map(out, PANOPTIC, drawings[name], png_of_numbers(numbers))
            record = {"file_name": name, "width": width, "height": height, "results": results}
            waiting.append((record, drawing))
            if len(waiting) > most_waiting:
                finish_drawing()
        while waiting:
            finish_drawing()

    whole = _joined([done[name] for name in files if name in done], skipped, loaded)
    predicted = len(whole["images"])
    if predicted > 0:
        write_bytes(out / RESULTS, orjson.dumps(whole))
        if PANOPTIC in loaded.tasks:
            write_bytes(out / f"{PANOPTIC}.json", _coco_panoptic(whole, drawings, loaded.stuff))
    (out / LINES).unlink()
    if predicted == 0:
        raise ValueError(f"none of {len(files)} files could be predicted")
    rows = [("predicted", f"{predicted} of {len(files)} images")]
    if skipped:
        rows.append(("skipped", f"{len(skipped)} files, named in {RESULTS}"))
    without = [task for task in loaded.tasks if not whole[task]]
    if without:
        rows.append((", ".join(without), f"no object scores {threshold:g} or more: lower --threshold"))
    written = [RESULTS, f"{VISUALIZATIONS}/"]
    if DEPTH in loaded.tasks:
        has_unit = all(result["depth"]["metres"] is not None for result in whole[DEPTH])
        written.append(f"{DEPTH}/" if has_unit else f"{DEPTH}/ (relative, without a unit)")
    if PANOPTIC in loaded.tasks:
        written += [f"{PANOPTIC}.json", f"{PANOPTIC}/"]
    rows.append(("written", f"{out}: {', '.join(written)}"))
    print_plan("done", [Section("results", rows)])


def names_of_drawings(names: Iterable[str]) -> dict[str, str]:
    """Name of an image -> that of its drawing: a.png -> a.jpg, or a.png.jpg where there is an a.jpg as
    well.
    """
    as_jpeg = {name: str(Path(name).with_suffix(".jpg")) for name in names}
    number = Counter(as_jpeg.values())
    return {name: drawing if number[drawing] == 1 else f"{name}.jpg" for name, drawing in as_jpeg.items()}


def _with_depth_file(results: Mapping[str, Results], out: Path, drawing: str) -> Mapping[str, Results]:
    """The results of an image, whose depth map is written to a file, named as its drawing, that they name."""
    if DEPTH not in results:
        return results
    (result,) = results[DEPTH]
    file = _write_map(out, DEPTH, drawing, png_of(result["depth"]))
    if result["depth"]["metres"] is None:
        write_text(out / DEPTH / UNIT_FILE, f"{RELATIVE}\n")
    named = {"file": str(file), "metres": result["depth"]["metres"]}
    return {**results, DEPTH: [{**result, "depth": named}]}


def _write_map(out: Path, kind: str, drawing: str, png: bytes) -> Path:
    """Write a map of an image, named as its drawing; returns its path in `out`."""
    file = Path(kind, drawing).with_suffix(".png")
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out / file, png)
    return file


def _coco_panoptic(whole: Mapping[str, Any], drawings: Mapping[str, str], stuff: Collection[int]) -> bytes:
    """The panoptic predictions as COCO's file of results, to which the PNG files in `PANOPTIC` belong."""
    segments = by_image(whole[PANOPTIC])
    annotations = []
    for image in whole["images"]:
        infos = []
        for segment in segments[image["id"]]:
            area = int(coco_mask.area(segment["segmentation"]))
            info = {key: segment[key] for key in ("id", "category_id", "score")}
            infos.append({**info, "iscrowd": 0, "area": area})
        file = str(Path(drawings[image["file_name"]]).with_suffix(".png"))
        annotations.append({"image_id": image["id"], "file_name": file, "segments_info": infos})
    categories = []
    for category in whole["categories"]:
        categories.append({**category, "isthing": int(category["id"] not in stuff)})
    content = {"images": whole["images"], "annotations": annotations, "categories": categories}
    return orjson.dumps(content)


def _draw(prediction: Prediction, path: Path) -> None:
    save_picture(np.asarray(prediction.draw()), path)


def _predictions(
    files: Mapping[str, Path], loaded: Model, threshold: float, size: int
) -> Iterator[tuple[str, Prediction | str]]:
    """(name, prediction, or reason why it was skipped) of each file; `size` of them go through the model
    together.
    """
    listed = list(files.items())
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(files), unit=" images", disable=None) as bar:

        def opening(start: int) -> list[tuple[str, Future[OpenedImage]]]:
            futures = []
            for name, file in listed[start : start + size]:
                futures.append((name, pool.submit(open_file, file, bands=loaded.bands)))
            return futures

        coming = opening(0)
        for start in range(0, len(listed), size):
            batch = coming
            coming = opening(start + size)  # while the model computes, the next ones are decoded
            opened: dict[str, OpenedImage] = {}
            for name, future in batch:
                try:
                    opened[name] = future.result()
                except (ValueError, OSError) as error:
                    yield name, _reason(error)
            with _advising(size):
                predictions = loaded.predict_opened(list(opened.values()), threshold)
            yield from zip(opened, predictions, strict=True)
            bar.update(len(batch))


def _predictions_by_tiles(
    files: Mapping[str, Path], loaded: Model, threshold: float, size: int, tiles: Tiles
) -> Iterator[tuple[str, Prediction | str]]:
    """As `_predictions`, one file after the other; `size` tiles go through the model together."""
    for name, file in tqdm(files.items(), unit=" images", disable=None):
        try:
            image = open_file(file, MOST_IN_TILES, loaded.bands)
        except (ValueError, OSError) as error:
            yield name, _reason(error)
            continue
        with _advising(size):
            prediction = loaded.predict_tiles(image, tiles, threshold, size)
        yield name, prediction


def _reason(error: Exception) -> str:
    """Print and return the reason why a file is skipped."""
    reason = printable(str(error))
    tqdm.write(f"skipped {visible(redacted(reason))}", file=sys.stderr)
    return reason


@contextmanager
def _advising(size: int) -> Iterator[None]:
    """Raise ValueError with advice where a batch of this size does not fit into the GPU."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{reason} Give a smaller --batch-size than {size}: the command continues with the images that "
            "are left"
        ) from error


def _line(record: Mapping[str, Any]) -> bytes:
    return orjson.dumps(record) + b"\n"


def _continued(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> line of the images that are done, of an interrupted command with these settings; none without
    a file. A last line that was cut off is none.

    Raises ValueError for other settings, and a damaged file.
    """
    if not path.is_file():
        return {}
    whole, _, _ = read_bytes(path).rpartition(b"\n")
    now = orjson.loads(orjson.dumps(settings))
    different = []
    with reading(path, "predictions of an interrupted command; remove its folder to begin anew"):
        before, *records = [orjson.loads(line) for line in whole.splitlines()] or [now]
        done = {str(record["file_name"]): record for record in records}
        for key, value in now.items():
            if before.get(key) != value:
                different.append(f"{key} {before.get(key)!r}, now {value!r}")
    if different:
        raise ValueError(
            f"{path.parent} has predictions of an interrupted command with other settings: "
            f"{'; '.join(different)[:600]}. Give that command again, choose another --out, or remove the "
            "folder"
        )
    return done


def _changed_last(path: Path) -> int:
    """Time of the last change of a file, or of the files in a folder, of a run in its export; ns, 0 for no
    file.
    """
    folder = export_of(path) if export_of(path).is_dir() else path
    files = [path] if path.is_file() else [file for file in folder.rglob("*") if file.is_file()]
    return max((file.stat().st_mtime_ns for file in files), default=0)


def _joined(records: list[dict[str, Any]], skipped: Mapping[str, str], loaded: Model) -> dict[str, Any]:
    """The content of `RESULTS`: images are numbered from 1 in this order."""
    images = []
    by_task: dict[str, Results] = {task: [] for task in loaded.tasks}
    ids = set(loaded.categories)
    for number, record in enumerate(records, 1):
        images.append({"id": number, **{key: record[key] for key in ("file_name", "width", "height")}})
        for task, results in record["results"].items():
            by_task[task] += [{**result, "image_id": number} for result in results]
            ids |= {result["category_id"] for result in results if "category_id" in result}
    return {
        "images": images,
        "categories": [{"id": id_, "name": category_name(id_, loaded.categories)} for id_ in sorted(ids)],
        "skipped": [{"file_name": name, "reason": reason} for name, reason in skipped.items()],
        **by_task,
    }

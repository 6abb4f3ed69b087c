"""`visft predict`: every picture through a model, a drawing of each, one JSON file of all."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from tqdm import tqdm

from visft_ds.interop.weights import write_atomically
from visft_ds.monitor.console import Section, print_plan
from visft_ds.predict.images import OpenedImage, find_images, open_file, printable
from visft_ds.predict.model import Model, check_options, load
from visft_ds.predict.results import category_name
from visft_ds.redaction import redacted
from visft_ds.resilience.errors import tell
from visft_ds.run.folder import refuse_filled
from visft_ds.tasks.pictures import save_png

RESULTS, PICTURES = "predictions.json", "pictures"
#: Threads that decode while the model computes.
_THREADS = 2


def predict(images: list[str], out: Path, threshold: float, batch_size: int | None, **model: Any) -> int:
    """Predict what the flags of `visft_ds.predict.cli` ask for; returns the exit status.

    Args:
        model: what `load` takes.
    """
    try:
        check_options(threshold, batch_size)
        refuse_filled(out)
        found = find_images(images, outside=out)
        whole = _predict(found, load(**model), out, threshold, batch_size)
    except (ValueError, OSError) as error:
        return tell(error, "predict")
    except torch.OutOfMemoryError as error:
        problem = f"{str(error).splitlines()[0]} Give a smaller --batch-size than {batch_size or 'now'}"
        return tell(ValueError(problem), "predict")
    rows = [("predicted", f"{len(whole['images'])} images")]
    rows += [("skipped", f"{len(whole['skipped'])} files, named in {RESULTS}")] if whole["skipped"] else []
    print_plan("done", [Section("results", [*rows, ("written", f"{out}: {RESULTS}, {PICTURES}/")])])
    return 0


def _predict(
    found: dict[str, Path], model: Model, out: Path, threshold: float, batch_size: int | None
) -> dict[str, Any]:
    """Write pictures and results of the files found; returns the results."""
    rows = [*model.facts.items(), ("precision", f"{model.precision} on {model.device}"), ("images", str(len(found)))]
    print_plan("visft_ds prediction", [Section("model and data", rows)])
    whole: dict[str, Any] = {"images": [], "categories": [], "skipped": [], **{task: [] for task in model.tasks}}
    ids, size = set(model.categories), batch_size or model.batch_size
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(found), unit=" images", disable=None) as bar:
        decoded = _decoded(found, pool, ahead=2 * size)
        while batch := list(islice(decoded, size)):
            images: dict[str, OpenedImage] = {}
            for name, future in batch:
                try:
                    images[name] = future.result()
                except (ValueError, OSError) as error:
                    reason = printable(str(error))
                    bar.write(f"skipped {redacted(reason)}", file=sys.stderr)
                    whole["skipped"].append({"file_name": name, "reason": reason})
            for name, prediction in zip(images, model.predict_opened([*images.values()], threshold), strict=True):
                number, (height, width) = len(whole["images"]) + 1, prediction.image.shape[:2]
                whole["images"].append({"id": number, "file_name": name, "width": width, "height": height})
                for task, results in prediction.to_coco(number).items():
                    whole[task] += results
                    ids |= {result["category_id"] for result in results if "category_id" in result}
                save_png(np.asarray(prediction.draw()), out / PICTURES / f"{name}.png")
            bar.update(len(batch))
    if not whole["images"]:
        raise ValueError(f"none of {len(found)} files could be predicted")
    whole["categories"] = [{"id": id_, "name": category_name(id_, model.categories)} for id_ in sorted(ids)]
    write_atomically(out / RESULTS, lambda file: file.write(orjson.dumps(whole)))
    return whole


def _decoded(found: dict[str, Path], pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[str, Future[OpenedImage]]]:
    """Each name with its picture to come; so many are decoded ahead."""
    pending = deque[tuple[str, Future[OpenedImage]]]()
    for name, file in found.items():
        pending.append((name, pool.submit(open_file, file)))
        if len(pending) == ahead:
            yield pending.popleft()
    yield from pending

"""`visft predict`: every picture through a model, a drawing of each, one JSON file of all."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from tqdm import tqdm

from visft_ds.interop.weights import write_atomically
from visft_ds.monitor.console import Section, print_plan
from visft_ds.predict.images import OpenedImage, find_images, open_file, printable
from visft_ds.predict.model import check_options, load
from visft_ds.redaction import redacted
from visft_ds.run.folder import refuse_filled
from visft_ds.tasks.classes import category_name
from visft_ds.tasks.pictures import save_png

RESULTS, PICTURES = "predictions.json", "pictures"
#: Threads that decode while the model computes.
_THREADS = 2


def predict(images: list[str], out: Path, threshold: float, batch_size: int | None, **model: Any) -> None:
    """Write pictures and results of what the flags of `visft_ds.predict.cli` ask for.

    Args:
        model: what `load` takes.

    Raises:
        ValueError: nothing could be predicted, or a batch did not fit into the GPU.
    """
    check_options(threshold, batch_size=batch_size)
    refuse_filled(out)
    found, loaded = find_images(images, outside=out), load(**model)
    facts = ("precision", f"{loaded.precision} on {loaded.device}"), ("images", str(len(found)))
    print_plan("visft_ds prediction", [Section("model and data", [*loaded.facts.items(), *facts])])
    whole: dict[str, Any] = {"images": [], "categories": [], "skipped": [], **{task: [] for task in loaded.tasks}}
    ids, size = set(loaded.categories), batch_size or loaded.batch_size
    with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(found), unit=" images", disable=None) as bar:
        files, coming = list(found.items()), [pool.submit(open_file, file) for file in list(found.values())[:size]]
        for start in range(0, len(files), size):
            batch = coming  # while the model computes, the next one is decoded
            coming = [pool.submit(open_file, file) for _, file in files[start + size : start + 2 * size]]
            opened: dict[str, OpenedImage] = {}
            for (name, _), future in zip(files[start : start + size], batch, strict=True):
                try:
                    opened[name] = future.result()
                except (ValueError, OSError) as error:
                    reason = printable(str(error))
                    bar.write(f"skipped {redacted(reason)}", file=sys.stderr)
                    whole["skipped"].append({"file_name": name, "reason": reason})
            try:
                predictions = loaded.predict_opened([*opened.values()], threshold)
            except torch.OutOfMemoryError as error:
                raise ValueError(f"{str(error).splitlines()[0]} Give a smaller --batch-size than {size}") from error
            for name, prediction in zip(opened, predictions, strict=True):
                number, (height, width) = len(whole["images"]) + 1, prediction.image.shape[:2]
                whole["images"].append({"id": number, "file_name": name, "width": width, "height": height})
                for task, results in prediction.to_coco(number).items():
                    whole[task] += results
                    ids |= {result["category_id"] for result in results if "category_id" in result}
                save_png(np.asarray(prediction.draw()), out / PICTURES / f"{name}.png")
            bar.update(len(batch))
    if not whole["images"]:
        raise ValueError(f"none of {len(found)} files could be predicted")
    whole["categories"] = [{"id": id_, "name": category_name(id_, loaded.categories)} for id_ in sorted(ids)]
    write_atomically(out / RESULTS, lambda file: file.write(orjson.dumps(whole)))
    rows = [("predicted", f"{len(whole['images'])} images")]
    rows += [("skipped", f"{len(whole['skipped'])} files, named in {RESULTS}")] if whole["skipped"] else []
    print_plan("done", [Section("results", [*rows, ("written", f"{out}: {RESULTS}, {PICTURES}/")])])

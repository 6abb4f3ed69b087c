"""A folder of `visft export`, read back: its files run in onnxruntime or torch, and predict as a `Model`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from visft_ds.data.decode import as_rgb
from visft_ds.data.depth import encoded, encoded_relative
from visft_ds.data.masks import code_of
from visft_ds.files import reading
from visft_ds.flags import check_extra
from visft_ds.predict.images import OpenedImage
from visft_ds.predict.model import Model
from visft_ds.predict.results import Prediction
from visft_ds.settings.bands import Bands
from visft_ds.settings.tiles import Tiles
from visft_ds.tasks import Results
from visft_ds.tasks.detection.roi import mask_code

Arrays = Mapping[str, npt.NDArray[Any]]
FORMAT = "visft_ds export 1"  #: in the metadata of each file
KEY = "visft"  #: of the facts of a file, as JSON, in its metadata
FACTS_FILE = "facts.json"  #: the same in a program of torch
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}  #: of the files of a format


class ExportedFile(NamedTuple):
    """A file of an export, opened."""

    facts: Mapping[str, Any]  #: task, categories or words, sizes, largest numbers
    run: Callable[[Arrays], Arrays]  #: inputs by name -> outputs by name


def exported_files(folder: Path) -> list[Path]:
    """The files of an export; none in a folder that is none."""
    files = []
    for suffix in SUFFIXES.values():
        files += sorted(folder.glob(f"*{suffix}"))
    return files if folder.is_dir() else []


def open_exported(path: Path) -> ExportedFile:
    """Open a file of an export. Raises ValueError for one of another origin."""
    if path.suffix == SUFFIXES["onnx"]:
        check_extra(str(path), "onnx", ("onnxruntime",))
        import onnxruntime

        with reading(path, "an ONNX file of visft export"):
            session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            facts = _facts(session.get_modelmeta().custom_metadata_map[KEY])
        names = [output.name for output in session.get_outputs()]

        def run(inputs: Arrays) -> Arrays:
            return dict(zip(names, session.run(None, dict(inputs)), strict=True))

        return ExportedFile(facts, run)
    stored = {FACTS_FILE: ""}
    with reading(path, "a program of visft export"):
        program = torch.export.load(path, extra_files=stored)
        facts = _facts(stored[FACTS_FILE])
    module = program.module()

    def compute(inputs: Arrays) -> Arrays:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        with torch.no_grad():
            return {name: tensor.numpy() for name, tensor in module(**tensors).items()}

    return ExportedFile(facts, compute)


def _facts(text: str) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = json.loads(text)
    if facts["format"] != FORMAT:
        raise ValueError(f"it is {facts['format']}; this release reads {FORMAT}")
    return facts


class ExportedModel(Model):
    """Model of an exported folder. It predicts, one image at a time, and has no backbone that trains."""

    def __init__(self, folder: Path) -> None:
        self._files = {path.stem: open_exported(path) for path in exported_files(folder)}
        self.source = folder
        every = [file.facts for file in self._files.values() if file.facts["task"] is not None]
        if not every:
            raise ValueError(f"{folder} has the backbone alone, which predicts nothing: run its file")
        self._by_task = {facts["task"]: facts for facts in every}
        self._streams = {}  # geometry is inside of the files
        self.has_instances = any(facts.get("box_masks") for facts in every)
        self.tasks = tuple(self._by_task)
        categories = [category for facts in every for category in facts.get("categories", ())]
        self.categories = {category["id"]: category["name"] for category in categories}
        self.stuff = frozenset(category["id"] for category in categories if not category.get("isthing", True))
        self.facts = {name: str(folder / name) for name in self._files}
        self._tiles = next((Tiles(*facts["tiles"]) for facts in every if "tiles" in facts), None)
        self.bands = Bands.of(every[0].get("bands"))
        self.precision = "fp32"
        self.device = torch.device("cpu")
        self.batch_size = 1
        self.outputs: dict[str, Arrays] = {}  #: of the files of tasks, for the image predicted last

    def tiles_of_training(self) -> Tiles | None:
        return self._tiles

    def predict_opened(self, images: Sequence[OpenedImage], threshold: float) -> list[Prediction]:
        predictions = []
        for image in images:
            results = {}
            for task in self.tasks:
                results[task] = self._of_task(task, image.pixels[None], threshold)
            shown = as_rgb(self.seen(image.pixels))
            predictions.append(Prediction(shown, image.path, self.categories, results, self.has_instances))
        return predictions

    def _of_task(self, task: str, images: npt.NDArray[Any], threshold: float) -> Results:
        """Results of one picture (1, H, W, 3 or bands), in COCO's format, the best first."""
        facts = self._by_task[task]
        if "words" in facts:
            return [{"image_id": 0, "caption": self._caption(task, images, facts["words"])}]
        self.outputs[task] = self._files[task].run({"images": images})
        outputs = {name: values[0] for name, values in self.outputs[task].items()}
        ids = [category["id"] for category in facts.get("categories", ())]
        return results_of_outputs(task, outputs, ids, images.shape[1:3], threshold)

    def _caption(self, task: str, images: npt.NDArray[Any], words: Sequence[str]) -> str:
        """The caption of a picture, the most probable word after each other, at most as many as in a run."""
        states = dict(self._files[f"{task}_encoder"].run({"images": images}))
        step = self._files[f"{task}_step"]
        end = len(words) - 1
        last = end - 1  # <start>
        caption = []
        for _ in range(self._by_task[task]["max_length"]):
            outputs = step.run({"words": np.array([last]), **states})
            last = int(outputs["caption_ids"][0])
            if last == end:
                break
            caption.append(words[last])
            states |= {"hidden": outputs["next_hidden"], "state": outputs["next_state"]}
        return " ".join(caption)


def results_of_outputs(
    task: str, outputs: Arrays, ids: Sequence[int], size: tuple[int, ...], threshold: float
) -> Results:
    """Results of the outputs for a picture of this size (H, W), in COCO's format; `ids` of its categories."""
    results = Results()
    if "inverse_depth" in outputs:
        return [{"image_id": 0, "depth": encoded_relative(outputs["inverse_depth"])}]
    if task == "depth":
        return [{"image_id": 0, "depth": encoded(outputs["depth"])}]
    if task == "semantic":
        for label in np.unique(outputs["labels"]).tolist():
            segmentation = code_of(outputs["labels"] == label)
            results.append({"image_id": 0, "category_id": ids[label], "segmentation": segmentation})
        return results
    height, width = size
    for index, (score, label) in enumerate(zip(outputs["scores"], outputs["labels"], strict=True)):
        if label < 0 or score < threshold:
            continue
        if task == "panoptic":
            number = index + 1
            segment = {"image_id": 0, "id": number, "category_id": ids[label], "score": float(score)}
            results.append({**segment, "segmentation": code_of(outputs["segments"] == number)})
            continue
        corners = outputs["boxes"][index].tolist()
        left, top, right, bottom = corners
        box = [left, top, right - left, bottom - top]
        result = {"image_id": 0, "category_id": ids[label], "bbox": box, "score": float(score)}
        if "box_masks" in outputs:
            result["segmentation"] = mask_code(outputs["box_masks"][index], corners, (height, width))
        if "masks" in outputs:
            result["segmentation"] = code_of(outputs["masks"][index])
        results.append(result)
    return results

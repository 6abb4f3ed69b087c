"""What a step that went wrong worked on, to be run again elsewhere: JSON and safetensors, nothing that can be executed.

<run>/bundles/step_00000012/bundle.json              step, task, samples, seeds, what was found, the configuration
                            rank_00001.safetensors   "<micro-batch>/images", "<micro-batch>/targets/<task>/<field>"
                            parameters.safetensors   what trains, as the step found it
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from visft_ds.config import ResolvedConfig
from visft_ds.data.features import StoredFeatures, View
from visft_ds.data.plan import Plan, StepPlan
from visft_ds.data.samples import Batch, DetectionTargets
from visft_ds.interop.writing import save_tensors
from visft_ds.model import LossDenominators
from visft_ds.monitor.metrics import versions
from visft_ds.tasks.captioning.data import CaptionTargets
from visft_ds.tasks.segmentation.data import SegmentationTargets

FORMAT, VERSION = "visft_ds.bundle", 1
FOLDER, RECORD, PARAMETERS = "bundles", "bundle.json", "parameters.safetensors"
#: Bytes of a rank's tensors, or of what trains, above which only their names are kept.
LARGEST = 1 << 30
TARGETS: Mapping[str, type] = {
    "detection": DetectionTargets,
    "segmentation": SegmentationTargets,
    "captioning": CaptionTargets,
}
_BATCH = ("images", "sizes", "original_sizes", "indices", "image_ids", "random_keys", "real")


@dataclass(frozen=True)
class RankPart:
    """What one rank worked on."""

    rank: int
    seed: int  #: of torch's generators at the beginning of the step
    batches: tuple[Batch, ...]  #: its micro-batches, in order
    loss_denominators: LossDenominators


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk."""

    path: Path
    record: Mapping[str, Any]

    def parameters(self) -> dict[str, Tensor]:
        """What trains, as the step found it; empty where it was too large to keep."""
        file = self.path / PARAMETERS
        return _load(file) if file.is_file() else {}

    def parts(self) -> list[RankPart]:
        """The ranks whose tensors were kept; of a pipeline, its last one, with the pixels of its first."""
        parts = {rank: _read_part(self.path, rank) for rank in self.record["kept"]}
        stages = self.record["stages"]
        pipelines = self.record["world_size"] // stages
        if stages == 1:
            return list(parts.values())
        return [
            _with_pixels(part, parts[rank % pipelines])
            for rank, part in parts.items()
            if rank >= pipelines * (stages - 1) and rank % pipelines in parts
        ]


def bundle_path(out: Path, step: int) -> Path:
    """Where the bundle of a step lies; `step` counts from 1, as in messages."""
    return out / FOLDER / f"step_{step:08d}"


def write_part(path: Path, part: RankPart) -> bool:
    """Write what a rank worked on; False where it is too large."""
    tensors: dict[str, Tensor] = {}
    texts: dict[str, Any] = {"seed": part.seed, "tasks": [list(batch.tasks) for batch in part.batches]}
    for number, batch in enumerate(part.batches):
        tensors |= {f"{number}/{name}": getattr(batch, name) for name in _BATCH}
        tensors |= _of_views(batch.views or (), f"{number}/views/")
        tensors |= {} if batch.frames is None else {f"{number}/frames": batch.frames}
        for task, targets in batch.targets.items():
            for entry in fields(targets):
                name, value = f"{number}/targets/{task}/{entry.name}", getattr(targets, entry.name)
                if isinstance(value, Tensor):
                    tensors[name] = value
                else:
                    texts[name] = value
    for task, counts in part.loss_denominators.items():
        tensors |= {f"normaliser/{task}/{name}": value for name, value in counts.items()}
    if sum(tensor.nbytes for tensor in tensors.values()) > LARGEST:
        return False
    path.mkdir(parents=True, exist_ok=True)
    save_tensors(_rank_file(path, part.rank), tensors, {"texts": json.dumps(texts)}, overwrite=True)
    return True


def write_record(
    path: Path,
    step_plan: StepPlan,
    plan: Plan,
    config: ResolvedConfig,
    *,
    image_ids: Sequence[Sequence[int]],
    kept: Sequence[int],
    parameters: Mapping[str, Tensor],
    **facts: Any,
) -> None:
    """Write the record, last and in one move, and before it what trains. Main process only.

    Args:
        image_ids: of each rank, in the order of its micro-batches.
        kept: ranks whose tensors were written.
        parameters: what trains, by qualified name.
        facts: anything else that is worth knowing, as JSON values.
    """
    path.mkdir(parents=True, exist_ok=True)
    if sum(tensor.nbytes for tensor in parameters.values()) <= LARGEST:
        save_tensors(path / PARAMETERS, parameters, {}, overwrite=True)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "step": step_plan.step + 1,
        "task": step_plan.task,
        "dataset": step_plan.dataset,
        "position": step_plan.position,
        "epoch": step_plan.epoch,
        "indices": step_plan.indices.tolist(),
        "random_keys": step_plan.keys.tolist(),
        "image_ids": [list(ids) for ids in image_ids],
        "plan": plan.state(step_plan.step),
        "kept": list(kept),
        **facts,
        "versions": versions(),
        "config": config.to_dict(),
    }
    temporary = path / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path / RECORD)


def clear(path: Path) -> None:
    """Remove what an earlier try of the same step left."""
    shutil.rmtree(path, ignore_errors=True)


def open_bundle(path: Path) -> Bundle:
    """Read a bundle's record.

    Raises:
        ValueError: no bundle, or one of another format.
    """
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no bundle: {error}") from error
    found = (record.get("format"), record.get("version")) if isinstance(record, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path}: format {found[0]} {found[1]}; this release reads {FORMAT} {VERSION}")
    return Bundle(path, record)


def _rank_file(path: Path, rank: int) -> Path:
    return path / f"rank_{rank:05d}.safetensors"


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _read_part(path: Path, rank: int) -> RankPart:
    file = _rank_file(path, rank)
    tensors = _load(file)
    with safe_open(file, "pt") as opened:
        texts = json.loads(opened.metadata()["texts"])
    batches = []
    for number, tasks in enumerate(texts["tasks"]):
        targets = {task: _targets(tensors, texts, f"{number}/targets/{task}/", TARGETS[task]) for task in tasks}
        views, frames = _views(tensors, f"{number}/views/"), tensors.get(f"{number}/frames")
        values = {name: tensors[f"{number}/{name}"] for name in _BATCH}
        batches.append(Batch(targets=targets, views=views, frames=frames, **values))
    loss_denominators: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("normaliser/"):
            _, task, count = name.split("/", 2)
            loss_denominators.setdefault(task, {})[count] = tensor
    return RankPart(rank, texts["seed"], tuple(batches), loss_denominators)


def _of_views(views: Sequence[View], prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for place, view in enumerate(views):
        tensors[f"{prefix}{place}/frame"] = torch.tensor(view.frame)
        if view.features is not None:
            tensors[f"{prefix}{place}/values"] = view.features.values
            if view.features.scales is not None:
                tensors[f"{prefix}{place}/scales"] = view.features.scales
    return tensors


def _views(tensors: Mapping[str, Tensor], prefix: str) -> tuple[View, ...] | None:
    views: list[View] = []
    while (frame := tensors.get(f"{prefix}{len(views)}/frame")) is not None:
        values = tensors.get(f"{prefix}{len(views)}/values")
        scales = tensors.get(f"{prefix}{len(views)}/scales")
        height, width = frame.tolist()
        views.append(View((height, width), None if values is None else StoredFeatures(values, scales)))
    return tuple(views) or None


def _with_pixels(part: RankPart, first: RankPart) -> RankPart:
    """What the last stage of a pipeline has read, with the images that the first one has."""
    pairs = zip(part.batches, first.batches, strict=True)
    return replace(part, batches=tuple(replace(batch, images=pixels.images) for batch, pixels in pairs))


def _targets(tensors: Mapping[str, Tensor], texts: Mapping[str, Any], prefix: str, kind: type) -> Any:
    values = {}
    for entry in fields(kind):
        name = prefix + entry.name
        # Texts are the only other thing that targets hold: the captions of each image.
        values[entry.name] = tensors[name] if name in tensors else tuple(tuple(one) for one in texts[name])
    return kind(**values)

"""Task heads in our own format: one safetensors file a task, with everything that is needed to build the head again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from visft_ds.data.manifest import Category
from visft_ds.interop.backbones import copy_tensors
from visft_ds.interop.files import TensorInfo, WeightFile, examples, open_weights, save_tensors

_KEY = "visft_head"


@dataclass(frozen=True)
class HeadInfo:
    """How a saved head was built: `build_head(in_channels, **options)` of the task gives the same shapes.

    `categories` is the category table of the data it was trained on, as COCO writes it ({"id", "name", ...}).
    `extra` is whatever the trainer wants to remember (step, data fingerprint, base weights).
    """

    task: str
    in_channels: int
    options: Mapping[str, Any] = field(default_factory=dict)
    categories: Sequence[Mapping[str, Any]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


def head_file(folder: str | Path, task: str) -> Path:
    """Where a task's head lies in a folder of heads."""
    return Path(folder) / f"{task}.safetensors"


def save_heads(
    heads: nn.ModuleDict | Mapping[str, nn.Module | Mapping[str, Tensor]],
    folder: str | Path,
    metadata: Mapping[str, HeadInfo],
    *,
    overwrite: bool = False,
) -> list[Path]:
    """Write `<folder>/<task>.safetensors` for each head (or its state dict); returns the paths, in the same order.

    Raises ValueError where a file exists (checked for all before the first is written, unless `overwrite`), and where
    `metadata` does not describe exactly these heads.
    """
    tasks = list(heads.keys())
    if sorted(tasks) != sorted(metadata):
        raise ValueError(f"heads {sorted(tasks)} and their descriptions {sorted(metadata)} must name the same tasks")
    paths = [head_file(folder, task) for task in tasks]
    existing = [str(path) for path in paths if path.exists()]
    if existing and not overwrite:
        raise ValueError(f"{examples(existing)} exist and are not overwritten: choose another folder")
    for task, path in zip(tasks, paths, strict=True):
        info = metadata[task]
        if info.task != task:
            raise ValueError(f"the head {task!r} is described as {info.task!r}")
        head = heads[task]
        state = head.state_dict() if isinstance(head, nn.Module) else head
        save_tensors(path, state, {_KEY: json.dumps(asdict(info))}, overwrite=overwrite)
    return paths


def read_head_info(path: str | Path) -> HeadInfo:
    """How the head in a file was built. Raises ValueError for a file that is no head of ours."""
    return _info(open_weights(path))


def _info(file: WeightFile) -> HeadInfo:
    if _KEY not in file.metadata:
        raise ValueError(f"{file.path}: no head written by visft_ds (its metadata has no {_KEY!r})")
    return HeadInfo(**json.loads(file.metadata[_KEY]))


def load_head_weights(head: nn.Module, path: str | Path, task: str) -> HeadInfo:
    """Copy a saved head into `head`, strictly: same task, same names, same shapes; cast to the head's dtype.

    Raises ValueError that lists every difference. Nothing is copied unless everything fits.
    """
    file = open_weights(path)
    info = _info(file)
    if info.task != task:
        raise ValueError(f"{path} holds a {info.task} head; a {task} head is wanted")
    targets = dict(head.state_dict())
    missing = [name for name in targets if name not in file]
    unexpected = [name for name in file if name not in targets]
    shapes = [
        f"{name} {file.shape(name)} in the file, {tuple(target.shape)} in the model"
        for name, target in targets.items()
        if name in file and TensorInfo.of(target).shape != file.shape(name)
    ]
    if missing or unexpected or shapes:
        built = f"in_channels={info.in_channels}" + "".join(f", {key}={value}" for key, value in info.options.items())
        lines = [f"{path} does not fit the {task} head of the model; the file's head was built with {built}."]
        for title, names in (("Missing", missing), ("Unexpected", unexpected), ("Other shape", shapes)):
            if names:
                lines.append(f"{title} ({len(names)}): {examples(names, 12)}.")
        raise ValueError("\n".join(lines))
    copy_tensors(file, {name: name for name in targets}, targets)
    return info


def check_categories(heads: Mapping[str, HeadInfo], categories: Sequence[Category], where: str) -> None:
    """Refuse to judge a head by categories it was not trained on; ones that the data lacks do no harm.

    Raises:
        ValueError: naming the categories of the data set (called `where`) that a head does not know by this id.
    """
    for task, info in heads.items():
        known = {int(entry.get("coco_id", entry["id"])): entry["name"] for entry in info.categories}
        unknown = [f"{c.coco_id} {c.name!r}" for c in categories if known.get(c.coco_id) != c.name]
        if known and unknown:
            trained = examples([f"{id_} {name!r}" for id_, name in known.items()])
            raise ValueError(
                f"the {task} head was trained on other categories than {where} has: it does not know "
                f"{examples(unknown)}; it knows {trained}. Evaluate it on data with its own categories"
            )

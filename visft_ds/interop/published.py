"""Files that ViSFT published (https://huggingface.co/TencentARC/ViSFT): heads `eva_{e,g}_*_heads.ckpt`, LoRA
`eva_{e,g}_lora_*.pt`; and checkpoints of its training, which hold both.

Heads are fp32, every name behind `visft_heads.`, built with the defaults of this package's configuration. A
file holds all three, of which only the one that it is named after is trained, and the modules of segmentation
a second time.
LoRA: `blocks.N.attn.qkv.lora_A` (2r, D) and `.lora_B` (2D, r), rows of q first, then v; alpha 1 as loralib's.

And the decoders of PMT on DINOv3 (https://github.com/tue-mps/pmt, model_zoo), which are plain segmentation
heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds.files import reading
from visft_ds.interop.adapter import FILE, Adapter, StoredAdapter
from visft_ds.interop.weights import Lazy, Weights, examples, open_weights
from visft_ds.models.eva_vit import PRESETS
from visft_ds.tasks import get_task
from visft_ds.tasks.captioning.head import PUBLISHED_NAMES
from visft_ds.tasks.channels import EPS
from visft_ds.tasks.detection.head import PUBLISHED_NAMES as DETECTION_NAMES
from visft_ds.tasks.masks.pmt import PMT_NAMES, options_of_pmt
from visft_ds.tasks.segmentation.head import PUBLISHED_NAMES as SEGMENTATION_NAMES

PREFIX = "visft_heads."
# Ours -> published, behind the prefix; `{n}` is a layer, and the first rule whose beginning fits counts. The
# very first is of the parameter whose second axis is the width of the features.
_RULES: Mapping[str, Mapping[str, str]] = {
    "detection": DETECTION_NAMES,
    "segmentation": SEGMENTATION_NAMES,
    "captioning": {ours: f"caption_decoder.{theirs}" for ours, theirs in PUBLISHED_NAMES.items()},
    "pmt": PMT_NAMES,
}


def published_name(kind: str, name: str) -> str:
    """Tensor of one of our heads -> its name in a published file; `kind` is a task, or "pmt"."""
    for ours, theirs in _RULES[kind].items():
        pattern = re.escape(ours).replace(r"\{n\}", r"(\d+)")
        if match := re.match(pattern if ours.endswith(".") else f"{pattern}$", name):
            theirs = theirs.replace("{n}", match[1] if match.groups() else "")
            return f"{'network.' if kind == 'pmt' else PREFIX}{theirs}{name[match.end() :]}"
    raise AssertionError(f"{kind} parameter {name} has no published name")


def published_head(
    task: str, file: Weights
) -> tuple[Sequence[tuple[int, int]], dict[str, Any], Weights, tuple[int, ...]]:
    """(shapes of its maps, options, tensors under our names, blocks that are read; none: the last) of a
    published head.

    Raises ValueError for a file without one.
    """
    kind, spec, layers = task, get_task(task), tuple[int, ...]()
    with reading(file.path, f"a {task} head of ViSFT or PMT"), torch.device("meta"):
        found = (
            options_of_pmt({name: one.shape for name, one in file.items()})
            if task == "segmentation"
            else None
        )
        if found is not None:
            kind, (shapes, options, layers) = "pmt", found
        else:
            first = next(iter(_RULES.get(task, [])), "").removesuffix("weight")
            anchor = published_name(task, f"{first}weight") if first else ""
            if anchor not in file:
                raise ValueError(f"no {task} head of visft_ds or ViSFT in it; it has {examples(file)}")
            options, shapes = spec.options("head", {}), [(file[anchor].shape[1], 14)]
            if task == "segmentation":
                options["class_ids"] = "published"
            if task == "captioning":
                options["vocabulary_size"] = file[published_name(task, "embedding.weight")].shape[0]
        head = spec.build_head(shapes, spec.settings("head", options), options.get("vocabulary_size"))
    names = {name: published_name(kind, name) for name in head.state_dict()}
    tensors = {ours: file[theirs] for ours, theirs in names.items() if theirs in file}
    for ours, one in tensors.items() if kind == "pmt" else ():
        if ours.endswith("spread"):
            tensors[ours] = Lazy(one.shape, torch.float32, partial(_spread, one))
    return shapes, options, Weights(tensors, file.path), layers


def _spread(variance: Lazy) -> Tensor:
    return variance.read().float().add(EPS).sqrt()


def read_adapter(path: str | Path) -> Adapter:
    """An adapter in a folder or file of ours, or a LoRA of ViSFT. Raises ValueError for anything else."""
    path = Path(path)
    return Adapter.load(path) if path.is_dir() or path.name == FILE else read_visft_lora(path)


def read_visft_lora(path: Path) -> Adapter:
    """A published LoRA, or that of a checkpoint of ViSFT's training. Raises ValueError for a file without
    one.
    """
    file = open_weights(path)
    found = {
        match[1]: file.tensor(name, torch.float32)
        for name in file
        if (match := re.search(r"(?:^|\.)(blocks\.\d+\.attn\.qkv\.lora_[AB])$", name))
    }
    if "blocks.0.attn.qkv.lora_A" not in found:
        raise ValueError(f"{path}: no LoRA of ViSFT, which is on q and v; it has {examples(file)}")
    with reading(path, "a LoRA of ViSFT"):
        double, width = found["blocks.0.attn.qkv.lora_A"].shape
        preset = next((name for name, one in PRESETS.items() if one.width == width), "debug")
        slices = ((0, width), (2 * width, 3 * width))
        layers = {f"blocks.{index}.attn.qkv": (3 * width, slices) for index in range(len(found) // 2)}
        settings = {"model": {"preset": preset}, "rank": double // 2, "alpha": 1.0, "targets": ("q", "v")}
        stored = StoredAdapter.model_validate({**settings, "layers": layers})
        stored.check(Weights({name: Lazy.of(value) for name, value in found.items()}, path))
    return Adapter({"preset": preset}, stored.rank, stored.alpha, stored.targets, layers, found, path=path)

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
from pathlib import Path
from typing import Any

import torch

from visft_ds.files import reading
from visft_ds.interop.adapter import Adapter, Factors
from visft_ds.interop.heads import HeadFile, HeadInfo
from visft_ds.interop.peft_folder import CONFIG, WEIGHTS, read_folder
from visft_ds.interop.weights import AnyPath, Weights, derived, examples, open_weights
from visft_ds.models.eva_vit import PRESETS
from visft_ds.ops import shapes_alone
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
    prefix = "network." if kind == "pmt" else PREFIX
    for ours, theirs in _RULES[kind].items():
        pattern = re.escape(ours).replace(r"\{n\}", r"(\d+)")
        if not ours.endswith("."):  # a whole name
            pattern += "$"
        if re.match(pattern, name):
            return prefix + re.sub(f"^{pattern}", theirs.replace("{n}", r"\1"), name)
    raise AssertionError(f"{kind} parameter {name} has no published name")


def published_head(task: str, file: Weights) -> HeadFile:
    """A published head. Raises ValueError for a file without one."""
    kind = task
    spec = get_task(task)
    extra: dict[str, Any] = {"format": "visft"}
    shapes: Sequence[tuple[int, int]]
    with reading(file.path, f"a {task} head of ViSFT or PMT"), shapes_alone():
        pmt = options_of_pmt({name: tensor.shape for name, tensor in file.items()})
        if task == "segmentation" and pmt is not None:
            kind = "pmt"
            shapes, options, layers = pmt
            extra["layers"] = list(layers)
        else:
            shapes, options = _of_visft(task, file)
        head = spec.build_head(shapes, spec.settings("head", options), options.get("vocabulary_size"))
    tensors = {}
    for name in head.state_dict():
        stored = file.get(published_name(kind, name))
        if stored is None:
            continue  # whoever reads the head misses it
        if kind == "pmt" and name.endswith("spread"):
            # Standard deviation, as our batch norm keeps it.
            stored = derived(lambda variance: variance.float().add(EPS).sqrt(), stored)
        tensors[name] = stored
    return HeadFile(HeadInfo(task, shapes, options, extra=extra), Weights(tensors, file.path))


def _of_visft(task: str, file: Weights) -> tuple[Sequence[tuple[int, int]], dict[str, Any]]:
    """(shapes of its maps, options) of a head of ViSFT, by the sizes of its tensors."""
    if task not in _RULES:
        raise ValueError(f"no {task} head of visft_ds in it; it has {examples(file)}")
    first = next(iter(_RULES[task])).removesuffix("weight") + "weight"
    reads_features = published_name(task, first)
    if reads_features not in file:
        raise ValueError(f"no {task} head of visft_ds or ViSFT in it; it has {examples(file)}")
    options = get_task(task).options("head", {})
    if task == "segmentation":
        options["class_ids"] = "published"
    if task == "captioning":
        options["vocabulary_size"] = file[published_name(task, "embedding.weight")].shape[0]
    return [(file[reads_features].shape[1], 14)], options


def read_adapter(path: AnyPath) -> Adapter:
    """An adapter in a folder of PEFT, or a LoRA of ViSFT. Raises ValueError for anything else."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path)
    if path.name in (CONFIG, WEIGHTS):
        return read_folder(path.parent)
    return read_visft_lora(path)


def read_visft_lora(path: Path) -> Adapter:
    """A published LoRA, or that of a checkpoint of ViSFT's training. Raises ValueError for a file without
    one.
    """
    file = open_weights(path)
    matches = {name: re.search(r"(?:^|\.)(blocks\.\d+\.attn\.qkv\.lora_[AB])$", name) for name in file}
    tensors = {match[1]: file.tensor(name, torch.float32) for name, match in matches.items() if match}
    if "blocks.0.attn.qkv.lora_A" not in tensors:
        raise ValueError(f"{path}: no LoRA of ViSFT, which is on q and v; it has {examples(file)}")
    with reading(path, "a LoRA of ViSFT"):
        twice_the_rank, width = tensors["blocks.0.attn.qkv.lora_A"].shape
        presets = [name for name, preset in PRESETS.items() if preset.width == width]
        slices = ((0, width), (2 * width, 3 * width))  # q and v of q, k, v
        layers = {}
        for index in range(len(tensors) // 2):
            name = f"blocks.{index}.attn.qkv"
            layers[name] = Factors(3 * width, slices, tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"])
    model = {"preset": presets[0] if presets else "debug"}
    return Adapter(model, twice_the_rank // 2, 1.0, ("q", "v"), layers, path=path)

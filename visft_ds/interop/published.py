"""Files that ViSFT published (https://huggingface.co/TencentARC/ViSFT): heads `eva_{e,g}_*_heads.ckpt`, LoRA
`eva_{e,g}_lora_*.pt`; and checkpoints of its training, which hold both.

Heads are fp32, every name behind `visft_heads.`, built with the defaults of this package's configuration. A file holds
all three, of which only the one that it is named after is trained, and the modules of segmentation a second time.
LoRA: `blocks.N.attn.qkv.lora_A` (2r, D) and `.lora_B` (2D, r), rows of q first, then v; alpha 1 as loralib's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visft_ds.files import reading
from visft_ds.interop.adapter import FILE, Adapter
from visft_ds.interop.weights import Weights, examples, open_weights
from visft_ds.models.eva_vit import PRESETS
from visft_ds.tasks import get_task
from visft_ds.tasks.captioning.head import PUBLISHED_NAMES

PREFIX = "visft_heads."
_DETR = "transformer.decoders.detection.detection_coco."
_PIXEL, _PREDICTOR = "segment_pixel_decoder.", "segment_predictor."
_CROSS = f"{_PREDICTOR}transformer_cross_attention_layers.{{n}}."
_SELF = f"{_PREDICTOR}transformer_self_attention_layers.{{n}}."
_FFN = f"{_PREDICTOR}transformer_ffn_layers.{{n}}."
# Ours -> published, behind the prefix; `{n}` is a layer, and the first rule whose beginning fits counts. The very first
# is of the parameter whose second axis is the width of the features.
_RULES: Mapping[str, Mapping[str, str]] = {
    "detection": {
        "input_proj.": "input_proj.",
        "task_embed.": "transformer.task_embeddings_enc.",
        "encoder.": "transformer.encoder.",
        "memory_proj.": "transformer.enc2dec_proj.",
        "position_proj.": "transformer.pos_embed_proj.",
        "decoder.layers.{n}.cross_attn.": f"{_DETR}layers.{{n}}.multihead_attn.",
        "decoder.": _DETR,
        "query_embed.": "query_embeds.detection.detection_coco.",
        "class_embed.": "class_embeds.",
        "box_embed.": "bbox_embeds.",
    },
    "segmentation": {
        "pixel_decoder.input_proj.": f"{_PIXEL}input_proj.0.0.",
        "pixel_decoder.input_norm.": f"{_PIXEL}input_proj.0.1.",
        "pixel_decoder.level_embed.weight": f"{_PIXEL}transformer.level_embed",
        "pixel_decoder.layers.": f"{_PIXEL}transformer.encoder.layers.",
        "pixel_decoder.lateral_norm.": f"{_PIXEL}adapter_1.norm.",
        "pixel_decoder.lateral_proj.": f"{_PIXEL}adapter_1.",
        "pixel_decoder.output_norm.": f"{_PIXEL}layer_1.norm.",
        "pixel_decoder.output_conv.": f"{_PIXEL}layer_1.",
        "pixel_decoder.mask_proj.": f"{_PIXEL}mask_features.",
        "decoder.query_feat.": f"{_PREDICTOR}query_feat.",
        "decoder.query_pos.": f"{_PREDICTOR}query_embed.",
        "decoder.level_embed.": f"{_PREDICTOR}level_embed.",
        "decoder.layers.{n}.cross_attn.": f"{_CROSS}multihead_attn.",
        "decoder.layers.{n}.norm1.": f"{_CROSS}norm.",
        "decoder.layers.{n}.self_attn.": f"{_SELF}self_attn.",
        "decoder.layers.{n}.norm2.": f"{_SELF}norm.",
        "decoder.layers.{n}.linear1.": f"{_FFN}linear1.",
        "decoder.layers.{n}.linear2.": f"{_FFN}linear2.",
        "decoder.layers.{n}.norm3.": f"{_FFN}norm.",
        "decoder.norm.": f"{_PREDICTOR}decoder_norm.",
        "decoder.class_embed.": f"{_PREDICTOR}class_embed.",
        "decoder.mask_embed.": f"{_PREDICTOR}mask_embed.",
    },
    "captioning": {ours: f"caption_decoder.{theirs}" for ours, theirs in PUBLISHED_NAMES.items()},
}


def published_name(task: str, name: str) -> str:
    """Parameter of one of our heads -> its name in a published file."""
    for ours, theirs in _RULES[task].items():
        pattern = re.escape(ours).replace(r"\{n\}", r"(\d+)")
        if match := re.match(pattern if ours.endswith(".") else f"{pattern}$", name):
            return PREFIX + theirs.replace("{n}", match[1] if match.groups() else "") + name[match.end() :]
    raise AssertionError(f"{task} parameter {name} has no published name")


def published_head(task: str, file: Weights) -> tuple[int, dict[str, Any], Weights]:
    """(width of its features, options, tensors under our names) of a task's head in a published file.

    Raises ValueError for a file without one.
    """
    first = next(iter(_RULES.get(task, [])), "").removesuffix("weight")
    anchor = published_name(task, f"{first}weight") if first else ""
    if anchor not in file:
        raise ValueError(f"{file.path}: no {task} head of visft_ds or ViSFT in this file; it has {examples(file)}")
    options = get_task(task).options("head", {})
    if task == "segmentation":
        options["labelling"] = "published"
    with reading(file.path, f"a {task} head of ViSFT"), torch.device("meta"):
        if task == "captioning":
            options["vocabulary_size"] = file[published_name(task, "embedding.weight")].shape[0]
        width = file[anchor].shape[1]
        head = get_task(task).build_head(width, options, options.get("vocabulary_size"))
    names = {name: published_name(task, name) for name in head.state_dict()}
    tensors = {ours: file[theirs] for ours, theirs in names.items() if theirs in file}
    return width, options, Weights(tensors, file.path)


def read_adapter(path: str | Path) -> Adapter:
    """An adapter in a folder or file of ours, or a LoRA of ViSFT. Raises ValueError for anything else."""
    path = Path(path)
    return Adapter.load(path) if path.is_dir() or path.name == FILE else read_visft_lora(path)


def read_visft_lora(path: Path) -> Adapter:
    """A published LoRA, or that of a checkpoint of ViSFT's training. Raises ValueError for a file without one."""
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
    return Adapter({"preset": preset}, double // 2, 1.0, ("q", "v"), layers, found)

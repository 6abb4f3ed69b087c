"""Files that ViSFT published (https://huggingface.co/TencentARC/ViSFT): heads `eva_{e,g}_*_heads.ckpt`, LoRA
`eva_{e,g}_lora_*.pt`; and checkpoints of its training, which hold both.

Heads are fp32, every name behind `visft_heads.`, built with the defaults of this package's configuration. A file holds
all three, of which only the one that it is named after is trained, and the modules of segmentation a second time.
LoRA: `blocks.N.attn.qkv.lora_A` (2r, D) and `.lora_B` (2D, r), rows of q first, then v; alpha 1 as loralib's.

And the decoders of PMT on DINOv3 (https://github.com/tue-mps/pmt, model_zoo), which are plain segmentation heads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds.files import reading
from visft_ds.interop.adapter import FILE, Adapter
from visft_ds.interop.weights import Lazy, Weights, examples, open_weights
from visft_ds.models.eva_vit import PRESETS
from visft_ds.tasks import get_task
from visft_ds.tasks.captioning.head import PUBLISHED_NAMES
from visft_ds.tasks.channels import EPS

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
    "plain": {
        "queries.": "decoder.q.",
        "laterals.{n}.channels.mean": "bn.{n}.running_mean",
        "laterals.{n}.channels.spread": "bn.{n}.running_var",
        "laterals.{n}.fc1.": "decoder.lateral_projections.{n}.0.",
        "laterals.{n}.fc2.": "decoder.lateral_projections.{n}.2.",
        "laterals.{n}.gain": "decoder.scalers.{n}",
        "laterals.": "bn.",
        "blocks.{n}.norm1.": "decoder.blocks.{n}.norm1.",
        "blocks.{n}.norm2.": "decoder.blocks.{n}.norm2.",
        "blocks.{n}.q.": "decoder.blocks.{n}.attention.q_proj.",
        "blocks.{n}.k.": "decoder.blocks.{n}.attention.k_proj.",
        "blocks.{n}.v.": "decoder.blocks.{n}.attention.v_proj.",
        "blocks.{n}.proj.": "decoder.blocks.{n}.attention.o_proj.",
        "blocks.{n}.fc1.": "decoder.blocks.{n}.mlp.up_proj.",
        "blocks.{n}.fc2.": "decoder.blocks.{n}.mlp.down_proj.",
        "blocks.{n}.gain1": "decoder.blocks.{n}.layer_scale1.lambda1",
        "blocks.{n}.gain2": "decoder.blocks.{n}.layer_scale2.lambda1",
        "norm.": "decoder.decoder_norm.",
        "upscale.{n}.up.": "decoder.upscale.{n}.conv1.",
        "upscale.{n}.near.": "decoder.upscale.{n}.conv2.",
        "upscale.": "decoder.upscale.",
        "mask1.": "decoder.mask_head.0.",
        "mask2.": "decoder.mask_head.2.",
        "mask3.": "decoder.mask_head.4.",
        "classes.": "decoder.class_head.",
    },
}
#: Width of a DINOv3 tower -> the blocks that PMT reads, of 24 or 12.
_PMT_LAYERS = {1024: (5, 11, 17, 23)}


HeadParts = tuple[list[tuple[int, int]], dict[str, Any], Weights]


def published_name(task: str, name: str) -> str:
    """Tensor of one of our heads -> its name in a published file; `task` "plain" is of PMT's decoders."""
    for ours, theirs in _RULES[task].items():
        pattern = re.escape(ours).replace(r"\{n\}", r"(\d+)")
        if match := re.match(pattern if ours.endswith(".") else f"{pattern}$", name):
            theirs = theirs.replace("{n}", match[1] if match.groups() else "")
            return f"{'network.' if task == 'plain' else PREFIX}{theirs}{name[match.end() :]}"
    raise AssertionError(f"{task} parameter {name} has no published name")


def published_head(task: str, file: Weights) -> HeadParts:
    """(shapes of its maps, options, tensors under our names) of a task's head in a published file.

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
        shapes = [(file[anchor].shape[1], 14)]
        head = get_task(task).build_head(shapes, options, options.get("vocabulary_size"))
    names = {name: published_name(task, name) for name in head.state_dict()}
    tensors = {ours: file[theirs] for ours, theirs in names.items() if theirs in file}
    return shapes, options, Weights(tensors, file.path)


def pmt_head(file: Weights) -> tuple[HeadParts, tuple[int, ...]] | None:
    """(as `published_head`, blocks that it reads) of a decoder of PMT; None for another file."""
    names = {theirs: published_name("plain", f"{theirs}weight") for theirs in ("queries.", "classes.")}
    if not set(names.values()) <= file.keys():
        return None

    def many(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in file)

    with reading(file.path, "a decoder of PMT"), torch.device("meta"):
        (queries, width), classes = file[names["queries."]].shape, file[names["classes."]].shape[0] - 1
        maps, blocks = many(r"network\.bn\.\d+\.weight"), many(r"network\.decoder\.blocks\.\d+\.norm1\.weight")
        ffn_dim = file[published_name("plain", "blocks.0.fc1.weight")].shape[0]
        sizes = {"num_classes": classes, "num_queries": queries, "blocks": blocks, "ffn_dim": ffn_dim}
        options = get_task("segmentation").options("head", {"type": "plain", **sizes})
        shapes = [(width, 16)] * maps
        head = get_task("segmentation").build_head(shapes, options, None)

    def spread(variance: Lazy) -> Tensor:
        return variance.read().float().add(EPS).sqrt()

    names = {ours: published_name("plain", ours) for ours in head.state_dict()}
    tensors = {ours: file[theirs] for ours, theirs in names.items() if theirs in file}
    for ours, one in tensors.items():
        if ours.endswith("spread"):
            tensors[ours] = Lazy(one.shape, torch.float32, partial(spread, one))
    return (shapes, options, Weights(tensors, file.path)), _PMT_LAYERS.get(width, (2, 5, 8, 11))


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

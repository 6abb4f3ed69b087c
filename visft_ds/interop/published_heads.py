"""The head files that ViSFT published (https://huggingface.co/TencentARC/ViSFT): eva_e_*_heads.ckpt and
eva_g_*_heads.ckpt, one for each of caption, segment and detection; and the checkpoints of its training.

Flat, fp32, every name behind `visft_heads.`. A file holds more than the head it is named after: the model always has
all three, and only the one that the stage trained is worth anything. The detection file even carries an untrained
caption head of other widths (512 instead of 384). So a file is read for one task at a time. The segmentation modules
appear a second time, as parts of `segment_head`. Checkpoints hold LoRA tensors of the backbone besides.

Names after mmf/models/visft/{visft_heads,transformer,msdeformattn,mask2former_transformer_decoder,caption_decoder}.py
of https://github.com/TencentARC/ViSFT. Every parameter that they name has its place in our heads, and the other way
round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visft_ds.interop.files import WeightFile, examples
from visft_ds.interop.head_file import HeadFile, HeadInfo, read_sizes
from visft_ds.tasks import BUILT_IN, TASKS, config_class
from visft_ds.tasks.captioning.head import PUBLISHED_NAMES

PREFIX = "visft_heads."
NUM_HEADS = 8  #: attention heads of the published detection and segmentation heads
GRID = 14  #: side of the pixel grid that the published caption head looks at
#: Task -> its word in the names of the published files.
KINDS: Mapping[str, str] = {name: config_class(name).published for name in BUILT_IN}

_DETR = "transformer.decoders.detection.detection_coco."
_PIXEL, _PREDICTOR = "segment_pixel_decoder.", "segment_predictor."
_CROSS = f"{_PREDICTOR}transformer_cross_attention_layers.{{n}}."
_SELF = f"{_PREDICTOR}transformer_self_attention_layers.{{n}}."
_FFN = f"{_PREDICTOR}transformer_ffn_layers.{{n}}."
# Ours -> published, behind the prefix. `{n}` is a layer; what ends in a point stands for all names that begin so. The
# first rule that fits counts.
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
# The same tensors a second time, behind the prefix.
_ALIASES = {"segment_head.pixel_decoder.": _PIXEL, "segment_head.predictor.": _PREDICTOR}
# Class weights of the detection loss, a constant; it stands outside the prefix.
_LOSS_CONSTANT = "det_losses.empty_weight"


def _compile(rules: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    compiled = []
    for old, new in rules:
        pattern = re.escape(old).replace(re.escape("{n}"), r"(?P<n>\d+)")
        compiled.append((re.compile(pattern if old.endswith(".") else f"{pattern}$"), new))
    return compiled


_TO_PUBLISHED = {task: _compile(rules.items()) for task, rules in _RULES.items()}
_TO_OURS = {task: _compile((new, old) for old, new in rules.items()) for task, rules in _RULES.items()}


def _translate(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, new in rules:
        if match := pattern.match(name):
            return new.replace("{n}", match.groupdict().get("n", "")) + name[match.end() :]
    return None


def published_name(task: str, name: str) -> str:
    """Parameter of one of our heads -> its name in a published file, prefix included."""
    translated = _translate(name, _TO_PUBLISHED[task])
    assert translated is not None, f"{task} parameter {name} has no published name"
    return PREFIX + translated


def _our_name(task: str, inner: str) -> str | None:
    """The inverse; None for a name of another task or of none."""
    ours = _translate(inner, _TO_OURS[task])
    # A name may fit a rule and still be none: "multihead_attn" is the only way to write our "cross_attn".
    return ours if ours is not None and published_name(task, ours) == PREFIX + inner else None


@dataclass(frozen=True)
class PublishedFile:
    """The names of a published file, sorted: every one that may matter is in exactly one of the fields."""

    file: WeightFile
    heads: Mapping[str, Mapping[str, str]]  #: task -> our name -> name in the file; only tasks that are there
    repeats: Mapping[str, str]  #: second name in the file -> the name it repeats
    unknown: tuple[str, ...]


def sort_names(file: WeightFile) -> PublishedFile:
    """Account for every name of a file, whatever it holds."""
    heads: dict[str, dict[str, str]] = {}
    repeats, unknown = {}, []
    for name in file:
        inner = name.removeprefix(PREFIX) if name.startswith(PREFIX) else None
        task, ours = _place(inner or "")
        alias = next((prefix for prefix in _ALIASES if inner is not None and inner.startswith(prefix)), None)
        if task is not None:
            heads.setdefault(task, {})[ours] = name
        elif alias is not None and inner is not None:
            repeats[name] = PREFIX + _ALIASES[alias] + inner.removeprefix(alias)
        elif name != _LOSS_CONSTANT and not (inner or "").startswith("backbone.0."):
            unknown.append(name)
    unknown += [name for name, original in repeats.items() if original not in file]
    return PublishedFile(
        file,
        {task: heads[task] for task in TASKS if task in heads},
        {name: original for name, original in repeats.items() if original in file},
        tuple(unknown),
    )


def _place(inner: str) -> tuple[str, str] | tuple[None, str]:
    """Task and our name of a name behind the prefix."""
    for task in TASKS:
        if (ours := _our_name(task, inner)) is not None:
            return task, ours
    return None, ""


def published_task(path: Path) -> str | None:
    """The task by a file's published name (`eva_e_caption_heads.ckpt`), None for other names."""
    match = re.fullmatch(r"eva_[eg]_(\w+)_heads\.ckpt", path.name)
    return next((task for task, kind in KINDS.items() if match and match[1] == kind), None)


def find_published(content: PublishedFile, task: str, *, assume: bool) -> HeadFile:
    """The head of a task in a published file.

    Its description has what the tensors show, and the labelling that all published heads were trained with. With
    `assume` it is enough to build the head: number of attention heads, and points that follow from it.

    Raises ValueError where the file has no head of this task, and where tensors that show its sizes are missing.
    """
    file = content.file
    if task not in content.heads:
        found = f"heads for {', '.join(content.heads)}" if content.heads else examples(file.infos)
        raise ValueError(f"{file.path}: no {task} head in this file; it has {found}")
    names = content.heads[task]
    num_heads = NUM_HEADS if assume and task != "captioning" else None
    try:
        in_channels, sizes = read_sizes(task, {ours: file.shape(name) for ours, name in names.items()}, num_heads)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    options: dict[str, Any] = dict(sizes) if num_heads is None else {**sizes, "num_heads": num_heads}
    if task == "segmentation":
        options["labelling"] = "published"
    info = HeadInfo(task, in_channels, options, extra={"format": "visft"})
    # Nothing is read of the other heads, so their second names are not compared.
    return HeadFile(file, info, names, content.unknown, content.repeats if task == "segmentation" else {})

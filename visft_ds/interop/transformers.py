"""The vision tower of BLIP-2 as transformers names it (`Blip2VisionModel`), both ways. transformers is not imported.

Names: https://github.com/huggingface/transformers/blob/main/src/transformers/models/blip_2/modeling_blip_2.py. It is
the pre-norm tower of EVA-CLIP-g; a published BLIP-2 has 39 of its 40 blocks, and its own final norm behind them
(`ln_vision` in LAVIS), trained with the Q-Former. Bare (`embeddings.`, `encoder.`) or inside a whole BLIP-2 (under
`vision_model.`, the two later names are those of its other parts).

q, k and v have one fused bias there. That of k has no effect: it adds the same number to all scores of a query, which
the softmax removes. It is dropped in reading and zero in writing.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from visft_ds.interop.files import Entry, TensorInfo, WeightFile, view
from visft_ds.interop.layouts import Layout, Tower

PREFIX = "vision_model."
LAYOUT = Layout(
    "transformers",
    PREFIX,
    {
        "rest of BLIP-2": (
            *("qformer.", "query_tokens", "language_model.", "language_projection.", "embeddings."),
            *("vision_projection.", "text_projection.", "itm_head."),
        )
    },
)
# Ours -> theirs, outside the blocks and inside one.
_OUTSIDE = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_INSIDE = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_THEIRS = {theirs: ours for ours, theirs in _OUTSIDE.items()}
_THEIR_PARTS = {theirs: ours for ours, theirs in _INSIDE.items()}
_BLOCK = re.compile(r"(blocks|encoder\.layers)\.(\d+)\.(.+)\.(weight|bias)")
_ANCHOR = "encoder.layers.0.self_attn.qkv.weight"


def as_tower(file: WeightFile) -> WeightFile | None:
    """The file with the names of our tower under `vision_model.`; None where it holds no such model.

    Names that mean nothing here stay as they are, for the check of all names to find them.
    """
    bare = _ANCHOR in file
    if not bare and PREFIX + _ANCHOR not in file:
        return None
    entries: dict[str, Entry] = {}
    for name in file:
        inner = name if bare else name[len(PREFIX) :] if name.startswith(PREFIX) else ""
        shape, dtype = file.shape(name), file.dtype(name)
        if inner.endswith(".self_attn.qkv.bias") and (match := _BLOCK.fullmatch(inner)) and shape[0] % 3 == 0:
            width = shape[0] // 3
            stem = f"{PREFIX}blocks.{match[2]}.attn."
            entries[stem + "q_bias"] = Entry((name,), TensorInfo((width,), dtype), lambda bias: bias.chunk(3)[0])
            entries[stem + "v_bias"] = Entry((name,), TensorInfo((width,), dtype), lambda bias: bias.chunk(3)[2])
        else:
            ours = _renamed(inner, _THEIRS, _THEIR_PARTS, "blocks")
            entries[name if ours is None else PREFIX + ours] = Entry.same(file, name)
    metadata = {"tower": '{"post_norm": false}', **file.metadata}  # the class has no other form
    return view(file, entries, metadata)


def export_entries(file: WeightFile, layout: Layout) -> dict[str, Entry]:
    """Name in a bare `Blip2VisionModel` -> how it is made of `file`, which has the given layout."""
    entries: dict[str, Entry] = {}
    for name in file:
        inner = name[len(layout.prefix) :] if name.startswith(layout.prefix) else ""
        theirs = _renamed(inner, _OUTSIDE, _INSIDE, "encoder.layers")
        if theirs is not None:
            entries[theirs] = Entry.same(file, name)
        elif inner.endswith(".attn.q_bias"):
            info, value = file.infos[name], name.removesuffix("q_bias") + "v_bias"
            index = inner.split(".")[1]
            joined = TensorInfo((3 * info.shape[0],), info.dtype)
            entries[f"encoder.layers.{index}.self_attn.qkv.bias"] = Entry((name, value), joined, _join)
    return entries


def _join(q: Tensor, v: Tensor) -> Tensor:
    return torch.cat((q, torch.zeros_like(q), v))


def _renamed(name: str, outside: dict[str, str], inside: dict[str, str], blocks: str) -> str | None:
    if name in outside:
        return outside[name]
    match = _BLOCK.fullmatch(name)
    part = inside.get(match[3]) if match else None
    # qkv has a bias of its own on one side only.
    if match is None or part is None or (part.endswith(".qkv") and match[4] == "bias"):
        return None
    return f"{blocks}.{match[2]}.{part}.{match[4]}"


def settings(tower: Tower, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of `Blip2VisionModel` for a tower; heads are known."""
    return {
        "architectures": ["Blip2VisionModel"],
        "model_type": "blip_2_vision_model",
        "hidden_size": tower.width,
        "intermediate_size": tower.hidden,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.num_heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "qkv_bias": True,
        "dtype": str(dtype).removeprefix("torch."),
    }

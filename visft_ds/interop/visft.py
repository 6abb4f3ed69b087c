"""The LoRA files that ViSFT published (https://huggingface.co/TencentARC/ViSFT): eva_e_lora_*.pt, eva_g_lora_*.pt.

Flat, fp32, `visual.blocks.N.attn.qkv.lora_A` (2r, D) and `.lora_B` (2D, r); rows for q first, then v. They were
trained with loralib's MergedLinear at its default alpha 1, r 64: scaling 1/64. Training checkpoints hold the same
tensors under `visft_heads.backbone.0.`, beside the heads, which `published_heads` reads.
"""

from __future__ import annotations

from pathlib import Path

from visft_ds.interop.adapter import Adapter
from visft_ds.interop.files import examples, open_weights
from visft_ds.interop.layouts import LAYOUTS, is_lora

ALPHA = 1.0
TARGETS = ("q", "v")


def read_visft_lora(path: str | Path) -> Adapter:
    """Read a published LoRA file or the LoRA of a ViSFT training checkpoint; the prefix is found.

    Raises ValueError for a file without LoRA tensors, with unexpected ones, and of inconsistent shapes.
    """
    file = open_weights(path)
    named = [name for name in file if is_lora(name)]
    if not named:
        raise ValueError(f"{path}: no LoRA tensors (…attn.qkv.lora_A) in this file; it has {examples(file.infos)}")
    layouts = (layout for layout in LAYOUTS.values() if named[0].startswith(layout.prefix + "blocks."))
    if (layout := next(layouts, None)) is None:
        raise ValueError(f"{path}: {named[0]!r} belongs to no vision tower that is known: not a ViSFT LoRA file")
    foreign = [name for name in named if not name.startswith(layout.prefix + "blocks.")]
    foreign += [name for name in named if not name.endswith((".attn.qkv.lora_A", ".attn.qkv.lora_B"))]
    foreign += [name for name in file if not is_lora(name) and layout.reason_to_ignore(name) is None]
    if foreign:
        raise ValueError(f"{path}: besides LoRA of the fused qkv there are {examples(foreign)}: not a ViSFT LoRA file")
    tensors = {name[len(layout.prefix) :]: file.get(name) for name in named}
    first = "blocks.0.attn.qkv."
    if first + "lora_A" not in tensors or first + "lora_B" not in tensors:
        raise ValueError(f"{path}: {layout.prefix}{first}lora_A or .lora_B is missing")
    if any(value.ndim != 2 for value in tensors.values()):
        raise ValueError(f"{path}: not all of its tensors are matrices: not a ViSFT LoRA file")
    rows, rank = tensors[first + "lora_A"].shape[0], tensors[first + "lora_B"].shape[1]
    if rows != 2 * rank or not rank:
        raise ValueError(
            f"{path}: lora_A has {rows} rows and lora_B {rank} columns; ViSFT adapts q and v, so 2 x {rank} rows are "
            f"expected: not a ViSFT LoRA file"
        )
    tensors = {name: value.float() for name, value in tensors.items()}
    return Adapter(rank, ALPHA, TARGETS, tensors)

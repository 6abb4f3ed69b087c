"""PEFT's adapter folder (adapter_config.json, adapter_model.safetensors), written without PEFT.

PEFT has no LoRA on slices of a fused qkv. Ours becomes its plain one on the whole qkv: of G slices rank G*r, A as it
is, B (3D, G*r) block by block and zero elsewhere, alpha G times as large. That is exact.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from visft_ds.interop.adapter import Adapter
from visft_ds.interop.weights import save_tensors, write_text
from visft_ds.models.lora import KINDS
from visft_ds.ops.lora import parts_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_peft(adapter: Adapter, folder: Path, base_model: str | None = None) -> None:
    """Write our own file and PEFT's two; the configuration last, without which the folder is no adapter.

    Args:
        base_model: repository of the base weights on the hub.
    """
    (folder / CONFIG).unlink(missing_ok=True)
    adapter.save(folder)
    save_tensors(folder / WEIGHTS, peft_tensors(adapter), {})
    content = peft_config(adapter) | {"base_model_name_or_path": base_model}
    write_text(folder / CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")


def peft_config(adapter: Adapter) -> dict[str, Any]:
    """Arguments of PEFT's LoraConfig. Whole names of layers: "conv1" alone would be that of every block."""
    several = {re.escape(layer): len(slices) for layer, (_, slices) in adapter.layers.items() if len(slices) > 1}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "rank_pattern": {layer: adapter.rank * count for layer, count in several.items()},
        "alpha_pattern": {layer: adapter.alpha * count for layer, count in several.items()},
        "target_modules": "|".join(re.escape(layer) for layer in adapter.layers),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def peft_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Its tensors under PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for layer, (rows, slices) in adapter.layers.items():
        a, b = (adapter.tensors[f"{layer}.{kind}"] for kind in KINDS)
        if slices != ((0, rows),):
            dense = b.new_zeros(rows, len(slices) * adapter.rank)
            for lo, hi, columns, rows_of_b in parts_of(slices, adapter.rank):
                dense[lo:hi, columns] = b[rows_of_b]
            b = dense
        stem = f"base_model.model.{layer}"
        tensors[f"{stem}.lora_A.weight"] = a.contiguous()
        tensors[f"{stem}.lora_B.weight"] = (b[:, :, None, None] if a.ndim == 4 else b).contiguous()
    return tensors

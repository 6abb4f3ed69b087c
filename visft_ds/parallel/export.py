"""What leaves a run: heads, adapters and base weights in files that other programs read, in <run>/export.

Stage 1 gives `<task>.safetensors` for every head, stage 2 the adapter as a PEFT folder. A backbone that was trained
itself is written whole. (Random base weights, where no file was named, are written at the start of the run.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from visft_ds.config import ResolvedConfig
from visft_ds.data.manifest import Category
from visft_ds.interop.adapters import LoraAdapter, canonical_targets
from visft_ds.interop.files import save_tensors
from visft_ds.interop.heads import HeadInfo, save_heads
from visft_ds.interop.layouts import Tower, base_parameters, is_lora, tower_of
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.models.eva_vit import EvaViT
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import ZeroEngine
from visft_ds.parallel.engine_state import gather_parameters

BACKBONE_FILE = "backbone.safetensors"
ADAPTER_FOLDER = "adapter"


def export_weights(
    engine: ZeroEngine,
    config: ResolvedConfig,
    folder: Path,
    *,
    step: int,
    categories: Sequence[Category],
    base_sha256: str,
) -> list[Path]:
    """Write everything that trained. Collective; returns the paths on the main process.

    Args:
        base_sha256: hash of the base weights the adapter belongs to.
    """
    trained = gather_parameters(engine)
    whole = [name for name, _ in engine.module.named_parameters() if name.startswith("backbone.") and not is_lora(name)]
    backbone_trained = any(name in trained for name in whole)
    backbone = gather_parameters(engine, tuple(whole)) if backbone_trained else {}
    if not distributed.is_main():
        return []
    written = []
    heads = {task: _below(trained, f"heads.{task}.") for task in engine.module.heads}
    heads = {task: tensors for task, tensors in heads.items() if tensors}
    if heads:
        infos = {task: _head_info(task, config, engine, step, categories) for task in heads}
        written += save_heads(heads, folder, infos, overwrite=True)
    adapter = {name: value for name, value in _below(trained, "backbone.").items() if is_lora(name)}
    lora, tower = config.visft.lora, tower_of(engine.module.backbone)
    if adapter and lora is not None:
        targets = canonical_targets(lora.targets)
        whole_adapter = LoraAdapter(lora.rank, lora.alpha, targets, adapter, "model", base_sha256)
        written.append(save_peft_adapter(whole_adapter, folder / ADAPTER_FOLDER, tower, overwrite=True))
    if backbone:
        written.append(_save_tower(_below(backbone, "backbone."), tower, folder))
    return written


def save_base(backbone: EvaViT, folder: Path) -> Path:
    """Write the base weights of a backbone, without the adapters in it, to `folder`/backbone.safetensors."""
    tensors = {name: parameter.detach() for name, parameter in base_parameters(backbone).items()}
    return _save_tower(tensors, tower_of(backbone), folder)


def _save_tower(tensors: Mapping[str, Tensor], tower: Tower, folder: Path) -> Path:
    told = {"tower": tower.to_json(), "lora_merged": "false"}
    save_tensors(folder / BACKBONE_FILE, tensors, told, overwrite=True)
    return folder / BACKBONE_FILE


def _head_info(
    task: str, config: ResolvedConfig, engine: ZeroEngine, step: int, categories: Sequence[Category]
) -> HeadInfo:
    options: dict[str, Any] = config.visft.tasks.enabled()[task].head.model_dump(mode="json")
    return HeadInfo(task, engine.module.backbone.width, options, [asdict(c) for c in categories], {"step": step})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

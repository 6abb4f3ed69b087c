"""What leaves a run: heads, adapters and base weights in files that other programs read, in <run>/export.

Stage 1 gives `<task>.safetensors` for every head, stage 2 the adapter as a PEFT folder. A backbone that was trained
itself is written whole, beside its base. (Random base weights are
written at the start of the run.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from visft_ds.config import ResolvedConfig
from visft_ds.data.manifest import Category
from visft_ds.data.vocabulary import Vocabulary
from visft_ds.interop.adapters import LoraAdapter, canonical_targets
from visft_ds.interop.files import save_tensors, sha256_file
from visft_ds.interop.heads import HeadInfo, save_head_files
from visft_ds.interop.layouts import Tower, base_parameters, is_lora, tower_of
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.models.eva_vit import EvaViT
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.engine_state import gather_parameters
from visft_ds.run_folder import ADAPTER_FOLDER, BACKBONE_FILE, TRAINED_BACKBONE_FILE
from visft_ds.tasks import TASKS


def export_weights(
    engine: Engine,
    config: ResolvedConfig,
    folder: Path,
    *,
    step: int,
    categories: Sequence[Category],
    base_weights: str,
    base_sha256: str,
    vocabulary: Vocabulary | None = None,
    instead: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[Path]:
    """Write everything that trained. Collective; returns the paths on the main process.

    Args:
        base_weights: what the heads were trained on, as stage 2 compares it.
        vocabulary: goes along with heads that work with words.
        instead: values (fp32, by qualified name) to write in place of the engine's own, e.g. an average of them.
        base_sha256: hash of the base file. An adapter beside a trained backbone belongs to that one instead.
    """
    trained = gather_parameters(engine)
    whole = [name for name, _ in engine.module.named_parameters() if name.startswith("backbone.") and not is_lora(name)]
    backbone_trained = any(name in trained for name in whole)
    backbone = gather_parameters(engine, tuple(whole)) if backbone_trained else {}
    if not distributed.is_main():
        return []
    trained, backbone = ({**own, **{n: v for n, v in instead.items() if n in own}} for own in (trained, backbone))
    written = []
    lora, tower = config.visft.lora, tower_of(engine.module.backbone)
    if backbone:
        written.append(_save_tower(_below(backbone, "backbone."), tower, folder / TRAINED_BACKBONE_FILE))
        base_sha256 = sha256_file(written[0])
    heads = {task: _below(trained, f"heads.{task}.") for task in engine.module.heads}
    heads = {task: tensors for task, tensors in heads.items() if tensors}
    if heads:
        extra = {"step": step, "base_weights": base_weights, "mode": config.visft.mode}
        infos = {task: _head_info(task, config, engine, extra, categories, vocabulary) for task in heads}
        written += save_head_files(heads, folder, infos, overwrite=True)
    adapter = {name: value for name, value in _below(trained, "backbone.").items() if is_lora(name)}
    if adapter and lora is not None:
        targets = canonical_targets(lora.targets)
        whole_adapter = LoraAdapter(lora.rank, lora.alpha, targets, adapter, "model", base_sha256)
        written.append(save_peft_adapter(whole_adapter, folder / ADAPTER_FOLDER, tower, overwrite=True))
    return written


def save_base(backbone: EvaViT, folder: Path) -> Path:
    """Write the base weights of a backbone, without the adapters in it, to `folder`/backbone.safetensors."""
    tensors = {name: parameter.detach() for name, parameter in base_parameters(backbone).items()}
    return _save_tower(tensors, tower_of(backbone), folder / BACKBONE_FILE)


def _save_tower(tensors: Mapping[str, Tensor], tower: Tower, path: Path) -> Path:
    save_tensors(path, tensors, {"tower": tower.to_json(), "lora_merged": "false"}, overwrite=True)
    return path


def _head_info(
    task: str,
    config: ResolvedConfig,
    engine: Engine,
    extra: Mapping[str, Any],
    categories: Sequence[Category],
    vocabulary: Vocabulary | None,
) -> HeadInfo:
    options: dict[str, Any] = config.visft.tasks.enabled()[task].head.model_dump(mode="json")
    width = engine.module.backbone.width
    if TASKS[task].uses_vocabulary:  # its classes are words, not categories
        assert vocabulary is not None
        options["vocabulary_size"] = vocabulary.size
        return HeadInfo(task, width, options, [], {**extra, "vocabulary": vocabulary.to_dict()})
    return HeadInfo(task, width, options, [asdict(c) for c in categories], extra)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

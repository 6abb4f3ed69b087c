"""Export of a run: heads, adapters and base weights in files that other programs read, in <run>/export.

Stage 1 gives `<task>.safetensors` for every head, stage 2 the adapter as a PEFT folder. A backbone that was trained
itself is written whole, beside its base; no process holds more than one tensor of it for that. (Random base weights are
written at the start of the run.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds.config.schema import LoraConfig
from visft_ds.config.task_schema import TaskConfig
from visft_ds.data.shards import Category
from visft_ds.interop.adapter import adapter_of_run
from visft_ds.interop.card_data import Publication
from visft_ds.interop.files import BASE_DRAWN_AS, DRAWN_AS, LAYERS, TRAINED, TRAINED_ON, TensorInfo, sha256_file
from visft_ds.interop.head_file import HeadInfo
from visft_ds.interop.heads import save_head_files
from visft_ds.interop.layouts import is_lora, tower_metadata, tower_of
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.interop.writing import file_order, write_safetensors
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.timm_backbone import TimmBackbone
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.state import gather_parameters, trainable
from visft_ds.prepare.materialize import BaseWeights
from visft_ds.run.folder import ADAPTER_FOLDER, TRAINED_BACKBONE_FILE
from visft_ds.tasks import TASKS
from visft_ds.tasks.vocabulary import Vocabulary


def export_weights(
    engine: Engine,
    folder: Path,
    *,
    lora: LoraConfig | None,
    infos: Mapping[str, HeadInfo],
    base_weights: str,
    base_sha256: str,
    base: BaseWeights,
    base_model: Publication | None = None,
) -> list[Path]:
    """Write everything that trained. Collective; returns the paths on the main process.

    Args:
        lora: settings of the adapters, where the backbone has some.
        infos: descriptions of the heads, see `describe_heads`.
        base_weights: name of what the backbone began as; equal to `base_sha256` unless it was drawn at random.
        base_sha256: hash of the base file. An adapter beside a trained backbone belongs to that one instead.
        base: has the values of what is frozen, which the engine holds in the precision of the run alone.
        base_model: publication of the base.
    """
    written = []
    backbone = engine.module.backbone
    names = trainable(engine)
    base_names = [
        name for name, _ in engine.module.named_parameters() if name.startswith("backbone.") and not is_lora(name)
    ]
    if own := [name.removeprefix("backbone.") for name in base_names if name in names]:
        path = folder / TRAINED_BACKBONE_FILE
        began = {TRAINED_ON: base_sha256, TRAINED: json.dumps(own)}
        began |= {BASE_DRAWN_AS: base_weights} if base_weights != base_sha256 else {}  # no file: at random
        written.append(_export_tower(engine, base_names, path, base, began))
    # Heads and adapters: small.
    trained = gather_parameters(engine, tuple(name for name in names if name not in base_names))
    if not distributed.is_main():
        return []
    if written:
        base_sha256, base_model = sha256_file(written[0]), None
    heads = {task: _below(trained, f"heads.{task}.") for task in engine.module.heads}
    heads = {task: tensors for task, tensors in heads.items() if tensors}
    if heads:
        written += save_head_files(heads, folder, {task: infos[task] for task in heads}, overwrite=True)
    adapter = {name: value for name, value in _below(trained, "backbone.").items() if is_lora(name)}
    if adapter and lora is not None:
        tower = tower_of(backbone) if isinstance(backbone, EvaViT) else None
        whole_adapter = adapter_of_run(lora, adapter, backbone, base_sha256)
        place = folder / ADAPTER_FOLDER
        written.append(save_peft_adapter(whole_adapter, place, tower, base_model=base_model, overwrite=True))
    return written


def save_base(base: BaseWeights, backbone: Backbone, path: Path) -> None:
    """Write base weights of a backbone as a run starts with them, reading or drawing one tensor at a time once more.

    So they need not be gathered from whoever holds them.
    """
    stored = backbone.stored_buffers().keys() if isinstance(backbone, TimmBackbone) else ()
    more = {**{name: value for name, value in base.buffers().items() if name in stored}, **base.beside()}
    infos = {**base.infos, **{name: TensorInfo.of(value) for name, value in more.items()}}
    drawn = {DRAWN_AS: base.drawn_as} if base.drawn_as else {}
    _write_tower(
        path, infos, lambda name: more[name] if name in more else base.read(name), {**tower_metadata(backbone), **drawn}
    )


def _export_tower(
    engine: Engine,
    names: Sequence[str],
    path: Path,
    base: BaseWeights,
    began: Mapping[str, str],
) -> Path:
    """Gather what trained of a tower, and write it whole, one tensor at a time. Collective; the main process writes.

    Args:
        names: qualified, of all of its parameters.
        base: see `export_weights`.
        began: what the file says of the base.
    """
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    infos = {name.removeprefix("backbone."): TensorInfo(shapes[name], torch.float32) for name in names}
    backbone, trained = engine.module.backbone, trainable(engine)
    # Statistics of batch norms are the same on every process, and as they were.
    buffers = backbone.stored_buffers() if isinstance(backbone, TimmBackbone) else {}

    def gather(name: str) -> Tensor:
        if name in buffers:
            return buffers[name].cpu()
        qualified = f"backbone.{name}"
        if qualified not in trained:
            return base.whole(name)
        return gather_parameters(engine, (qualified,))[qualified]

    if distributed.is_main():
        stored = {**infos, **{name: TensorInfo.of(value) for name, value in buffers.items()}}
        _write_tower(path, stored, gather, {**tower_metadata(backbone), **began})
    else:
        for name in file_order({name: info for name, info in infos.items() if f"backbone.{name}" in trained}):
            gather_parameters(engine, (f"backbone.{name}",))
    return path


def _write_tower(
    path: Path, infos: Mapping[str, TensorInfo], produce: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    write_safetensors(path, infos, produce, {**metadata, "lora_merged": "false"}, overwrite=True)


def describe_heads(
    backbone: Backbone,
    tasks: Mapping[str, TaskConfig],
    facts: Mapping[str, Any],
    categories: Sequence[Category],
    vocabulary: Vocabulary | None,
) -> dict[str, HeadInfo]:
    """Description of each head of a run, by which its file alone is enough to build it again.

    Args:
        facts: "step", "mode", and "base_weights" they were trained on, as stage 2 compares it.
        vocabulary: goes along with heads that work with words.
    """
    extra = {**facts, **({LAYERS: list(backbone.layers_read)} if backbone.layers_read else {})}
    infos = {}
    for name, task in tasks.items():
        options = task.head.model_dump(mode="json")
        if TASKS[name].uses_vocabulary:  # its classes are words, not categories
            assert vocabulary is not None
            options["vocabulary_size"] = vocabulary.size
            infos[name] = HeadInfo(name, backbone.width, options, [], {**extra, "vocabulary": vocabulary.to_dict()})
        else:
            infos[name] = HeadInfo(name, backbone.width, options, [asdict(c) for c in categories], extra)
    return infos


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

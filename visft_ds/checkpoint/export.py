"""Export of a run: heads, adapters and base weights in files that other programs read, in <run>/export.

It holds `<task>.safetensors` for every head, the adapter of stage 2 (also for PEFT), base weights that were
drawn, and a copy of the run's record, which is written last: with the base weights at hand it is a whole
model. A backbone that trained itself is written whole, beside its base. What trained is read out of a
checkpoint, one tensor at a time. The backbone in a checkpoint is found here, too, for runs that have no
export yet.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds.checkpoint.format import Checkpoint, explained, open_checkpoint
from visft_ds.config.record import recorded_config
from visft_ds.config.schema import VisftConfig
from visft_ds.data.shards import categories_for
from visft_ds.files import write_text
from visft_ds.interop.heads import HeadInfo, head_file, save_head
from visft_ds.interop.layouts import BASE, MODEL, fingerprint_of, is_lora, model_of
from visft_ds.interop.weights import Lazy, Tensors, Weights, derived, write_safetensors
from visft_ds.models import Backbone
from visft_ds.models.lora import inject_lora
from visft_ds.prepare.data import RunData
from visft_ds.prepare.materialize import BaseWeights
from visft_ds.prepare.model import PreparedModel
from visft_ds.run_files import (
    ADAPTER_FOLDER,
    BACKBONE_FILE,
    TRAINED_BACKBONE_FILE,
    folder_of_run,
)
from visft_ds.settings.task_schema import TaskConfig
from visft_ds.tasks import TASKS
from visft_ds.tasks.vocabulary import Vocabulary


def export_weights(
    trained: Weights,
    folder: Path,
    prepared: PreparedModel,
    config: VisftConfig,
    infos: Mapping[str, HeadInfo],
    step: int,
) -> None:
    """Write everything that trained until a step. Main process only.

    Args:
        trained: values by qualified name, see `Checkpoint.weights`.
        prepared: has the values of what is frozen.
        infos: descriptions of the heads that train, see `describe_heads`.
    """
    backbone = prepared.module.backbone
    identity = prepared.base.identity
    lora: dict[str, Lazy] = {}
    own: dict[str, Lazy] = {}
    for name, tensor in trained.under("backbone.").items():
        (lora if is_lora(name) else own)[name] = tensor
    if own:
        save_base(prepared.base, backbone, folder / TRAINED_BACKBONE_FILE, own)
        # Adapters belong to that one, which no hub has.
        identity = fingerprint_of(backbone, folder / TRAINED_BACKBONE_FILE)
    for task, info in infos.items():
        tensors = dict(trained.under(f"heads.{task}."))
        if task in prepared.heads:  # a group may train a part of a head
            tensors = {**prepared.heads[task].tensors, **tensors}
        save_head(head_file(folder, task), info, _read(tensors))
    if config.lora is not None:
        from visft_ds.interop.adapter import Adapter  # stage 1 has none
        from visft_ds.interop.card import README, card, repository_of
        from visft_ds.interop.peft_folder import write_folder

        repository = None if own else repository_of(config.model.weights)
        adapter = Adapter.of(backbone, config.lora, _read(lora), identity, step)
        write_folder(adapter, folder / ADAPTER_FOLDER, repository)
        text = card("LoRA adapter", "peft", backbone, adapter, base=repository)
        write_text(folder / ADAPTER_FOLDER / README, text)


def begin_export(folder: Path, prepared: PreparedModel, vocabulary: Vocabulary | None) -> None:
    """Write what a run does not train and no other folder is sure to have: drawn base weights, heads of stage
    1.

    Without its record, which is written last, the folder is no export yet. Heads that work with words, and
    whose file (a published one) has none, get those of `vocabulary`. Main process only. Raises OSError: a
    full disk.
    """
    with explained("what the run does not train", folder, "The same command continues"):
        if prepared.base.drawn:
            save_base(prepared.base, prepared.module.backbone, folder / BACKBONE_FILE)
        for task, head in prepared.heads.items():
            extra = dict(head.info.extra)
            if vocabulary is not None and TASKS[task].uses_vocabulary:
                extra.setdefault("vocabulary", vocabulary.to_dict())
            save_head(head_file(folder, task), replace(head.info, extra=extra), _read(head.tensors))


def save_base(base: BaseWeights, backbone: Backbone, path: Path, trained: Tensors | None = None) -> None:
    """Write a backbone whole: as a run starts with it, or in fp32 with what trained of it; one tensor at a
    time.
    """
    header = {MODEL: json.dumps(model_of(backbone))}
    tensors: dict[str, Lazy] = {}
    if trained is None:
        for name, parameter in base.parameters.items():
            tensors[name] = Lazy(tuple(parameter.shape), parameter.dtype, partial(base.read, name))
    else:
        header[BASE] = base.identity
        tensors |= {name: derived(Tensor.float, base.weights[name]) for name in base.parameters}
        tensors |= trained
    stored = backbone.state_dict().keys()
    tensors |= {name: Lazy.of(value) for name, value in base.buffers.items() if name in stored}
    write_safetensors(path, tensors, header)


@torch.no_grad()
def install_checkpoint(backbone: Backbone, folder: Path) -> tuple[Checkpoint, dict[str, Tensor]]:
    """Put what a checkpoint has of the backbone into one with the base weights; returns it, too."""
    folder = folder.resolve()
    checkpoint = open_checkpoint(folder)
    lora = recorded_config(folder_of_run(folder)).visft.lora
    tensors = _read(checkpoint.weights().under("backbone."))
    if not tensors:
        raise ValueError(f"{folder}: the run trains no part of its backbone")
    if lora is not None:
        inject_lora(backbone, **lora.model_dump())
    for name, value in tensors.items():
        backbone.get_parameter(name).copy_(value)
    return checkpoint, tensors


def describe_heads(
    backbone: Backbone, tasks: Mapping[str, TaskConfig], facts: Mapping[str, Any], data: RunData
) -> dict[str, HeadInfo]:
    """Description of each head of a run, by which its file alone is enough to build it again.

    Args:
        facts: "step", "mode", and "base_weights" they were trained on, as stage 2 compares it.
        data: categories, and the words that go along with heads that work with words.
    """
    infos = {}
    for name, task in tasks.items():
        options = task.head.model_dump(mode="json")
        categories = []
        if task.has_classes:
            categories = [asdict(category) for category in categories_for(task.labels, data.categories)]
        extra = dict(facts)
        if backbone.layers_read:
            extra["layers"] = list(backbone.layers_read)
        if backbone.bands is not None:
            extra["bands"] = backbone.bands.model_dump(mode="json")
        if TASKS[name].uses_vocabulary:
            assert data.vocabulary is not None
            options["vocabulary_size"] = data.vocabulary.size
            extra["vocabulary"] = data.vocabulary.to_dict()
        infos[name] = HeadInfo(name, backbone.shapes, options, categories, extra)
    return infos


def _read(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor.read() for name, tensor in tensors.items()}

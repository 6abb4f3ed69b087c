"""Export of a run: heads, adapters and base weights in files that other programs read, in <run>/export.

It holds `<task>.safetensors` for every head, the adapter of stage 2 (also for PEFT), base weights that were drawn, and
a copy of the run's record, which is written last: with the base weights at hand it is a whole model. A backbone that
trained itself is written whole, beside its base; no process holds more than one tensor of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds.config.preflight import EXPORT_RECORD_FILE
from visft_ds.config.schema import LoraConfig
from visft_ds.config.task_schema import TaskConfig
from visft_ds.data.shards import Category
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.card import README, card
from visft_ds.interop.heads import HeadInfo, head_file, save_head
from visft_ds.interop.layouts import BASE, MODEL, fingerprint_of, is_lora, model_of
from visft_ds.interop.weights import Lazy, file_order, write_safetensors, write_text
from visft_ds.models import Backbone
from visft_ds.models.timm_backbone import TimmBackbone
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.state import gather_parameters, trainable
from visft_ds.prepare.materialize import BaseWeights
from visft_ds.prepare.model import PreparedModel
from visft_ds.run.folder import ADAPTER_FOLDER, BACKBONE_FILE, TRAINED_BACKBONE_FILE
from visft_ds.tasks import TASKS
from visft_ds.tasks.vocabulary import Vocabulary


def export_weights(
    engine: Engine,
    folder: Path,
    prepared: PreparedModel,
    *,
    lora: LoraConfig | None,
    infos: Mapping[str, HeadInfo],
    repository: str | None = None,
) -> list[Path]:
    """Write everything that trained. Collective; returns the paths on the main process.

    Args:
        prepared: has the values of what is frozen, which the engine holds in the precision of the run alone.
        lora: settings of the adapters, where the backbone has some.
        infos: descriptions of the heads that train, see `describe_heads`.
        repository: of the base weights on the hub, where it is known.
    """
    written, base = list[Path](), prepared.base
    backbone, names, identity = engine.module.backbone, trainable(engine), base.identity
    own = [f"backbone.{name}" for name in base.parameters if f"backbone.{name}" in names]
    if own:
        written.append(folder / TRAINED_BACKBONE_FILE)
        _export_tower(engine, list(base.parameters), written[0], base)
    # Heads and adapters: small.
    trained = gather_parameters(engine, tuple(name for name in names if name not in own))
    if not distributed.is_main():
        return []
    for task in infos:
        given = prepared.heads[task].tensors if task in prepared.heads else {}  # a group may train a part of a head
        head = {**_read(given), **_below(trained, f"heads.{task}.")}
        written.append(save_head(head_file(folder, task), infos[task], head))
    if lora is not None and (tensors := {n: v for n, v in _below(trained, "backbone.").items() if is_lora(n)}):
        if own:  # the adapter belongs to that one
            identity, repository = fingerprint_of(backbone, written[0]), None
        adapter, place = Adapter.of(backbone, lora, tensors, identity), folder / ADAPTER_FOLDER
        adapter.save(place, repository)
        write_text(place / README, card("LoRA adapter", "peft", backbone, adapter, base=repository))
        written.append(place)
    return written


def begin_export(folder: Path, prepared: PreparedModel, vocabulary: Vocabulary | None) -> None:
    """Write what a run does not train and no other folder is sure to have: drawn base weights, heads of stage 1.

    Without its record, which is written last, the folder is no export yet. Main process only.

    Args:
        vocabulary: for heads that work with words and whose file (a published one) has none.
    """
    (folder / EXPORT_RECORD_FILE).unlink(missing_ok=True)
    if prepared.base.drawn:
        save_base(prepared.base, prepared.module.backbone, folder / BACKBONE_FILE)
    for task, head in prepared.heads.items():
        extra = dict(head.info.extra)
        if vocabulary is not None and TASKS[task].uses_vocabulary:
            extra.setdefault("vocabulary", vocabulary.to_dict())
        save_head(head_file(folder, task), replace(head.info, extra=extra), _read(head.tensors))


def save_base(base: BaseWeights, backbone: Backbone, path: Path) -> None:
    """Write base weights of a backbone as a run starts with them, reading or drawing one tensor at a time once more.

    So they need not be gathered from whoever holds them.
    """
    stored = backbone.stored_buffers().keys() if isinstance(backbone, TimmBackbone) else ()
    more = {name: Lazy.of(value) for name, value in base.buffers().items() if name in stored}
    tensors = {n: Lazy(tuple(p.shape), p.dtype, partial(base.read, n)) for n, p in base.parameters.items()}
    write_safetensors(path, tensors | more, {MODEL: json.dumps(model_of(backbone))})


def _export_tower(engine: Engine, names: Sequence[str], path: Path, base: BaseWeights) -> None:
    """Gather what trained of a backbone, and write it whole, one tensor at a time. Collective; the main process writes.

    Args:
        names: of all of its parameters.
    """
    backbone, trained = engine.module.backbone, trainable(engine)

    def gather(name: str) -> Tensor:
        qualified = f"backbone.{name}"
        if qualified not in trained:
            return base.weights.tensor(name, torch.float32)
        return gather_parameters(engine, (qualified,))[qualified]

    tensors = {n: Lazy(tuple(base.parameters[n].shape), torch.float32, partial(gather, n)) for n in names}
    if not distributed.is_main():
        for name in file_order({n: one for n, one in tensors.items() if f"backbone.{n}" in trained}):
            gather_parameters(engine, (f"backbone.{name}",))  # which gives the main process alone the values
        return
    # Statistics of batch norms are the same on every process, and as they were.
    buffers = backbone.stored_buffers() if isinstance(backbone, TimmBackbone) else {}
    stored = {name: Lazy.of(value.cpu()) for name, value in buffers.items()}
    write_safetensors(path, {**tensors, **stored}, {MODEL: json.dumps(model_of(backbone)), BASE: base.identity})


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
    extra = {**facts, **({"layers": list(backbone.layers_read)} if backbone.layers_read else {})}
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


def _read(tensors: Mapping[str, Lazy]) -> dict[str, Tensor]:
    return {name: one.read() for name, one in tensors.items()}


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}

"""Start of a run from another one or from an adapter (`visft.init_from`): what it is, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from visft_ds import distributed
from visft_ds.checkpoint.format import Checkpoint, newest_checkpoint, open_checkpoint
from visft_ds.config.record import recorded_config
from visft_ds.config.schema import LoraConfig, VisftConfig
from visft_ds.data.loader import StepLoader
from visft_ds.interop.heads import check_heads, open_head
from visft_ds.interop.layouts import describe_model, model_of
from visft_ds.interop.weights import Lazy, Weights, examples, open_weights
from visft_ds.models import build_empty
from visft_ds.models.lora import slices_of
from visft_ds.parallel.engine import Engine
from visft_ds.prepare.data import RunData
from visft_ds.prepare.datasets import classes_of_run
from visft_ds.prepare.materialize import Start
from visft_ds.prepare.model import PreparedModel
from visft_ds.run.folder import EarlierStarts
from visft_ds.run_files import CHECKPOINTS, PARAMETERS_FILE, run_of
from visft_ds.settings.task_schema import Stream
from visft_ds.tasks.channels import Channels, measure_channels

_MEASURED = 64  #: images


def open_start(config: VisftConfig, data: RunData, earlier: EarlierStarts) -> Start | None:
    """The values that a run of `visft.init_from` begins with; None for any other, and for a resumed one.

    Raises:
        ValueError: nothing to start from; a run of other categories, words or adapters.
    """
    if config.init_from is None:
        return None
    path = Path(config.init_from.path)
    out = Path(config.run.out or "")
    run = run_of(path)
    if run is not None and run.resolve() == out.resolve():
        raise ValueError(
            f"--out {out} is the run to start from: name another folder, or resume it without --from"
        )
    if earlier.steps:
        return None
    if run is None:
        return _start_from_adapter(config, path)
    if run != path:
        return _start_from_run(config, data, run, open_checkpoint(path))
    checkpoint, skipped = newest_checkpoint(run / CHECKPOINTS)
    if checkpoint is None:
        raise ValueError(
            f"visft.init_from: {run} has no whole checkpoint to start from ({examples(skipped)}); for its "
            f"adapter alone give {run}/export/adapter"
        )
    return _start_from_run(config, data, run, checkpoint)


def measure_heads(
    engine: Engine,
    prepared: PreparedModel,
    loader: StepLoader,
    streams: Mapping[str, Stream],
    start: Start | None,
) -> None:
    """Let new heads measure the channels that they read, on the first images of the plan. Collective."""
    if not any(isinstance(module, Channels) for module in prepared.module.heads.modules()):
        return
    known = set(prepared.heads)
    if start is not None:
        known |= _tasks_of_heads(start.tensors)

    def agree(value: Any) -> Any:
        return distributed.by_main_process(lambda: value)

    for stream in streams.values():
        drawn = [engine.module.heads[task] for task in stream.tasks if task not in known]
        measure_channels(drawn, engine.predict, loader.first_images(stream.name, _MEASURED), agree)


def _tasks_of_heads(names: Iterable[str]) -> set[str]:
    """Tasks whose heads these qualified names of parameters are of."""
    return {name.split(".")[1] for name in names if name.startswith("heads.")}


def _start_from_adapter(config: VisftConfig, path: Path) -> Start:
    if config.stage == 1 or config.lora is None:
        raise ValueError(
            f"visft.init_from: {path} is no run and no checkpoint, and an adapter is given to stage 2"
        )
    from visft_ds.interop.published import read_adapter  # a run from an adapter is rare

    backbone = build_empty(config.model.preset, torch.float32, config.model.backbone_options())
    adapter = read_adapter(path).on(backbone)
    assert adapter.model is not None
    if adapter.model != model_of(backbone):
        raise ValueError(
            f"visft.init_from: the adapter in {path} is for {describe_model(adapter.model)}, not for this "
            "model"
        )
    targets = adapter.targets
    if slices_of(backbone, config.lora.targets) == adapter.slices:
        targets = config.lora.targets  # the same layers by other words
    if not targets:
        raise ValueError(
            f"visft.init_from: {path} adapts rows of some blocks alone, which no visft.lora.targets do: "
            "merge it into the base weights, and start from these"
        )
    there = LoraConfig(rank=adapter.rank, alpha=adapter.alpha, targets=targets)
    _check_lora(path, there, config.lora)
    tensors = {f"backbone.{name}": Lazy.of(value) for name, value in adapter.tensors.items()}
    return Start(
        path=path,
        sha256=adapter.fingerprint(),
        tensors=Weights(tensors, path),
        base=adapter.base,
        note=f"started from the adapter in {path} ({adapter.describe()})",
    )


def _start_from_run(config: VisftConfig, data: RunData, run: Path, checkpoint: Checkpoint) -> Start:
    assert config.init_from is not None
    path = checkpoint.path / PARAMETERS_FILE
    values = open_weights(path)
    heads = _tasks_of_heads(values)
    if config.init_from.heads == "reset" and not heads:
        raise ValueError(
            f"visft.init_from.heads=reset: {run} trains no heads: start a stage 1 from the run that trained "
            "them"
        )
    is_kept = config.init_from.heads == "keep"
    continued = [task for task in config.tasks.enabled() if is_kept and task in heads]
    infos = {task: open_head(path, task).info for task in continued}
    try:
        check_heads(infos, classes_of_run(config, data.categories), data.categories, data.vocabulary)
    except ValueError as error:
        raise ValueError(
            f"visft.init_from: {error}; --reset-heads initialises the heads of {run} anew"
        ) from error
    if any(name.startswith("backbone.") for name in values):
        _check_lora(run, recorded_config(run).visft.lora, config.lora)
    beginnings = ("backbone.", *(f"heads.{task}." for task in continued))
    tensors = {name: value for name, value in values.items() if name.startswith(beginnings)}
    return Start(
        path=checkpoint.path,
        sha256=checkpoint.record["files"][PARAMETERS_FILE],
        tensors=Weights(tensors, path),
        base=checkpoint.record["identity"]["base weights"],
        note=f"started from step {checkpoint.step} of {run}; heads kept: {', '.join(continued) or 'none'}",
        step=checkpoint.step,
    )


def _check_lora(path: Path, there: LoraConfig | None, here: LoraConfig | None) -> None:
    """Refuse other settings of adapters; the order of targets does not matter."""

    def settings(lora: LoraConfig | None) -> dict[str, Any]:
        return {} if lora is None else {**lora.model_dump(), "targets": sorted(lora.targets)}

    if settings(there) != settings(here):
        value = "null" if there is None else there.model_dump_json()
        raise ValueError(
            f"visft.init_from: the adapter in {path} has other settings: --set 'visft.lora={value}'"
        )

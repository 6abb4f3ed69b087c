"""Origin of NaN and infinity: outputs of modules in a step, and the gradients that flow back into them.

`visft replay` repeats a step in one process, from the checkpoint of the state before it: samples, keys and random
numbers are a function of (seed, step), so the configuration of the run and its data give them again.

Shape letters: B images of a micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.checkpoint.format import Checkpoint, checkpoint_path, open_checkpoint, saved_steps
from visft_ds.config import ResolvedConfig, derive_batches
from visft_ds.data.dataset import DataSet
from visft_ds.data.loader import BatchMaker
from visft_ds.data.samples import Batch
from visft_ds.data.shards import ShardReader
from visft_ds.model import LossDenominators, MultiTaskModel, counts_of, loss_denominators_of
from visft_ds.monitor.metrics import METRICS_FILE, read_metrics
from visft_ds.ops import use_kernels
from visft_ds.ops.numerics import use_numerics
from visft_ds.parallel.engine import step_seed
from visft_ds.prepare.data import features_of
from visft_ds.prepare.datasets import captioned, data_identity, first_of, open_training_data
from visft_ds.prepare.model import heads_identity, prepare_model
from visft_ds.prepare.places import DATA, HEADS, WEIGHTS, located, with_paths
from visft_ds.prepare.streams import pipelines_of, plan_of, vocabulary_of
from visft_ds.run.folder import REFUSED_FOLDER, read_run, recorded_config

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Note = Callable[[str, Tensor], None]  #: called with the name of a tensor, and the tensor


@dataclass(frozen=True)
class NonFinite:
    """A tensor with numbers that are none."""

    what: str  #: e.g. "output of heads.detection.decoder.layers.0"
    count: int  #: how many
    of: int
    images: tuple[int, ...] = ()  #: ids of the images whose rows they are in; empty where the rows are not images

    def text(self) -> str:
        """Finding as a line of text."""
        where = f", images {', '.join(map(str, self.images))}" if self.images else ""
        return f"{self.what}: {self.count} of {self.of} values are not finite{where}"


def examine_batch(
    module: MultiTaskModel, batch: Batch, loss_denominators: LossDenominators, autocast: str, scale: float = 1.0
) -> list[NonFinite]:
    """Forward and backward of a micro-batch. What is not finite, in the order in which it came to be.

    Parameters and targets come first, then outputs of modules, losses, and gradients from the loss down.

    Args:
        scale: what the loss is multiplied by before it goes backward.
    """
    found: list[NonFinite] = []

    def note(what: str, tensor: Tensor) -> None:
        if (fault := not_finite(what, tensor, batch)) is not None:
            found.append(fault)

    for name, parameter in module.named_parameters():
        note(f"parameter {name}", parameter)
    for task, targets in batch.targets.items():
        for tensor in tensors_of(targets):
            note(f"targets of {task}", tensor)
    module.faults = []
    device = batch.images.device.type
    with watched(module, note):
        with torch.autocast(device, _AUTOCAST.get(autocast, torch.bfloat16), enabled=autocast in _AUTOCAST):
            losses = module(batch, loss_denominators)
        found += [NonFinite(f"criterion: {text}", 1, 1) for text in module.faults]
        for name, value in losses.items():
            note(f"loss {name}", value)
        if losses["loss"].requires_grad:
            (losses["loss"] * scale).backward()
    return found


def not_finite(what: str, tensor: Tensor, batch: Batch | None = None) -> NonFinite | None:
    """Description of the non-finite values of a tensor, None if there are none.

    Args:
        batch: tells rows from images.
    """
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return None
    bad = ~tensor.detach().isfinite()
    images: tuple[int, ...] = ()
    if batch is not None and tensor.ndim > 1 and tensor.shape[0] == len(batch.image_ids):
        images = tuple(batch.image_ids[bad.flatten(1).any(1).cpu()].tolist())
    return NonFinite(what, int(bad.sum()), bad.numel(), images)


@contextlib.contextmanager
def watched(module: nn.Module, note: Note) -> Iterator[None]:
    """Let `note` see outputs of modules, their gradients and those of parameters, as they come to be."""
    hooks: list[Any] = [
        child.register_forward_hook(_hook(name, note))
        for name, child in module.named_modules()
        if name and not isinstance(child, nn.ModuleList | nn.ModuleDict)
    ]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(_gradient_hook(f"parameter {name}", note)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in a module's output, or in targets."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for item in value.values() for tensor in tensors_of(item))
    elif isinstance(value, tuple | list):
        yield from (tensor for item in value for tensor in tensors_of(item))
    elif is_dataclass(value):
        yield from (tensor for entry in fields(value) for tensor in tensors_of(getattr(value, entry.name)))


def _gradient_hook(what: str, note: Note) -> Callable[[Tensor], None]:
    return lambda gradient: note(f"gradient of {what}", gradient)


def _hook(name: str, note: Note) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tensors_of(output):
            note(f"output of {name}", tensor)
            if tensor.requires_grad:
                tensor.register_hook(_gradient_hook(f"the output of {name}", note))

    return hook


def open_state(run: Path, step: int | None, total_steps: int) -> Checkpoint:
    """The checkpoint of the state that a step (it counts from 1, as in messages) began with.

    Raises:
        ValueError: there is none, or a damaged one; says which steps can be replayed.
    """
    folders = {
        saved + 1: folder
        for folder in (run / "checkpoints", run / REFUSED_FOLDER)
        for saved in saved_steps(folder)
        if saved < total_steps
    }
    if step in folders:
        return open_checkpoint(checkpoint_path(folders[step], step - 1))
    known = ", ".join(map(str, sorted(folders))) or "none, nothing was saved"
    problem = "--step N is missing" if step is None else f"--step {step}: the state before that step was not kept"
    raise ValueError(f"{run}: {problem}; steps that can be replayed: {known}")


def replay(run: Path, step: int | None, settings: Sequence[str], limit: int) -> int:
    """Repeat a step of a run, part after part as its ranks had them, and print what is found.

    Returns 1 where something is not finite, 0 otherwise.

    Raises:
        ValueError: no run, no checkpoint, or a model or data that are not those of the run.
    """
    config = _with_settings(recorded_config(run), run, settings)
    checkpoint = open_state(run, step, config.total_steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world_size = read_run(run).world_size  # when it was started last
    parts, module, denominators = _build(config, checkpoint, world_size, device)
    events = [
        record.get("details", "")
        for record in (read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else ())
        if record.get("event") in ("bad step", "loss scale") and record["step"] == checkpoint.step + 1
    ]
    print("\n".join(f"in the run: {text}" for text in events) or "in the run: nothing is recorded against it")
    precision = checkpoint.identity("precision")
    scale = checkpoint.record["loss_scale"].get("scale", 1.0)
    module.train()
    bad = False
    for rank, batches in parts.items():
        torch.manual_seed(step_seed(config.visft.seed, checkpoint.step, rank))
        for number, batch in enumerate(batches):
            name = f"rank {rank}, micro-batch {number} (images {batch.image_ids.tolist()})"
            module.zero_grad(set_to_none=True)
            found = examine_batch(module, batch.to(device), denominators, precision, scale / len(batches))
            if not found:
                print(f"{name}: everything is finite")
                continue
            bad = True
            print(f"{name}: it begins with the {found[0].text()}")
            for later in found[1:limit]:
                print(f"    then {later.text()}")
            if len(found) > limit:
                print(f"    and {len(found) - limit} more (--limit)")
    if not bad:
        doubt = " again: another kind of device here, or faulty hardware there?" if events else ""
        print(f"nothing that is not finite came up{doubt}")
    return int(bad)


def _build(
    config: ResolvedConfig, checkpoint: Checkpoint, world_size: int, device: torch.device
) -> tuple[dict[int, list[Batch]], MultiTaskModel, LossDenominators]:
    """The micro-batches of the step after a checkpoint by rank, and the model as it was then."""
    settings, recorded = config.visft, checkpoint.record["identity"]
    sets = open_training_data(settings)
    plan, vocabulary = plan_of(settings, sets), vocabulary_of(settings, *captioned(sets))
    found = {"data set": data_identity(sets), "order of samples": plan.describe(), "heads": heads_identity(settings)}
    _check_same({**found, "vocabulary": vocabulary.fingerprint if vocabulary else "none"}, recorded)
    use_kernels(settings.model.kernels, device)
    use_numerics(device, tf32=settings.model.tf32)
    prepared = prepare_model(
        settings,
        config.optimizer.params,
        precision=recorded["precision"],
        heads_from=Path(settings.heads.path) if settings.heads.path else None,
        categories=first_of(sets).categories,
        vocabulary=vocabulary,
    )
    _check_same({"base weights": prepared.base_weights}, recorded)
    module = prepared.module
    module.feature_cache = features_of(settings, sets, prepared.base_weights, recorded["precision"], device.type)
    values = checkpoint.parameters()
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if {name: value.shape for name, value in values.items()} != {name: p.shape for name, p in trained.items()}:
        raise ValueError(f"{checkpoint.path}: its tensors are not those that this configuration trains")
    for name, parameter in trained.items():
        parameter.data.copy_(values[name])
    maker = BatchMaker(
        {name: DataSet(ShardReader(of_set.manifest), of_set.categories) for name, of_set in sets.items()},
        pipelines_of(settings, sets, vocabulary),
        features=module.feature_cache,
    )
    batches, step_plan = derive_batches(config, world_size), plan.step(checkpoint.step)
    print(
        f"step {checkpoint.step + 1} ({step_plan.task}) of {step_plan.dataset}, epoch {step_plan.epoch}, "
        f"from {checkpoint.path}"
    )
    split = [plan.split(step_plan, place, batches.dp, batches.accumulation) for place in range(batches.dp)]
    # Of a pipeline the last stage, which has the losses: its random numbers, and the name that messages give it.
    first = batches.dp * (batches.stages - 1)
    parts = {rank: [maker(part) for part in of_rank] for rank, of_rank in enumerate(split, first)}
    counts = counts_of(module, [batch for of_rank in parts.values() for batch in of_rank])
    return parts, module.to(device), loss_denominators_of(counts, batches.micro_batches, device)


def _check_same(found: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    """Refuse data and weights that are not those of the run."""
    other = [
        f"  {name}: {found[name]}, the run had {recorded[name]}" for name in found if recorded[name] != found[name]
    ]
    if other:
        raise ValueError(
            "not what the run has worked with:\n" + "\n".join(other) + "\nsay where that lies: --set "
            "visft.data.root=DIR, visft.model.weights=FILE, visft.heads.path=DIR"
        )


def _with_settings(config: ResolvedConfig, run: Path, settings: Sequence[str]) -> ResolvedConfig:
    """The configuration of a run with its files where they lie now, or where settings say that they do."""
    given = {}
    for text in settings:
        key, found, value = text.partition("=")
        if not found or key not in (DATA, WEIGHTS, HEADS):
            raise ValueError(f"--set {text}: only where files lie can be set: {DATA}, {WEIGHTS}, {HEADS}")
        given[key] = value
    return located(with_paths(config, given), run, given)

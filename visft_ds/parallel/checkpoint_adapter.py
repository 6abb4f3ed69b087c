"""The adapter of a run that has not written its export yet, out of one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from visft_ds.interop.adapters import LoraAdapter, canonical_targets
from visft_ds.interop.files import examples, sha256_file
from visft_ds.interop.layouts import is_lora
from visft_ds.parallel.checkpoint import newest_checkpoint, open_checkpoint
from visft_ds.run_folder import BACKBONE_FILE, recorded_config


def adapter_of_checkpoint(folder: Path) -> LoraAdapter:
    """The adapter in `<run>/checkpoints/step_N`, whose files are checked; its settings come from the run's record.

    Raises ValueError for a damaged checkpoint, and for one of a run that has no adapter or trains its backbone as well.
    """
    folder = folder.resolve()
    checkpoint, run = open_checkpoint(folder), folder.parents[1]
    config = recorded_config(run)
    lora = config.visft.lora
    tensors = {
        name.removeprefix("backbone."): value
        for name, value in checkpoint.parameters().items()
        if name.startswith("backbone.")
    }
    adapter = {name: value.float() for name, value in tensors.items() if is_lora(name)}
    if lora is None or not adapter:
        raise ValueError(f"{folder} holds no adapter: the run trains without LoRA (stage {config.visft.stage})")
    if others := [name for name in tensors if name not in adapter]:
        raise ValueError(
            f"{folder}: the run trains its backbone itself as well ({examples(others)}), so that the adapter belongs "
            f"to weights that only its export has: let the run finish and give {run.name}/export/adapter"
        )
    random_base = run / "export" / BACKBONE_FILE
    if config.visft.model.weights is not None:
        base: str | None = checkpoint.record["identity"]["base weights"]
    else:
        base = sha256_file(random_base) if random_base.is_file() else None
    targets, storage = canonical_targets(lora.targets), config.visft.model.base
    return LoraAdapter(lora.rank, lora.alpha, targets, adapter, "checkpoint", base, base_storage=storage)


def newest_adapter_folder(run: Path) -> Path:
    """The newest whole checkpoint of a run. Raises ValueError where there is none."""
    checkpoint, skipped = newest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{run} has no whole checkpoint and no export yet: {examples(skipped)}")
    return checkpoint.path

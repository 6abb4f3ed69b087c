"""Change of a run's backbone read from a checkpoint, for runs that have not written their export yet."""

from __future__ import annotations

from pathlib import Path

import torch

from visft_ds.checkpoint.format import newest_checkpoint, open_checkpoint
from visft_ds.interop.adapter import adapter_of_run
from visft_ds.interop.files import examples, sha256_file
from visft_ds.interop.layouts import is_lora, tower_metadata
from visft_ds.interop.tuned import Change, tuned_of
from visft_ds.models import build_empty
from visft_ds.run.folder import BACKBONE_FILE, recorded_config


def change_of_checkpoint(folder: Path) -> Change:
    """The adapter, or the backbone's own parameters, in `<run>/checkpoints/step_N`, whose files are checked; settings
    come from the run's record.

    Raises ValueError for a damaged checkpoint, and for one of a run that trains only heads, or its backbone beside an
    adapter.
    """
    folder = folder.resolve()
    checkpoint, run = open_checkpoint(folder), folder.parents[1]
    config = recorded_config(run)
    lora = config.visft.lora
    tensors = {
        name.removeprefix("backbone."): value.float()
        for name, value in checkpoint.parameters().items()
        if name.startswith("backbone.")
    }
    if not tensors:
        raise ValueError(f"{folder}: the run trains nothing of its backbone (stage {config.visft.stage})")
    random_base = run / "export" / BACKBONE_FILE
    if config.visft.model.weights is not None:
        base: str | None = checkpoint.identity("base weights")
    else:
        base = sha256_file(random_base) if random_base.is_file() else None
    model = config.visft.model
    empty = build_empty(model.preset, torch.float32, model.backbone_options())
    if lora is None:
        return tuned_of(tensors, folder, base, tower_metadata(empty))
    if others := [name for name in tensors if not is_lora(name)]:
        raise ValueError(
            f"{folder}: the run trains its backbone itself as well ({examples(others)}), so that the adapter belongs "
            f"to weights that only its export has: let the run finish and give {run.name}/export/adapter"
        )
    return adapter_of_run(lora, tensors, empty, base)


def newest_checkpoint_folder(run: Path) -> Path:
    """The newest complete checkpoint of a run. Raises ValueError where there is none."""
    checkpoint, skipped = newest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{run} has no whole checkpoint and no export yet: {examples(skipped)}")
    return checkpoint.path

"""`visft vlm`: the tower that a run trained inside a vision-language model of transformers."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from pathlib import Path

import torch

from visft_ds.config.record import recorded_config
from visft_ds.interop import export, layouts
from visft_ds.interop.vlm import Vlm, open_vlm
from visft_ds.interop.weights import Weights
from visft_ds.merge.command import Base, open_parts
from visft_ds.models import Backbone
from visft_ds.pretrained import local
from visft_ds.run_files import check_new
from visft_ds.settings.bands import in_words


def put_into_vlm(flags: Namespace) -> None:
    """Put the tower of a run into the model in a folder, as the flags of `visft vlm` say.

    Raises ValueError for a tower that does not fit, and for a model whose own tower is not the run's base.
    """
    if flags.out is not None:
        check_new(flags.out)
    vlm = open_vlm(flags.model)
    print(f"vlm      {flags.model}: {vlm.describe()}")
    adapter, base = open_parts(flags)
    if base.backbone.bands is not None:
        raise ValueError(f"the tower reads {in_words(base.backbone.bands)}, and such models read photographs")
    whole = layouts.built(layouts.as_far_as(base.file, base.model), "meta")
    tower = layouts.tower_in(base.file, whole)
    began_with = vlm.names(tower if adapter is not None else _recorded_base(base), whole)
    print(f"tower    of the model: the base, up to {vlm.check_base(began_with):.2g}")
    merged = export.merge(tower, adapter, torch.float32, layouts.base_parameters(whole), export.Share())
    tensors = vlm.names(merged, whole)
    vlm.put(tensors)
    print(f"swapped  {len(tensors)} tensors")
    _warn_of_blocks(vlm, base.backbone)
    if flags.out is not None:
        _write(vlm, flags.model, flags.out)
        print(f"out      {flags.out}")


def _recorded_base(base: Base) -> Weights:
    """The weights that a run began with which trained its backbone itself."""
    weights = None if base.run is None else recorded_config(base.run).visft.model.weights
    if weights is None:
        raise ValueError(f"{base.path}: nobody recorded which weights its training began with")
    return layouts.tower_in(layouts.open_model(local(weights)), base.backbone)


def _warn_of_blocks(vlm: Vlm, backbone: Backbone) -> None:
    """Say where heads read another block in training than the model does."""
    read = max(backbone.layers_read, default=len(backbone.ends()) - 1)
    if read == vlm.block:
        return
    text = f"training read block {read}, this model reads block {vlm.block}"
    if read > vlm.block:
        text += f"; what blocks behind {vlm.block} learnt is lost"
    how = f"train with --set 'visft.model.out_indices=[{vlm.block}]'"
    print(f"warning: {text}; {how}", file=sys.stderr)


def _write(vlm: Vlm, source: Path, out: Path) -> None:
    """Write the model into a new folder, with tokenizer and image processor as they are."""
    vlm.model.save_pretrained(out)
    for path in source.iterdir():
        is_weights = path.suffix in (".safetensors", ".bin", ".pt") or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)

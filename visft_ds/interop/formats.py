"""Formats of merged weights: names, file, and the files beside it that let a library load the folder alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visft_ds.interop import eva_clip, lavis, open_clip
from visft_ds.interop import timm_names as timm
from visft_ds.interop.files import Entry, WeightFile, examples
from visft_ds.interop.layouts import Layout, Tower
from visft_ds.models.timm_backbone import TimmBackbone

#: What timm knows of pretrained weights that holds for trained ones too; the latter where positions keep their size.
_SIZES = ("test_input_size", "min_input_size", "test_crop_pct", "pool_size")
_SETTINGS = (
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("first_conv", "classifier"),
    *_SIZES,
)


@dataclass(frozen=True)
class Format:
    """A form of full weights. `file` is its name inside a folder; `pre_norm_only`: the library knows pre-norm towers
    alone, and needs the class token."""

    entries: Callable[[WeightFile, Layout], dict[str, Entry]]
    library: str
    file: str = "model.safetensors"
    suffixes: tuple[str, ...] = (".safetensors",)
    pre_norm_only: bool = False


FORMATS: dict[str, Format] = {
    "timm": Format(timm.export_entries, "timm"),
    # EVA-CLIP's own code reads by torch.load only.
    "eva_clip": Format(eva_clip.export_entries, "EVA-CLIP", "eva_clip.pt", (".safetensors", ".pt")),
    "open_clip": Format(open_clip.export_entries, "open_clip", open_clip.FILE),
    "lavis": Format(timm.export_entries, "LAVIS", lavis.FILE, (".pth",), pre_norm_only=True),
}


def check_format(name: str, out: Path, tower: Tower) -> None:
    """Raise ValueError where a tower cannot be written in a format, or not under that name."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; allowed: {', '.join(FORMATS)}")
    form = FORMATS[name]
    if out.suffix not in form.suffixes:
        allowed = " or ".join(form.suffixes)
        raise ValueError(f"{out}: weights for {form.library} are written as {allowed} only; choose such a name")
    if not form.pre_norm_only:
        return
    if tower.post_norm is None:
        raise ValueError(f"{form.library} knows pre-norm towers only, and the file does not tell where its norms are")
    if tower.post_norm:
        raise ValueError(
            f"{form.library} has the pre-norm tower of EVA-CLIP-g only; this one ({tower.describe()}) norms the "
            f"branches: write it as timm, open_clip or eva_clip"
        )
    if not tower.class_token:
        raise ValueError(
            f"the base has no class token, which {form.library} needs (it would be random): give the published base "
            f"file, which has one"
        )


def side_files(
    name: str, weights: WeightFile, tower: Tower, dtype: torch.dtype, folder: Path
) -> dict[str, dict[str, Any]]:
    """File -> content (JSON) by which the library loads `folder` alone; empty where it cannot (tower)."""
    content: dict[str, Any] | None = None
    if name == "timm" and tower.num_heads is not None:
        content = timm.settings(tower, weights.shape("head.weight")[0] if "head.weight" in weights else 0)
    elif name == "open_clip":
        return open_clip.settings(weights, tower, folder)
    return {} if content is None else {"config.json": content}


def config_of(backbone: TimmBackbone, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Any] | None, list[str]]:
    """(config.json, by which `timm.create_model("local-dir:FOLDER", pretrained=True)` builds and loads these tensors;
    notes). None, and why, where they are not all that timm's model has, and no more.
    """
    from timm import create_model

    classes = timm.classes_in(backbone.classifier_names, shapes)
    with torch.device("meta"):
        model = create_model(backbone.name, num_classes=classes, **backbone.options)
    wanted = model.state_dict().keys()
    lacks, more = [key for key in wanted if key not in shapes], [key for key in shapes if key not in wanted]
    if lacks or more:
        facts = [f"lacks {examples(lacks)}"] if lacks else []
        facts += [f"has {examples(more)} beside it"] if more else []
        return None, [f"timm does not load this by itself: of its {backbone.name} the base {' and '.join(facts)}"]
    known = model.pretrained_cfg
    kept = {key: known[key] for key in _SETTINGS if known.get(key) is not None}
    if side := backbone.options.get("img_size"):
        kept = {key: value for key, value in kept.items() if key not in _SIZES} | {"input_size": [3, side, side]}
    return {
        "architecture": known["architecture"],
        "num_classes": classes,
        "num_features": model.num_features,
        "model_args": backbone.options,
        "pretrained_cfg": kept | {"num_classes": classes},
    }, []

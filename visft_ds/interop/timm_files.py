"""Weights of models of timm: files under timm's own names, in and out, every key accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds.interop.backbones import read_tensor
from visft_ds.interop.files import WeightFile, examples, open_weights
from visft_ds.interop.layouts import TIMM_KEY, base_parameters, is_lora
from visft_ds.models.timm_backbone import TimmBackbone, build_timm

#: What timm knows of pretrained weights that holds for trained ones too; the latter where positions keep their size.
_SIZES = ("test_input_size", "min_input_size", "test_crop_pct", "pool_size")
_SETTINGS = (
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("first_conv", "classifier"),
    *_SIZES,
)


@dataclass(frozen=True)
class TimmFile:
    """A weight file that fits a backbone, of which nothing but names and shapes has been read."""

    file: WeightFile
    stored: tuple[str, ...]  #: names of the buffers that belong to the weights
    summary: str  #: one line for the console

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a parameter, see `read_tensor`."""
        return read_tensor(self.file, name, dtype)

    def buffers(self) -> dict[str, Tensor]:
        """Statistics of batch norms, in memory of their own."""
        return {name: self.file.get(name).clone() for name in self.stored}


def open_timm(backbone: TimmBackbone, path: str | Path) -> TimmFile:
    """Open a weight file for a model of timm on any device.

    What lies behind the feature map (classifier, pooling, the norm of a head) is passed over and named.

    Raises ValueError, with every name concerned, for tensors that are missing, unexpected or of another shape; values
    are not looked at.
    """
    file = open_weights(path)
    parameters, buffers = base_parameters(backbone), backbone.stored_buffers()
    wanted = {name: tuple(value.shape) for name, value in {**parameters, **buffers}.items()}
    behind = _behind(backbone)
    left_out = [name for name in file if name not in wanted and name.startswith(behind)]
    problems = {
        "Missing": [name for name in wanted if name not in file],
        "Unexpected": [name for name in file if name not in wanted and name not in left_out],
        "Other shape": [
            f"{name} {file.shape(name)} in the file, {shape} wanted"
            for name, shape in wanted.items()
            if name in file and file.shape(name) != shape
        ],
        "Quantised": [
            f"{name} {file.dtype(name)}"
            for name, value in parameters.items()
            if name in file and not file.dtype(name).is_floating_point
        ],
    }
    if any(problems.values()):
        raise ValueError(_complaint(file, backbone, problems))
    count = sum(value.numel() for value in parameters.values())
    summary = f"{file.path.name}: timm {backbone.name}, {len(parameters)} tensors, {count:,} parameters"
    if buffers:
        summary += f", {len(buffers)} statistics"
    if left_out:
        summary += f"; left out {len(left_out)} behind the feature map ({examples(left_out, 3)})"
    return TimmFile(file, tuple(buffers), summary)


def classes_in(classifier: str | Sequence[str] | None, shapes: Mapping[str, Sequence[int]]) -> int:
    """`num_classes` of the model of timm that has these tensors, by the names of its classifiers; 0 without one."""
    return next((shapes[f"{name}.weight"][0] for name in _listed(classifier) if f"{name}.weight" in shapes), 0)


def config_of(backbone: TimmBackbone, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Any] | None, list[str]]:
    """(config.json, by which `timm.create_model("local-dir:FOLDER", pretrained=True)` builds and loads these tensors;
    notes). None, and why, where they are not all that timm's model has, and no more.
    """
    import timm

    classes = classes_in(backbone.classifier_names, shapes)
    with torch.device("meta"):
        model = timm.create_model(backbone.name, num_classes=classes, **backbone.options)
    wanted = model.state_dict().keys()
    lacks, more = [key for key in wanted if key not in shapes], [key for key in shapes if key not in wanted]
    if lacks or more:
        facts = [f"lacks {examples(lacks)}"] * bool(lacks) + [f"has {examples(more)} beside it"] * bool(more)
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


def _listed(classifier: str | Sequence[str] | None) -> list[str]:
    return [classifier] if isinstance(classifier, str) else list(classifier or ())


def _behind(backbone: TimmBackbone) -> tuple[str, ...]:
    """Beginnings of names of what a file may hold beyond the feature map."""
    tops = {name.partition(".")[0] for name in (*_listed(backbone.classifier_names), *backbone.left_out)}
    return tuple(f"{name}." for name in sorted(tops | {"fc_norm"}))


def _complaint(file: WeightFile, backbone: TimmBackbone, problems: Mapping[str, list[str]]) -> str:
    lines = [f"{file.path} does not fit timm's {backbone.name} of images of {backbone.image_size} pixels."]
    lines += [f"{title} ({len(names)}): {examples(names, 12)}." for title, names in problems.items() if names]
    if any(is_lora(name) for name in problems["Unexpected"]):
        lines.append("It holds LoRA tensors beside the model: merge them first (visft merge).")
    elif any(name.startswith("pos_embed") for name in problems["Other shape"]):
        lines.append(
            "Positions of another size: set visft.model.overrides.image_size to the size the file was made for; images "
            "of any size are fed all the same."
        )
    else:
        lines.append("Give weights as timm saves them (model.safetensors of its repositories), of this very model.")
    return "\n".join(lines)


def timm_settings(file: WeightFile) -> tuple[str, int | None] | None:
    """(name, image size where it is not the model's own) of the model that a file of ours says it is of, or None."""
    if TIMM_KEY not in file.metadata:
        return None
    told = json.loads(file.metadata[TIMM_KEY])
    return str(told["name"]), told["image_size"]


def load_timm(path: str | Path, name: str, image_size: int | None, storage: torch.dtype) -> tuple[TimmBackbone, str]:
    """A model of timm with the weights of a file, and what to say of it; matrices in `storage`, the rest in fp32."""
    backbone = build_timm(name, image_size=image_size)
    opened = open_timm(backbone, path)
    for key, parameter in backbone.named_parameters():
        small = parameter.ndim < 2 or key in ("pos_embed", "cls_token", "reg_token")
        parameter.data = opened.read(key, torch.float32 if small else storage)
    backbone.set_buffers(opened.buffers())
    return backbone, opened.summary

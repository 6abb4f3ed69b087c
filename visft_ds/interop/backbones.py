"""Weights of the backbone, in from every known file layout and out again.

Reading is strict: each tensor of the file is loaded, or ignored for a named reason, or the file is refused. Names
and shapes are all checked before the first copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from visft_ds.interop.files import TensorInfo, WeightFile, all_finite, examples, sha256_file
from visft_ds.interop.layouts import LAYOUTS, PROJECTION, Layout, Tower, base_parameters, is_lora, tower_in, tower_of
from visft_ds.interop.towers import open_tower
from visft_ds.interop.writing import write_safetensors
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import lora_layers


@dataclass(frozen=True)
class LoadReport:
    """Report of `load_backbone` on each tensor of a file."""

    path: Path
    layout: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    merged: bool
    mapped: bool  #: False: the file is of a kind that can only be read whole
    ignored: dict[str, tuple[str, ...]] = field(default_factory=dict)
    sha256: str | None = None

    def summary(self) -> str:
        """Summary in one line for the console."""
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
        text = (
            f"{self.path.name}: layout {self.layout}, {self.tensors} tensors, {self.parameters:,} parameters ({kinds})"
        )
        if self.merged:
            text += "; LoRA already merged in"
        if not self.mapped:
            text += "; READ WHOLE by every process (written by torch before 1.6): save it again to save host memory"
        for reason, names in self.ignored.items():
            text += f"; ignored {len(names)} ({reason})"
        return text


def load_backbone(backbone: EvaViT, path: str | Path, *, with_sha256: bool = False) -> LoadReport:
    """Copy the tower of a weight file into the existing parameters, tensor by tensor, cast to their dtype.

    The layout is found by prefix (see `LAYOUTS`). `pos_embed` is copied whole, class entry included. LoRA parameters of
    the backbone stay as they are. `with_sha256` also hashes the file (one more pass over it).

    Raises ValueError, with every name concerned, for tensors that are missing, unexpected or of another shape (and says
    which tower the file holds), for values that are not finite, and for a backbone on the meta device.
    """
    if any(layer.merged for layer in lora_layers(backbone).values()):
        raise ValueError("the backbone has its adapter merged in: call unmerge_lora before loading weights")
    opened = open_backbone(backbone, path)
    copy_tensors(opened.file, opened.sources, base_parameters(backbone))
    return replace(opened.report, sha256=sha256_file(path) if with_sha256 else None)


@dataclass(frozen=True)
class BackboneFile:
    """A weight file that fits a tower, of which nothing but names and shapes has been read."""

    file: WeightFile
    sources: Mapping[str, str]  #: our name -> name in the file
    report: LoadReport

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor by our name, see `read_tensor`."""
        return read_tensor(self.file, self.sources[name], dtype)


def open_backbone(backbone: EvaViT, path: str | Path) -> BackboneFile:
    """Open a weight file for a tower on any device, the meta device too.

    Raises ValueError as `load_backbone` does for names, shapes and quantised weights; values are not looked at.
    """
    file, layout = open_tower(path)
    targets = base_parameters(backbone)
    ignored = check_names(
        file, layout, {name: tuple(value.shape) for name, value in targets.items()}, tower_of(backbone)
    )
    sources = {name: layout.prefix + name for name in targets}
    _check_kinds(file, sources, targets)
    dtypes = Counter(str(file.dtype(source)).removeprefix("torch.") for source in sources.values())
    report = LoadReport(
        path=file.path,
        layout=layout.name,
        tensors=len(targets),
        parameters=sum(value.numel() for value in targets.values()),
        dtypes=dict(dtypes),
        merged=is_merged(file),
        mapped=file.mapped,
        ignored=ignored,
    )
    return BackboneFile(file, sources, report)


def is_merged(file: WeightFile) -> bool:
    """Return True if our own metadata records that an adapter was merged into these weights."""
    return file.metadata.get("lora_merged") == "true"


def check_names(
    file: WeightFile, layout: Layout, wanted: Mapping[str, tuple[int, ...]], tower: Tower
) -> dict[str, tuple[str, ...]]:
    """Account for every name of a file against the tower `wanted` (name without prefix -> shape).

    Returns what is ignored: reason -> names in the file. Raises ValueError listing all that is missing, unexpected or
    of another shape.
    """
    ignored: dict[str, list[str]] = {}
    unexpected: list[str] = []
    shapes: list[str] = []
    for name in file:
        inner = name[len(layout.prefix) :] if name.startswith(layout.prefix) else None
        if inner is not None and inner in wanted:
            if file.shape(name) != wanted[inner]:
                shapes.append(f"{name} {file.shape(name)} in the file, {wanted[inner]} wanted")
            continue
        reason = _reason(inner) or layout.reason_to_ignore(name)
        if reason is None:
            unexpected.append(name)
        else:
            ignored.setdefault(reason, []).append(name)
    missing = [layout.prefix + name for name in wanted if layout.prefix + name not in file]
    if missing or unexpected or shapes:
        raise ValueError(_complaint(file, layout, tower, missing, unexpected, shapes))
    return {reason: tuple(names) for reason, names in ignored.items()}


def _reason(inner: str | None) -> str | None:
    """Why a name inside the tower that the model lacks is no error."""
    if inner == "cls_token":
        return "class token, which the model does not use"
    for reason, names in PROJECTION.items():
        if inner in names:
            return reason
    return None


def _complaint(
    file: WeightFile, layout: Layout, tower: Tower, missing: list[str], unexpected: list[str], shapes: list[str]
) -> str:
    found = tower_in(file, layout)
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
    if any(is_lora(name) for name in unexpected):
        lines.append("It holds LoRA tensors beside the tower: merge them first (visft merge), or split the file.")
    if missing == [layout.prefix + "cls_token"]:
        lines.append("The model was built with class_token=True; the file has no class token.")
    for title, names in (("Missing", missing), ("Unexpected", unexpected), ("Other shape", shapes)):
        if names:
            lines.append(f"{title} ({len(names)}): {examples(names, 12)}.")
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
    result = value.to(dtype, copy=True)
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


def save_backbone(
    backbone: EvaViT,
    path: str | Path,
    layout: str = "timm",
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the tower as safetensors in one of `LAYOUTS`, cast to `dtype` (None: as it is), streaming and atomic.

    The metadata has sizes, number of heads and norm placement, so that our own readers need no hints, and whether
    adapters are merged into the weights. Raises ValueError for an unknown layout, an existing file (unless
    `overwrite`), adapters that are not merged (they would be lost in silence), and a cast that overflows.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as .safetensors only; choose such a name")
    merged = [layer.merged for layer in lora_layers(backbone).values()]
    if not all(merged):
        raise ValueError(
            "the backbone has LoRA adapters, which this file does not hold: save the adapter on its own, or call "
            "merge_lora first (which --base + --adapter in visft merge do without a model)"
        )
    prefix = LAYOUTS[layout].prefix
    parameters = {prefix + name: parameter for name, parameter in base_parameters(backbone).items()}
    infos = {
        name: TensorInfo(tuple(parameter.shape), dtype or parameter.dtype) for name, parameter in parameters.items()
    }
    told = {"tower": tower_of(backbone).to_json(), "lora_merged": "true" if merged else "false", **(metadata or {})}
    write_safetensors(
        path,
        infos,
        lambda name: cast(parameters[name].detach(), infos[name].dtype, name),
        told,
        overwrite=overwrite,
    )


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Cast, and raise ValueError where a finite value overflows."""
    result = tensor.to(dtype)
    changed = dtype != tensor.dtype and result.is_floating_point()
    if changed and not all_finite(result):
        raise ValueError(f"{name} does not fit into {dtype} (largest value {tensor.abs().max().item():.3g})")
    return result

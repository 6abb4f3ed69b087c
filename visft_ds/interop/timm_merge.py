"""Weights of a model of timm with what a run changed in them, as timm itself reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds.interop.backbones import cast, is_merged
from visft_ds.interop.files import BASE_SHA256, TensorInfo, examples, recipe_of_base, sha256_file
from visft_ds.interop.layouts import TIMM_KEY, base_parameters
from visft_ds.interop.merge import Share, scaled
from visft_ds.interop.module_adapters import ModuleAdapter
from visft_ds.interop.timm_files import classes_in, load_timm, open_timm
from visft_ds.interop.tuned import TunedWeights
from visft_ds.interop.writing import refuse_existing, write_safetensors
from visft_ds.models.timm_backbone import TimmBackbone, build_timm

Change = ModuleAdapter | TunedWeights
#: What timm knows of pretrained weights that holds for trained ones too; the latter where positions keep their size.
_SIZES = ("test_input_size", "min_input_size", "test_crop_pct", "pool_size")
_SETTINGS = (
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("first_conv", "classifier"),
    *_SIZES,
)


@dataclass(frozen=True)
class TimmMerge:
    """Report of `merge_timm`."""

    backbone: TimmBackbone  #: on the meta device
    base_sha256: str
    tensors: Mapping[str, TensorInfo]
    shares: Mapping[str, Share]  #: by name of the changed weight
    total: Share
    settings: Mapping[str, Any] | None  #: config.json of a folder; None: timm cannot load it, as a note says
    notes: tuple[str, ...]

    def create_call(self) -> str | None:
        """Python that builds the model and loads a file FILE of these weights, strictly; None where timm cannot."""
        if self.settings is None:
            return None
        size = "".join(f", {key}={value}" for key, value in self.backbone.options.items())
        classes = self.settings["num_classes"]
        return f'timm.create_model("{self.backbone.name}", num_classes={classes}{size}, checkpoint_path=FILE)'


def _settings(backbone: TimmBackbone, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Any] | None, list[str]]:
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


def merge_timm(
    base: str | Path, change: Change, out: str | Path, *, dtype: torch.dtype = torch.float32, allow_other: bool = False
) -> TimmMerge:
    """Write base + change as safetensors under timm's names; all that the base has beside the backbone stays as it is.

    Raises ValueError, before anything is written, for an existing `out` or another suffix than .safetensors, a base of
    another model or with an adapter merged in already, and a change that was made on another base (unless
    `allow_other`).
    """
    out = Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: weights for timm are written as .safetensors only; choose such a name")
    refuse_existing(out)
    assert change.timm is not None
    name, image_size = change.timm
    backbone = build_timm(name, image_size=image_size, device="meta")
    opened = open_timm(backbone, base)
    file, own = opened.file, base_parameters(backbone)
    if is_merged(file):
        raise ValueError(f"{base} has an adapter merged in already; merging again would count it twice: give the base")
    changed = set(change.weights())
    foreign = sorted(changed - own.keys() - set(opened.stored))
    if foreign:
        raise ValueError(f"{base} has nothing of the names that were changed: {examples(foreign)}")
    sha256, notes = check_timm_base(base, change, allow_other=allow_other)
    infos = {key: TensorInfo(file.shape(key), dtype if key in own else file.dtype(key)) for key in file}
    shares, total = {key: Share() for key in sorted(changed & own.keys())}, Share()

    def make(key: str) -> Tensor:
        value = file.get(key)
        if key not in own:
            return value.contiguous()
        if key not in changed:
            return cast(value, dtype, key)
        weight = value.float()
        moved, delta = change.apply(key, weight)
        result = cast(moved, dtype, key)
        for share in (shares[key], total):
            share.add(result.float() - weight, delta)
        return result

    merged = isinstance(change, ModuleAdapter)
    told = {
        TIMM_KEY: backbone.settings(),
        "lora_merged": "true" if merged else "false",
        BASE_SHA256: sha256,
        **recipe_of_base(file),
        "lora" if merged else "tuned": json.dumps({**change.record(), "sha256": change.fingerprint()}),
    }
    write_safetensors(out, infos, make, told)
    settings, unfit = _settings(backbone, {key: info.shape for key, info in infos.items()})
    return TimmMerge(backbone, sha256, infos, shares, total, settings, (*notes, *unfit))


def scaled_module(change: Change, scale: float) -> Change:
    """The change with `scale` times its effect, see `ModuleAdapter.scaled`."""
    return scaled(change, scale) if isinstance(change, TunedWeights) else change.scaled(scale)


def check_timm_base(base: str | Path, change: Change, *, allow_other: bool) -> tuple[str, list[str]]:
    """(sha256 of the file, notes). Raises ValueError where the change was made on another base that is not allowed."""
    sha256 = sha256_file(base)
    if change.base_sha256 is None:
        return sha256, ["it is not recorded on which base file this was trained: not checked"]
    if change.base_sha256 == sha256:
        return sha256, []
    problem = f"this was trained on the base with sha256 {change.base_sha256}, {base} has {sha256}"
    if not allow_other:
        raise ValueError(f"{problem}: give that one, or allow it (--allow-other-base)")
    return sha256, [f"allowed: {problem}"]


def timm_card(title: str, change: Change, report: TimmMerge) -> str:
    """README.md of merged weights."""
    what = "with its LoRA merged in" if isinstance(change, ModuleAdapter) else "trained itself"
    snippet = ["```python", 'FOLDER = "."  # this folder', "import timm", ""]
    snippet += ['model = timm.create_model(f"local-dir:{FOLDER}", pretrained=True)', "```"]
    if report.settings is None:
        snippet = [f"{note[0].upper()}{note[1:]}." for note in report.notes]
    return "\n".join(
        [
            *("---", "library_name: timm", "tags: [vision, visft]", "---", ""),
            f"# {title}",
            "",
            f"timm's {report.backbone.name} after a supervised fine-tuning "
            f"([ViSFT, arXiv 2401.10222](https://arxiv.org/abs/2401.10222)), {what}: {change.describe()}.",
            f"Base weights: sha256 {report.base_sha256}. Change: sha256 {change.fingerprint()}. "
            f"{report.total.retained:.2%} of the change is in the file.",
            "",
            *snippet,
            "",
        ]
    )


def verify_timm(base: Path, change: Change, merged: Path, *, images: int = 2) -> tuple[float, float]:
    """(relative difference of the merged file from base + change, effect of the change), on seeded noise, in fp32."""
    assert change.timm is not None
    model, _ = load_timm(base, *change.timm, torch.float32)
    result, _ = load_timm(merged, *change.timm, torch.float32)
    side = min(model.image_size, 224)
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model.eval()(pixels)
        change.install(model)
        wanted, got = model.eval()(pixels), result.eval()(pixels)
    return _relative(got, wanted), _relative(wanted, plain)


def _relative(a: Tensor, b: Tensor) -> float:
    norm = b.norm().item()
    return (a - b).norm().item() / norm if norm else math.inf

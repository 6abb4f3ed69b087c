"""Low-rank adapters on models of timm, apart from any model: the file a run leaves, and PEFT's form of it.

Legend: r rank, G adapted slices of a fused qkv, g groups of a convolution. Tensors are named and shaped as in the
model: linear layers `lora_A` (G*r, in), `lora_B` (rows, r); convolutions `lora_A` (r, in / g, k, k), `lora_B` (out, r);
with magnitudes `lora_magnitude` (rows,). PEFT has neither slices nor groups that share A: ours are put into its plain
form with zeros, exactly, of rank G*r or g*r.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds.config.schema import LoraConfig
from visft_ds.interop.files import examples, open_weights
from visft_ds.interop.peft import CONFIG, README, WEIGHTS
from visft_ds.interop.writing import save_tensors, write_text
from visft_ds.models.adapted import resized
from visft_ds.models.lora import LoRALinear, inject_lora, lora_layers, lora_parameters
from visft_ds.models.lora_conv import LoRAConv2d
from visft_ds.models.timm_backbone import TimmBackbone

FILE = "lora.safetensors"
_KEY = "visft_module_adapter"
#: Values that PEFT's form may have: zeros of depthwise convolutions could make it many times larger than the model.
LARGEST_PEFT = 2**27

_TEXT = """\
# LoRA adapter for timm's {name}

{facts}
Base weights: sha256 {base}.

`{file}` is what `visft merge` of visft_ds reads to add it into full weights, which need nothing else.

"""
_LOADING = """\
## Load it with timm and PEFT

```python
import timm
from peft import PeftModel
from safetensors.torch import load_file

ADAPTER = "."  # this folder
BASE = "base.safetensors"  # the base weights, under timm's names

model = timm.create_model("{name}", num_classes=0{size})
weights = load_file(BASE)
model.load_state_dict({{name: weights[name] for name in model.state_dict()}})  # without a classifier
model = PeftModel.from_pretrained(model, ADAPTER).eval()
```
"""


@dataclass(frozen=True)
class AdaptedPlace:
    """An adapted layer: output slices of a linear one, groups of a convolution."""

    slices: tuple[tuple[int, int], ...]
    groups: int = 1


@dataclass(frozen=True)
class ModuleAdapter:
    """All of an adapter on a model of timm. `base_sha256` is None where nobody recorded the base."""

    name: str  #: of the model
    rank: int
    alpha: float
    targets: tuple[str, ...]  #: as configured
    magnitude: bool
    places: Mapping[str, AdaptedPlace]  #: by name of the layer
    tensors: Mapping[str, Tensor]
    base_sha256: str | None = None
    options: Mapping[str, int] = field(default_factory=dict)  #: of `timm.create_model`

    @property
    def scaling(self) -> float:
        """Factor on B @ A."""
        return self.alpha / self.rank

    @property
    def timm(self) -> tuple[str, int | None]:
        """(name, image size where it is not the model's own) of the model."""
        return self.name, self.options.get("img_size")

    def weights(self) -> tuple[str, ...]:
        """Names of all base weights that it changes."""
        return tuple(f"{layer}.weight" for layer in self.places)

    def apply(self, weight: str, base: Tensor) -> tuple[Tensor, Tensor]:
        """(result, change) of one base weight, fp32 all."""
        layer = weight.removesuffix(".weight")
        a, b = (self.tensors[f"{layer}.{kind}"].float() for kind in ("lora_A", "lora_B"))
        change, start = torch.zeros_like(base), 0
        for index, (lo, hi) in enumerate(self.places[layer].slices):
            rows = slice(start, start + hi - lo)
            own = a[index * self.rank : (index + 1) * self.rank]
            change[lo:hi] = self.scaling * (b[rows] @ own.flatten(1)).view_as(base[lo:hi])
            if self.magnitude:
                magnitude = self.tensors[f"{layer}.lora_magnitude"].float()[rows]
                change[lo:hi] = resized(base[lo:hi], change[lo:hi], magnitude)
            start += hi - lo
        return base + change, change

    def fingerprint(self) -> str:
        """sha256 of what it computes with."""
        digest = hashlib.sha256(repr((self.name, self.rank, float(self.alpha), sorted(self.places))).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].float().contiguous().numpy().data)
        return digest.hexdigest()

    def record(self) -> dict[str, object]:
        """Entry in the metadata of merged weights."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, "magnitude": self.magnitude}

    def describe(self) -> str:
        """A few words for the console."""
        kind = "DoRA, rank" if self.magnitude else "rank"
        return f"{kind} {self.rank}, scaling {self.scaling:g}, on {len(self.places)} layers ({', '.join(self.targets)})"

    def scaled(self, scale: float) -> ModuleAdapter:
        """With `scale` times its effect. Raises ValueError for magnitudes, whose effect is no multiple of lora_B."""
        if scale == 1:
            return self
        if self.magnitude:
            raise ValueError("an adapter with magnitudes (DoRA) cannot be scaled: its effect is no multiple of lora_B")
        tensors = {name: value * scale if name.endswith("lora_B") else value for name, value in self.tensors.items()}
        return replace(self, tensors=tensors)

    def install(self, backbone: TimmBackbone) -> None:
        """Put it into a model without adapters. Raises ValueError where it does not fit."""
        inject_lora(backbone, rank=self.rank, alpha=self.alpha, targets=self.targets, magnitude=self.magnitude)
        parameters = lora_parameters(backbone)
        wrong = sorted(parameters.keys() ^ self.tensors.keys())
        wrong += [n for n, p in parameters.items() if n in self.tensors and p.shape != self.tensors[n].shape]
        if wrong:
            raise ValueError(f"the adapter is not one of timm's {backbone.name}: {examples(wrong)}")
        with torch.no_grad():
            for name, value in self.tensors.items():
                parameters[name].copy_(value)


def module_adapter(
    lora: LoraConfig, tensors: Mapping[str, Tensor], backbone: TimmBackbone, base_sha256: str | None
) -> ModuleAdapter:
    """The adapter that a run with `visft.lora` has in these tensors; the model may be on the meta device."""
    places = {}
    for name, layer in lora_layers(backbone).items():
        if isinstance(layer, LoRAConv2d):
            places[name] = AdaptedPlace(((0, layer.out_channels),), layer.groups)
        else:
            assert isinstance(layer, LoRALinear)
            places[name] = AdaptedPlace(layer.slices)
    return ModuleAdapter(
        backbone.name,
        lora.rank,
        lora.alpha,
        lora.targets,
        lora.magnitude,
        places,
        dict(tensors),
        base_sha256,
        backbone.options,
    )


def save_module_adapter(adapter: ModuleAdapter, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a folder with our file, a README.md, and, where PEFT can have it, PEFT's files. Returns the folder."""
    folder = Path(folder)
    told = {name: value for name, value in asdict(adapter).items() if name != "tensors"}
    tensors = {name: value.float().contiguous() for name, value in adapter.tensors.items()}
    reason = why_no_peft(adapter)
    if overwrite:
        (folder / CONFIG).unlink(missing_ok=True)
    save_tensors(folder / FILE, tensors, {_KEY: json.dumps(told)}, overwrite=overwrite)
    text = _TEXT.format(
        name=adapter.name, facts=f"{adapter.describe()}.", base=adapter.base_sha256 or "not recorded", file=FILE
    )
    if reason is None:
        save_tensors(folder / WEIGHTS, _to_peft(adapter, _fan_in(adapter)), {}, overwrite=overwrite)
        text += _LOADING.format(
            name=adapter.name, size="".join(f", {key}={value}" for key, value in adapter.options.items())
        )
    else:
        text += f"It is not in PEFT's form: {reason}.\n"
    write_text(folder / README, text, overwrite=overwrite)
    if reason is None:
        config = json.dumps(_config(adapter), indent=2, sort_keys=True) + "\n"
        write_text(folder / CONFIG, config, overwrite=overwrite)
    return folder


def read_module_adapter(folder: str | Path) -> ModuleAdapter:
    """Read what `save_module_adapter` wrote. Raises ValueError for another file."""
    file = open_weights(Path(folder) / FILE)
    if _KEY not in file.metadata:
        raise ValueError(f"{file.path} is no adapter that this project wrote for a model of timm")
    told = json.loads(file.metadata[_KEY])
    places = {
        name: AdaptedPlace(tuple((lo, hi) for lo, hi in place["slices"]), place["groups"])
        for name, place in told.pop("places").items()
    }
    told["targets"] = tuple(told["targets"])
    return ModuleAdapter(**told, places=places, tensors={name: file.get(name) for name in file})


def why_no_peft(adapter: ModuleAdapter) -> str | None:
    """Why PEFT cannot compute with an adapter; None where it can."""
    grouped = [name for name, place in adapter.places.items() if place.groups > 1]
    if adapter.magnitude:
        out = {name: len(adapter.tensors[f"{name}.lora_magnitude"]) for name in adapter.places}
        sliced = [name for name, place in adapter.places.items() if place.slices != ((0, out[name]),)]
        if sliced or grouped:
            why = "slices of a fused layer" if sliced else "grouped convolutions"
            return f"its DoRA knows no {why} ({examples(sliced or grouped, 1)})"
    fan_in = _fan_in(adapter)
    size = sum(
        adapter.rank * adapter.places[name].groups * fan_in[name] * adapter.tensors[f"{name}.lora_A"][0, 0].numel()
        for name in grouped
    )
    if size > LARGEST_PEFT:
        return f"as updates of convolutions without groups they would have {size:,} values, nearly all of them zero"
    return None


def _fan_in(adapter: ModuleAdapter) -> dict[str, int]:
    """Input channels of every layer, over all groups."""
    return {name: adapter.tensors[f"{name}.lora_A"].shape[1] * p.groups for name, p in adapter.places.items()}


def _factor(place: AdaptedPlace) -> int:
    """PEFT's rank of a layer over ours."""
    return max(len(place.slices), place.groups)


def _config(adapter: ModuleAdapter) -> dict[str, Any]:
    patterns = {re.escape(name): _factor(place) for name, place in adapter.places.items() if _factor(place) > 1}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "rank_pattern": {name: adapter.rank * factor for name, factor in patterns.items()},
        "alpha_pattern": {name: adapter.alpha * factor for name, factor in patterns.items()},
        # Whole names: "conv1" alone would be the conv1 of every block.
        "target_modules": "|".join(re.escape(name) for name in adapter.places),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": adapter.magnitude,
    }


def _to_peft(adapter: ModuleAdapter, fan_in: Mapping[str, int]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, place in adapter.places.items():
        a, b = (adapter.tensors[f"{name}.{kind}"].float() for kind in ("lora_A", "lora_B"))
        if a.ndim == 4:
            if place.groups > 1:  # group i of the output sees rows i*r.. of A, which see group i of the input
                spread = a.new_zeros(place.groups, adapter.rank, place.groups, *a.shape[1:])
                for group in range(place.groups):
                    spread[group, :, group] = a
                a = spread.flatten(2, 3).flatten(0, 1)
                assert a.shape[1] == fan_in[name]
            b = b[:, :, None, None]
        elif place.slices != ((0, len(b)),):
            out = torch.zeros(_rows(adapter, name), len(place.slices) * adapter.rank)
            start = 0
            for index, (lo, hi) in enumerate(place.slices):
                out[lo:hi, index * adapter.rank : (index + 1) * adapter.rank] = b[start : start + hi - lo]
                start += hi - lo
            b = out
        stem = f"base_model.model.{name}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a.contiguous(), b.contiguous()
        if adapter.magnitude:
            magnitude = adapter.tensors[f"{name}.lora_magnitude"].float()
            tensors[f"{stem}.lora_magnitude_vector"] = magnitude[None, :, None, None] if a.ndim == 4 else magnitude
    return tensors


def _rows(adapter: ModuleAdapter, name: str) -> int:
    """Outputs of a fused qkv, of which slices are adapted."""
    return 3 * adapter.tensors[f"{name}.lora_A"].shape[1]

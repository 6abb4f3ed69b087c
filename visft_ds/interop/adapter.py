"""A low-rank adapter apart from any model, as everything here reads it; `peft_folder` reads and writes it.

Letters: r rank, G adapted slices of a layer. Linear layers have `lora_A` (G*r, in) and `lora_B` (adapted
rows, r), stacked slice by slice; convolutions `lora_A` (r, in, k, k) and `lora_B` (out, r). The change of a
weight is alpha / r * B A.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from visft_ds.config.schema import LoraConfig
from visft_ds.files import reading
from visft_ds.interop.layouts import PREFIXES, Description, describe_model, fitted, model_of
from visft_ds.interop.transformers_names import Parts, layers_of
from visft_ds.interop.weights import Lazy, Weights, examples
from visft_ds.models import Backbone
from visft_ds.models.lora import (
    AdaptedLayer,
    adapt_layers,
    adaptable_layers,
    dense_update,
    globs_of,
    lora_layers,
    lora_parameters,
    targets_of,
)
from visft_ds.ops.lora import Slices

#: What stands in front of the names of a tower's layers in models of open_clip and transformers.
_AROUND = (*PREFIXES, "model.", "vision_model.", "vision_tower.", "vision_tower.vision_model.")


class Factors(NamedTuple):
    """Change of a layer, without its scale: B A in the rows that are adapted."""

    rows: int  #: of the layer
    slices: Slices  #: those that are adapted
    a: Tensor  #: fp32
    b: Tensor  #: fp32


@dataclass(frozen=True)
class Adapter:
    """Settings and tensors."""

    #: preset and options of the backbone, as `layouts.model_of`; None: a folder of PEFT does not say it
    model: Description | None
    rank: int
    alpha: float
    targets: tuple[str, ...]  #: that adapt these layers in the model; empty if that is not known
    layers: Mapping[str, Factors] = field(compare=False, repr=False)  #: by name of the adapted layer
    base: str | None = None  #: fingerprint of the weights it was trained on
    step: int | None = None  #: of the training
    path: Path | None = field(
        default=None, compare=False, repr=False
    )  #: the file it was read from, for messages

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        lora: LoraConfig,
        tensors: Mapping[str, Tensor],
        base: str | None,
        step: int | None = None,
    ) -> Adapter:
        """The adapter in a backbone that `inject_lora` has seen, which may be on the meta device, with these
        values.
        """
        layers = {}
        for name, layer in lora_layers(backbone).items():
            a = tensors[f"{name}.lora_A"].float()
            layers[name] = Factors(_rows_of(layer), layer.slices, a, tensors[f"{name}.lora_B"].float())
        return cls(model_of(backbone), lora.rank, lora.alpha, tuple(lora.targets), layers, base, step)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The factors by the names that they have in a backbone."""
        tensors = {}
        for name, factors in self.layers.items():
            tensors[f"{name}.lora_A"] = factors.a
            tensors[f"{name}.lora_B"] = factors.b
        return tensors

    @property
    def slices(self) -> dict[str, Slices]:
        """Rows that are adapted, by layer."""
        return {name: factors.slices for name, factors in self.layers.items()}

    def weights(self) -> list[str]:
        """Names of the base weights that it changes."""
        return [f"{layer}.weight" for layer in self.layers]

    def delta(self, weight: str) -> Tensor:
        """Change of a base weight by the adapter, (rows, fan in), fp32; zero in rows that are not adapted."""
        rows, slices, a, b = self.layers[weight.removesuffix(".weight")]
        return dense_update(rows, a, b, slices, self.alpha / self.rank)

    def scaled(self, scale: float) -> Adapter:
        """Adapter with `scale` times the effect."""
        layers = {name: factors._replace(b=factors.b * scale) for name, factors in self.layers.items()}
        return replace(self, layers=layers)

    def on(self, backbone: Backbone) -> Adapter:
        """Itself; or, of a folder that names no model, the same change by the names and rows of this one.

        Raises ValueError for layers that it does not have.
        """
        if self.model is not None:
            return self
        layers: dict[str, Factors] = {}
        for theirs, (ours, part, count) in sorted(self._parts_of(backbone).items(), key=itemgetter(1)):
            rows, _, a, b = self.layers[theirs]
            slices: Slices = ((rows * part, rows * (part + 1)),)
            if ours in layers:
                before = layers[ours]
                slices = before.slices + slices
                a = torch.cat([before.a, a])
                b = torch.cat([before.b, b])
            layers[ours] = Factors(rows * count, slices, a, b)
        known = replace(self, model=model_of(backbone), layers=layers)
        return replace(known, targets=targets_of(backbone, known.slices))

    def _parts_of(self, backbone: Backbone) -> Parts:
        """Its layers -> (layer of the backbone, which part of its rows, of how many).

        The names are timm's or those of transformers' classes, behind the name of the tower in the model
        around it, which is the same for all.
        """
        known = adaptable_layers(backbone)
        for names in ({name: (name, 0, 1) for name in known}, layers_of(backbone, known)):
            for prefix in _AROUND:
                parts = {prefix + name: part for name, part in names.items()}
                if self.layers.keys() <= parts.keys():
                    return {name: parts[name] for name in self.layers}
        raise ValueError(
            f"{self.path}: its layers ({examples(self.layers)}) are none of {backbone.describe()}, which "
            f"has {examples(known)}"
        )

    def install(self, backbone: Backbone) -> None:
        """Put it into a backbone without adapters. Raises ValueError if it does not fit."""
        ours = self.on(backbone)
        assert ours.model is not None
        where = self.path or Path(f"the adapter of {describe_model(ours.model)}")
        here = model_of(backbone)
        here.setdefault("bands")
        with reading(where, f"an adapter of {backbone.describe()}"):
            if any(ours.model.get(key) != here.get(key) for key in ("layers", "bands")):
                raise ValueError(
                    f"it is of {describe_model(ours.model)}, and this model is {describe_model(here)}"
                )
            adapt_layers(backbone, ours.slices, rank=ours.rank, alpha=ours.alpha)
            for name, layer in lora_layers(backbone).items():
                rows = ours.layers[name].rows
                if rows != _rows_of(layer):
                    raise ValueError(f"it is of {rows} rows of {name}, which has {_rows_of(layer)}")
            parameters = lora_parameters(backbone)
            tensors = ours.tensors
            values = {name: Lazy.of(value) for name, value in tensors.items()}
            fitted(Weights(values, where), parameters, behind=(), what=backbone.describe())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])

    def describe(self) -> str:
        """A few words for the console."""
        targets = ", ".join(self.targets or globs_of(self.layers))
        return f"rank {self.rank}, alpha {self.alpha:g}, on {len(self.layers)} layers ({targets})"

    def fingerprint(self) -> str:
        """sha256 of settings and values, whatever file they come from."""
        digest = hashlib.sha256(repr((self.rank, float(self.alpha), sorted(self.layers))).encode())
        for name, value in sorted(self.tensors.items(), key=itemgetter(0)):
            digest.update(name.encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()


def _rows_of(layer: AdaptedLayer) -> int:
    """Rows of its weight, which has no shape under ZeRO-3."""
    return int(getattr(layer, "out_features", layer.shapes["lora_B"][0]))


def average(adapters: Sequence[Adapter]) -> Adapter:
    """The adapter whose change of every weight is the mean of theirs, exactly: ranks add up, alpha / rank is
    1.

    The factors are not averaged: the product of two means is not the mean of two products.

    Raises ValueError for adapters of other models or layers, or of other base weights.
    """
    first, *others = adapters
    if not others:
        return first
    for other in others:
        if other.model != first.model or _rows_in(other) != _rows_in(first):
            raise ValueError(
                f"{first.path} and {other.path} are of different models or layers, and cannot be averaged"
            )
        if other.base != first.base:
            raise ValueError("adapters of different base weights cannot be averaged: give those of one base")
    layers = {}
    for name, (rows, slices, *_) in first.layers.items():
        a = []
        b = []
        for adapter in adapters:
            factors = adapter.layers[name]
            # A is stacked slice by slice, and within a slice adapter by adapter.
            a.append(factors.a.unflatten(0, (len(slices), -1)))
            b.append(adapter.alpha / adapter.rank / len(adapters) * factors.b)
        layers[name] = Factors(rows, slices, torch.cat(a, dim=1).flatten(0, 1), torch.cat(b, dim=1))
    rank = sum(adapter.rank for adapter in adapters)
    return replace(first, rank=rank, alpha=float(rank), layers=layers, step=None)


def _rows_in(adapter: Adapter) -> dict[str, tuple[int, Slices]]:
    return {name: (factors.rows, factors.slices) for name, factors in adapter.layers.items()}

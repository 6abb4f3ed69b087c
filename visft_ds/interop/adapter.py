"""A low-rank adapter apart from any model, as a run exports it and as everything here reads it.

Letters: r rank, G adapted slices of a layer. Linear layers have `lora_A` (G*r, in) and `lora_B` (adapted
rows, r), stacked slice by slice; convolutions `lora_A` (r, in, k, k) and `lora_B` (out, r). The change of a
weight is alpha / r * B A.

A folder holds it twice, in a file of ours and as PEFT reads it. PEFT has no LoRA on slices of a fused qkv.
Ours becomes its plain one on the whole qkv: of G slices rank G*r, A as it is, B (3D, G*r) block by block and
zero elsewhere, alpha G times as large. That is exact.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from visft_ds.config.schema import LoraConfig
from visft_ds.files import reading, write_text
from visft_ds.interop.layouts import StoredModel, describe_model, fitted, model_of
from visft_ds.interop.weights import Lazy, Weights, examples, open_weights, save_tensors
from visft_ds.models import Backbone
from visft_ds.models.lora import KINDS, dense_update, inject_lora, lora_layers, lora_parameters
from visft_ds.ops.lora import Slices, spread
from visft_ds.settings.fields import Count, Positive

FILE = "lora.safetensors"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
_KEY = "visft_adapter"


class StoredAdapter(LoraConfig):
    """Settings of an adapter in the header of its file; rank, alpha and targets are those of a
    configuration.
    """

    model: StoredModel
    layers: Annotated[dict[str, tuple[Positive, tuple[tuple[Count, Positive], ...]]], Field(min_length=1)]
    base: str | None = None

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Layers whose slices do not rise from row to row within them."""
        for name, (rows, slices) in self.layers.items():
            rises = bool(slices)
            end = 0
            for low, high in slices:
                rises = rises and end <= low < high
                end = high
            if not rises or end > rows:
                yield "layers", f"slices of {name[:80]} do not rise from row 0 to row {rows}"

    def check(self, file: Weights) -> None:
        """Raise ValueError for tensors of other sizes; none of them is read."""
        for name, (_, slices) in self.layers.items():
            a = file.get(f"{name}.lora_A")
            b = file.get(f"{name}.lora_B")
            if a is None or b is None:
                raise ValueError(f"the tensors of {name[:80]} are missing; it has {examples(file)}")
            width = sum(high - low for low, high in slices)
            a_fits = len(a.shape) in (2, 4) and a.shape[0] == len(slices) * self.rank and 0 not in a.shape
            if not a_fits or b.shape != (width, self.rank):
                raise ValueError(
                    f"{name[:80]}.lora_A is {a.shape} and lora_B {b.shape}, which is not rank {self.rank} on "
                    f"{len(slices)} slice(s) of {width} rows in all"
                )


@dataclass(frozen=True)
class Adapter:
    """Settings and tensors."""

    model: Mapping[str, Any]  #: preset and options of the backbone, as `layouts.model_of`
    rank: int
    alpha: float
    targets: tuple[str, ...]
    layers: Mapping[str, tuple[int, Slices]]  #: adapted layer -> its rows, and which of them are adapted
    tensors: Mapping[str, Tensor] = field(repr=False)  #: fp32
    base: str | None = None  #: fingerprint of the weights it was trained on
    path: Path | None = field(
        default=None, compare=False, repr=False
    )  #: the file it was read from, for messages

    @classmethod
    def of(
        cls, backbone: Backbone, lora: LoraConfig, tensors: Mapping[str, Tensor], base: str | None
    ) -> Adapter:
        """The adapter in a backbone that `inject_lora` has seen, which may be on the meta device, with these
        values.
        """
        layers = _layers_of(backbone)
        return cls(
            model=model_of(backbone),
            rank=lora.rank,
            alpha=lora.alpha,
            targets=tuple(lora.targets),
            layers=layers,
            tensors={name: tensors[name].float() for name in _names_in(layers)},
            base=base,
        )

    def weights(self) -> list[str]:
        """Names of the base weights that it changes."""
        return [f"{layer}.weight" for layer in self.layers]

    def delta(self, weight: str) -> Tensor:
        """Change of a base weight by the adapter, (rows, fan in), fp32; zero in rows that are not adapted."""
        layer = weight.removesuffix(".weight")
        rows, slices = self.layers[layer]
        a = self.tensors[f"{layer}.lora_A"]
        b = self.tensors[f"{layer}.lora_B"]
        return dense_update(rows, a, b, slices, self.alpha / self.rank)

    def scaled(self, scale: float) -> Adapter:
        """Adapter with `scale` times the effect."""
        scaled = dict(self.tensors)
        for layer in self.layers:
            scaled[f"{layer}.lora_B"] = self.tensors[f"{layer}.lora_B"] * scale
        return replace(self, tensors=scaled)

    def install(self, backbone: Backbone) -> None:
        """Put it into a backbone without adapters. Raises ValueError if it does not fit."""
        where = self.path or Path(f"the adapter of {describe_model(self.model)}")
        with reading(where, f"an adapter of {backbone.describe()}"):
            if tuple(self.model.get("layers", ())) != backbone.layers_read:
                block = ", ".join(map(str, backbone.layers_read)) or "the last"
                raise ValueError(
                    f"it is of {describe_model(self.model)}, and this model is read after block {block}"
                )
            inject_lora(backbone, rank=self.rank, alpha=self.alpha, targets=self.targets)
            parameters = lora_parameters(backbone)
            values = {name: Lazy.of(value) for name, value in self.tensors.items()}
            fitted(Weights(values, where), parameters, behind=(), what=backbone.describe())
            for layer, rows in _layers_of(backbone).items():
                ours = self.layers[layer]
                if ours != rows:
                    raise ValueError(f"it is of rows {ours} of {layer}, and {self.targets} are {rows}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(self.tensors[name])

    def describe(self) -> str:
        """A few words for the console."""
        targets = ", ".join(self.targets)
        return f"rank {self.rank}, alpha {self.alpha:g}, on {len(self.layers)} layers ({targets})"

    def fingerprint(self) -> str:
        """sha256 of settings and values, whatever file they come from."""
        settings = (self.rank, float(self.alpha), sorted(self.layers))
        digest = hashlib.sha256(repr(settings).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, base_model: str | None = None) -> None:
        """Write our own file and PEFT's two; the configuration last, without which the folder is no adapter.

        Args:
            base_model: repository of the base weights on the hub.
        """
        (folder / PEFT_CONFIG).unlink(missing_ok=True)
        names = ("model", "rank", "alpha", "targets", "layers", "base")
        settings = json.dumps({name: getattr(self, name) for name in names})
        save_tensors(folder / FILE, self.tensors, {_KEY: settings})
        save_tensors(folder / PEFT_WEIGHTS, self._peft_tensors(), {})
        rank_pattern = {}
        alpha_pattern = {}
        for layer, (_, slices) in self.layers.items():
            if len(slices) > 1:
                rank_pattern[re.escape(layer)] = self.rank * len(slices)
                alpha_pattern[re.escape(layer)] = self.alpha * len(slices)
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            # Whole names: "conv1" alone would be that of every block.
            "target_modules": "|".join(re.escape(layer) for layer in self.layers),
            "lora_dropout": 0.0,
            "bias": "none",
        }
        write_text(folder / PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _peft_tensors(self) -> dict[str, Tensor]:
        """The tensors under PEFT's names: on all rows of each layer, with the axes of a convolution."""
        tensors: dict[str, Tensor] = {}
        for layer, (rows, slices) in self.layers.items():
            a = self.tensors[f"{layer}.lora_A"]
            b = self.tensors[f"{layer}.lora_B"]
            if slices != ((0, rows),):
                b = spread(b, slices, rows)
            if a.ndim == 4:
                b = b[:, :, None, None]
            tensors[f"base_model.model.{layer}.lora_A.weight"] = a
            tensors[f"base_model.model.{layer}.lora_B.weight"] = b
        return tensors

    @classmethod
    def load(cls, path: Path) -> Adapter:
        """Read our own file, or that in a folder. Raises ValueError for another one, and for values not
        finite.
        """
        path = path / FILE if path.is_dir() else path
        file = open_weights(path)
        with reading(path, "an adapter of visft_ds"):
            if _KEY not in file.metadata:
                raise ValueError(f"its header has no entry {_KEY!r}: give RUN/export/adapter, or a run")
            stored = StoredAdapter.model_validate_json(file.metadata[_KEY])
            stored.check(file)
            tensors = {name: file.tensor(name, torch.float32) for name in _names_in(stored.layers)}
        return cls(
            model=stored.model.options(),
            rank=stored.rank,
            alpha=stored.alpha,
            targets=stored.targets,
            layers=stored.layers,
            tensors=tensors,
            base=stored.base,
            path=path,
        )


def _names_in(layers: Iterable[str]) -> list[str]:
    """Names of the tensors of an adapter on these layers."""
    return [f"{layer}.{kind}" for layer in layers for kind in KINDS]


def _layers_of(backbone: Backbone) -> dict[str, tuple[int, Slices]]:
    """Adapted layer -> its rows, and which of them are adapted."""
    layers = {}
    for name, layer in lora_layers(backbone).items():
        rows = getattr(layer, "out_features", layer.shapes["lora_B"][0])
        layers[name] = (rows, layer.slices)
    return layers


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
        if (other.model, other.layers) != (first.model, first.layers):
            raise ValueError(
                f"adapters of {describe_model(first.model)} and {describe_model(other.model)} "
                "cannot be averaged"
            )
        if other.base != first.base:
            raise ValueError("adapters of different base weights cannot be averaged: give those of one base")
    tensors: dict[str, Tensor] = {}
    for layer, (_, slices) in first.layers.items():
        # A is stacked slice by slice, and within a slice adapter by adapter.
        by_adapter = [adapter.tensors[f"{layer}.lora_A"].chunk(len(slices)) for adapter in adapters]
        by_slice = zip(*by_adapter, strict=True)
        tensors[f"{layer}.lora_A"] = torch.cat([torch.cat(parts) for parts in by_slice])
        scaled = []
        for adapter in adapters:
            factor = adapter.alpha / adapter.rank / len(adapters)
            scaled.append(factor * adapter.tensors[f"{layer}.lora_B"])
        tensors[f"{layer}.lora_B"] = torch.cat(scaled, dim=1)
    rank = sum(adapter.rank for adapter in adapters)
    return replace(first, rank=rank, alpha=float(rank), tensors=tensors)

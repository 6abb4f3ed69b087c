"""A low-rank adapter apart from any model and any file format; every format reads into it and writes from it.

Legend: r rank, G number of adapted slices of a fused qkv, D width, g groups of a convolution. Tensors are named and
shaped as in the model: linear layers `lora_A` (G*r, in), rows stacked slice by slice in the order q, k, v, and `lora_B`
(rows, r), likewise; convolutions `lora_A` (r, in / g, k, k) and `lora_B` (out, r). The change of a weight is
(alpha / r) * B @ A, per slice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from visft_ds.config.schema import LoraConfig
from visft_ds.interop.files import examples
from visft_ds.interop.layouts import Tower, depth_of, part_of, tower_names, tower_of
from visft_ds.models import Backbone
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import (
    KINDS,
    TARGETS,
    dense_update,
    inject_lora,
    lora_layers,
    lora_parameters,
)
from visft_ds.models.timm_backbone import TimmBackbone
from visft_ds.ops.lora import Slices

SLICES = ("q", "k", "v")
# Target -> module inside a block.
MODULES = {target: place[0] for target, place in TARGETS.items()}
# The layers of which q, k and v are slices.
_FUSED = re.compile(r"blocks\.\d+\.attn\.qkv")


def rows_of_qkv(slices: Sequence[str], width: int) -> Slices:
    """The rows of a fused qkv that belong to slices of it."""
    starts = (SLICES.index(name) * width for name in slices)
    return tuple((start, start + width) for start in starts)


@dataclass(frozen=True)
class Adapter:
    """Settings and tensors of an adapter. `tensors` are those of the legend above; `targets` as configured, those of a
    tower of our own in the order q k v proj fc1 fc2.

    `base_sha256` is the hash of the base weight file it was trained on, None where nobody recorded it. `model` is None
    for a tower of our own.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    tensors: dict[str, Tensor]
    base_sha256: str | None = None
    model: str | None = None  #: name of the model of timm
    options: Mapping[str, int] = field(default_factory=dict)  #: of `timm.create_model`
    layers_read: tuple[int, ...] = ()  #: blocks of the tower that were read when it was trained; none: the last

    @property
    def scaling(self) -> float:
        """Factor on B @ A."""
        return self.alpha / self.rank

    @property
    def timm(self) -> tuple[str, int | None] | None:
        """(name, image size where it is not the model's own) of the model of timm that it is of, or None."""
        return None if self.model is None else (self.model, self.options.get("img_size"))

    @property
    def depth(self) -> int:
        """Number of blocks it spans."""
        return depth_of(self.tensors)

    @property
    def width(self) -> int:
        """Width of the tower it fits: the input size of a block's projections (fc2 apart, its output size)."""
        module = MODULES[self.targets[0]]
        part, axis = ("lora_B", 0) if module == "mlp.fc2" else ("lora_A", 1)
        shapes = [value.shape for name, value in self.tensors.items() if name.endswith(f".{module}.{part}")]
        return shapes[0][axis] if shapes else 0

    def slices(self) -> tuple[str, ...]:
        """The adapted slices of the fused qkv, in order."""
        return tuple(name for name in SLICES if name in self.targets)

    def modules(self) -> tuple[str, ...]:
        """Adapted modules inside a block of a tower of our own, each once."""
        return tuple(dict.fromkeys(MODULES[target] for target in self.targets))

    def layers(self) -> tuple[str, ...]:
        """Names of the adapted layers, in the order of the tensors."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.tensors))

    def weights(self) -> tuple[str, ...]:
        """Names of all base weights it changes: `blocks.0.attn.qkv.weight`, ..."""
        return tuple(f"{layer}.weight" for layer in self.layers())

    def adapted(self, layer: str) -> tuple[Slices, int]:
        """The rows of a layer that it changes, and how many it has in all."""
        rows, slices = len(self.tensors[f"{layer}.lora_B"]), self.slices()
        if slices and _FUSED.fullmatch(layer):
            width = rows // len(slices)
            return rows_of_qkv(slices, width), 3 * width
        return ((0, rows),), rows

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A and B of a layer, fp32."""
        return self.tensors[f"{layer}.lora_A"].float(), self.tensors[f"{layer}.lora_B"].float()

    def delta(self, weight: str) -> Tensor:
        """scaling * B @ A of one base weight, dense, fp32, (out, fan in); zero in rows that are not adapted."""
        layer = weight.removesuffix(".weight")
        slices, rows = self.adapted(layer)
        return dense_update(rows, *self.factors(layer), slices, self.scaling)

    def apply(self, weight: str, base: Tensor) -> tuple[Tensor, Tensor]:
        """(result, change) of one base weight, fp32 all."""
        change = self.delta(weight).view_as(base)
        return base + change, change

    def scaled(self, scale: float) -> Adapter:
        """With `scale` times its effect, any number, also 0 and below; it goes into lora_B."""
        if scale == 1:
            return self
        tensors = {name: value * scale if name.endswith("lora_B") else value for name, value in self.tensors.items()}
        return replace(self, tensors=tensors)

    def record(self) -> dict[str, object]:
        """Entry in the metadata of merged weights."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": self.targets}

    def describe(self) -> str:
        """A few words for the console."""
        where = "+".join(self.targets)
        if self.model is not None:
            where = f"{len(self.layers())} layers ({', '.join(self.targets)})"
        return f"rank {self.rank}, alpha {self.alpha:g}, on {where}"

    def fingerprint(self) -> str:
        """SHA-256 of settings and values, independent of the file they came from."""
        if self.model is None:
            settings: object = (self.rank, float(self.alpha), self.targets)
        else:
            settings = (self.model, self.rank, float(self.alpha), sorted(self.layers()))
        return fingerprint_of(settings, ((name, self.tensors[name]) for name in sorted(self.tensors)))

    def expected_shapes(self, tower: Tower) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor an adapter of these settings has on a tower of our own."""
        base, slices = tower_names(tower), len(self.slices())
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in (f"blocks.{index}.{module}" for index in range(tower.depth) for module in self.modules()):
            rows, fan_in = base[f"{layer}.weight"]
            parts = 1
            if _FUSED.fullmatch(layer):
                rows, parts = slices * tower.width, slices
            shapes |= {f"{layer}.lora_A": (parts * self.rank, fan_in), f"{layer}.lora_B": (rows, self.rank)}
        return shapes

    def fit(self, tower: Tower) -> Adapter:
        """The adapter, checked to have exactly the tensors that its settings mean on this tower, as far as it was read.

        Raises ValueError for every difference, and for values that are not finite.
        """
        if self.model is not None:
            raise ValueError(
                f"the adapter is for timm's {self.model}, and this is a tower of EVA ({tower.describe()}): take the "
                f"adapter and the base of the same model"
            )
        tensors, tower = self.tensors, part_of(tower, self.layers_read)
        if (depth_of(tensors), self.width) != (tower.depth, tower.width):
            raise ValueError(
                f"the adapter is for a tower of width {self.width}, depth {self.depth}; this tower has "
                f"{tower.describe()}: take the adapter and the base of the same model"
            )
        wanted = self.expected_shapes(tower)
        wrong = [f"{name} is missing" for name in wanted if name not in tensors]
        wrong += [f"{name} is unexpected" for name in tensors if name not in wanted]
        wrong += [
            f"{name} is {tuple(tensors[name].shape)}, not {shape}"
            for name, shape in wanted.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ]
        wrong += [f"{name} holds NaN or infinity" for name, value in tensors.items() if not value.isfinite().all()]
        if wrong:
            raise ValueError(
                f"the adapter (rank {self.rank}, {'+'.join(self.targets)}) is not whole: {examples(wrong)}"
            )
        return replace(self, tensors=tensors)

    def install(self, backbone: Backbone) -> None:
        """Put it into a model without adapters: inject LoRA of its settings, then copy every value.

        Raises ValueError where it does not fit the model, and where the model has adapters already.
        """
        adapter = self
        if self.layers_read != backbone.layers_read:
            read = (self.layers_read, backbone.layers_read)
            theirs, ours = (f"ends after block {max(each)}" if each else "is whole" for each in read)
            raise ValueError(f"the tower that the adapter was trained in {theirs}, this one {ours}: take the same end")
        if isinstance(backbone, EvaViT):
            adapter = self.fit(tower_of(backbone))
        elif self.model is None:
            raise ValueError(
                f"the adapter is for a tower of EVA of width {self.width}, depth {self.depth}, and the model is timm's "
                f"{backbone.name}: take the adapter and the base of the same model"
            )
        inject_lora(backbone, rank=self.rank, alpha=self.alpha, targets=self.targets)
        parameters = lora_parameters(backbone)
        wrong = sorted(parameters.keys() ^ adapter.tensors.keys())
        wrong += [n for n, p in parameters.items() if n in adapter.tensors and p.shape != adapter.tensors[n].shape]
        if wrong and isinstance(backbone, TimmBackbone):
            raise ValueError(f"the adapter is not one of timm's {backbone.name}: {examples(wrong)}")
        assert not wrong, wrong
        with torch.no_grad():
            for name, value in adapter.tensors.items():
                parameters[name].copy_(value)


def fingerprint_of(settings: object, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of settings and of values, as fp32, by name."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, value in tensors:
        digest.update(name.encode())
        digest.update(value.float().contiguous().numpy().data)
    return digest.hexdigest()


def average(adapters: Sequence[Adapter]) -> Adapter:
    """Adapter whose change of every weight is the mean of theirs, exactly: ranks add up, scaling is 1.

    Factors A and B themselves are not averaged: the product of two means is not the mean of two products. (PEFT calls
    this combination "cat".)

    Raises ValueError for adapters of other projections, towers or bases.
    """
    first = adapters[0]
    for other in adapters[1:]:
        if _model_of(other) != _model_of(first) or (other.model is not None and other.layers() != first.layers()):
            models = (f"{_model_of(one)} ({one.describe()})" for one in (first, other))
            raise ValueError(f"adapters of {' and of '.join(models)} cannot be averaged")
        if other.model is None and (other.targets, other.depth, other.width) != (
            first.targets,
            first.depth,
            first.width,
        ):
            raise ValueError(
                f"adapters on {'+'.join(first.targets)} (width {first.width}, depth {first.depth}) and on "
                f"{'+'.join(other.targets)} (width {other.width}, depth {other.depth}) cannot be averaged"
            )
    bases = {adapter.base_sha256 for adapter in adapters if adapter.base_sha256 is not None}
    if len(bases) > 1:
        raise ValueError(
            f"the adapters were trained on different bases, sha256 {' and '.join(sorted(bases))}: their changes do not "
            f"add up"
        )
    tensors: dict[str, Tensor] = {}
    for layer in first.layers():
        a, b = f"{layer}.lora_A", f"{layer}.lora_B"
        slices = len(first.adapted(layer)[0])
        parts = [adapter.tensors[a].float().chunk(slices) for adapter in adapters]
        tensors[a] = torch.cat([part[index] for index in range(slices) for part in parts])
        columns = [adapter.scaling / len(adapters) * adapter.tensors[b].float() for adapter in adapters]
        tensors[b] = torch.cat(columns, dim=1)
    rank = sum(adapter.rank for adapter in adapters)
    return replace(
        first,
        rank=rank,
        alpha=float(rank),
        tensors=tensors,
        base_sha256=next(iter(bases), None),
    )


def _model_of(adapter: Adapter) -> str:
    """The model that an adapter is of; the number of its blocks tells where a tower of our own ended."""
    if adapter.model is None:
        return "a tower of EVA"
    size = "".join(f", {name}={value}" for name, value in adapter.options.items())
    return f"{adapter.model}{size}{f', up to block {max(adapter.layers_read)}' if adapter.layers_read else ''}"


def canonical_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """The same targets in the order q k v proj fc1 fc2."""
    given = set(targets)
    return tuple(name for name in MODULES if name in given)


def adapter_of(backbone: EvaViT, *, base_sha256: str | None = None) -> Adapter:
    """A copy (CPU, fp32) of the adapter in a model. Raises ValueError where the model has none."""
    tensors = {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in lora_parameters(backbone).items()
    }
    layers = lora_layers(backbone)
    first = next(iter(layers.values()))
    targets = [
        role
        for role, (path, part, parts) in TARGETS.items()
        if (layer := layers.get(f"blocks.0.{path}")) is not None
        and len(layer.weight) // parts * part in [lo for lo, _ in layer.slices]
    ]
    lora = LoraConfig(rank=first.rank, alpha=first.alpha, targets=tuple(targets))
    return adapter_of_run(lora, tensors, backbone, base_sha256)


def adapter_of_run(
    lora: LoraConfig,
    tensors: Mapping[str, Tensor],
    backbone: Backbone,
    base_sha256: str | None = None,
) -> Adapter:
    """The adapter that a run with `visft.lora` has in these tensors; the model may be on the meta device."""
    adapter = Adapter(
        lora.rank,
        lora.alpha,
        tuple(lora.targets),
        dict(tensors),
        base_sha256,
        layers_read=backbone.layers_read,
    )
    if isinstance(backbone, EvaViT):
        return replace(adapter, targets=canonical_targets(adapter.targets))
    layers = {name: module for name, module in backbone.named_modules() if f"{name}.lora_A" in tensors}
    # In the order of the model's layers, which is that of the file's header.
    names = [f"{layer}.{kind}" for layer in layers for kind in KINDS if f"{layer}.{kind}" in tensors]
    assert len(names) == len(tensors)
    tensors = {name: tensors[name] for name in names}
    return replace(adapter, tensors=tensors, model=backbone.name, options=backbone.options)

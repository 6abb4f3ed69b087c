"""A LoRA adapter apart from any model and any file format; every format reads into it and writes from it.

Legend: r rank, G number of adapted slices of the fused qkv, D width. Tensors are named and shaped as in our model:
`blocks.N.attn.qkv.lora_A` (G*r, D), rows stacked slice by slice in the order q, k, v; `.lora_B` (G*D, r), likewise;
other projections plain: `lora_A` (r, in), `lora_B` (out, r). The change of a weight is (alpha / r) * B @ A, per slice;
with `.lora_magnitude` (G*D,) or (out,) (DoRA) the moved rows then get these lengths.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visft_ds.config.schema import LoraConfig
from visft_ds.interop.files import examples
from visft_ds.interop.layouts import Tower, depth_of, tower_of
from visft_ds.models.adapted import resized
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import TARGETS, LoraSettings, inject_lora, lora_layers, lora_parameters, lora_settings

SLICES = ("q", "k", "v")
# Target -> module inside a block.
MODULES = {target: place[0] for target, place in TARGETS.items()}


@dataclass(frozen=True)
class LoraAdapter:
    """All of an adapter. `targets` in the order q k v proj fc1 fc2; `tensors` as the legend above says.

    `origin` says what it came from (model, peft, visft, checkpoint; average: several of these). `base_sha256` is the
    hash of the base weight file it was trained on, None where nobody recorded it. `base_storage` says how a run of an
    earlier release kept that base, "full" or in few bits; the adapter belongs to the file, in full precision, all the
    same.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    tensors: dict[str, Tensor]
    origin: str
    base_sha256: str | None = None
    magnitude: bool = False
    base_storage: str = "full"

    @property
    def scaling(self) -> float:
        """Factor on B @ A."""
        return self.alpha / self.rank

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
        """Adapted modules inside a block, each once."""
        return tuple(dict.fromkeys(MODULES[target] for target in self.targets))

    def weights(self) -> tuple[str, ...]:
        """Names of all base weights it changes: `blocks.0.attn.qkv.weight`, ..."""
        return tuple(f"blocks.{index}.{module}.weight" for index in range(self.depth) for module in self.modules())

    def delta(self, weight: str) -> Tensor:
        """scaling * B @ A of one base weight, dense, fp32, (out, in); zero in slices that are not adapted."""
        stem = weight.removesuffix(".weight")
        a, b = self.tensors[stem + ".lora_A"].float(), self.tensors[stem + ".lora_B"].float()
        if not stem.endswith("attn.qkv"):
            return self.scaling * (b @ a)
        width = a.shape[1]
        result = torch.zeros(3 * width, width)
        for group, name in enumerate(self.slices()):
            start = SLICES.index(name) * width
            rows_b = b[group * width : (group + 1) * width]
            rows_a = a[group * self.rank : (group + 1) * self.rank]
            torch.matmul(rows_b, rows_a, out=result[start : start + width])
        return result.mul_(self.scaling)

    def change(self, weight: str, base: Tensor) -> Tensor:
        """The change of one base weight (fp32, (out, in)): `delta`, and with magnitudes what they make of it."""
        result = self.delta(weight)
        if self.magnitude:
            stem = weight.removesuffix(".weight")
            magnitude = self.tensors[stem + ".lora_magnitude"].float()
            own = [SLICES.index(name) for name in self.slices()] if stem.endswith("attn.qkv") else [0]
            width = len(magnitude) // len(own)
            for part, lengths in zip(own, magnitude.chunk(len(own)), strict=True):
                rows = slice(part * width, (part + 1) * width)
                result[rows] = resized(base[rows], result[rows], lengths)
        return result

    def apply(self, weight: str, base: Tensor) -> tuple[Tensor, Tensor]:
        """(result, change) of one base weight, fp32 all."""
        change = self.change(weight, base)
        return base + change, change

    def record(self) -> dict[str, object]:
        """Entry in the metadata of merged weights."""
        return {"rank": self.rank, "alpha": self.alpha, "targets": self.targets, "magnitude": self.magnitude}

    def describe(self) -> str:
        """A few words for the console."""
        kind = "DoRA, rank" if self.magnitude else "rank"
        return f"{kind} {self.rank}, scaling {self.scaling:g}, {'+'.join(self.targets)}"

    def fit(self, tower: Tower) -> LoraAdapter:
        """See `fit_to_tower`."""
        return fit_to_tower(self, tower)

    def install(self, backbone: EvaViT) -> None:
        """See `install_adapter`."""
        install_adapter(backbone, self)

    def fingerprint(self) -> str:
        """sha256 of what it computes with: settings and values, whatever file they came from."""
        settings = (self.rank, float(self.alpha), self.targets, *(("magnitude",) * self.magnitude))
        digest = hashlib.sha256(repr(settings).encode())
        for name in sorted(self.tensors):
            digest.update(name.encode())
            digest.update(self.tensors[name].float().contiguous().numpy().data)
        return digest.hexdigest()


def average(adapters: Sequence[LoraAdapter], weights: Sequence[float]) -> LoraAdapter:
    """Adapter whose change of every weight is the weighted sum of theirs, exactly: ranks add up, scaling is 1.

    Factors A and B themselves are not averaged: the product of two means is not the mean of two products. (PEFT calls
    this combination "cat".)

    Raises ValueError for adapters of other projections, towers or bases, and for weights that are not one a piece.
    """
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"{len(adapters)} adapters and weights {list(weights)}: give one finite number for each")
    first = adapters[0]
    if any(adapter.magnitude for adapter in adapters):
        raise ValueError("adapters with magnitudes (DoRA) cannot be averaged: their changes are no low-rank sums")
    for other in adapters[1:]:
        if (other.targets, other.depth, other.width) != (first.targets, first.depth, first.width):
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
    groups = len(first.slices())
    tensors: dict[str, Tensor] = {}
    for name in first.tensors:
        slices = groups if ".attn.qkv." in name else 1
        if name.endswith("lora_A"):
            parts = [adapter.tensors[name].float().chunk(slices) for adapter in adapters]
            tensors[name] = torch.cat([part[group] for group in range(slices) for part in parts])
        else:
            factors = [w * adapter.scaling for w, adapter in zip(weights, adapters, strict=True)]
            columns = [f * adapter.tensors[name].float() for f, adapter in zip(factors, adapters, strict=True)]
            tensors[name] = torch.cat(columns, dim=1)
    rank = sum(adapter.rank for adapter in adapters)
    origins = {adapter.origin for adapter in adapters}
    origin = first.origin if len(origins) == 1 else "average"
    storages = sorted({adapter.base_storage for adapter in adapters})
    base, storage = next(iter(bases), None), " and ".join(storages)
    return LoraAdapter(rank, float(rank), first.targets, tensors, origin, base, base_storage=storage)


def canonical_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """The same targets in the order q k v proj fc1 fc2."""
    given = set(targets)
    return tuple(name for name in MODULES if name in given)


def expected_shapes(adapter: LoraAdapter, tower: Tower) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor an adapter of these settings has on a tower."""
    groups, rank = len(adapter.slices()), adapter.rank
    sizes = {
        "attn.qkv": (tower.width, groups * rank, groups * tower.width),
        "attn.proj": (tower.width, rank, tower.width),
        "mlp.fc1": (tower.width, rank, tower.hidden),
        "mlp.fc2": (tower.hidden, rank, tower.width),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(tower.depth):
        for module in adapter.modules():
            fan_in, rows, fan_out = sizes[module]
            shapes[f"blocks.{index}.{module}.lora_A"] = (rows, fan_in)
            shapes[f"blocks.{index}.{module}.lora_B"] = (fan_out, rank)
            if adapter.magnitude:
                shapes[f"blocks.{index}.{module}.lora_magnitude"] = (fan_out,)
    return shapes


def fit_to_tower(adapter: LoraAdapter, tower: Tower) -> LoraAdapter:
    """The adapter, checked to have exactly the tensors that its settings mean on this tower.

    A published ViSFT adapter of the 40-block giant loses its last block on a 39-block tower (LAVIS builds it without
    that block) with a warning. Raises ValueError for every other difference, and for values that are not finite.
    """
    if adapter.origin == "visft" and (adapter.depth, tower.depth) == (40, 39):
        warnings.warn(
            "the adapter has 40 blocks and the tower 39 (the giant as LAVIS cuts it): the adapter's block 39 is "
            "ignored",
            UserWarning,
            stacklevel=2,
        )
        kept = {name: value for name, value in adapter.tensors.items() if not name.startswith("blocks.39.")}
        adapter = replace(adapter, tensors=kept)
    if (adapter.depth, adapter.width) != (tower.depth, tower.width):
        raise ValueError(
            f"the adapter is for a tower of width {adapter.width}, depth {adapter.depth}; this tower has "
            f"{tower.describe()}: take the adapter and the base of the same model"
        )
    wanted = expected_shapes(adapter, tower)
    wrong = [f"{name} is missing" for name in wanted if name not in adapter.tensors]
    wrong += [f"{name} is unexpected" for name in adapter.tensors if name not in wanted]
    wrong += [
        f"{name} is {tuple(adapter.tensors[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if name in adapter.tensors and tuple(adapter.tensors[name].shape) != shape
    ]
    wrong += [f"{name} holds NaN or infinity" for name, value in adapter.tensors.items() if not value.isfinite().all()]
    if wrong:
        raise ValueError(
            f"the adapter (rank {adapter.rank}, {'+'.join(adapter.targets)}) is not whole: {examples(wrong)}"
        )
    return adapter


def adapter_of(backbone: EvaViT, *, base_sha256: str | None = None) -> LoraAdapter:
    """A copy (CPU, fp32) of the adapter in a model. Raises ValueError where the model has none."""
    settings = lora_settings(backbone)
    tensors = {
        name: parameter.detach().to("cpu", torch.float32, copy=True)
        for name, parameter in lora_parameters(backbone).items()
    }
    return LoraAdapter(
        settings.rank, settings.alpha, settings.targets, tensors, "model", base_sha256, settings.magnitude
    )


def adapter_of_run(
    lora: LoraConfig, tensors: dict[str, Tensor], origin: str, base_sha256: str | None = None
) -> LoraAdapter:
    """The adapter that a run with `visft.lora` has in these tensors."""
    targets = canonical_targets(lora.targets)
    return LoraAdapter(lora.rank, lora.alpha, targets, tensors, origin, base_sha256, lora.magnitude)


def merged_modules(backbone: EvaViT) -> list[str]:
    """Names of the layers whose weight contains its adapter right now."""
    return [name for name, layer in lora_layers(backbone).items() if layer.merged]


def install_adapter(backbone: EvaViT, adapter: LoraAdapter) -> None:
    """Put an adapter into a model: inject LoRA of its settings where the model has none, then copy every value.

    Raises ValueError where the adapter does not fit the tower, and where the model has LoRA of other settings.
    """
    adapter = fit_to_tower(adapter, tower_of(backbone))
    if merged_modules(backbone):
        raise ValueError("the model has its adapter merged in: call unmerge_lora before loading another")
    if lora_parameters(backbone):
        settings = lora_settings(backbone)
        wanted = LoraSettings(adapter.rank, adapter.alpha, adapter.targets, adapter.magnitude)
        if settings != wanted:
            raise ValueError(
                f"the model has {_described(settings)}; the adapter has {_described(wanted)}: use the adapter's "
                f"settings"
            )
    else:
        inject_lora(
            backbone,
            rank=adapter.rank,
            alpha=adapter.alpha,
            targets=adapter.targets,
            magnitude=adapter.magnitude,
        )
    parameters = lora_parameters(backbone)
    assert set(parameters) == set(adapter.tensors)
    with torch.no_grad():
        for name, value in adapter.tensors.items():
            parameters[name].copy_(value)


def _described(settings: LoraSettings) -> str:
    kind = "DoRA" if settings.magnitude else "LoRA"
    return f"{kind} of rank {settings.rank}, alpha {settings.alpha:g} on {'+'.join(settings.targets)}"

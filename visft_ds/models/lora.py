"""Low-rank adapters inside a backbone (LoRA, https://arxiv.org/abs/2106.09685), with an explicit merge.

An adapted layer keeps the names of the layer it replaces (`weight`, `bias`), adding `lora_A` and `lora_B`, stacked over
the adapted slices as loralib's MergedLinear stacks them, so files of either kind load as they are. On the fused qkv
projection any of q, k and v can be adapted alone. The paper's code adapts q and v with rank 64 and alpha 1: scale 1/64.
With a magnitude (DoRA, https://arxiv.org/abs/2402.09353) each adapted row also has a length that is learnt.

Evaluation mode changes nothing: only `merge_lora` merges, and refuses to do it twice.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.models.adapted import KINDS, AdaptedLayer, resized
from visft_ds.models.eva_vit import generator_for
from visft_ds.models.layers import Linear
from visft_ds.models.lora_conv import LoRAConv2d
from visft_ds.ops import matmul_dtype
from visft_ds.ops.dora import dora_linear, row_lengths
from visft_ds.ops.lora import Slices, lora_linear

#: target -> (path of the layer in a block, which part of its output, number of equal parts), in stacking order
TARGETS = {
    "q": ("attn.qkv", 0, 3),
    "k": ("attn.qkv", 1, 3),
    "v": ("attn.qkv", 2, 3),
    "proj": ("attn.proj", 0, 1),
    "fc1": ("mlp.fc1", 0, 1),
    "fc2": ("mlp.fc2", 0, 1),
}


class LoRALinear(AdaptedLayer):
    """A `Linear` with low-rank updates on slices of its output; takes over the parameters of the layer it replaces.

    Parameters: weight (out, in), bias (out,) or None, lora_A (G*r, in), lora_B (R, r), lora_magnitude (R,) or None, R
    the sum of the slices' widths. The adapters are fp32 over weights of any narrower dtype; A starts uniform in
    +-1/sqrt(in), B zero, magnitudes as the lengths of the weight's rows, so that nothing changes at the start.
    """

    def __init__(
        self,
        base: Linear | nn.Linear,
        slices: Slices,
        *,
        rank: int,
        alpha: float,
        magnitude: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        a, b = (len(slices) * rank, base.in_features), (sum(hi - lo for lo, hi in slices), rank)
        super().__init__(base, a, b, rank=rank, alpha=alpha, magnitude=magnitude)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.slices = slices
        self.start(generator)

    def first_magnitude(self, weight: Tensor) -> Tensor:
        """See `AdaptedLayer`; weight (out, in)."""
        a, b = (weight.new_zeros(self.shapes[kind]) for kind in ("lora_A", "lora_B"))
        return row_lengths(weight, a, b, self.scale, self.slices)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out). A bias given here replaces the module's own."""
        bias = self.bias if bias is None else bias
        if self.merged:
            dtype = matmul_dtype(self.weight)
            return F.linear(x.to(dtype), self.weight.to(dtype), None if bias is None else bias.to(dtype))
        factors = (self.weight, bias, self.lora_A, self.lora_B)
        if self.lora_magnitude is not None:
            return dora_linear(x, *factors, self.lora_magnitude, self.scale, self.slices)
        return lora_linear(x, *factors, self.scale, self.slices)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """The dense change (out, in) of the weight, which is not merged, in the precision of the adapters."""
        out = self.lora_A.new_zeros(self.out_features, self.in_features)
        start = 0
        for index, (lo, hi) in enumerate(self.slices):
            a = self.lora_A[index * self.rank : (index + 1) * self.rank]
            part = slice(start, start + hi - lo)
            out[lo:hi] = self.scale * (self.lora_B[part] @ a)
            if self.lora_magnitude is not None:
                out[lo:hi] = resized(self.weight[lo:hi], out[lo:hi], self.lora_magnitude[part])
            start += hi - lo
        return out

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, slices={self.slices}, "
            f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"
        )


@dataclass(frozen=True)
class LoraSettings:
    """Hyperparameters of a model's adapters."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  #: in the order of TARGETS
    magnitude: bool = False


def inject_lora(
    backbone: nn.Module,
    *,
    rank: int = 64,
    alpha: float = 1.0,
    targets: Iterable[str] = ("q", "v"),
    magnitude: bool = False,
    seed: int = 0,
) -> None:
    """Replace the targeted layers by adapted ones, in place.

    The forward does not change by this (B is zero, magnitudes are the rows' own), the names and objects of the existing
    parameters neither. The new parameters require gradients; nothing else is frozen or thawed. Slices of a layer are
    stacked in the order q, k, v.

    Args:
        rank: of each slice's update.
        alpha: the update is scaled by alpha / rank.
        targets: roles in every block of `backbone.blocks`, q, k, v, proj, fc1, fc2; or globs over the names of linear
            layers and convolutions, such as "stages.*.mlp.fc1".
        magnitude: adapted rows have a length of their own that is learnt (DoRA).
        seed: decides A of every layer, whatever the device and the state of the global generators.

    Raises:
        ValueError: a repeated or unmatched target, none at all, a layer that two of them adapt, adapters already there,
            rank or alpha not positive.
    """
    targets = tuple(targets)
    if not targets or len(set(targets)) < len(targets):
        raise ValueError(f"LoRA targets {targets}: give at least one of {', '.join(TARGETS)}, each at most once")
    if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"LoRA rank {rank} and alpha {alpha} must be positive")
    if lora_layers(backbone):
        raise ValueError("the model has LoRA adapters already; inject them once, into a model without")
    plan = _layers_of_roles(backbone, tuple(target for target in targets if target in TARGETS))
    for glob in (target for target in targets if target not in TARGETS):
        found = _layers_of_glob(backbone, glob)
        if twice := [name for name in found if name in plan]:
            raise ValueError(f"LoRA targets {targets}: {twice[0]} is adapted by two of them")
        plan |= found
    options: dict[str, Any] = {"rank": rank, "alpha": alpha, "magnitude": magnitude}
    for name, (layer, slices) in plan.items():
        parent, _, child = name.rpartition(".")
        generator = generator_for(seed, name)
        adapted: AdaptedLayer
        if isinstance(layer, nn.Conv2d):
            adapted = LoRAConv2d(layer, **options, generator=generator)
        else:
            adapted = LoRALinear(layer, slices, **options, generator=generator)
        setattr(backbone.get_submodule(parent), child, adapted.train(layer.training))


Adaptable = Linear | nn.Linear | nn.Conv2d
Planned = dict[str, tuple[Adaptable, Slices]]


def _layers_of_roles(backbone: nn.Module, roles: tuple[str, ...]) -> Planned:
    """Name -> layer and its slices, of roles in every block."""
    if not roles:
        return {}
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
        raise ValueError(
            f"{_name(backbone)} has no list of blocks, in which {', '.join(roles)} have a meaning: give "
            f"visft.lora.targets as globs over its layers: {_some_layers(backbone)}"
        )
    plan: Planned = {}
    for name, parts in (
        (f"blocks.{index}.{path}", parts)
        for index in range(len(blocks))
        for path, parts in _slices_by_layer(roles).items()
    ):
        layer = _find(backbone, name)
        fused = name.endswith("attn.qkv")
        if not isinstance(layer, Linear | nn.Linear) or (fused and layer.out_features != 3 * layer.in_features):
            raise ValueError(
                f"LoRA targets {roles} need a Linear layer at {name}, which {_name(backbone)} has not; it has "
                f"{_some_layers(backbone)}"
            )
        plan[name] = (layer, tuple(_range(layer.out_features, part, of) for part, of in parts))
    return plan


def _layers_of_glob(backbone: nn.Module, glob: str) -> Planned:
    found: Planned = {}
    for name, layer in _adaptable(backbone).items():
        if fnmatchcase(name, glob):
            out = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
            found[name] = (layer, ((0, out),))
    if not found:
        near = difflib.get_close_matches(glob, [*TARGETS, *_adaptable(backbone)], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"LoRA target {glob!r} matches no linear layer and no convolution{hint} {_name(backbone)} has "
            f"{_some_layers(backbone)}; roles in blocks: {', '.join(TARGETS)}"
        )
    return found


def _adaptable(backbone: nn.Module) -> dict[str, Adaptable]:
    """Layers whose forward is that of their class: subclasses may compute something else with the weight."""
    kinds = (Linear, nn.Linear, nn.Conv2d)
    return {name: module for name, module in backbone.named_modules() if type(module) in kinds}


def _some_layers(backbone: nn.Module) -> str:
    names = [re.sub(r"\.\d+\.", ".*.", name) for name in _adaptable(backbone)]
    return ", ".join(list(dict.fromkeys(names))[:8])


def _name(backbone: nn.Module) -> str:
    return str(getattr(backbone, "name", type(backbone).__name__))


def first_value(backbone: nn.Module, name: str, seed: int, read: Callable[[str], Tensor]) -> Tensor:
    """Initial value that `inject_lora` with this seed gives an adapter's parameter: fp32, on the CPU.

    For a backbone on the meta device, which `inject_lora` gives shapes only.

    Args:
        name: "...lora_A", "...lora_B" or "...lora_magnitude".
        read: gives the backbone's own parameters, by name, as the model starts with them.
    """
    path, _, kind = name.rpartition(".")
    layer = lora_layers(backbone)[path]
    if kind == "lora_A":
        return layer.random_a(generator_for(seed, path))
    return torch.zeros(layer.shapes[kind]) if kind == "lora_B" else layer.first_magnitude(read(f"{path}.weight"))


def lora_layers(module: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers by qualified name, in order of the blocks."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, AdaptedLayer)}


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by qualified name: `...lora_A`, `...lora_B`, and `...lora_magnitude` if there is one."""
    return {
        f"{name}.{kind}" if name else kind: getattr(layer, kind)
        for name, layer in lora_layers(module).items()
        for kind in KINDS
        if getattr(layer, kind) is not None
    }


def lora_settings(module: nn.Module) -> LoraSettings:
    """Rank, alpha, targets (roles) and kind of an EvaViT's adapters. Raises ValueError where it has none."""
    layers = _require_lora(module)
    first = next(iter(layers.values()))
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALinear)}
    found = {
        target
        for name, layer in linear.items()
        for target, (path, part, of) in TARGETS.items()
        if name.endswith(path) and _range(layer.out_features, part, of) in layer.slices
    }
    targets = tuple(target for target in TARGETS if target in found)
    return LoraSettings(first.rank, first.alpha, targets, first.lora_magnitude is not None)


def merge_lora(module: nn.Module) -> dict[str, float]:
    """Merge every adapter into its weight (see `AdaptedLayer.merge`); the originals are kept for `unmerge_lora`.

    Returns:
        Layer name -> retained share of its update: 16-bit weights round part of a small update away.

    Raises:
        ValueError: no adapters, or any of them merged already (then nothing is changed).
    """
    layers = _require_lora(module)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(
            f"{len(merged)} of {len(layers)} LoRA layers are already merged, e.g. {merged[0]}; unmerge first"
        )
    return {name: layer.merge() for name, layer in layers.items()}


def unmerge_lora(module: nn.Module) -> None:
    """Put every original weight back, bit for bit. Raises ValueError where adapters are missing or not merged."""
    layers = _require_lora(module)
    plain = [name for name, layer in layers.items() if not layer.merged]
    if plain:
        raise ValueError(f"{len(plain)} of {len(layers)} LoRA layers are not merged, e.g. {plain[0]}; merge first")
    for layer in layers.values():
        layer.unmerge()


@torch.no_grad()
def has_effect(module: nn.Module, inputs: Tensor) -> float:
    """Relative change of the output under perturbation of every lora_B, to find adapters that the forward bypasses.

    A lora_B is perturbed only while its layer runs, and restored afterwards: a module whose
    parameters are gathered for the forward of their own module can be judged, too.

    Args:
        module: with unmerged adapters, tensor -> tensor.
        inputs: on the module's device; images (B, 3, H, W) for a backbone.

    Returns:
        |changed - plain| / |plain| (Frobenius norms); 0.0 as soon as one adapted layer is not run at all.

    Raises:
        ValueError: no adapters, or merged ones.
    """
    layers = _require_lora(module)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the LoRA layers are merged and have no effect of their own; unmerge first")
    names, saved = {layer: name for name, layer in layers.items()}, dict[AdaptedLayer, Tensor]()

    def disturb(layer: AdaptedLayer, _: Any) -> None:
        saved[layer] = layer.lora_B.clone()
        noise = torch.randn(layer.lora_B.shape, generator=generator_for(0, names[layer]))
        # With A and the scale the layer's output changes by about half its input's size: large enough to see
        # through 16-bit rounding and through a softmax that is nearly uniform (k alone).
        layer.lora_B.add_(noise.to(layer.lora_B) / (layer.scale * math.sqrt(layer.rank)))

    def restore(layer: AdaptedLayer, *_: Any) -> None:
        layer.lora_B.copy_(saved.pop(layer))

    reached: set[AdaptedLayer] = set()
    with ExitStack() as hooks:
        for layer in layers.values():
            hooks.callback(layer.register_forward_hook(lambda layer, *_: reached.add(layer)).remove)
        plain: Tensor = module(inputs)
    if len(reached) < len(layers):
        return 0.0
    with ExitStack() as hooks:
        for layer in layers.values():
            hooks.callback(layer.register_forward_pre_hook(disturb).remove)
            # Ahead of a hook that takes gathered values away, and also where the layer fails.
            hooks.callback(layer.register_forward_hook(restore, prepend=True, always_call=True).remove)
        changed: Tensor = module(inputs)
    return float((changed - plain).double().norm() / plain.double().norm())


def _require_lora(module: nn.Module) -> dict[str, AdaptedLayer]:
    layers = lora_layers(module)
    if not layers:
        raise ValueError(f"{type(module).__name__} has no LoRA adapters; call inject_lora first")
    return layers


def _slices_by_layer(targets: tuple[str, ...]) -> dict[str, list[tuple[int, int]]]:
    grouped: dict[str, list[tuple[int, int]]] = {}
    for target, (path, part, of) in TARGETS.items():
        if target in targets:
            grouped.setdefault(path, []).append((part, of))
    return grouped


def _range(width: int, part: int, of: int) -> tuple[int, int]:
    return width // of * part, width // of * (part + 1)


def _find(module: nn.Module, name: str) -> nn.Module | None:
    return dict(module.named_modules()).get(name)

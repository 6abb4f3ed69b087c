"""Low-rank adapters inside a backbone (LoRA, https://arxiv.org/abs/2106.09685).

An adapted layer keeps the names of the layer it replaces (`weight`, `bias`), adding `lora_A` and `lora_B`, stacked over
the adapted slices as loralib's MergedLinear stacks them, so files of either kind load as they are. A slice is a range
of output rows: on the fused qkv projection any of q, k and v can be adapted alone. ViSFT's code adapts q and v with
rank 64 and alpha 1: scale 1/64.

On convolutions, grouped and depthwise ones too, the weight (out, in / groups, k, k) is updated as a matrix with a row
for each output channel, as in LoCon (https://github.com/KohakuBlueleaf/LyCORIS). Without groups the update is a
convolution to r channels followed by a 1x1 one, which is PEFT's form. With groups all groups share A, so that the
update has the shape of the grouped weight and can be merged; PEFT's has that of a weight without groups.

Evaluation mode changes nothing (loralib merges in `eval()`, and ViSFT's code then adds the update a second time).

Letters: G slices of a layer, r rank, R adapted rows: the sum of the slices' widths.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.models.eva_vit import generator_for
from visft_ds.models.layers import Linear
from visft_ds.ops import no_autocast
from visft_ds.ops.lora import Slices, WideWeight, lora_linear, parts_of

#: Parameters that an adapted layer may add to those of the layer it replaces.
KINDS = ("lora_A", "lora_B")
_FUSED = "attn.qkv"  #: where a tower keeps q, k and v in one layer; EVA-02's larger ones of timm have attn.q_proj, ...
#: target -> (path of the layer in a block, index of the part of its output, number of equal parts), in stacking order
TARGETS = {
    "q": (_FUSED, 0, 3),
    "k": (_FUSED, 1, 3),
    "v": (_FUSED, 2, 3),
    "proj": ("attn.proj", 0, 1),
    "fc1": ("mlp.fc1", 0, 1),
    "fc2": ("mlp.fc2", 0, 1),
}


@dataclass(frozen=True)
class AdaptedRows:
    """The rows of a weight, or output channels, that low-rank updates change."""

    slices: Slices  #: (first, end) of each range of adapted rows, ascending
    rows: int  #: of the weight in all
    groups: int = 1  #: of a convolution

    @property
    def unsliced(self) -> bool:
        """Return True if the weight is adapted as one matrix."""
        return self.slices == ((0, self.rows),)

    def parts(self, rank: int) -> Iterator[tuple[slice, slice, slice]]:
        """(rows of the weight, rows of lora_A, rows of lora_B) of each slice."""
        for lo, hi, rows_of_a, rows_of_b in parts_of(self.slices, rank):
            yield slice(lo, hi), rows_of_a, rows_of_b

    def update(self, a: Tensor, b: Tensor, scale: float) -> Tensor:
        """Dense scale * B A (rows, fan in) in the precision of the factors; zero in rows that are not adapted."""
        result = a.new_zeros(self.rows, a[0].numel())
        for changed, rows_of_a, rows_of_b in self.parts(b.shape[1]):
            torch.matmul(b[rows_of_b], a[rows_of_a].flatten(1), out=result[changed])
        return result.mul_(scale)


class AdaptedLayer(nn.Module):
    """Layer with the weight and bias of the one it replaces, lora_A and lora_B. Subclasses compute the forward."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, base: nn.Module, adapted: AdaptedRows, fan_in: Sequence[int], *, rank: int, alpha: float
    ) -> None:
        """Take over a layer's parameters; the adapters are fp32, or fp64 over fp64 weights.

        Args:
            base: the layer to replace, with `weight` and `bias`.
            fan_in: shape of a row of the weight and of a row of lora_A.
        """
        super().__init__()
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / rank
        self.adapted = adapted
        a, b = (len(adapted.slices) * rank, *fan_in), (sum(hi - lo for lo, hi in adapted.slices), rank)
        self.shapes = {"lora_A": a, "lora_B": b}  # under ZeRO-3 the parameters' own shape is (0,)
        weight: Any = base.weight
        self.weight = weight
        self.register_parameter("bias", base.bias)  # type: ignore[arg-type]
        like: dict[str, Any] = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.lora_A = nn.Parameter(torch.empty(*a, **like))
        self.lora_B = nn.Parameter(torch.zeros(*b, **like))

    def start(self, generator: torch.Generator | None) -> None:
        """Initialise A; on the meta device there is nothing to do. B is zero from the beginning."""
        if not self.weight.is_meta:
            self.lora_A.data.copy_(self.random_a(generator))

    def random_a(self, generator: torch.Generator | None = None) -> Tensor:
        """Initial values of A, fp32 on the CPU, so that every device starts alike.

        kaiming_uniform_(a=sqrt(5)), as loralib initialises it: uniform in +-1/sqrt(fan in).
        """
        shape = self.shapes["lora_A"]
        bound = 1.0 / math.sqrt(math.prod(shape[1:]))
        return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)


class LoRALinear(AdaptedLayer):
    """A `Linear` with low-rank updates on slices of its output.

    Parameters: weight (out, in), bias (out,) or None, lora_A (G*r, in), lora_B (R, r). A starts uniform in
    +-1/sqrt(in), B at zero: the output does not change at the start.
    """

    def __init__(
        self,
        base: Linear | nn.Linear,
        slices: Slices,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
    ) -> None:
        adapted = AdaptedRows(slices, base.out_features)
        super().__init__(base, adapted, (base.in_features,), rank=rank, alpha=alpha)
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.slices = slices
        self._wide = WideWeight()
        self.start(generator)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LoRALinear:
        """Move or cast the parameters (`.to()`, `.half()`), and give back the memory that the weight looked into."""
        super()._apply(fn, recurse)
        self._wide = WideWeight()
        return self

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out). A bias given here replaces the module's own (EVA's qkv: see `Attention`)."""
        factors = (self.weight, self.bias if bias is None else bias, self.lora_A, self.lora_B)
        return lora_linear(x, *factors, self.scale, self.slices, wide=self._wide)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, slices={self.slices}, "
            f"rank={self.rank}, alpha={self.alpha:g}"
        )


class LoRAConv2d(AdaptedLayer):
    """An `nn.Conv2d` with a low-rank update: lora_A (r, in / groups, k, k), lora_B (out, r)."""

    def __init__(
        self,
        base: nn.Conv2d,
        *,
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
    ) -> None:
        out, *fan_in = base.weight.shape
        adapted = AdaptedRows(((0, out),), out, base.groups)
        super().__init__(base, adapted, fan_in, rank=rank, alpha=alpha)
        self.stride, self.padding, self.dilation, self.groups = base.stride, base.padding, base.dilation, base.groups
        self.out_channels, self.kernel_size = out, base.kernel_size
        self.start(generator)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W') in the dtype that torch chooses for a convolution."""
        window: tuple[Any, Any, Any] = (self.stride, self.padding, self.dilation)
        y = F.conv2d(x, self.weight, self.bias, *window, self.groups)
        if self.groups == 1:
            inner = F.conv2d(x, self.lora_A, None, *window)
            return y + self.scale * F.conv2d(inner, self.lora_B[:, :, None, None])
        return y + F.conv2d(x, self._update(), None, *window, self.groups)

    def _update(self) -> Tensor:
        """scale * B A in the shape of the weight, in the precision of the adapters."""
        with no_autocast(self.lora_A.device):
            return self.scale * torch.einsum("or,rikl->oikl", self.lora_B, self.lora_A)

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.weight.shape)}, stride={self.stride}, groups={self.groups}, bias={self.bias is not None}, "
            f"rank={self.rank}, alpha={self.alpha:g}"
        )


@dataclass(frozen=True)
class LoraSettings:
    """Hyperparameters of a model's adapters."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  #: in the order of TARGETS


def inject_lora(
    backbone: nn.Module,
    *,
    rank: int = 64,
    alpha: float = 1.0,
    targets: Iterable[str] = ("q", "v"),
    seed: int = 0,
) -> None:
    """Replace the targeted layers by adapted ones, in place.

    The output does not change by this, nor do names and objects of the existing parameters. The new parameters require
    gradients; `requires_grad` of the others stays. Slices of a layer are stacked in the order q, k, v.

    Args:
        rank: of each slice's update.
        alpha: the update is scaled by alpha / rank.
        targets: roles in every block of `backbone.blocks` (keys of TARGETS); or globs over the names of linear layers
            and convolutions, such as "stages.*.mlp.fc1".
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
    options: dict[str, Any] = {"rank": rank, "alpha": alpha}
    for name, (layer, slices) in plan.items():
        parent, _, child = name.rpartition(".")
        generator = generator_for(seed, name)
        adapted: AdaptedLayer
        if isinstance(layer, nn.Conv2d):
            adapted = LoRAConv2d(layer, **options, generator=generator)
        else:
            adapted = LoRALinear(layer, slices, **options, generator=generator)
            attention: Any = backbone.get_submodule(parent)
            if hasattr(attention, "qkv_bias_separate"):
                attention.qkv_bias_separate = True  # else timm's EVA reads the weight past its layer
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
    by_layer = _parts_by_layer(roles)
    for index, path in itertools.product(range(len(blocks)), by_layer):
        name = f"blocks.{index}.{path}"
        if path == _FUSED and _find(backbone, name) is None:
            parts = {role: _find(backbone, f"blocks.{index}.attn.{role}_proj") for role in roles if role in "qkv"}
            split = {role: layer for role, layer in parts.items() if isinstance(layer, nn.Linear)}
            if split and len(split) == len(parts):
                plan |= {
                    f"blocks.{index}.attn.{role}_proj": (layer, ((0, layer.out_features),))
                    for role, layer in split.items()
                }
                continue
        layer = _find(backbone, name)
        fused = path == _FUSED
        if not isinstance(layer, Linear | nn.Linear) or (fused and layer.out_features != 3 * layer.in_features):
            raise ValueError(
                f"LoRA targets {roles} need a Linear layer at {name}, which {_name(backbone)} has not; it has "
                f"{_some_layers(backbone)}"
            )
        plan[name] = (layer, tuple(_range(layer.out_features, part, of) for part, of in by_layer[path]))
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


def first_value(backbone: nn.Module, name: str, seed: int) -> Tensor:
    """Initial value that `inject_lora` with this seed gives an adapter's parameter: fp32, on the CPU.

    For a backbone on the meta device, where `inject_lora` makes shapes only; values are drawn as they are needed.

    Args:
        name: "...lora_A" or "...lora_B".
    """
    path, _, kind = name.rpartition(".")
    layer = lora_layers(backbone)[path]
    return layer.random_a(generator_for(seed, path)) if kind == "lora_A" else torch.zeros(layer.shapes[kind])


def lora_layers(module: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers by qualified name, in order of the blocks."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, AdaptedLayer)}


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by qualified name: `...lora_A`, `...lora_B`."""
    return {
        f"{name}.{kind}" if name else kind: getattr(layer, kind)
        for name, layer in lora_layers(module).items()
        for kind in KINDS
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
    return LoraSettings(first.rank, first.alpha, targets)


@torch.no_grad()
def has_effect(module: nn.Module, inputs: Tensor) -> float:
    """Relative change of the output under perturbation of every lora_B, to find adapters that the forward bypasses.

    A lora_B is perturbed only while its layer runs, and restored afterwards: so the test works under ZeRO-3 too, where
    a parameter has values only then.

    Args:
        module: with adapters, tensor -> tensor.
        inputs: on the module's device; images (B, 3, H, W) for a backbone.

    Returns:
        |changed - plain| / |plain| (Frobenius norms); 0.0 as soon as one adapted layer is not run at all.

    Raises:
        ValueError: no adapters.
    """
    layers = _require_lora(module)
    names, saved = {layer: name for name, layer in layers.items()}, dict[AdaptedLayer, Tensor]()

    def perturb(layer: AdaptedLayer, _: Any) -> None:
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
            hooks.callback(layer.register_forward_pre_hook(perturb).remove)
            # Before ZeRO-3's hook that frees gathered values, and also where the layer fails.
            hooks.callback(layer.register_forward_hook(restore, prepend=True, always_call=True).remove)
        changed: Tensor = module(inputs)
    return float((changed - plain).double().norm() / plain.double().norm())


def _require_lora(module: nn.Module) -> dict[str, AdaptedLayer]:
    layers = lora_layers(module)
    if not layers:
        raise ValueError(f"{type(module).__name__} has no LoRA adapters; call inject_lora first")
    return layers


def _parts_by_layer(targets: tuple[str, ...]) -> dict[str, list[tuple[int, int]]]:
    """Path of a layer in a block -> (index, number of equal parts) of each adapted part of its output."""
    grouped: dict[str, list[tuple[int, int]]] = {}
    for target, (path, part, of) in TARGETS.items():
        if target in targets:
            grouped.setdefault(path, []).append((part, of))
    return grouped


def _range(width: int, part: int, of: int) -> tuple[int, int]:
    """(first, end) of a part of `width` outputs in `of` equal ones."""
    return width // of * part, width // of * (part + 1)


def _find(module: nn.Module, name: str) -> nn.Module | None:
    return dict(module.named_modules()).get(name)

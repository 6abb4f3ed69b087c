"""Low-rank adapters inside a backbone (LoRA, https://arxiv.org/abs/2106.09685), with an explicit merge.

An adapted layer keeps the names of the layer it replaces (`weight`, `bias`), adding `lora_A` and `lora_B`, stacked over
the adapted slices as loralib's MergedLinear stacks them, so files of either kind load as they are. On the fused qkv
projection any of q, k and v can be adapted alone. The paper's code adapts q and v with rank 64 and alpha 1: scale 1/64.
With a magnitude (DoRA, https://arxiv.org/abs/2402.09353) each adapted row also has a length that is learnt.

Evaluation mode changes nothing: only `merge_lora` merges, and refuses to do it twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.models.eva_vit import generator_for
from visft_ds.models.layers import Linear
from visft_ds.ops import matmul_dtype
from visft_ds.ops.dora import dora_linear, row_lengths
from visft_ds.ops.lora import Slices, lora_linear

#: Parameters that an adapted layer may have beside those of the layer it replaces.
KINDS = ("lora_A", "lora_B", "lora_magnitude")
#: target -> (path of the layer in a block, which part of its output, number of equal parts), in stacking order
TARGETS = {
    "q": ("attn.qkv", 0, 3),
    "k": ("attn.qkv", 1, 3),
    "v": ("attn.qkv", 2, 3),
    "proj": ("attn.proj", 0, 1),
    "fc1": ("mlp.fc1", 0, 1),
    "fc2": ("mlp.fc2", 0, 1),
}


class LoRALinear(nn.Module):
    """A `Linear` with low-rank updates on slices of its output; takes over the parameters of the layer it replaces.

    Parameters: weight (out, in), bias (out,) or None, lora_A (G*r, in), lora_B (R, r), lora_magnitude (R,) or None, R
    the sum of the slices' widths. The adapters are fp32 over weights of any narrower dtype; A starts uniform in
    +-1/sqrt(in), B zero, magnitudes as the lengths of the weight's rows, so that nothing changes at the start.
    While merged, `state_dict` holds the merged weight without the adapters, so that nothing can apply them again.
    """

    bias: nn.Parameter | None
    lora_magnitude: nn.Parameter | None

    def __init__(
        self,
        base: Linear,
        slices: Slices,
        *,
        rank: int,
        alpha: float,
        magnitude: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.slices = slices
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / rank
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        like: dict[str, Any] = {"device": base.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.empty(len(slices) * rank, base.in_features, **like))
        if not base.weight.is_meta:
            self.lora_A.data.copy_(self.random_a(generator))
        rows = sum(hi - lo for lo, hi in slices)
        self.lora_B = nn.Parameter(torch.zeros(rows, rank, **like))
        self.register_parameter("lora_magnitude", nn.Parameter(torch.empty(rows, **like)) if magnitude else None)
        if self.lora_magnitude is not None and not base.weight.is_meta:
            self.lora_magnitude.data.copy_(self.first_magnitude(base.weight))
        self._original: Tensor | None = None

    def random_a(self, generator: torch.Generator | None = None) -> Tensor:
        """What A starts from, fp32 on the CPU, so that every device starts alike.

        kaiming_uniform_(a=sqrt(5)) over fan_in = in_features, as loralib initialises it.
        """
        bound = 1.0 / math.sqrt(self.in_features)
        draw = torch.empty(len(self.slices) * self.rank, self.in_features, device="cpu")
        return draw.uniform_(-bound, bound, generator=generator)

    def first_magnitude(self, weight: Tensor) -> Tensor:
        """What magnitudes start from, fp32: the lengths of the adapted rows of a weight (out, in) on any device."""
        a, b = (weight.new_zeros(shape) for shape in (self.lora_A.shape, self.lora_B.shape))
        return row_lengths(weight, a, b, self.scale, self.slices)

    @property
    def merged(self) -> bool:
        """Whether the update is part of `weight` right now."""
        return self._original is not None

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

    @torch.no_grad()
    def merge(self) -> float:
        """Add the update to the weight, in fp32 and rounded once; keeps the original weight for `unmerge`.

        Returns:
            The share of the update that survived the rounding: <W_after - W_before, delta> / <delta, delta>, 1 for a
            zero update.

        Raises:
            ValueError: already merged.
        """
        if self.merged:
            raise ValueError("this LoRA layer is merged already; unmerge it first")
        before = self.weight.detach()
        delta = self.delta()
        after = (before.to(delta.dtype) + delta).to(before.dtype)
        self._original = before
        self.weight.data = after
        size = torch.sum(delta.double() ** 2)
        kept = torch.sum((after.double() - before.double()) * delta.double())
        return float(kept / size) if size > 0 else 1.0

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit. Raises ValueError where nothing is merged."""
        if self._original is None:
            raise ValueError("this LoRA layer is not merged; merge it first")
        self.weight.data = self._original.to(self.weight.device)
        self._original = None

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, slices={self.slices}, "
            f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"
        )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            for name in KINDS:
                destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merged:
            raise ValueError(f"{prefix}: cannot load into a merged LoRA layer; unmerge it first")
        super()._load_from_state_dict(state_dict, prefix, *args)


def resized(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """The change of rows (n, in) that DoRA moves by `delta` and then gives the lengths `magnitude` (n,)."""
    turned = weight.to(delta.dtype) + delta
    lengths = turned.norm(dim=1).clamp(min=torch.finfo(turned.dtype).tiny)
    return turned * (magnitude / lengths)[:, None] - weight


@dataclass(frozen=True)
class LoraSettings:
    """How the adapters of a model were made."""

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
    """Replace the targeted layers of every block of `backbone.blocks` by adapted ones, in place.

    The forward does not change by this (B is zero, magnitudes are the rows' own), the names and objects of the existing
    parameters neither. The new parameters require gradients; nothing else is frozen or thawed. Slices of a layer are
    stacked in the order q, k, v.

    Args:
        rank: of each slice's update.
        alpha: the update is scaled by alpha / rank.
        targets: among q, k, v, proj, fc1, fc2, in any order.
        magnitude: adapted rows have a length of their own that is learnt (DoRA).
        seed: decides A of every layer, whatever the device and the state of the global generators.

    Raises:
        ValueError: an unknown, repeated or unmatched target, none at all, adapters already there, rank or alpha not
            positive.
    """
    targets = tuple(targets)
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or not targets or len(set(targets)) < len(targets):
        raise ValueError(f"LoRA targets {targets}: give at least one of {', '.join(TARGETS)}, each at most once")
    if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"LoRA rank {rank} and alpha {alpha} must be positive")
    if lora_layers(backbone):
        raise ValueError("the model has LoRA adapters already; inject them once, into a model without")
    blocks = getattr(backbone, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        raise ValueError(f"{type(backbone).__name__} has no list of blocks to put LoRA into; needed: an EvaViT")
    plan = [
        (f"blocks.{index}.{path}", slices)
        for index in range(len(blocks))
        for path, slices in _slices_by_layer(targets).items()
    ]
    layers = {}
    for name, parts in plan:
        layer = _find(backbone, name)
        if not isinstance(layer, Linear):
            raise ValueError(
                f"LoRA targets {targets} need a Linear layer at {name}, which the model has not; needed: an EvaViT"
            )
        layers[name] = (layer, tuple(_range(layer.out_features, part, of) for part, of in parts))
    for name, (layer, slices) in layers.items():
        parent, _, child = name.rpartition(".")
        generator = generator_for(seed, name)
        adapted = LoRALinear(layer, slices, rank=rank, alpha=alpha, magnitude=magnitude, generator=generator)
        setattr(backbone.get_submodule(parent), child, adapted.train(layer.training))


def first_value(backbone: nn.Module, name: str, seed: int, read: Callable[[str], Tensor]) -> Tensor:
    """What `inject_lora` with this seed puts into an adapter's parameter: fp32, on the CPU.

    For a backbone on the meta device, which `inject_lora` gives shapes only.

    Args:
        name: "...lora_A", "...lora_B" or "...lora_magnitude".
        read: gives the backbone's own parameters, by name, as the model starts with them.
    """
    path, _, kind = name.rpartition(".")
    layer = lora_layers(backbone)[path]
    if kind == "lora_A":
        return layer.random_a(generator_for(seed, path))
    return torch.zeros(layer.lora_B.shape) if kind == "lora_B" else layer.first_magnitude(read(f"{path}.weight"))


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers by qualified name, in order of the blocks."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by qualified name: `...lora_A`, `...lora_B`, and `...lora_magnitude` if there is one."""
    return {
        f"{name}.{kind}" if name else kind: getattr(layer, kind)
        for name, layer in lora_layers(module).items()
        for kind in KINDS
        if getattr(layer, kind) is not None
    }


def lora_settings(module: nn.Module) -> LoraSettings:
    """Rank, alpha, targets and kind of a model's adapters. Raises ValueError where it has none."""
    layers = _require_lora(module)
    first = next(iter(layers.values()))
    found = {
        target
        for name, layer in layers.items()
        for target, (path, part, of) in TARGETS.items()
        if name.endswith(path) and _range(layer.out_features, part, of) in layer.slices
    }
    targets = tuple(target for target in TARGETS if target in found)
    return LoraSettings(first.rank, first.alpha, targets, first.lora_magnitude is not None)


def merge_lora(module: nn.Module) -> dict[str, float]:
    """Merge every adapter into its weight (see `LoRALinear.merge`); the originals are kept for `unmerge_lora`.

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
    """How much the output changes when every lora_B is disturbed, to find adapters that the forward goes around.

    A lora_B is disturbed only while its layer runs, and holds its old values again afterwards: a module whose
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
    names, saved = {layer: name for name, layer in layers.items()}, dict[LoRALinear, Tensor]()

    def disturb(layer: LoRALinear, _: Any) -> None:
        saved[layer] = layer.lora_B.clone()
        noise = torch.randn(layer.lora_B.shape, generator=generator_for(0, names[layer]))
        # With A and the scale the layer's output changes by about half its input's size: large enough to see
        # through 16-bit rounding and through a softmax that is nearly uniform (k alone).
        layer.lora_B.add_(noise.to(layer.lora_B) / (layer.scale * math.sqrt(layer.rank)))

    def restore(layer: LoRALinear, *_: Any) -> None:
        layer.lora_B.copy_(saved.pop(layer))

    reached: set[LoRALinear] = set()
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


def _require_lora(module: nn.Module) -> dict[str, LoRALinear]:
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

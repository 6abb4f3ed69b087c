"""Low-rank adapters inside a backbone (LoRA, https://arxiv.org/abs/2106.09685).

An adapted layer keeps the names of the layer it replaces (`weight`, `bias`) and adds `lora_A` and `lora_B`,
stacked over the adapted slices as loralib's MergedLinear stacks them. A slice is a range of output rows: of a
fused qkv any of q, k and v can be adapted alone. A convolution is updated by one to r channels and a 1x1 one
behind it. Evaluation mode changes nothing (loralib merges in `eval()`, and ViSFT's code then adds the update
a second time).
Letters: G slices of a layer, r rank, R adapted rows: the sum of the slices' widths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.models.eva_vit import Linear
from visft_ds.ops.lora import Slices, lora_linear, ranges_of
from visft_ds.randomness import generator_for

#: Parameters that an adapted layer adds to those of the layer it replaces.
KINDS = ("lora_A", "lora_B")
#: Role -> (layer of a block, index of the part of its output, number of equal parts), in stacking order.
TARGETS = {
    "q": ("attn.qkv", 0, 3),
    "k": ("attn.qkv", 1, 3),
    "v": ("attn.qkv", 2, 3),
    "proj": ("attn.proj", 0, 1),
    "fc1": ("mlp.fc1", 0, 1),
    "fc2": ("mlp.fc2", 0, 1),
}


class AdaptedLayer(nn.Module):
    """Layer with the weight and bias of the one it replaces, lora_A (G*r, fan in) and lora_B (R, r), at least
    fp32.

    A starts uniform in +-1/sqrt(fan in), as loralib initialises it, and B at zero: the output does not
    change.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        slices: Slices,
        *,
        rank: int,
        alpha: float,
    ) -> None:
        super().__init__()
        weight: Any = base.weight
        self.slices = slices
        self.rank = rank
        self.alpha = alpha
        self.scale = alpha / rank
        self.weight = weight
        self.register_parameter("bias", base.bias)  # type: ignore[arg-type]
        rows = sum(hi - lo for lo, hi in slices)
        #: Under ZeRO-3 the parameters' own shape is (0,).
        self.shapes = {"lora_A": (len(slices) * rank, *weight.shape[1:]), "lora_B": (rows, rank)}
        dtype = torch.promote_types(weight.dtype, torch.float32)
        for kind, shape in self.shapes.items():
            values = torch.zeros(shape, device=weight.device, dtype=dtype)
            self.register_parameter(kind, nn.Parameter(values))


class LoRALinear(AdaptedLayer):
    """A linear layer with low-rank updates on slices of its output."""

    def __init__(
        self,
        base: nn.Linear,
        slices: Slices,
        *,
        rank: int,
        alpha: float,
    ) -> None:
        super().__init__(base, slices, rank=rank, alpha=alpha)
        self.in_features = base.in_features
        self.out_features = base.out_features

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) -> (..., out). A bias given here replaces the module's own (EVA's qkv)."""
        bias = self.bias if bias is None else bias
        return lora_linear(x, self.weight, bias, self.lora_A, self.lora_B, self.scale, self.slices)


class LoRAConv2d(AdaptedLayer):
    """A convolution without groups, with a low-rank update: lora_A (r, in, k, k), lora_B (out, r)."""

    def __init__(
        self,
        base: nn.Conv2d,
        slices: Slices,
        *,
        rank: int,
        alpha: float,
    ) -> None:
        super().__init__(base, slices, rank=rank, alpha=alpha)
        self.convolve = base._conv_forward  #: with its padding, stride and dilation
        self.pads_same = _pads_same(base)
        self.window = (base.kernel_size, base.stride, base.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H', W') in the dtype that torch chooses for a convolution."""
        if self.pads_same:
            from timm.layers import pad_same  # timm is here: the layer is its own

            x = pad_same(x, *self.window)
        y = self.convolve(x, self.weight, self.bias)
        inner = self.convolve(x, self.lora_A, None)
        update = F.conv2d(inner, self.lora_B[:, :, None, None])
        return y + self.scale * update


def dense_update(
    rows: int,
    a: Tensor,
    b: Tensor,
    slices: Slices,
    scale: float,
) -> Tensor:
    """Dense scale * B A (rows, fan in) in the precision of the factors; zero in rows that are not adapted."""
    result = a.new_zeros(rows, a[0].numel())
    for outputs, of_a, of_b in ranges_of(slices, b.shape[1]):
        torch.matmul(b[of_b], a[of_a].flatten(1), out=result[outputs])
    return result.mul_(scale)


def inject_lora(
    backbone: nn.Module,
    *,
    rank: int = 64,
    alpha: float = 1.0,
    targets: Iterable[str] = ("q", "v"),
    seed: int = 0,
) -> None:
    """Replace the targeted layers by adapted ones, in place; output and existing parameters do not change by
    this.

    Args:
        alpha: the update is scaled by alpha / rank.
        targets: roles in every block (keys of TARGETS), or globs over names of linear layers and
        convolutions.
        seed: decides A of every layer, whatever the device.

    Raises:
        ValueError: a target without a layer or with a grouped convolution, or a layer that two of them adapt.
    """
    slices = slices_of(backbone, targets)
    adapt_layers(backbone, slices, rank=rank, alpha=alpha, seed=seed)


def slices_of(backbone: nn.Module, targets: Iterable[str]) -> dict[str, Slices]:
    """Layer -> its rows that `targets` adapt. Arguments and errors are those of `inject_lora`."""
    layers = adaptable_layers(backbone)
    rows_of: dict[str, list[tuple[int, int]]] = {}
    for target in targets:
        rows = _rows_of(layers, target)
        if not rows:
            raise ValueError(
                f"visft.lora.targets: no layer for {target!r}; there are {', '.join(TARGETS)} of blocks, and "
                f"layers such as {', '.join([*layers][:8])}"
            )
        for name, (lo, hi) in rows.items():
            taken = rows_of.setdefault(name, [])
            if any(lo < end and begin < hi for begin, end in taken):
                raise ValueError(f"visft.lora.targets: {name} is adapted by two targets")
            taken.append((lo, hi))
    return {name: tuple(sorted(ranges)) for name, ranges in rows_of.items()}


def adapt_layers(
    backbone: nn.Module, slices: Mapping[str, Slices], *, rank: int, alpha: float, seed: int = 0
) -> None:
    """`inject_lora` by names and rows of layers. Raises ValueError for a layer that cannot be adapted."""
    layers = adaptable_layers(backbone)
    for name, ranges in slices.items():
        layer = layers.get(name)
        if layer is None:
            raise ValueError(f"{name} is no linear layer or convolution in it that takes a LoRA")
        if getattr(layer, "groups", 1) > 1:
            raise ValueError(
                f"{name} is a grouped convolution, which has no LoRA: choose others (visft.lora.targets)"
            )
        parent, _, leaf = name.rpartition(".")
        owner: Any = backbone.get_submodule(parent)
        kind = LoRAConv2d if isinstance(layer, nn.Conv2d) else LoRALinear
        adapted: AdaptedLayer = kind(layer, ranges, rank=rank, alpha=alpha)
        if hasattr(owner, "qkv_bias_separate"):
            owner.qkv_bias_separate = True  # else timm's EVA reads the weight past its layer
        setattr(owner, leaf, adapted.train(layer.training))
        if not adapted.weight.is_meta:
            adapted.lora_A.data.copy_(first_value(backbone, f"{name}.lora_A", seed))


def adaptable_layers(backbone: nn.Module) -> dict[str, Any]:
    """Linear layers and convolutions by name, of a backbone without adapters.

    Only those whose forward is that of their class: subclasses may compute something else with the weight.
    """
    assert not lora_layers(backbone), "the model has adapters already"
    kinds = (Linear, nn.Linear, nn.Conv2d)
    layers = {}
    for name, layer in backbone.named_modules():
        if type(layer) in kinds or _pads_same(layer):
            layers[name] = layer
    return layers


def _pads_same(layer: nn.Module) -> bool:
    """Return True for timm's convolution that pads as TensorFlow's "SAME", by the size of each image."""
    return type(layer).__name__ == "Conv2dSame"


def targets_of(backbone: nn.Module, slices: Mapping[str, Slices]) -> tuple[str, ...]:
    """Targets that adapt just these rows of layers: roles, then globs of like names, then single names; empty
    where none do, as for q of a single block.
    """
    layers = adaptable_layers(backbone)
    missing = {(name, range_) for name, ranges in slices.items() for range_ in ranges}
    targets = []
    for target in dict.fromkeys([*TARGETS, *globs_of(slices), *slices]):
        rows = _rows_of(layers, target).items()
        if rows and missing.issuperset(rows):
            targets.append(target)
            missing.difference_update(rows)
    return () if missing else tuple(targets)


def globs_of(names: Iterable[str]) -> list[str]:
    """Names with `*` in place of numbers between dots, each once."""
    return list(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names))


def _rows_of(layers: Mapping[str, Any], target: str) -> dict[str, tuple[int, int]]:
    """Layer -> its rows that a role or glob adapts."""
    if target not in TARGETS:
        return {name: (0, len(layer.weight)) for name, layer in layers.items() if fnmatchcase(name, target)}
    rows = {}
    path, number, of = TARGETS[target]
    for name, layer in layers.items():
        width = len(layer.weight)
        height = width // of
        if name.startswith("blocks.") and name.endswith(f".{path}"):
            rows[name] = (height * number, height * (number + 1))
        elif path == "attn.qkv" and name.endswith(f".attn.{target}_proj"):  # EVA-02's larger models in timm
            rows[name] = (0, width)
    return rows


def first_value(backbone: nn.Module, name: str, seed: int) -> Tensor:
    """Initial value, fp32 on the CPU, of "...lora_A" or "...lora_B" in a backbone that was adapted without
    values.
    """
    path, _, kind = name.rpartition(".")
    layer: Any = backbone.get_submodule(path)
    shape = layer.shapes[kind]
    values = torch.zeros(shape, device="cpu")
    if kind == "lora_A":
        bound = 1.0 / math.sqrt(math.prod(shape[1:]))
        values.uniform_(-bound, bound, generator=generator_for(seed, path))
    return values


def lora_layers(module: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers by qualified name, in order of the blocks."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, AdaptedLayer)}


def lora_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by qualified name: `...lora_A`, `...lora_B`."""
    return {name: value for name, value in module.named_parameters() if name.rpartition(".")[2] in KINDS}

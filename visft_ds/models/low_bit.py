"""The frozen matrices of a tower's blocks in 8 or 4 bits, and what that changes (QLoRA, arXiv 2305.14314).

Stored so are the projections of attention and MLP, 99 % of EVA-ViT-E; norms, biases, embeddings and adapters stay as
they are. A layer keeps the name of its parameter: `weight` then holds codes, see `visft_ds.ops.low_bit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.models.eva_vit import EvaViT, generator_for
from visft_ds.models.layers import Linear
from visft_ds.models.lora import LoRALinear
from visft_ds.ops.low_bit import LowBit

#: Of the probe, in patches. Small, since what takes the time is reading the weights.
_PROBE = 4

Layer = Linear | LoRALinear


def frozen_matrices(backbone: nn.Module) -> dict[str, Layer]:
    """The layers whose weights may be stored in few bits: those inside blocks, by qualified name."""
    return {
        name: module
        for name, module in backbone.named_modules()
        if name.startswith("blocks.") and isinstance(module, Linear | LoRALinear)
    }


def plan_few_bits(backbone: nn.Module, format: str) -> dict[str, LowBit]:
    """How each matrix inside blocks would be stored, by name of its layer; none with "full".

    Args:
        format: "full", or one of `visft_ds.ops.low_bit.FORMATS`.

    Raises:
        ValueError: a matrix that trains; as `LowBit`.
    """
    if format == "full":
        return {}
    layers = frozen_matrices(backbone)
    trained = [name for name, layer in layers.items() if layer.weight.requires_grad]
    if trained:
        raise ValueError(
            f"{len(trained)} matrices of the blocks train, e.g. {trained[0]}.weight, and can be stored as {format} "
            "only while frozen: set visft.model.base to full, or keep them out of visft.param_groups"
        )
    planned = {}
    for name, layer in layers.items():
        try:
            planned[name] = LowBit(format, layer.in_features, layer.weight.dtype)
        except ValueError as error:
            raise ValueError(f"visft.model.base = {format}: {name}: {error}") from error
    return planned


def store_in_few_bits(backbone: nn.Module, format: str) -> None:
    """Replace the weights inside blocks by codes, in place; on the meta device by the shapes of codes.

    Arguments and errors as `plan_few_bits`.
    """
    layers = frozen_matrices(backbone)
    for name, low_bit in plan_few_bits(backbone, format).items():
        layer = layers[name]
        if layer.weight.is_meta:
            codes = torch.empty(layer.out_features, low_bit.row_bytes, dtype=torch.uint8, device="meta")
        else:
            codes = low_bit.pack(layer.weight)
        layer.low_bit, layer.weight = low_bit, nn.Parameter(codes, requires_grad=False)


def number_of_values(module: nn.Module) -> int:
    """Values that the parameters stand for, however they are stored; also under ZeRO-3, which empties its tensors."""
    layers = (one for one in module.modules() if isinstance(one, Linear | LoRALinear) and one.low_bit is not None)
    coded = {layer.weight: layer.in_features * layer.out_features for layer in layers}
    return sum(coded.get(p, int(getattr(p, "ds_numel", p.numel()))) for p in module.parameters())


# ------------------------------------------------------------------------------------------------ what it changes


@dataclass(frozen=True)
class LowBitDifference:
    """A tower with matrices in few bits beside the same one in full precision."""

    format: str
    blocks: tuple[str, ...]  #: that were compared
    whole: bool  #: whether these are all of the tower
    features: float  #: |stored - full| / |full| of what comes out, Frobenius norms
    worst: str  #: block whose own addition to the stream changes most
    worst_change: float  #: |stored - full| / |full - input|, for the input that the full tower gives it
    stored_bytes: int  #: of the matrices
    full_bytes: int

    def lines(self) -> list[str]:
        """For people."""
        mib, full = self.stored_bytes / 2**20, self.full_bytes / 2**20
        where = "features" if self.whole else f"{self.blocks[0]} to {self.blocks[-1]} (this stage)"
        return [
            f"frozen base as {self.format}: {mib:,.1f} MiB instead of {full:,.1f} ({100 * mib / full:.1f} %), "
            f"{full - mib:,.1f} MiB saved",
            f"frozen base as {self.format} against full precision, on a fixed probe: {where} change by "
            f"{100 * self.features:.3g} %, at worst {self.worst} by {100 * self.worst_change:.3g} % of what it adds",
        ]


@torch.no_grad()
def compare_with_full(
    backbone: EvaViT, read: Callable[[str], Tensor], whole: Callable[[nn.Module], AbstractContextManager[None]]
) -> LowBitDifference | None:
    """What storing in few bits does to the features, and to each block alone. Collective where `whole` is.

    The probe is one fixed picture of 4 x 4 patches, computed in fp32. A process that holds part of the blocks compares
    those, on fixed tokens. One matrix in full precision exists at a time.

    Args:
        read: name of a parameter -> its values in full precision, on the host.
        whole: see `visft_ds.prepare.materialize.Placement`.

    Returns:
        None where nothing is stored so, or nothing of it is here.
    """
    held = {
        f"blocks.{index}": block
        for index, block in enumerate(backbone.blocks)
        if not any(p.is_meta for p in block.parameters())
    }
    layers = {name: one for name, one in frozen_matrices(backbone).items() if not one.weight.is_meta}
    formats = {layer.low_bit.format for layer in layers.values() if layer.low_bit is not None}
    if not held or not formats:
        return None
    device = next(iter(layers.values())).weight.device
    everything = len(held) == len(backbone.blocks)
    tower: nn.Module = backbone if everything else nn.Sequential(*held.values())
    probe = _probe(backbone, everything).to(device)
    changes: dict[str, float] = {}
    with whole(tower), _in_fp32(layers):
        stored = tower(probe)
        with ExitStack() as stack:
            full = stack.enter_context(_in_full_precision(layers, read))
            for name, block in held.items():
                stack.callback(block.register_forward_hook(_compared(name, full, changes)).remove)
            exact = tower(probe)
    worst = max(changes, key=lambda name: changes[name])
    sizes = [(layer.out_features, low_bit) for layer in layers.values() if (low_bit := layer.low_bit) is not None]
    return LowBitDifference(
        format=formats.pop(),
        blocks=tuple(held),
        whole=everything,
        features=_ratio(stored - exact, exact),
        worst=worst,
        worst_change=changes[worst],
        stored_bytes=sum(rows * low_bit.row_bytes for rows, low_bit in sizes),
        full_bytes=sum(rows * low_bit.fan_in * low_bit.dtype.itemsize for rows, low_bit in sizes),
    )


def _probe(backbone: EvaViT, everything: bool) -> Tensor:
    """A smooth picture in the statistics of normalised pixels; tokens where no image can be embedded."""
    generator = generator_for(0, "probe of visft.model.base")
    if not everything:
        return torch.randn(1, _PROBE**2, backbone.width, generator=generator)
    coarse = torch.randn(1, 3, _PROBE, _PROBE, generator=generator)
    side = _PROBE * backbone.patch_size
    return nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)


class _Switch:
    """Whether layers compute with full precision right now."""

    on = True


def _compared(name: str, full: _Switch, changes: dict[str, float]) -> Callable[..., None]:
    """A hook that runs the block once more on the same input, with what is stored."""

    def compare(block: nn.Module, arguments: tuple[Any, ...], exact: Tensor) -> None:
        if full.on:
            full.on = False
            changes[name] = _ratio(block(*arguments) - exact, exact - arguments[0])
            full.on = True

    return compare


@contextmanager
def _in_fp32(layers: Mapping[str, Layer]) -> Iterator[None]:
    """Compute products with stored values in fp32, so that the rounding of 16-bit products is no part of a result."""
    before = {layer: layer.low_bit for layer in layers.values()}
    for layer, low_bit in before.items():
        assert low_bit is not None
        layer.low_bit = replace(low_bit, dtype=torch.float32)
    try:
        yield
    finally:
        for layer, low_bit in before.items():
            layer.low_bit = low_bit


@contextmanager
def _in_full_precision(layers: Mapping[str, Layer], read: Callable[[str], Tensor]) -> Iterator[_Switch]:
    """Each layer computes with its values as they were before they were stored, as long as the switch is on."""
    switch, before = _Switch(), dict[nn.Module, tuple[nn.Parameter, LowBit | None]]()
    names = {layer: name for name, layer in layers.items()}

    def exchange(layer: Any, _: Any) -> None:
        if switch.on:
            before[layer] = layer.weight, layer.low_bit
            values = read(f"{names[layer]}.weight").to(layer.weight.device, torch.float32)
            layer.weight, layer.low_bit = nn.Parameter(values, requires_grad=False), None

    def restore(layer: Any, *_: Any) -> None:
        if layer in before:
            layer.weight, layer.low_bit = before.pop(layer)

    with ExitStack() as hooks:
        for layer in layers.values():
            # Ahead of a hook that gathers the layer's parameters, which then leaves this one alone.
            hooks.callback(layer.register_forward_pre_hook(exchange, prepend=True).remove)
            hooks.callback(layer.register_forward_hook(restore, always_call=True).remove)
        yield switch


def _ratio(change: Tensor, of: Tensor) -> float:
    return float(change.double().norm() / of.double().norm())

"""Benchmark of blocks with adapters: against the same blocks without, and against other implementations.

Two measurements for every image size and dtype, forward and backward: whole blocks, and the adapted projection alone.
All variants share the frozen weights and take turns in every round, so ratios to the frozen layers are comparable where
times are not. On a CPU, CPU time is measured. Tensors that blocks save for the backward pass are counted to the byte.

Letters: B images (one), N tokens, D width, r rank; as in `visft_ds.ops.lora` for the arguments of a projection.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.config.schema import Precision
from visft_ds.costs.hardware import DTYPES
from visft_ds.costs.ledger import ACTIVATIONS, FROZEN, OTHER, TRAINED, TRANSIENT, Ledger
from visft_ds.models.eva_vit import RECOMPUTE, EvaViT, build_backbone
from visft_ds.models.layers import Linear
from visft_ds.models.lora import LoRALinear, inject_lora, lora_parameters
from visft_ds.monitor.console import Section
from visft_ds.ops.attention import attention_backend, use_fixed_lengths
from visft_ds.ops.lora import BACKENDS, Slices, lora_linear, why_not_triton
from visft_ds.profiling.harness import (
    circumstances,
    clock,
    in_turn,
    measured_on,
    ratio,
    spread,
    with_quartiles,
)
from visft_ds.profiling.memory import live_tensors, step_watched

FORMAT, VERSION = "visft_ds ops", 1
FROZEN_LAYERS, OURS, DENSE, AFTERWARDS = "frozen", "adapted", "dense update, as loralib", "added afterwards, as PEFT"
FORWARD, BACKWARD = "forward", "backward"
PARTS = BLOCKS, PROJECTION, KEPT = "blocks", "projection", "kept"
#: Debug width instead of EVA-ViT-E's.
SMALL = {"width": 64, "num_heads": 4, "mlp_ratio": 4.0, "image_size": 56}

Projection = Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float, Slices], Tensor]
Case = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class OperationOptions:
    """Options of the measurement of operations."""

    pixels: Sequence[int] = (224, 448)  #: sides of the one image
    dtypes: Sequence[Precision] = ("fp32", "bf16")
    depth: int = 2  #: blocks
    rank: int = 64
    targets: Sequence[str] = ("q", "v")
    parts: Sequence[str] = PARTS
    repeats: int = 5  #: rounds after one to warm up
    device: str = "cpu"
    small: bool = False  #: debug width instead of EVA-ViT-E's

    def __post_init__(self) -> None:
        check_blocks(self)


def check_blocks(options: Any, *, counts: Sequence[str] = ("depth", "rank", "repeats"), whole: bool = False) -> None:
    """Check the options that `ops` and `peft` share.

    Args:
        counts: names of those that must be at least 1.
        whole: images must be of whole patches.

    Raises:
        ValueError: values out of range, a missing GPU.
    """
    if not options.dtypes or any(dtype not in DTYPES for dtype in options.dtypes):
        raise ValueError(f"--dtypes {' '.join(options.dtypes)}: give some of {', '.join(DTYPES)}")
    for name in counts:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")
    sides = options.pixels
    if not sides or min(sides) < 14 or (whole and any(side % 14 for side in sides)):
        what = "whole patches of 14" if whole else "at least one patch, 14"
        raise ValueError(f"--pixels {' '.join(map(str, sides))}: give sides of {what}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave it out, or see visft doctor")


def dense_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, slices: Slices
) -> Tensor:
    """As loralib's MergedLinear, which ViSFT used: B A is built with zeros between, and multiplied like a weight."""
    rows, place = [], 0
    for lo, hi, down, up in _parts(a.to(x.dtype), b.to(x.dtype), slices):
        rows += [x.new_zeros(lo - place, x.shape[-1]), up @ down]
        place = hi
    rows.append(x.new_zeros(len(weight) - place, x.shape[-1]))
    return F.linear(x, weight, bias) + F.linear(x, torch.cat(rows)) * scale


def added_afterwards(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, slices: Slices
) -> Tensor:
    """As PEFT: the frozen result, and the update of each slice, zeros where there is none, added to it."""
    columns, place = [], 0
    for lo, hi, down, up in _parts(a.to(x.dtype), b.to(x.dtype), slices):
        columns += [x.new_zeros(*x.shape[:-1], lo - place), F.linear(F.linear(x, down), up) * scale]
        place = hi
    columns.append(x.new_zeros(*x.shape[:-1], len(weight) - place))
    return F.linear(x, weight, bias) + torch.cat(columns, dim=-1)


def _parts(a: Tensor, b: Tensor, slices: Slices) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each slice: its range, and its rows of A and B."""
    rank, start = b.shape[1], 0
    for index, (lo, hi) in enumerate(slices):
        yield lo, hi, a[index * rank : (index + 1) * rank], b[start : start + hi - lo]
        start += hi - lo


def measure_operations(options: OperationOptions) -> dict[str, Any]:
    """Measure every image size and dtype; returns a record of JSON values."""
    device, load = torch.device(options.device), os.getloadavg()
    sizes: dict[str, Any] = SMALL if options.small else {}
    results = []
    for name in options.dtypes:
        backbone = build_backbone("eva_e", depth=options.depth, dtype=DTYPES[name], device=device, **sizes)
        backbone.requires_grad_(False).train()
        plain = _projections(backbone)
        inject_lora(backbone, rank=options.rank, targets=options.targets)
        ours, trained = _projections(backbone), list(lora_parameters(backbone).values())
        for side in options.pixels:
            tokens = (side // backbone.patch_size) ** 2
            use_fixed_lengths([tokens])
            x = torch.randn(1, tokens, backbone.width, device=device).to(DTYPES[name])
            heads = backbone.width // backbone.num_heads
            found: dict[str, Any] = {"pixels": side, "dtype": name, "tokens": tokens}
            found["attention"] = attention_backend(device, DTYPES[name], heads, tokens)
            if KEPT in options.parts:
                found[KEPT] = {policy: _kept(backbone, ours, policy, x) for policy in ("none", *RECOMPUTE)}
            if PROJECTION in options.parts:
                found[PROJECTION] = _measure(_projection_cases(backbone, plain[0]), x, options.repeats, trained)
            if BLOCKS in options.parts:
                found[BLOCKS] = _measure(_block_cases(backbone, plain, ours), x, options.repeats, trained)
            results.append(found)
    return {
        "format": FORMAT,
        "version": VERSION,
        **circumstances(load, device),
        "options": asdict(options),
        "results": results,
    }


# ------------------------------------------------------------------------------------------------------- cases


class _Other(nn.Module):
    """An adapted layer whose product is computed by another implementation."""

    def __init__(self, layer: LoRALinear, projection: Projection) -> None:
        super().__init__()
        self.layer = layer
        self._projection = projection

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        layer = self.layer
        return self._projection(x, layer.weight, bias, layer.lora_A, layer.lora_B, layer.scale, layer.slices)


def _block_cases(backbone: EvaViT, plain: Sequence[nn.Module], ours: Sequence[nn.Module]) -> dict[str, Case]:
    """All blocks one after another: frozen, adapted by each implementation, and ours with each recomputation policy."""
    others = {
        name: [_Other(layer, projection) for layer in ours if isinstance(layer, LoRALinear)]
        for name, projection in ((DENSE, dense_update), (AFTERWARDS, added_afterwards))
    }
    layers: dict[str, Sequence[nn.Module]] = {FROZEN_LAYERS: plain, OURS: ours, **others}
    cases = {name: _blocks(backbone, chosen, "none") for name, chosen in layers.items()}
    return cases | {f"{OURS}, {policy}": _blocks(backbone, ours, policy) for policy in RECOMPUTE}


def _projections(backbone: EvaViT) -> list[nn.Module]:
    return [block.get_submodule("attn.qkv") for block in backbone.blocks]


def _blocks(backbone: EvaViT, projections: Sequence[nn.Module], policy: str) -> Case:
    def run(x: Tensor) -> Tensor:
        backbone.recompute = policy
        for block, projection in zip(backbone.blocks, projections, strict=True):
            block.get_submodule("attn").register_module("qkv", projection)
            x = backbone.run_block(block, x)
        return x

    return run


def _projection_cases(backbone: EvaViT, plain: nn.Module) -> dict[str, Case]:
    layer = next(module for module in backbone.modules() if isinstance(module, LoRALinear))
    weight, rest = layer.weight, (layer.lora_A, layer.lora_B, layer.scale, layer.slices)
    bias = torch.zeros(len(weight), device=weight.device, dtype=weight.dtype)
    usable = [name for name in BACKENDS if name != "triton" or why_not_triton(weight.device, weight.dtype) is None]

    def by(backend: str) -> Case:
        return lambda x: lora_linear(x, weight, bias, *rest, backend=backend)

    assert isinstance(plain, Linear)
    return {
        FROZEN_LAYERS: lambda x: plain(x, bias),
        OURS: lambda x: layer(x, bias),
        **{f"{OURS}, {name}": by(name) for name in usable},
        DENSE: lambda x: dense_update(x, weight, bias, *rest),
        AFTERWARDS: lambda x: added_afterwards(x, weight, bias, *rest),
    }


# ------------------------------------------------------------------------------------------------- measurements


def _measure(cases: Mapping[str, Case], given: Tensor, repeats: int, trained: Sequence[nn.Parameter]) -> dict[str, Any]:
    """Seconds forward and backward of every case, and its ratio to the first one, round by round."""
    with torch.no_grad():
        gradient = torch.randn_like(next(iter(cases.values()))(given))

    def run(name: str) -> tuple[float, float]:
        for parameter in trained:
            parameter.grad = None  # as after an update; to add to gradients is what accumulation costs
        x = given.clone().requires_grad_()
        began = clock(given.device)
        out = cases[name](x)
        between = clock(given.device)
        out.backward(gradient)
        return between - began, clock(given.device) - between

    seconds = in_turn(cases, run, repeats)
    first = [sum(parts) for parts in next(iter(seconds.values()))]
    return {
        name: {
            FORWARD: spread(forward for forward, _ in found),
            BACKWARD: spread(backward for _, backward in found),
            "ratio": ratio(map(sum, found), first),
        }
        for name, found in seconds.items()
    }


def _kept(backbone: EvaViT, ours: Sequence[nn.Module], policy: str, given: Tensor) -> float:
    """Elements of the stream's dtype that live between forward and backward, in D for a token and block.

    Tensors saved by autograd and by checkpointing both count. So does the blocks' input; their output and parameters do
    not.
    """
    case, x = _blocks(backbone, ours, policy), given.clone().requires_grad_()
    case(given)  # which makes the casts of frozen parameters that layers keep
    ledger = Ledger(x.device.type)
    for parameter in backbone.parameters():
        ledger.add(parameter, TRAINED if parameter.requires_grad else FROZEN)
    ledger.add(x, ACTIVATIONS)
    ledger.add_all(live_tensors(), OTHER)
    with step_watched(ledger, backbone):
        out = case(x)
        size = ledger.now[ACTIVATIONS] + ledger.now[TRANSIENT] - out.untyped_storage().nbytes()
    return size / (x.element_size() * x.numel() * backbone.depth)


# ------------------------------------------------------------------------------------------------------- tables


def blocks_text(options: Mapping[str, Any]) -> str:
    """Number, width and rank of the blocks."""
    width = "debug width" if options["small"] else "width of EVA-ViT-E"
    return f"{options['depth']} blocks, {width}, rank {options['rank']}"


def rounds_row(options: Mapping[str, Any]) -> tuple[str, str]:
    """Number of rounds and kind of clock, as a row of a table."""
    kind = "wall clock" if options["device"] == "cuda" else "CPU time"
    return "rounds", f"{options['repeats']} after 1 to warm up; all ways in turn; {kind}"


def tables(record: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """(title, tables) of a record: blocks, projection and memory of every image size and dtype."""
    options = record["options"]
    sections = [Section("measured on", [*measured_on(record), rounds_row(options)])]
    names = ("", "forward ms", "backward ms", "time over frozen (quartiles)")
    for result in record["results"]:
        what = f"{result['pixels']} px ({result['tokens']} tokens), {result['dtype']}"
        for part in (part for part in (BLOCKS, PROJECTION) if part in result):
            rows = [
                (
                    name,
                    *(f"{1000 * numbers[half]['median']:.1f}" for half in (FORWARD, BACKWARD)),
                    with_quartiles(numbers["ratio"], 3),
                )
                for name, numbers in result[part].items()
            ]
            sections.append(Section(f"{part}: {what}", rows, names))
        if KEPT in result:
            kept = [(policy, f"{size:.3f}") for policy, size in result[KEPT].items()]
            sections.append(Section(f"kept for the backward pass: {what}", kept, ("recomputed", "D a token and block")))
    return f"operations: {blocks_text(options)} on {', '.join(options['targets'])}", sections

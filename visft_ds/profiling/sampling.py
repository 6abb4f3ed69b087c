"""Deformable attention as the segmentation head computes it, beside other formulations of the same sum.

Letters: B images, S cells, Q = S queries, M heads, c channels of a head, L levels (one here), P points.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.costs.ledger import ACTIVATIONS, OTHER, Ledger
from visft_ds.monitor.console import Section
from visft_ds.ops.deform_attn import cell_centres, deform_attn
from visft_ds.profiling.memory import step_watched
from visft_ds.profiling.timing import BACKWARD, Spread, Stopwatch, in_turn

OURS, NEIGHBOURS, TRANSFORMERS = "ops/deform_attn.py", "four neighbours", "transformers"
FORWARD, BOTH = "forward", "forward and backward"
_MIB = 2**20

Formulation = Callable[[Tensor, Sequence[tuple[int, int]], Tensor, Tensor], Tensor]


def four_neighbours(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The definition written out: arguments and result of `deform_attn`, without `grid_sample`.

    Each sample is gathered from the four cells around it, a cell outside counting as zero.
    """
    queries, points = locations.shape[1], locations.shape[4]
    mixed = value.new_zeros(value.shape[0], value.shape[2], queries, value.shape[3])  # (B, M, Q, c)
    parts = value.split([h * w for h, w in shapes], dim=1)
    for level, (part, (height, width)) in enumerate(zip(parts, shapes, strict=True)):
        cells = part.transpose(1, 2)  # (B, M, S, c)
        places = locations[:, :, :, level].transpose(1, 2)  # (B, M, Q, P, 2)
        x, y = places[..., 0] * width - 0.5, places[..., 1] * height - 0.5
        attention = weights[:, :, :, level].transpose(1, 2)  # (B, M, Q, P)
        for right in (0, 1):
            for below in (0, 1):
                column, row = x.detach().floor() + right, y.detach().floor() + below
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                share = (1 - (x - column).abs()) * (1 - (y - row).abs()) * attention * inside
                index = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).long()
                index = index.flatten(2)[..., None].expand(-1, -1, -1, cells.shape[3])  # (B, M, Q * P, c)
                picked = cells.gather(2, index).unflatten(2, (queries, points))
                mixed = mixed + (picked * share[..., None]).sum(dim=3)
    return mixed.transpose(1, 2).flatten(2)


def formulations() -> dict[str, Formulation]:
    """By name, ours first; that of transformers' Mask2Former only where the package is installed."""
    found: dict[str, Formulation] = {OURS: deform_attn, NEIGHBOURS: four_neighbours}
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return found
    from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention

    return {**found, f"{TRANSFORMERS} {installed}": multi_scale_deformable_attention}


def measure_sampling(
    images: int, grid: tuple[int, int], *, heads: int, channels: int, points: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """One layer's sampling by every formulation in turn: seconds, bytes saved for the backward pass, agreement."""
    inputs = _inputs(images, grid, heads, channels, points, device)
    found = formulations()
    watch = Stopwatch(device)

    def run(name: str) -> dict[str, float]:
        _run(found[name], inputs, grid, watch)
        seconds = watch.seconds()
        return seconds | {BOTH: seconds[FORWARD] + seconds[BACKWARD]}

    times = in_turn(found, run, repeats)
    with torch.no_grad():
        results = {name: function(inputs[0], [grid], *inputs[1:]) for name, function in found.items()}
    return {
        "sizes": {"images": images, "grid": list(grid), "heads": heads, "channels": channels, "points": points},
        "formulations": {
            name: {
                "seconds": {part: asdict(Spread.of([run[part] for run in runs])) for part in runs[0]},
                "ratio": asdict(Spread.of([a[BOTH] / b[BOTH] for a, b in zip(runs, times[OURS], strict=True)])),
                "saved_bytes": _saved_bytes(found[name], inputs, grid, device),
                "largest_difference": float((results[name] - results[OURS]).abs().max()),
            }
            for name, runs in times.items()
        },
    }


def sampling_section(record: Mapping[str, Any]) -> Section:
    """What `measure_sampling` found, as a table."""
    sizes = record["sizes"]
    rows = []
    for name, numbers in record["formulations"].items():
        forward, backward = (1000 * numbers["seconds"][part]["median"] for part in (FORWARD, BACKWARD))
        ratio = numbers["ratio"]
        rows.append(
            (
                name,
                f"{forward:.2f}",
                f"{backward:.2f}",
                f"{numbers['saved_bytes'] / _MIB:.2f}",
                f"{ratio['median']:.2f}  ({ratio['low']:.2f} .. {ratio['high']:.2f})",
                f"{numbers['largest_difference']:.1e}",
            )
        )
    shape = f"{sizes['images']} x {sizes['grid'][0]}x{sizes['grid'][1]} cells"
    title = f"deformable attention, one layer: {shape}, {sizes['heads']} heads of {sizes['channels']} channels, "
    columns = ("formulation", "forward ms", "backward ms", "saved MiB", "time over ours (quartiles)", "differs by")
    return Section(f"{title}{sizes['points']} points", rows, columns)


def _inputs(
    images: int, grid: tuple[int, int], heads: int, channels: int, points: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, locations up to a few cells away from each query (some outside) and weights, all with gradients."""
    generator = torch.Generator().manual_seed(0)
    cells = grid[0] * grid[1]
    value = torch.randn(images, cells, heads, channels, generator=generator)
    offsets = 2 * torch.randn(images, cells, heads, 1, points, 2, generator=generator)  # in cells
    centres = cell_centres([grid], torch.device("cpu"), torch.float32)[:, None, None, None]
    locations = centres + offsets / torch.tensor([grid[1], grid[0]])
    weights = torch.randn(images, cells, heads, points, generator=generator).softmax(dim=-1).unsqueeze(3)
    value, locations, weights = (tensor.to(device).requires_grad_() for tensor in (value, locations, weights))
    return value, locations, weights


def _run(function: Formulation, inputs: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int], watch: Stopwatch) -> None:
    watch.start(FORWARD)
    result = function(inputs[0], [grid], *inputs[1:])
    watch.stop(FORWARD)
    ones = torch.ones_like(result)
    watch.start(BACKWARD)
    torch.autograd.grad(result, inputs, ones)
    watch.stop(BACKWARD)


def _saved_bytes(
    function: Formulation, inputs: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int], device: torch.device
) -> int:
    """Storages that autograd keeps from the forward to the backward pass, besides the inputs."""
    ledger = Ledger(device.type)
    ledger.add_all(inputs, OTHER)
    with step_watched(ledger, nn.Identity()):
        _run(function, inputs, grid, Stopwatch(device))
    return ledger.highest[ACTIVATIONS]

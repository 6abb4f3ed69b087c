"""The backbone's part of a stage-2 step against the same tower in timm under PEFT's LoRA: time and peak memory.

Both have the same weights, images, loss and optimiser, and their gradients are compared before anything is timed. All
ways take turns in every round, so ratios to the baseline mean something where times do not. On a CPU it is CPU time
that counts. Memory is the peak of live tensors of forward and backward pass, each storage once, without the weights.
Heads are no part of it: they are the same whatever the backbone is made of.

Letters: B images, N tokens, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.config.schema import Precision
from visft_ds.costs.hardware import DTYPES
from visft_ds.costs.ledger import FROZEN, OTHER, TRAINED, Ledger
from visft_ds.interop.peft_model import adapter_gradients, peft_on_timm
from visft_ds.models.eva_vit import RECOMPUTE, build_backbone
from visft_ds.models.lora import inject_lora, lora_parameters
from visft_ds.monitor.console import Section
from visft_ds.prepare.materialize import is_small
from visft_ds.profiling.blocks import SMALL, blocks_text, check_blocks, rounds_row
from visft_ds.profiling.harness import (
    circumstances,
    clock,
    in_turn,
    measured_on,
    ratio,
    spread,
    with_quartiles,
)
from visft_ds.profiling.memory import step_watched

FORMAT, VERSION = "visft_ds peft profile", 1
BASELINE, PLAIN = "timm + PEFT, every block again", "timm + PEFT, nothing again"
#: Relative difference of all gradients of adapters that passes as rounding.
AGREE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2}
#: What timm's residual stream is in, in 16 bit: that (`model.to(bfloat16)`), or fp32 as ours is.
STREAMS = ("16bit", "fp32")


@dataclass(frozen=True)
class PeftOptions:
    """Options of the comparison."""

    pixels: Sequence[int] = (224, 448)  #: sides of the images
    dtypes: Sequence[Precision] = ("fp32", "bf16")
    depth: int = 2  #: blocks
    rank: int = 64
    batch: int = 1  #: images
    stream: str = "16bit"  #: one of STREAMS
    repeats: int = 5  #: rounds after one to warm up
    device: str = "cpu"
    small: bool = False  #: debug width instead of EVA-ViT-E's

    def __post_init__(self) -> None:
        check_blocks(self, counts=("depth", "rank", "batch", "repeats"), whole=True)
        if self.stream not in STREAMS:
            raise ValueError(f"--stream {self.stream}: give {' or '.join(STREAMS)}")


def measure_peft(options: PeftOptions) -> dict[str, Any]:
    """Every image size and dtype; a record of JSON values.

    Raises:
        ValueError: timm is not installed.
        RuntimeError: gradients that do not agree: the two do not compute the same.
    """
    device, load = torch.device(options.device), os.getloadavg()
    results = [_measure(options, name, side, device) for name in options.dtypes for side in options.pixels]
    return {
        "format": FORMAT,
        "version": VERSION,
        **circumstances(load, device),
        "options": asdict(options),
        "results": results,
    }


def _measure(options: PeftOptions, name: Precision, side: int, device: torch.device) -> dict[str, Any]:
    sizes: dict[str, Any] = {**SMALL} if options.small else {}
    # timm resizes positions in another way, so that both get those of the right size from the start.
    backbone = build_backbone("eva_e", **{**sizes, "depth": options.depth, "image_size": side}, device=device)
    for parameter_name, parameter in backbone.named_parameters():
        if not is_small(parameter_name, tuple(parameter.shape)):
            parameter.data = parameter.data.to(DTYPES[name])
    backbone.requires_grad_(False)
    inject_lora(backbone, rank=options.rank)
    with torch.no_grad():
        for parameter in lora_parameters(backbone).values():
            parameter.add_(0.01 * torch.randn_like(parameter))  # a B of zero would hide the gradient of A
    adapted = peft_on_timm(backbone, DTYPES[name] if options.stream == "16bit" else None)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, side, side, generator=generator).to(device)
    tokens = (side // backbone.patch_size) ** 2
    target = torch.randn(options.batch, tokens, backbone.width, generator=generator).to(device)
    cast = partial(torch.autocast, device.type, DTYPES[name]) if name != "fp32" else nullcontext
    eva: Any = adapted.get_submodule("base_model.model")

    def taught(tokens: Tensor) -> None:
        F.mse_loss(tokens.float(), target).backward()

    def theirs(again: bool) -> None:
        eva.set_grad_checkpointing(again)
        with cast():
            taught(eva.forward_features(images))

    def ours(policy: str) -> None:
        backbone.train()
        backbone.checkpoint_every = int(policy != "nothing")
        backbone.recompute = "block" if policy == "nothing" else policy
        with cast():
            taught(backbone.tokens(images))

    steps: dict[str, Callable[[], None]] = {BASELINE: partial(theirs, True), PLAIN: partial(theirs, False)}
    steps |= {f"ours, {policy}": partial(ours, policy) for policy in ("nothing", *RECOMPUTE)}
    module_of = {case: adapted if case in (BASELINE, PLAIN) else backbone for case in steps}

    # The relative difference of all gradients, |ours - theirs| / |theirs|.
    for case in (BASELINE, "ours, block"):
        module_of[case].zero_grad()
        steps[case]()
    of_theirs, of_ours = (gradients.double() for gradients in adapter_gradients(adapted, backbone))
    difference = float((of_ours - of_theirs).norm() / of_theirs.norm())
    if not difference <= AGREE[name]:
        raise RuntimeError(f"gradients of timm + PEFT and ours differ by {difference:.1e} in {name}")

    # Bytes of live tensors at the fullest moment of forward and backward pass, without weights and inputs.
    peaks = {}
    for case, step in steps.items():
        module_of[case].zero_grad()
        ledger = Ledger(images.device.type)
        for parameter in module_of[case].parameters():
            ledger.add(parameter, TRAINED if parameter.requires_grad else FROZEN)
        ledger.add_all((images, target), OTHER)
        resident = sum(ledger.now.values())
        ledger.forget_peaks()
        with step_watched(ledger, module_of[case]):
            step()
        peaks[case] = sum(ledger.at_peak.values()) - resident

    # Seconds of a step with its update.
    optimizers = {
        module: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)
        for module in (adapted, backbone)
    }

    def timed(case: str) -> float:
        optimizer = optimizers[module_of[case]]
        began = clock(device)
        optimizer.zero_grad()
        steps[case]()
        optimizer.step()
        return clock(device) - began

    seconds = in_turn(steps, timed, options.repeats)
    cases = {
        case: {
            "seconds": spread(seconds[case]),
            "speed": ratio(seconds[BASELINE], seconds[case]),
            "peak_bytes": peaks[case],
            "memory_ratio": peaks[case] / peaks[BASELINE],
        }
        for case in steps
    }
    return {"pixels": side, "dtype": name, "tokens": tokens, "gradients_differ_by": difference, "cases": cases}


# ------------------------------------------------------------------------------------------------------- tables


def make_title(record: Mapping[str, Any]) -> str:
    """Title of the tables: blocks, width and rank."""
    return f"stage-2 step of the backbone against timm + PEFT: {blocks_text(record['options'])}"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables, one for each image size and dtype."""
    options = record["options"]
    facts = [
        *measured_on(record),
        rounds_row(options),
        ("memory", "peak of live tensors, forward and backward, without weights; exact to the byte"),
        ("timm's stream", "fp32, as ours" if options["stream"] == "fp32" else "16 bit in 16 bit, ours fp32"),
    ]
    sections = [Section("measured on", facts)]
    for result in record["results"]:
        what = f"{result['pixels']} px ({result['tokens']} tokens), {options['batch']} image(s), {result['dtype']}"
        rows = [
            (
                name,
                f"{1e3 * case['seconds']['median']:.0f}",
                with_quartiles(case["speed"], 3),
                f"{case['peak_bytes'] / 2**20:.1f}",
                f"x {case['memory_ratio']:.3f}",
            )
            for name, case in result["cases"].items()
        ]
        sections.append(Section(what, rows, ("recomputed", "ms", "times as fast (quartiles)", "peak MiB", "")))
        sections.append(Section("gradients of all adapters", [("differ by", f"{result['gradients_differ_by']:.1e}")]))
    return sections

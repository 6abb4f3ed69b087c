"""The backbone's part of a stage-2 step beside the same tower in timm under PEFT's LoRA: time and peak memory.

Both have the same weights, images, loss and optimiser, and their gradients are compared before anything is timed. All
ways take turns in every round, so ratios to the baseline mean something where times do not. On a CPU it is CPU time
that counts. Memory is the peak of live tensors of forward and backward pass, each storage once, without the weights.
Heads are no part of it: they are the same whatever the backbone is made of.

Letters: B images, N tokens, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.costs.hardware import DTYPES
from visft_ds.costs.ledger import FROZEN, OTHER, TRAINED, Ledger
from visft_ds.interop.peft_model import adapter_gradients, peft_on_timm
from visft_ds.models.eva_vit import RECOMPUTE, EvaViT, build_backbone
from visft_ds.models.lora import inject_lora, lora_parameters
from visft_ds.monitor.console import Section
from visft_ds.prepare.materialize import is_small
from visft_ds.profiling.memory import step_watched
from visft_ds.profiling.record import circumstances, measured_on
from visft_ds.profiling.timing import Spread, clock, in_turn

FORMAT, VERSION = "visft_ds peft profile", 1
BASELINE, PLAIN = "timm + PEFT, every block again", "timm + PEFT, nothing again"
#: Relative difference of all gradients of adapters that passes as rounding.
AGREE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 2e-2}
#: What timm's residual stream is in, in 16 bit: that (`model.to(bfloat16)`), or fp32 as ours is.
STREAMS = ("16bit", "fp32")
_SMALL = {"width": 64, "num_heads": 4, "mlp_ratio": 4.0, "image_size": 56}

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class PeftOptions:
    """Options of the comparison. Raises ValueError for values out of range and a missing GPU."""

    pixels: Sequence[int] = (224, 448)  #: sides of the images
    dtypes: Sequence[str] = ("fp32", "bf16")
    depth: int = 2  #: blocks
    rank: int = 64
    batch: int = 1  #: images
    stream: str = "16bit"  #: one of STREAMS
    repeats: int = 5  #: rounds after one to warm up
    device: str = "cpu"
    small: bool = False  #: debug width instead of EVA-ViT-E's

    def __post_init__(self) -> None:
        if not self.dtypes or any(dtype not in DTYPES for dtype in self.dtypes):
            raise ValueError(f"--dtypes {' '.join(self.dtypes)}: give some of {', '.join(DTYPES)}")
        for name in ("depth", "rank", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.stream not in STREAMS:
            raise ValueError(f"--stream {self.stream}: give {' or '.join(STREAMS)}")
        if not self.pixels or min(self.pixels) < 14 or any(side % 14 for side in self.pixels):
            raise ValueError(f"--pixels {' '.join(map(str, self.pixels))}: give sides of whole patches of 14")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU here; leave it out, or see visft doctor")


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


def _measure(options: PeftOptions, name: str, side: int, device: torch.device) -> dict[str, Any]:
    sizes: dict[str, Any] = {**_SMALL} if options.small else {}
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
    cases = _cases(backbone, adapted, images, target, cast)
    agreement = _agreement(cases, adapted, backbone, name)
    memory = {case: _peak(step, module, images, target) for case, (step, module) in cases.items()}
    times = _times(cases, options.repeats, device)
    found = {
        case: {**times[case], "peak_bytes": memory[case], "memory_ratio": memory[case] / memory[BASELINE]}
        for case in cases
    }
    return {"pixels": side, "dtype": name, "tokens": tokens, "gradients_differ_by": agreement, "cases": found}


def _cases(
    backbone: EvaViT,
    adapted: nn.Module,
    images: Tensor,
    target: Tensor,
    cast: Callable[[], AbstractContextManager[Any]],
) -> dict[str, tuple[Step, nn.Module]]:
    """Name -> what computes the loss and its gradients, and whose parameters learn."""
    eva: Any = adapted

    def theirs(again: bool) -> Tensor:
        eva.base_model.model.set_grad_checkpointing(again)
        with cast():
            return _taught(eva.base_model.model.forward_features(images), target)

    def ours(policy: str) -> Tensor:
        backbone.train()
        backbone.checkpoint_every = int(policy != "nothing")
        backbone.recompute = "block" if policy == "nothing" else policy
        with cast():
            return _taught(backbone.tokens(images), target)

    cases: dict[str, tuple[Step, nn.Module]] = {
        BASELINE: (partial(theirs, True), adapted),
        PLAIN: (partial(theirs, False), adapted),
    }
    return cases | {f"ours, {policy}": (partial(ours, policy), backbone) for policy in ("nothing", *RECOMPUTE)}


def _taught(tokens: Tensor, target: Tensor) -> Tensor:
    loss = F.mse_loss(tokens.float(), target)
    loss.backward()
    return loss.detach()


def _forget(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def _agreement(cases: Mapping[str, tuple[Step, nn.Module]], adapted: nn.Module, backbone: EvaViT, name: str) -> float:
    """Relative difference of all gradients; |ours - theirs| / |theirs|."""
    for case in (BASELINE, "ours, block"):
        step, module = cases[case]
        _forget(module)
        step()
    theirs, ours = adapter_gradients(adapted, backbone)
    difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    if not difference <= AGREE[name]:
        raise RuntimeError(f"gradients of timm + PEFT and ours differ by {difference:.1e} in {name}")
    return difference


def _peak(step: Step, module: nn.Module, images: Tensor, target: Tensor) -> int:
    """Bytes of live tensors at the fullest moment of forward and backward pass, without weights and inputs."""
    _forget(module)
    ledger = Ledger(images.device.type)
    for parameter in module.parameters():
        ledger.add(parameter, TRAINED if parameter.requires_grad else FROZEN)
    ledger.add_all((images, target), OTHER)
    resident = sum(ledger.now.values())
    ledger.forget_peaks()
    with step_watched(ledger, module):
        step()
    return sum(ledger.at_peak.values()) - resident


def _times(
    cases: Mapping[str, tuple[Step, nn.Module]], repeats: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Seconds of a step with its update, and their ratio to the baseline's, round by round."""
    optimizers = {
        module: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-6)
        for _, module in cases.values()
    }

    def run(name: str) -> float:
        step, module = cases[name]
        began = clock(device)
        optimizers[module].zero_grad()
        step()
        optimizers[module].step()
        return clock(device) - began

    seconds = in_turn(cases, run, repeats)
    return {
        name: {
            "seconds": asdict(Spread.of(found)),
            "speed": asdict(Spread.of([base / own for own, base in zip(found, seconds[BASELINE], strict=True)])),
        }
        for name, found in seconds.items()
    }


# ------------------------------------------------------------------------------------------------------- tables


def make_title(record: Mapping[str, Any]) -> str:
    """Title of the tables: blocks, width and rank."""
    options = record["options"]
    width = "debug width" if options["small"] else "width of EVA-ViT-E"
    return (
        f"stage-2 step of the backbone against timm + PEFT: {options['depth']} blocks, {width}, rank {options['rank']}"
    )


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables, one for each image size and dtype."""
    options = record["options"]
    kind = "wall clock" if options["device"] == "cuda" else "CPU time"
    facts = [
        *measured_on(record),
        ("rounds", f"{options['repeats']} after 1 to warm up; all ways in turn; {kind}"),
        ("memory", "peak of live tensors, forward and backward, without weights; exact to the byte"),
        ("timm's stream", "fp32, as ours" if options["stream"] == "fp32" else "16 bit in 16 bit, ours fp32"),
    ]
    sections = [Section("measured on", facts)]
    for result in record["results"]:
        what = f"{result['pixels']} px ({result['tokens']} tokens), {options['batch']} image(s), {result['dtype']}"
        rows = [_row(name, case) for name, case in result["cases"].items()]
        sections.append(Section(what, rows, ("recomputed", "ms", "times as fast (quartiles)", "peak MiB", "")))
        sections.append(Section("gradients of all adapters", [("differ by", f"{result['gradients_differ_by']:.1e}")]))
    return sections


def _row(name: str, case: Mapping[str, Any]) -> tuple[str, ...]:
    speed = case["speed"]
    return (
        name,
        f"{1e3 * case['seconds']['median']:.0f}",
        f"{speed['median']:.3f}  ({speed['low']:.3f} .. {speed['high']:.3f})",
        f"{case['peak_bytes'] / 2**20:.1f}",
        f"x {case['memory_ratio']:.3f}",
    )

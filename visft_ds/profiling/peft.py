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
from torch import Tensor, nn

from visft_ds.config.schema import Precision
from visft_ds.costs.hardware import DTYPES
from visft_ds.costs.ledger import FROZEN, OTHER, TRAINED, Ledger
from visft_ds.flags import check_extra
from visft_ds.interop.adapter import adapter_of
from visft_ds.interop.layouts import is_lora, tower_of
from visft_ds.interop.peft import adapter_config, peft_tensors
from visft_ds.interop.timm_names import model_arguments
from visft_ds.models.eva_vit import RECOMPUTE, EvaViT, build_backbone
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
COMPILED = "timm + PEFT, compiled, nothing again"
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
    compile: bool = False  #: timm + PEFT by torch.compile, too

    def __post_init__(self) -> None:
        check_blocks(self, counts=("depth", "rank", "batch", "repeats"), whole=True)
        if self.stream not in STREAMS:
            raise ValueError(f"--stream {self.stream}: give {' or '.join(STREAMS)}")


def measure_peft(options: PeftOptions) -> dict[str, Any]:
    """Every image size and dtype; a record of JSON values.

    Raises:
        ValueError: timm or PEFT is not installed.
        RuntimeError: gradients that do not agree: the two do not compute the same.
    """
    check_extra("profile peft", "", ("timm", "peft"))
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

    def theirs(again: bool, forward: Callable[[Tensor], Tensor] = eva.forward_features) -> None:
        eva.set_grad_checkpointing(again)
        with cast():
            taught(forward(images))

    def ours(policy: str) -> None:
        backbone.train()
        backbone.recompute = policy
        with cast():
            taught(backbone.tokens(images))

    steps: dict[str, Callable[[], None]] = {BASELINE: partial(theirs, True), PLAIN: partial(theirs, False)}
    steps |= {f"ours, {policy}": partial(ours, policy) for policy in ("none", *RECOMPUTE)}
    if options.compile:
        steps[COMPILED] = partial(theirs, False, torch.compile(eva.forward_features, dynamic=False))
    module_of = {case: backbone if case.startswith("ours") else adapted for case in steps}

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
        if case == COMPILED:
            continue  # its kernels do not say what they keep
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
            "peak_bytes": peaks.get(case),
            "memory_ratio": peaks[case] / peaks[BASELINE] if case in peaks else None,
        }
        for case in steps
    }
    return {"pixels": side, "dtype": name, "tokens": tokens, "gradients_differ_by": difference, "cases": cases}


# ------------------------------------------------------------------------------------------------------- tables


def tables(record: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """(title, tables) of a record, one for each image size and dtype."""
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
                *(
                    ("not seen", "")
                    if case["peak_bytes"] is None
                    else (f"{case['peak_bytes'] / 2**20:.1f}", f"x {case['memory_ratio']:.3f}")
                ),
            )
            for name, case in result["cases"].items()
        ]
        sections.append(Section(what, rows, ("recomputed", "ms", "times as fast (quartiles)", "peak MiB", "")))
        sections.append(Section("gradients of all adapters", [("differ by", f"{result['gradients_differ_by']:.1e}")]))
    return f"stage-2 step of the backbone against timm + PEFT: {blocks_text(options)}", sections


def peft_on_timm(backbone: EvaViT, dtype: torch.dtype | None) -> nn.Module:
    """timm's model with separate q, k and v under PEFT, ready to train the same adapters.

    On timm's fused qkv PEFT does nothing (docs/export.md). Frozen tensors of the wanted dtype are shared with the
    backbone; adapters are copies, in fp32 as PEFT keeps them.

    Args:
        backbone: with adapters, not merged.
        dtype: of everything that is frozen; None: each tensor as the backbone has it, so that all are shared.

    Raises:
        ValueError: the backbone has no adapters.
    """
    import timm
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    adapter = adapter_of(backbone)
    name, arguments = model_arguments(tower_of(backbone))
    with torch.device("meta"):
        model = timm.create_model(name, qkv_fused=False, **arguments)
    model.load_state_dict(_split(backbone, dtype), assign=True)
    settings = adapter_config(adapter, split=True)
    config = LoraConfig(r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules=settings["target_modules"])
    adapted = get_peft_model(model.requires_grad_(False), config)
    tensors = peft_tensors(adapter, split=True)
    device = backbone.pos_embed.device
    outcome = set_peft_model_state_dict(adapted, {key: value.to(device) for key, value in tensors.items()})
    assert not outcome.unexpected_keys, outcome.unexpected_keys
    assert not any(p.is_meta for p in adapted.parameters())
    return adapted.train()


def adapter_gradients(adapted: nn.Module, backbone: EvaViT) -> tuple[Tensor, Tensor]:
    """All gradients of the adapters of `peft_on_timm` and of the backbone it was made from, flat, in one order."""
    theirs = {
        name.replace(".default.", "."): parameter.grad
        for name, parameter in adapted.named_parameters()
        if is_lora(name.replace(".default.", "."))
    }
    adapter = adapter_of(backbone)
    gradients = {name: backbone.get_parameter(name).grad for name in adapter.tensors}
    assert all(gradient is not None for gradient in (*theirs.values(), *gradients.values()))
    adapter.tensors.update({name: gradient for name, gradient in gradients.items() if gradient is not None})
    ours = peft_tensors(adapter, split=True)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    flat = [theirs[name] for name in ours]
    return torch.cat([one.flatten() for one in flat if one is not None]), torch.cat(
        [v.flatten() for v in ours.values()]
    )


def _split(backbone: EvaViT, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tower's own tensors under timm's names, q, k and v as views of the fused projection."""
    tensors = {name: p.detach().to(dtype or p.dtype) for name, p in backbone.named_parameters() if not is_lora(name)}
    if backbone.cls_token is None:
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]  # timm keeps none for a class token that is not there
    for index in range(backbone.depth):
        stem = f"blocks.{index}.attn."
        for part, rows in zip("qkv", tensors.pop(f"{stem}qkv.weight").chunk(3), strict=True):
            tensors[f"{stem}{part}_proj.weight"] = rows
        for part in "qv":
            tensors[f"{stem}{part}_proj.bias"] = tensors.pop(f"{stem}{part}_bias")
    return tensors

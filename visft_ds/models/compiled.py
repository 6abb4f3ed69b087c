"""Transformer blocks through torch.compile, and their kernels recorded as CUDA graphs where shapes come again.

All blocks of a tower are one piece of code with other parameters, so it is compiled once and not once a block. Numbers
of images and tokens are symbols in it: images of any size run in the same kernels. A new compilation comes with a batch
of one image against several (torch gives 1 a meaning of its own), with an input that wants a gradient against one that
does not (the first block behind a frozen embedding), with a recompute policy and with evaluation; with nothing else.

What is compiled rounds otherwise than eager code: products are the same, sums of pointwise chains are fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.models.backbone import Backbone, require_eva_vit
from visft_ds.models.eva_vit import recomputed, run_block
from visft_ds.ops.attention import Packing

COMPILE = ("none", "blocks", "cuda_graphs")
#: Variants of the code of a block; a run needs up to six for each recompute policy. One more is an error.
_MOST_VARIANTS = 32
#: Times that a shape has to come before it is recorded, and shapes that are: each costs memory for all blocks.
_REPEATS, _MOST_SHAPES = 3, 8

Compile = Callable[..., Callable[..., Tensor]]  #: as torch.compile


class CompiledBlocks:
    """Runs the blocks of a tower, as `eva_vit.run_block` does.

    Args:
        how: "blocks" or "cuda_graphs".
        backend: of torch.compile.
        compile_: stands for torch.compile.
    """

    def __init__(self, how: str, *, backend: str = "inductor", compile_: Compile = torch.compile) -> None:
        assert how in COMPILE[1:], how
        self._any_shape = compile_(run_block, dynamic=True, backend=backend)
        self._recorded: Callable[..., Tensor] | None = None
        if how == "cuda_graphs":
            self._recorded = compile_(run_block, dynamic=False, backend=backend, mode="reduce-overhead")
        self._seen: dict[Any, int] = {}
        self._recording = False

    def begin(self, images: Tensor, *, training: bool, packed: bool) -> None:
        """Prepare for the first block of a forward: count how often its shape has come, for CUDA graphs."""
        self._recording = False
        if self._recorded is None:
            return
        # The outputs of all blocks of a forward live together, until the next forward.
        torch.compiler.cudagraph_mark_step_begin()
        key = (tuple(images.shape), training, torch.is_grad_enabled())
        known = self._seen.get(key, 0)
        full = sum(count >= _REPEATS for count in self._seen.values()) >= _MOST_SHAPES
        if packed or (full and known < _REPEATS):
            return
        self._seen[key] = known + 1
        self._recording = known + 1 >= _REPEATS

    def __call__(self, block: nn.Module, x: Tensor, packing: Packing | None, policy: str) -> Tensor:
        """Run a block; see `eva_vit.run_block`."""
        if self._recording and self._recorded is not None:
            return self._recorded(block, x, packing, policy)
        if packing is not None and policy == "block":
            # Attention over packed images is not compiled, and what is recomputed has to be compiled whole.
            out: Tensor = recomputed(self._any_shape)(block, x, packing, "none")
            return out
        assert packing is None or policy != "all_but_attention"  # the configuration refuses it
        return self._any_shape(block, x, packing, policy)


def compile_blocks(backbone: Backbone, how: str, *, backend: str = "inductor") -> None:
    """From now on the blocks of a tower are compiled, when they first run; "none" changes nothing."""
    if how == "none":
        return
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    # Otherwise a block that is compiled too often would run uncompiled, in silence.
    config.fail_on_recompile_limit_hit = True
    require_eva_vit(backbone).compiled = CompiledBlocks(how, backend=backend)


def check_compiler(how: str, device: torch.device) -> None:
    """Raise ValueError where blocks cannot be compiled for a device on this machine."""
    reason = None if how == "none" else why_not(how, device)
    if reason is not None:
        raise ValueError(f"visft.model.compile = {how}: {reason}")


def why_not(how: str, device: torch.device) -> str | None:
    """Reason why blocks cannot be compiled on this machine, and the remedy; None where they can."""
    if how == "cuda_graphs" and device.type != "cuda":
        return f"CUDA graphs are recorded on a GPU, this process computes on {device.type}; use blocks or none"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "kernels for GPUs are made by Triton, which is missing: pip install triton"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return (
            "kernels for CPUs are made by a C++ compiler, and there is none: install g++ (or name one in the variable "
            "CXX), or use none"
        )
    return None


def compilations() -> tuple[int, int]:
    """Graphs that this process has compiled so far, and places where a graph had to be broken up."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]), sum(counters["graph_break"].values())

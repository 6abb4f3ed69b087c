"""Transformer blocks through torch.compile.

All blocks of a tower are one piece of code with other parameters, so it is compiled once and not once a block. Numbers
of images and tokens are symbols in it: images of any size run in the same kernels. A new compilation comes with a batch
of one image against several (torch gives 1 a meaning of its own), with an input that wants a gradient against one that
does not (the first block behind a frozen embedding), with a recompute policy and with evaluation; with nothing else.

What is compiled rounds otherwise than eager code: products are the same, sums of pointwise chains are fused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visft_ds.models.backbone import Backbone, require_eva_vit
from visft_ds.models.eva_vit import recomputed, run_block
from visft_ds.ops.attention import Packing

COMPILE = ("none", "blocks")
#: Variants of the code of a block; a run needs up to six for each recompute policy. One more is an error.
_MOST_VARIANTS = 32


def compile_blocks(backbone: Backbone, how: str, *, backend: str = "inductor") -> None:
    """From now on the blocks of a tower are compiled, when they first run; "none" changes nothing."""
    if how == "none":
        return
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    # Otherwise a block that is compiled too often would run uncompiled, in silence.
    config.fail_on_recompile_limit_hit = True
    compiled = torch.compile(run_block, dynamic=True, backend=backend)

    def run(block: nn.Module, x: Tensor, packing: Packing | None, policy: str) -> Tensor:
        if packing is not None and policy == "block":
            # Attention over packed images is not compiled, and what is recomputed has to be compiled whole.
            out: Tensor = recomputed(compiled)(block, x, packing, "none")
            return out
        return compiled(block, x, packing, policy)

    require_eva_vit(backbone).compiled = run


def check_compiler(how: str, device: torch.device) -> None:
    """Raise ValueError where blocks cannot be compiled for a device on this machine."""
    if how == "none":
        return
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError(f"visft.model.compile = {how}: Triton is missing: pip install triton, or use none")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(f"visft.model.compile = {how}: there is no C++ compiler: install g++, or use none") from error


def compilations() -> tuple[int, int]:
    """Graphs that this process has compiled so far, and places where a graph had to be broken up."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"]), sum(counters["graph_break"].values())

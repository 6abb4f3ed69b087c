"""Transformer blocks through torch.compile.

All blocks of a tower are one piece of code with other parameters, so it is compiled once and not once a block. Numbers
of images and tokens are symbols in it: images of any size run in the same kernels. What is compiled rounds otherwise
than eager code: products are the same, sums of pointwise chains are fused.
"""

from __future__ import annotations

import torch

from visft_ds.models import Backbone, require_eva_vit

COMPILE = ("none", "blocks")
#: Variants of the code of a block; a run needs up to six for each recompute policy.
_MOST_VARIANTS = 32


def compile_blocks(backbone: Backbone, how: str, *, backend: str = "inductor") -> None:
    """From now on the blocks of a tower are compiled, when they first run; "none" changes nothing."""
    if how == "none":
        return
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    # Otherwise a block that is compiled too often would run uncompiled, in silence.
    config.fail_on_recompile_limit_hit = True
    for block in require_eva_vit(backbone).blocks:
        block.compile(dynamic=True, backend=backend)


def check_compiler(how: str, device: torch.device) -> None:
    """Raise ValueError if blocks cannot be compiled for a device on this machine."""
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

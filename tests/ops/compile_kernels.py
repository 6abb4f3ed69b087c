"""Compiles every Triton kernel for GPUs that are not there, and says what became of it.

    python -m tests.ops.compile_kernels [--only NAME] [--write]

The wheel of Triton brings ptxas and the disassembler, so no driver is needed. TRITON_INTERPRET must not be set. What it
finds for each kernel, dtype and architecture, as JSON: registers of a thread, bytes that spill, bytes of shared memory,
and matrix instructions in the machine code (HMMA, HGMMA, UTC*MMA). --write puts it into compiled_kernels.json, with
which `test_triton.py` compares. Sizes are those of EVA-ViT-E: width 1792, LoRA of rank 64 on q and v.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What Triton 3.9 does by default, said aloud: it warns that later versions will not fuse.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from visft_ds.ops.triton import lora

TABLE = Path(__file__).with_name("compiled_kernels.json")
ARCHITECTURES = (80, 90, 100)
WIDTH, RANK = 1792, 64
_NUMBERS = {"M", "F", "K", "x_row", "weight_row", "u_row", "dy_row", "count", "D"}
_MATRIX = re.compile(r"\bHMMA\.|\bHGMMA\.|\bUTC\w*MMA")


@dataclass(frozen=True)
class Case:
    """A kernel, its constants, and the types of its other arguments where they are not those of `_signature`."""

    name: str
    kernel: Any
    dtype: str
    constants: dict[str, Any]
    types: dict[str, str] = field(default_factory=dict)


def cases(architecture: int) -> Iterator[Case]:
    tiles = "sm_90" if architecture >= 90 else "sm_80"
    slices = (0, WIDTH, 0, 2 * WIDTH, 3 * WIDTH, WIDTH)
    for dtype, rank in (("bf16", RANK), ("fp16", RANK), ("bf16", 256)):
        name = "lora" if rank == RANK else f"lora r{rank}"
        constants: dict[str, Any] = {"SLICES": slices, "GROUPS": 2, "RANK": rank, "HAS_BIAS": True}
        constants |= lora.TILES["forward"][tiles] | {"GROUP": 8}
        yield Case(f"{name} forward", lora.forward_kernel, dtype, constants)
        constants = lora.TILES["backward"][tiles] | {"DOWN": 2 * rank, "GROUP": 8}
        yield Case(f"{name} backward", lora.backward_kernel, dtype, constants)


def compiled(case: Case, architecture: int) -> dict[str, int]:
    """Registers, spilled bytes, shared memory and matrix instructions of a kernel."""
    options = {name: case.constants[name] for name in ("num_warps", "num_stages") if name in case.constants}
    constants = {name: value for name, value in case.constants.items() if name not in options}
    names = case.kernel.arg_names
    types = {name: "constexpr" if name in constants else _type(name, case) for name in names}
    # What the launcher finds out at run time: pointers, strides and widths that are multiples of 16.
    divisible = [name for name in names if types[name] not in ("constexpr", "fp32") and name != "M"]
    source = ASTSource(
        fn=case.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        # Triton keeps what ptxas says to itself, so it is asked again.
        ptx, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"])
        assert target is not None
        command = [get_ptxas(architecture).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={target[1]}", str(ptx)]
        log = subprocess.run([*command, "-o", str(binary)], capture_output=True, text=True, check=True).stderr
        binary.write_bytes(kernel.asm["cubin"])
        code = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", str(binary)], capture_output=True, text=True, check=True
        )
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spilled": _number(r"(\d+) bytes spill stores", log),
        "shared": int(kernel.metadata.shared),
        "matrix_instructions": len(_MATRIX.findall(code.stdout)),
    }


def _type(name: str, case: Case) -> str:
    if name in case.types:
        return case.types[name]
    return "i32" if name in _NUMBERS else f"*{case.dtype}"


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, (pattern, text)
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time.")
    parser.add_argument("--only", default="", help="kernels whose row begins with this, e.g. 'lora forward bf16 sm_90'")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    rows = {}
    for architecture in ARCHITECTURES:
        for case in cases(architecture):
            name = f"{case.name} {case.dtype} sm_{architecture}"
            if name.startswith(options.only):
                rows[name] = compiled(case, architecture)
                print(name, rows[name], file=sys.stderr, flush=True)
    text = json.dumps({"triton": triton.__version__, "kernels": rows}, indent=2)
    if options.write:
        TABLE.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

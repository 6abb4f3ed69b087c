"""Compiles the Triton kernel for GPUs that are not there, and says what became of it.

    python -m tests.ops.compile_kernels [--write]

The wheel of Triton brings ptxas and the disassembler, so no driver is needed. TRITON_INTERPRET must not be
set. What it finds for each pass, dtype and architecture, as JSON: registers of a thread, bytes that spill,
bytes of shared memory, and matrix instructions in the machine code (HMMA, HGMMA, UTC*MMA). --write puts it
into compiled_kernels.json, with which `test_triton.py` compares.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

# What Triton 3.9 does by default, said aloud: it warns that later versions will not fuse.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from visft_ds.ops import triton_lora

TABLE = Path(__file__).with_name("compiled_kernels.json")
ARCHITECTURES = (80, 90, 100)
_MATRIX = re.compile(r"\bHMMA\.|\bHGMMA\.|\bUTC\w*MMA")
#: What is 1 where a factor is transposed, and where it is not: Triton makes constants of these.
WAYS = {"forward": ("right_row", "up_row"), "backward": ("right_column", "up_column")}


def compiled(way: str, dtype: str, architecture: int) -> dict[str, int]:
    """Registers, spilled bytes, shared memory and matrix instructions of the kernel."""
    constants: dict[str, Any] = dict(triton_lora.TILES["sm_90" if architecture >= 90 else "sm_80"])
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    constants |= dict.fromkeys(WAYS[way], 1) | {"HAS_BIAS": way == "forward", "GROUP": triton_lora.GROUP}
    kernel = triton_lora.kernel
    names = kernel.arg_names
    pointers = {"left", "right", "low", "up", "bias", "out"}
    types = {n: "constexpr" if n in constants else f"*{dtype}" if n in pointers else "i32" for n in names}
    # What the launcher finds out at run time: pointers, strides and widths that are multiples of 16.
    divisible = [name for name in names if types[name] != "constexpr" and name != "M"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    binary_of = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        # Triton keeps what ptxas says to itself, so it is asked again.
        ptx, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(binary_of.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", binary_of.asm["ptx"])
        assert target is not None
        command = [
            get_ptxas(architecture).path,
            "-v",
            "--regAllocOptLevel=2",
            f"--gpu-name={target[1]}",
            str(ptx),
        ]
        log = subprocess.run([*command, "-o", str(binary)], capture_output=True, text=True, check=True).stderr
        binary.write_bytes(binary_of.asm["cubin"])
        code = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", str(binary)], capture_output=True, text=True, check=True
        )
    return {
        "registers": _number(r"Used (\d+) registers", log),
        "spilled": _number(r"(\d+) bytes spill stores", log),
        "shared": int(binary_of.metadata.shared),
        "matrix_instructions": len(_MATRIX.findall(code.stdout)),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, (pattern, text)
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the Triton kernel ahead of time.")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    options = parser.parse_args()
    rows = {}
    for architecture, way, dtype in product(ARCHITECTURES, WAYS, ("bf16", "fp16")):
        name = f"{way} {dtype} sm_{architecture}"
        rows[name] = compiled(way, dtype, architecture)
        print(name, rows[name], file=sys.stderr, flush=True)
    text = json.dumps({"triton": triton.__version__, "kernels": rows}, indent=2)
    if options.write:
        TABLE.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

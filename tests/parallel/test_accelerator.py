"""DeepSpeed computes where torch does, also on GPUs without /dev/nvidiactl (WSL2, ROCm)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ranks import REPOSITORY


def run(code: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    inherited |= {"PYTHONPATH": str(REPOSITORY), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=inherited)
    return done.stdout + done.stderr[-500:]


@pytest.mark.parametrize(("sees", "accelerator"), [(True, "cuda"), (False, "cpu")])
def test_the_accelerator_is_torchs(sees: bool, accelerator: str) -> None:
    code = f"import torch; torch.cuda.is_available = lambda: {sees}\nimport os, visft_ds.parallel"
    assert run(f"{code}\nprint(os.environ['DS_ACCELERATOR'])") == f"{accelerator}\n"


def test_who_asks_deepspeed_for_the_cpu_gets_it_everywhere() -> None:
    code = (
        "import torch; torch.cuda.is_available = lambda: True\nfrom visft_ds.parallel.distributed import local_device\n"
    )
    assert run(f"{code}print(local_device())", DS_ACCELERATOR="cpu") == "cpu\n"

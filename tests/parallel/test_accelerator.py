"""DeepSpeed computes where torch does, also on GPUs without /dev/nvidiactl (WSL2, ROCm)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ranks import REPOSITORY


@pytest.mark.parametrize(("sees", "asked", "told"), [(1, "", "cuda cuda:0"), (0, "", "cpu cpu"), (1, "cpu", "cpu cpu")])
def test_the_accelerator_is_torchs_or_what_was_asked_for(sees: int, asked: str, told: str) -> None:
    code = f"import torch; torch.cuda.is_available = lambda: bool({sees})\nimport os\n"
    code += (
        "from visft_ds.parallel.distributed import local_device\nprint(os.environ['DS_ACCELERATOR'], local_device())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    environment |= {"PYTHONPATH": str(REPOSITORY), **({"DS_ACCELERATOR": asked} if asked else {})}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == f"{told}\n", done.stderr[-500:]

"""TF32 and determinism as they are set for a GPU; a torch for CPUs takes the settings too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from visft_ds.ops.numerics import describe_numerics, use_numerics, without_order
from visft_ds.resilience.errors import RankError, exit_code
from visft_ds.resilience.memory import memory_explained

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def _settings() -> tuple[Any, ...]:
    return (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.fixture(autouse=True)
def as_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = _settings()
    monkeypatch.delenv(WORKSPACE, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before[:2]
    torch.backends.cuda.enable_cudnn_sdp(before[3])
    torch.use_deterministic_algorithms(before[4])
    assert _settings() == before


def test_float32_is_computed_in_full_unless_tf32_is_asked_for() -> None:
    use_numerics(GPU)
    assert _settings() == (False, False, "highest", False, False)
    # What torch's compiler and its kernels read.
    assert "tf32" not in (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)
    use_numerics(GPU, tf32=True)
    assert _settings()[:3] == (True, True, "high") and torch.backends.cudnn.conv.fp32_precision == "tf32"
    assert WORKSPACE not in os.environ


def test_nothing_is_set_on_a_cpu() -> None:
    before = _settings()
    use_numerics(CPU, tf32=True, deterministic=True)
    assert _settings() == before and WORKSPACE not in os.environ


def test_an_operator_without_an_order_ends_in_a_line_that_names_it() -> None:
    use_numerics(GPU, deterministic=True)
    assert os.environ[WORKSPACE] == ":4096:8"
    with pytest.raises(RankError) as caught, memory_explained("step 7 (segmentation)", "segmentation", str, CPU):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))
    text = str(caught.value)
    assert text.startswith("step 7 (segmentation): put_ has no deterministic version") and "\n" not in text
    assert "visft.run.deterministic=false" in text and exit_code(caught.value) == 2


def test_cublas_without_its_workspace_is_told_how_to_get_it() -> None:
    said = RuntimeError(
        "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or ..., but this "
        "operation is not deterministic because it uses CuBLAS and you have CUDA >= 10.2."
    )
    text = without_order(said)
    assert text is not None and text.startswith("CuBLAS has") and f"{WORKSPACE}=:4096:8" in text
    assert without_order(RuntimeError("something else")) is None and without_order(ValueError(str(said))) is None


@pytest.mark.parametrize(
    ("device", "tf32", "deterministic", "words"),
    [
        (CPU, True, True, "float32 in full, the same numbers each time"),
        (GPU, False, False, "float32 in full; the order of some sums varies"),
        (GPU, True, True, "as TF32 (visft.model.tf32); deterministic operators only"),
    ],
)
def test_the_start_of_a_run_says_it(device: torch.device, tf32: bool, deterministic: bool, words: str) -> None:
    assert words in describe_numerics(device, tf32=tf32, deterministic=deterministic)

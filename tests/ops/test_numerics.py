"""TF32 and determinism as they are set for a GPU; a torch for CPUs takes the settings too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from visft_ds.ops import use_numerics

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


def test_an_operator_without_an_order_is_refused_where_asked() -> None:
    use_numerics(GPU, deterministic=True)
    assert os.environ[WORKSPACE] == ":4096:8"
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))


def test_nothing_is_set_on_a_cpu() -> None:
    before = _settings()
    use_numerics(CPU, tf32=True, deterministic=True)
    assert _settings() == before and WORKSPACE not in os.environ

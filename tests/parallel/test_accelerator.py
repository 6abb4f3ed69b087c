"""DeepSpeed computes where torch does, also on GPUs without /dev/nvidiactl (WSL2, ROCm)."""

from __future__ import annotations

import importlib

import pytest

import visft_ds.parallel
from visft_ds.distributed import local_device


@pytest.mark.parametrize(
    ("sees", "asked", "told"), [(1, "", "cuda cuda:0"), (0, "", "cpu cpu"), (1, "cpu", "cpu cpu")]
)
def test_the_accelerator_is_torchs_or_what_was_asked_for(
    sees: int, asked: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"DS_ACCELERATOR": asked} if asked else {}
    monkeypatch.setattr("os.environ", environment)
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(sees))
    importlib.reload(visft_ds.parallel)
    assert f"{environment['DS_ACCELERATOR']} {local_device()}" == told


@pytest.mark.parametrize("asked", ["cuda", "tpu"])
def test_an_accelerator_that_is_not_there_is_refused(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=f"DS_ACCELERATOR={asked}: torch sees no such device here"):
        local_device()

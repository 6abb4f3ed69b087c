"""Attention of packed images against one image after the other, and who computes what."""

from __future__ import annotations

import sys
import tomllib
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from torch import Tensor
from torch.nn.attention import varlen

from tests.ranks import REPOSITORY
from visft_ds.ops import attention, use_numerics
from visft_ds.ops.attention import (
    FLASH_2,
    FLASH_3,
    PLAIN,
    VARLEN,
    Packing,
    attention_packed,
    packed_kernel,
)

BF16 = torch.bfloat16


def _plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 19), min_size=1, max_size=5), st.sampled_from([6, 88, 112]))
def test_packed_lengths_equal_one_image_after_the_other(lengths: list[int], head_dim: int) -> None:
    torch.manual_seed(0)
    fused = torch.randn(sum(lengths), 3, 2, head_dim, dtype=torch.float64)
    q, k, v = (part.requires_grad_() for part in fused.unbind(1))
    packing = Packing.of(lengths, q.device)
    out = attention_packed(q, k, v, packing)
    # The definition in other words: each token sees those of its own image only.
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5
    shares = scores.masked_fill(owner[:, None] != owner[None], -torch.inf).softmax(dim=-1)
    exact = torch.einsum("hqk,khd->qhd", shares, v)
    gradient = torch.randn_like(out)
    actual, expected = (torch.autograd.grad(value, (q, k, v), gradient) for value in (out, exact))
    torch.testing.assert_close((out, *actual), (exact, *expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kernel", "package"), [(FLASH_2, "flash_attn"), (FLASH_3, "flash_attn_interface"), (VARLEN, None)]
)
def test_what_kernels_for_packed_lengths_are_given(
    monkeypatch: pytest.MonkeyPatch, kernel: str, package: str | None
) -> None:
    """flash-attn's functions by a stand-in with their first seven arguments, torch's by the shapes it works out
    itself.
    """
    lengths = [3, 5, 1]
    q, k, v = (torch.randn(9, 2, 8) for _ in range(3))
    packing = Packing.of(lengths, q.device)
    if package is None:
        asked = [tensor.to("meta", BF16) for tensor in (q, k, v)]
        on_meta = Packing.of(lengths, torch.device("meta"))
        assert attention_packed(asked[0], asked[1], asked[2], on_meta, kernel).shape == (9, 2, 8)
        return

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
    ) -> Any:
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.tolist() == [0, 3, 8, 9] and max_q == max_k == 5
        images = zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)
        parts = [[t[low:high].transpose(0, 1) for t in (q, k, v)] for low, high in images]
        out = torch.cat([_plain(*part).transpose(0, 1) for part in parts])
        return (out, None) if kernel == FLASH_3 else out

    module = types.ModuleType(package)
    module.flash_attn_varlen_func = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, module)
    torch.testing.assert_close(
        attention_packed(q, k, v, packing, kernel), attention_packed(q, k, v, packing, PLAIN)
    )


def test_which_kernel_runs_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """By GPU, precision, width of a head and what is installed."""
    gpu = torch.device("cuda", 0)
    installed = set[str]()
    monkeypatch.setattr(attention, "find_spec", lambda name: name if name in installed else None)

    def chosen(
        capability: tuple[int, int], *packages: str, dtype: torch.dtype = BF16, width: int = 112
    ) -> str:
        packed_kernel.cache_clear()
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
        installed.clear()
        installed.update(packages)
        kernel, why = packed_kernel(gpu, dtype, width)
        return f"{kernel}: {why}"

    both = ("flash_attn_2_cuda", "flash_attn_interface")
    try:
        assert chosen((9, 0), *both).startswith(f"{FLASH_3}: installed")
        assert chosen((8, 0), *both) == f"{FLASH_2}: installed; flash-attn 3 is not, or not for sm_80"
        assert chosen((9, 0), "flash_attn_2_cuda").startswith(FLASH_2)
        assert chosen((9, 0), "flash_attn").startswith(VARLEN), "the package of flash-attn 4"
        assert chosen((10, 0), "flash_attn_interface").startswith(VARLEN)
        assert chosen((8, 0), dtype=torch.float16, width=88) == f"{VARLEN}: flash-attn is not installed"
        assert "16 bits" in chosen((9, 0), *both, dtype=torch.float32)
        assert "heads of 12" in chosen((9, 0), *both, width=12)
        assert "heads of 264" in chosen((9, 0), *both, width=264)
        assert chosen((7, 0), *both, dtype=torch.float16).endswith("this GPU is sm_70")
        assert packed_kernel(torch.device("cpu"), BF16, 64) == (PLAIN, "no GPU")
    finally:
        packed_kernel.cache_clear()


@pytest.mark.skipif(
    not hasattr(varlen, "_select_backend"), reason="torch before 2.15 takes flash attention anyway"
)
@pytest.mark.parametrize("head_dim", [64, 88, 112, 256])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_packed_lengths_never_meet_cudnn(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], head_dim: int
) -> None:
    """It plans anew for every number of tokens; torch prefers it on sm_90 and sm_100, unless a run forbids
    it.
    """
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)
    monkeypatch.setattr("torch.backends.cudnn.version", lambda: 92400)
    device, offsets = torch.device("cuda", 0), torch.tensor([0, 1600, 4000])
    shape = {
        "shape": (4000, 16, head_dim),
        "dtype": BF16,
        "device": device,
        "is_cuda": True,
        "requires_grad": True,
    }
    q, before = types.SimpleNamespace(**shape), torch.backends.cuda.cudnn_sdp_enabled()

    def chosen() -> int:
        for function in vars(varlen).values():
            getattr(function, "cache_clear", lambda: None)()
        found: int = varlen._select_backend(q, q, q, offsets, offsets, 2400, [-1, -1])
        return found

    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert (chosen() != varlen._FLASH_ATTENTION_BACKEND) == (
            capability in ((9, 0), (10, 0)) and head_dim <= 128
        )
        use_numerics(device)
        assert chosen() == varlen._FLASH_ATTENTION_BACKEND
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_torch_which_takes_cudnn_whatever_it_is_told_is_not_installed() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (torch_here,) = [
        requirement
        for requirement in map(Requirement, project["dependencies"])
        if requirement.name == "torch"
    ]
    assert "2.14.0" not in torch_here.specifier and "2.13.0" in torch_here.specifier

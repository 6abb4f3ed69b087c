"""Attention: the specification against the formula, the backends against the specification."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend

from visft_ds.ops import attention as attention_module
from visft_ds.ops.attention import (
    Packing,
    attention,
    attention_backend,
    attention_packed,
    attention_reference,
    choose_for_gpu,
    choose_packed_for_gpu,
    fixed_lengths,
    packed_backend,
    use_fixed_lengths,
)


def _qkv(dtype: torch.dtype, *, length: int = 9, head_dim: int = 6) -> list[Tensor]:
    """Views of one fused projection, with the strides the model hands over."""
    fused = torch.randn(2, length, 3, 4, head_dim, dtype=dtype)
    return [part.detach().requires_grad_() for part in fused.permute(2, 0, 3, 1, 4).unbind(0)]


def test_reference_is_the_formula() -> None:
    q, k, v = (part.detach() for part in _qkv(torch.float64))
    out = torch.zeros_like(q)
    for image in range(2):
        for head in range(4):
            for query in range(9):
                weights = torch.exp(k[image, head] @ q[image, head, query] / 6**0.5)
                out[image, head, query] = (weights / weights.sum()) @ v[image, head]
    # Two float64 evaluations of the same sums.
    torch.testing.assert_close(attention_reference(q, k, v), out, rtol=0, atol=1e-12)


# head_dim 112 is EVA-ViT-E's; 1,025 tokens need several tiles of a fused kernel.
@pytest.mark.parametrize(("length", "head_dim"), [(9, 6), (257, 112), (1025, 8)])
def test_chosen_backend_equals_the_reference_with_gradients(length: int, head_dim: int) -> None:
    inputs = _qkv(torch.float64, length=length, head_dim=head_dim)
    assert attention_backend(inputs[0].device, torch.float64)[0] == "sdpa"
    gradient = torch.randn(2, 4, length, head_dim, dtype=torch.float64)
    found = torch.autograd.grad(attention(*inputs), inputs, gradient)
    wanted = torch.autograd.grad(attention_reference(*inputs), inputs, gradient)
    torch.testing.assert_close(attention(*inputs), attention_reference(*inputs), rtol=0, atol=1e-12)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("amx", "length", "chosen"),
    [(False, 9, "reference"), (False, 600, "reference"), (True, 511, "reference"), (True, 512, "sdpa")],
)
def test_bf16_on_a_cpu_takes_what_is_faster_there_and_stays_close_to_float64(
    monkeypatch: pytest.MonkeyPatch, amx: bool, length: int, chosen: str
) -> None:
    monkeypatch.setattr("visft_ds.ops.attention._AMX", amx)
    inputs = [part.detach() for part in _qkv(torch.bfloat16, length=length)]
    name, reason = attention_backend(inputs[0].device, torch.bfloat16, length=length)
    assert name == chosen and "CPU" in reason.upper()
    out = attention(*inputs)
    exact = attention_reference(*(part.double() for part in inputs))
    assert out.dtype == torch.bfloat16
    # bf16 has 8 bits: 2^-8 = 0.4 % per rounding, a few roundings deep.
    assert (out.double() - exact).norm() / exact.norm() < 1e-2


BF16, FP16 = torch.bfloat16, torch.float16
V100, A100, H100, B200, RTX = (7, 0), (8, 0), (9, 0), (10, 0), (12, 0)


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_dim", "length", "flash", "name"),
    [
        (V100, FP16, 112, 257, None, "efficient"),
        (A100, BF16, 112, 257, None, "flash"),
        (A100, BF16, 88, 5329, None, "flash"),
        (A100, BF16, 112, 5329, "FA3", "cudnn"),  # where flash attention is none, and for fixed numbers of tokens
        (H100, BF16, 112, 257, None, "flash"),
        (H100, BF16, 112, 1025, None, "cudnn"),
        (H100, BF16, 88, 5329, "FA3", "flash"),
        (H100, BF16, 112, 257, "FA4", "flash"),
        (H100, torch.float32, 112, 5329, "FA3", "efficient"),
        (H100, BF16, 12, 5329, None, "efficient"),
        (B200, BF16, 112, 257, None, "cudnn"),
        (B200, BF16, 112, 257, "FA4", "cudnn"),  # 112 is no multiple of 32
        (B200, BF16, 64, 257, "FA4", "flash"),
        (RTX, BF16, 112, 5329, None, "flash"),
    ],
)
def test_the_table_of_gpus(
    gpu: tuple[int, int], dtype: torch.dtype, head_dim: int, length: int, flash: str | None, name: str
) -> None:
    found, reason = choose_for_gpu(gpu, dtype, head_dim, length, flash, fixed=True)
    assert found == name and reason
    varying, why = choose_for_gpu(gpu, dtype, head_dim, length, flash)
    if name == "cudnn":  # a plan for each number of tokens
        assert varying == ("flash" if flash is None else "efficient") and "a plan for each" in why
    else:
        assert varying == name
    assert SDPBackend.CUDNN_ATTENTION not in attention_module._ORDER[varying]


def test_numbers_of_tokens_are_fixed_for_those_that_were_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "_fixed", frozenset())
    monkeypatch.setattr(attention_module, "_capability", lambda device: H100)
    gpu = torch.device("cuda", 0)
    assert attention_backend(gpu, BF16, 112, 5329)[0] == "flash"
    use_fixed_lengths([324, 5329])
    assert fixed_lengths() == (324, 5329)
    names = {length: attention_backend(gpu, BF16, 112, length)[0] for length in (324, 1637, 5328, 5329)}
    assert names == {324: "flash", 1637: "flash", 5328: "flash", 5329: "cudnn"}


@pytest.mark.parametrize(
    ("gpu", "dtype", "head_dim", "flash", "installed", "name"),
    [
        (V100, FP16, 112, None, True, "one by one"),
        (A100, torch.float32, 112, None, True, "one by one"),
        (A100, BF16, 12, None, True, "one by one"),
        (A100, BF16, 112, None, False, "varlen"),
        (A100, BF16, 88, None, True, "flash_attn"),
        (H100, BF16, 112, "FA3", True, "varlen"),
        (B200, BF16, 112, "FA4", True, "flash_attn"),
        (B200, BF16, 112, "FA4", False, "one by one"),
    ],
)
def test_the_table_of_gpus_for_packed_lengths(
    gpu: tuple[int, int], dtype: torch.dtype, head_dim: int, flash: str | None, installed: bool, name: str
) -> None:
    found, reason = choose_packed_for_gpu(gpu, dtype, head_dim, flash, installed)
    assert found == name and reason


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
    found, wanted = (torch.autograd.grad(value, (q, k, v), gradient) for value in (out, exact))
    torch.testing.assert_close((out, *found), (exact, *wanted), rtol=0, atol=1e-12)


def test_what_kernels_for_packed_lengths_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's function by a stand-in with its first seven arguments, torch's by the shapes it works out itself."""
    lengths = [3, 5, 1]
    q, k, v = (torch.randn(9, 2, 8) for _ in range(3))
    packing = Packing.of(lengths, q.device)
    wanted = attention_packed(q, k, v, packing)

    def stand_in(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_q: int, max_k: int
    ) -> Tensor:
        assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q.tolist() == [0, 3, 8, 9] and max_q == max_k == 5
        images = zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)
        parts = [[t[low:high].transpose(0, 1) for t in (q, k, v)] for low, high in images]
        return torch.cat([attention_reference(*part).transpose(0, 1) for part in parts])

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    name = "visft_ds.ops.attention.packed_backend"
    monkeypatch.setattr(name, lambda *_: ("flash_attn", ""))
    torch.testing.assert_close(attention_packed(q, k, v, packing), wanted)
    monkeypatch.setattr(name, lambda *_: ("varlen", ""))
    q, k, v = (tensor.to("meta", torch.bfloat16) for tensor in (q, k, v))
    assert attention_packed(q, k, v, Packing.of(lengths, q.device)).shape == (9, 2, 8)


def test_packing_needs_tokens() -> None:
    assert packed_backend(torch.device("cpu"), torch.float32)[0] == "one by one"
    for lengths in ([], [3, 0]):
        with pytest.raises(ValueError, match="at least one"):
            Packing.of(lengths, torch.device("cpu"))

"""The Triton kernels in Triton's interpreter, on a CPU; `test_triton.py` runs this file with
TRITON_INTERPRET=1.

Triton decides on interpreting when a kernel is defined, so these tests need a process of their own. Every
result is compared with float64 on the same inputs. The interpreter computes bf16 wrongly without a word, so
launchers go through float32 there: that tests what kernels make of bf16 inputs, not their own roundings.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visft_ds.ops.lora import Slices, lora_linear
from visft_ds.ops.triton_lora import INTERPRETED

assert INTERPRETED, "run by tests/ops/test_triton.py"

#: Relative error in the Frobenius norm. fp32: sums of a hundred terms; 16 bit: u and each result are rounded
#: once.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _lora(
    slices: Slices, lead: tuple[int, ...], fan_in: int, fan_out: int, rank: int, dtype: torch.dtype
) -> list[Tensor]:
    width = sum(high - low for low, high in slices)
    shapes = ((*lead, fan_in), (fan_out, fan_in), (fan_out,), (len(slices) * rank, fan_in), (width, rank))
    scales = (1.0, fan_in**-0.5, 1.0, fan_in**-0.5, rank**-0.5)
    return [(torch.randn(*shape) * scale).to(dtype) for shape, scale in zip(shapes, scales, strict=True)]


def _compare_lora(tensors: list[Tensor], slices: Slices, gradient: Tensor, *, with_bias: bool = True) -> None:
    """Output and all gradients of the Triton backend against the eager one in float64."""
    actual = []
    for dtype, backend in ((gradient.dtype, "triton"), (torch.float64, "eager")):
        x, weight, bias, a, b = (tensor.to(dtype).requires_grad_() for tensor in tensors)
        out = lora_linear(x, weight.detach(), bias if with_bias else None, a, b, 0.5, slices, backend=backend)
        expected = (x, a, b, bias) if with_bias else (x, a, b)
        actual.append((out.detach(), *torch.autograd.grad(out, expected, gradient.to(dtype))))
    for name, value, exact in zip(("y", "dx", "dA", "dB", "dbias"), *actual, strict=False):
        assert _error(value, exact) < TOLERANCE[gradient.dtype], (name, _error(value, exact))


QV: Slices = ((0, 32), (64, 96))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_lora_equals_float64(dtype: torch.dtype) -> None:
    _compare_lora(_lora(QV, (2, 9), 48, 96, 16, dtype), QV, torch.randn(2, 9, 96).to(dtype))


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Slices, tuple[int, ...], int, int, int, bool]:
    """Ragged slices that end anywhere in a tile, ranks that are no power of two, sizes below and above a
    tile.
    """
    fan_out = draw(st.integers(4, 80))
    count = draw(st.integers(1, 3)) if fan_out >= 6 else 1
    edges = draw(
        st.lists(st.integers(0, fan_out), min_size=2 * count, max_size=2 * count, unique=True).map(sorted)
    )
    slices = tuple((edges[2 * i], edges[2 * i + 1]) for i in range(count))
    lead = draw(st.lists(st.integers(1, 7), min_size=1, max_size=2).map(tuple))
    return slices, lead, draw(st.integers(1, 70)), fan_out, draw(st.integers(1, 40)), draw(st.booleans())


@pytest.mark.slow
@settings(max_examples=25, deadline=None, derandomize=True)
@given(_cases())
def test_lora_of_any_shape(case: tuple[Slices, tuple[int, ...], int, int, int, bool]) -> None:
    slices, lead, fan_in, fan_out, rank, with_bias = case
    torch.manual_seed(0)
    tensors = _lora(slices, lead, fan_in, fan_out, rank, torch.float32)
    _compare_lora(tensors, slices, torch.randn(*lead, fan_out), with_bias=with_bias)


def test_lora_takes_what_is_not_contiguous() -> None:
    x, *others = _lora(QV, (6, 5, 48), 48, 96, 16, torch.float32)
    x = torch.randn(48, 5, 3).permute(2, 1, 0)
    _compare_lora([x, *others], QV, torch.randn(96, 5, 3).permute(2, 1, 0))
    _compare_lora([x, *others], QV, torch.ones(()).expand(3, 5, 96))


def test_lora_small_updates_survive_bf16() -> None:
    """The whole layer rounds once. |B| is 1e-2 and rank 64, as some steps after the start of a run."""
    slices: Slices = ((0, 64),)
    x, weight, bias, a, b = _lora(slices, (40,), 256, 64, 64, torch.bfloat16)
    b = torch.randn(64, 64).mul(1e-2).bfloat16()
    share = {}
    for backend in ("triton", "eager"):
        changed, plain = (
            lora_linear(x, weight, bias, a, values, 1 / 64, slices, backend=backend).double()
            for values in (b, torch.zeros_like(b))
        )
        delta = (x.double() @ a.double().t()) @ b.double().t() / 64
        share[backend] = float(((changed - plain) * delta).sum() / delta.square().sum())
    assert 0.9 < share["triton"] < 1.1 and share["eager"] < 0.75

"""Attention: the specification against the formula, the backends against the specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from visft_ds.ops.attention import attention, attention_backend, attention_reference


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


def test_bf16_on_a_cpu_takes_plain_products_and_stays_close_to_float64() -> None:
    inputs = [part.detach() for part in _qkv(torch.bfloat16)]
    name, reason = attention_backend(inputs[0].device, torch.bfloat16)
    assert name == "reference" and "CPU" in reason
    out = attention(*inputs)
    exact = attention_reference(*(part.double() for part in inputs))
    assert out.dtype == torch.bfloat16
    # bf16 has 8 bits: 2^-8 = 0.4 % per rounding, a few roundings deep.
    assert (out.double() - exact).norm() / exact.norm() < 1e-2

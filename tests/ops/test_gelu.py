"""The GELU that keeps its slope in 8 bits: exact results, slopes off by half a step at most, one byte a number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.costs.ledger import FROZEN, Allocations, Ledger, saved_tensors_counted
from visft_ds.models.layers import Mlp
from visft_ds.models.lora import LoRALinear
from visft_ds.ops.gelu import STEPS, gelu


def _slope(x: Tensor, *, coded: bool) -> Tensor:
    used = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(gelu(used, coded=coded).sum(), used)
    return gradient


def test_slopes_are_off_by_half_a_step_and_0_and_1_are_exact() -> None:
    x = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    exact, coded = _slope(x, coded=False), _slope(x, coded=True)
    # The extremes, at +-sqrt(2), are within the range of the codes: beyond it, the error would be larger.
    assert exact.min() < -0.128 and exact.max() > 1.128
    assert 0.49 / STEPS < (coded - exact).abs().max() <= 0.5 / STEPS + 1e-12
    assert torch.all(coded[x < -6] == 0) and torch.all(coded[x > 6] == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_exact_and_gradients_lose_little(dtype: torch.dtype) -> None:
    """In bf16 the code costs about as much as rounding the gradient does anyway: 2^-9 and its like."""
    x, gradient = (torch.randn(4, 50_000) * 1.5).to(dtype), torch.randn(4, 50_000).to(dtype)
    wide = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(wide), wide, gradient.double())
    errors = []
    for coded in (False, True):
        used = x.clone().requires_grad_()
        out = gelu(used, coded=coded)
        assert out.dtype == dtype and torch.equal(out.detach(), F.gelu(x))
        (found,) = torch.autograd.grad(out, used, gradient.clone())  # is written over
        assert found.dtype == dtype
        errors.append(float((found.double() - exact).norm() / exact.norm()))
    assert errors[0] < 2e-3 and 1e-3 < errors[1] < 3e-3


def test_one_byte_is_kept_for_each_number() -> None:
    kept: list[Tensor] = []
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gelu(x, coded=True)
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, x.shape)]


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_an_mlp_computes_the_same_and_holds_one_wide_tensor_less(
    coded: bool, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With F.gelu three live in the backward pass: what is kept, the gradient of the result and that of the input."""
    monkeypatch.setattr("visft_ds.ops.gelu._AT_ONCE", {"cpu": 4096})
    torch.manual_seed(0)
    mlp = Mlp(8, 4096)
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    mlp.requires_grad_(False)
    if adapted:
        for name in ("fc1", "fc2"):
            layer = getattr(mlp, name)
            setattr(mlp, name, LoRALinear(layer, ((0, layer.out_features),), rank=2, alpha=2.0))
            torch.nn.init.normal_(getattr(mlp, name).lora_B)
    x, given = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8)
    trained = [x, *(p for p in mlp.parameters() if p.requires_grad)]

    def plain() -> Tensor:
        return mlp.fc2(F.gelu(mlp.fc1(x)))

    wanted, exact = plain().detach(), torch.autograd.grad(plain(), trained, given)
    peaks = []
    for run in (plain, lambda: mlp(x, coded=coded)):
        ledger = Ledger("cpu")
        for tensor in (*mlp.parameters(), x, given):
            ledger.add(tensor, FROZEN)
        before = sum(ledger.now.values())
        with saved_tensors_counted(ledger, mlp), Allocations(ledger):
            found = torch.autograd.grad(run(), trained, given)
        peaks.append((sum(ledger.at_peak.values()) - before) / (4 * 16 * 4096))
        if run is plain or not coded:
            assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    assert torch.equal(mlp(x, coded=coded), wanted)
    if adapted:  # fc2 keeps its input as well, up to a moment at which that of fc1 has no gradient yet
        assert peaks[1] <= peaks[0]
    else:
        assert peaks[1] < (1.7 if coded else 2.1) < 3 <= peaks[0]

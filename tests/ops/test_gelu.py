"""The GELU that writes over its gradient: torch's to the last bit, with a wide tensor less."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.planner.made_up import LiveBytes
from visft_ds.models.eva_vit import Linear
from visft_ds.models.lora import LoRALinear
from visft_ds.ops import gelu


@pytest.mark.parametrize("adapted", [False, True])
def test_an_mlp_computes_the_same_and_holds_one_wide_tensor_less(adapted: bool) -> None:
    """With F.gelu three live in the backward pass: what is kept, the gradient of the result and that of the
    input.
    """
    torch.manual_seed(0)
    mlp = nn.ModuleDict({"fc1": Linear(8, 4096), "fc2": Linear(4096, 8)})
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    mlp.requires_grad_(False)
    if adapted:
        for name in ("fc1", "fc2"):
            layer: Any = mlp[name]
            mlp[name] = adapted_layer = LoRALinear(layer, ((0, layer.out_features),), rank=2, alpha=2.0)
            torch.nn.init.normal_(adapted_layer.lora_B)
    x, given = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8)
    trained = [x, *(p for p in mlp.parameters() if p.requires_grad)]

    def run_with(activation: Callable[[Tensor], Tensor]) -> Tensor:
        out: Tensor = mlp["fc2"](activation(mlp["fc1"](x)))
        return out

    assert torch.equal(run_with(gelu), run_with(F.gelu))
    exact, peaks = torch.autograd.grad(run_with(F.gelu), trained, given), []
    for activation in (F.gelu, gelu):
        with LiveBytes() as live:
            found = torch.autograd.grad(run_with(activation), trained, given)
        peaks.append(live.peak / (4 * 16 * 4096))
        assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    if adapted:  # fc2 keeps its input as well, up to a moment at which that of fc1 has no gradient yet
        assert peaks[1] <= peaks[0]
    else:
        assert peaks[1] < 2.1 < 3 <= peaks[0]
    # Without a gradient the hidden layer is the one wide tensor.
    with torch.no_grad(), LiveBytes() as live:
        result = run_with(gelu)
    assert torch.equal(result, run_with(F.gelu))
    if not adapted:
        assert live.peak < 1.1 * 4 * 16 * 4096

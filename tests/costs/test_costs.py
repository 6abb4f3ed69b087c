"""Counting, formulas, bytes by kind, parts of a step: each against arithmetic done by hand or another way."""

from __future__ import annotations

import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from visft_ds.costs import hardware
from visft_ds.costs.counting import FlopMeter
from visft_ds.costs.flops import Flops, TowerShape, packed_flops, tower_flops
from visft_ds.costs.ledger import (
    ACTIVATIONS,
    BUCKETS,
    GATHERED,
    OTHER,
    TRAINED,
    TRANSIENT,
    Ledger,
    saved_tensors_counted,
)
from visft_ds.models.eva_vit import EvaViT, build_backbone
from visft_ds.models.lora import inject_lora

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------ operations

EVA_E = {"width": 1792, "depth": 64, "hidden": 15360, "patch_size": 14, "post_norm": True}
LORA_E = frozenset(f"blocks.{index}.attn.qkv.lora_{name}" for index in range(64) for name in "AB")


def test_the_formula_reproduces_the_known_figures_of_eva_e() -> None:
    """At 224 pixels with a class token: 257 tokens of 256 patches. Figures rounded as they are usually quoted."""
    forward = tower_flops(TowerShape(**EVA_E), images=1, tokens=257, patches=256).forward
    attention = 64 * 4 * 257**2 * 1792
    patches = 2 * 256 * 3 * 14**2 * 1792
    assert (forward - attention - patches) / (64 * 257) / 1e6 == pytest.approx(135.8, abs=0.05)
    assert forward / 1e12 == pytest.approx(2.264, abs=0.001)
    step = tower_flops(
        TowerShape(**EVA_E, rank=64, targets=("q", "v"), trainable=LORA_E, recompute="block"), 1, 257, 256
    )
    assert step.forward / 1e12 == pytest.approx(2.28, abs=0.005)
    assert step.backward / 1e12 == pytest.approx(2.34, abs=0.01)
    assert (step.forward + step.backward + step.recompute) / 1e12 == pytest.approx(6.90, abs=0.01)


def test_operations_grow_with_images_and_nothing_trains_without_a_backward_pass() -> None:
    one, four = (tower_flops(TowerShape(**EVA_E), images, 256, 256) for images in (1, 4))
    assert four == Flops(4 * one.forward) and one.backward == one.recompute == 0


def tower_of(backbone: EvaViT, **options: Any) -> TowerShape:
    hidden = backbone.get_submodule("blocks.0.mlp.fc1").out_features
    assert isinstance(hidden, int)
    return TowerShape(
        width=backbone.width,
        depth=backbone.depth,
        hidden=hidden,
        patch_size=backbone.patch_size,
        post_norm=backbone.post_norm,
        recompute=backbone.recompute,
        trainable=frozenset(name for name, p in backbone.named_parameters() if p.requires_grad),
        **options,
    )


@pytest.mark.parametrize(
    ("targets", "trained", "post_norm", "recompute"),
    [
        (("q", "v"), "", False, "none"),
        (("q", "v"), "", True, "block"),
        (("q", "v"), "", False, "block"),  # recomputation ends before the last layer
        (("fc2",), "", False, "block"),  # and here it does not
        (("k", "proj", "fc1"), "", False, "block"),
        (("fc1",), "", True, "none"),  # the first block's attention needs no gradient
        ((), "blocks.1.mlp.fc1.weight", False, "none"),
        ((), "norm2", False, "none"),
        ((), "norm1", True, "none"),
        ((), "", False, "none"),  # all of it trains
        (("q", "v"), "", False, "mlp"),
        (("q", "v"), "", True, "mlp"),  # the norm behind the MLP has kept its result
        (("fc2",), "", False, "mlp"),
    ],
)
def test_a_backbone_step_costs_what_the_formula_says(
    targets: tuple[str, ...], trained: str, post_norm: bool, recompute: str
) -> None:
    """To the last operation: both count the same products."""
    backbone = build_backbone("debug", width=16, depth=2, num_heads=2, image_size=56, post_norm=post_norm)
    backbone.requires_grad_(not targets and not trained)
    if targets:
        inject_lora(backbone, rank=3, targets=targets)
    for name, parameter in backbone.named_parameters():
        if trained and trained in name:
            parameter.requires_grad_(True)
    backbone.recompute = recompute
    meter = FlopMeter()
    with meter.counting():
        meter.start("forward")
        features = backbone.train()(torch.randn(2, 3, 56, 70))
        meter.stop("forward")
        features.square().sum().backward()
    tower = tower_of(backbone, rank=3 if targets else 0, targets=targets)
    formula = tower_flops(tower, images=2, tokens=20, patches=20)
    assert meter.parts["forward"] == formula.forward
    assert meter.total == formula.all
    assert (recompute != "none") == bool(formula.recompute)


def test_packed_images_cost_what_the_formula_says() -> None:
    """Patches of the padded batch are embedded, blocks see those of the images alone."""
    backbone = build_backbone("debug", width=16, depth=2, num_heads=2, image_size=56)
    backbone.requires_grad_(False)
    inject_lora(backbone, rank=3)
    backbone.recompute = "block"
    meter = FlopMeter()
    with meter.counting():
        backbone.train()(torch.randn(2, 3, 56, 70), ((56, 28), (30, 70))).square().sum().backward()
    formula = packed_flops(tower_of(backbone, rank=3, targets=("q", "v")), [4 * 2, 2 * 5], 2 * 4 * 5)
    assert meter.total == formula.all


def test_naive_attention_costs_one_product_less_backward() -> None:
    fused, naive = (
        tower_flops(
            TowerShape(**EVA_E, trainable=LORA_E, rank=64, targets=("q", "v"), plain_attention_below=limit), 1, 2, 2
        )
        for limit in (2, 3)
    )
    assert fused.backward - naive.backward == 64 * 2 * 2 * 2 * 1792


# ----------------------------------------------------------------------------------------------------- bytes


def test_saved_activations_of_a_small_module_are_exact() -> None:
    """4 rows of 5 -> 7 -> GELU -> 3 in fp32: GELU keeps its input, the second layer its input, square its own."""
    module = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    ledger, batch = Ledger("cpu"), torch.randn(4, 5)
    ledger.add_all(module.parameters(), TRAINED)
    ledger.add(batch, OTHER)
    with saved_tensors_counted(ledger, module):
        loss = module(batch).square().sum()
    assert ledger.now[ACTIVATIONS] == 4 * (4 * 7 + 4 * 7 + 4 * 3)
    assert ledger.now[TRAINED] == 4 * (5 * 7 + 7 + 7 * 3 + 3)
    loss.backward()  # gives back what was kept
    assert ledger.now[ACTIVATIONS] == 0 and ledger.highest[ACTIVATIONS] == 272


def test_a_tensor_kept_twice_or_as_a_view_counts_once() -> None:
    ledger, module = Ledger("cpu"), nn.Identity()
    with saved_tensors_counted(ledger, module):
        wide = torch.randn(6, 8, requires_grad=True).exp()  # exp keeps its result
        first, second = wide.square(), wide[:3].square()  # both keep `wide`, one a part of it
    assert ledger.now[ACTIVATIONS] == 4 * 6 * 8
    assert first.requires_grad and second.requires_grad


def test_what_is_named_after_the_peak_is_named_at_the_peak_too() -> None:
    """ZeRO's bucket is the largest thing that lives when it is made, and only known as one a moment later."""
    ledger, bucket = Ledger("cpu"), torch.zeros(100)
    ledger.add(bucket, TRANSIENT)
    late = torch.zeros(50)
    ledger.add(late, TRANSIENT)
    del late
    ledger.add(torch.zeros(10), TRANSIENT)  # after the peak
    ledger.add(bucket, BUCKETS, instead_of=(TRANSIENT,))
    assert ledger.at_peak[BUCKETS] == 400 and ledger.at_peak[TRANSIENT] == 200


@pytest.mark.parametrize("transposed", [False, True])
def test_looking_holds_no_weight_that_autograd_would_not_hold(transposed: bool) -> None:
    """ZeRO-3 gives a gathered weight back after the forward and gathers it again, elsewhere, for the backward pass.

    A product with the weight itself lets it go; torch's linear layer keeps a view of it and thereby its storage.
    """
    module = nn.Linear(6, 6, bias=False)
    module.weight.ds_id = 0  # type: ignore[assignment]  # what marks a parameter of ZeRO-3
    values, ledger = module.weight.detach().clone(), Ledger("cpu")
    batch = torch.randn(6, 6, requires_grad=True)

    def step() -> tuple[torch.Tensor, bool]:
        gathered = weakref.ref(module.weight.untyped_storage())
        result = module(batch) if transposed else batch * module.weight
        module.weight.data = torch.empty(0)
        return result.sum(), gathered() is not None

    loss, held = step()
    module.weight.data = values.clone()
    loss.backward()
    expected, batch.grad = batch.grad, None
    with saved_tensors_counted(ledger, module):
        again, held_again = step()
    assert held == held_again == transposed
    assert ledger.now[GATHERED] == 144 * transposed and ledger.highest[GATHERED] == 144
    module.weight.data = values.clone()
    again.backward()
    assert expected is not None and batch.grad is not None and torch.equal(batch.grad, expected)


# ------------------------------------------------------------------------------------------------------ time


# -------------------------------------------------------------------------------------------------- hardware


@pytest.mark.parametrize(
    ("name", "bf16", "fp16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 989.4),
        ("NVIDIA H100 PCIe", 756.5, 756.5),
        ("NVIDIA H200", 989.4, 989.4),
        ("NVIDIA H100 NVL", 835.5, 835.5),
        ("NVIDIA A100-SXM4-80GB", 312.0, 312.0),
        ("Tesla V100-SXM2-32GB", None, 125.0),
        ("Tesla V100-PCIE-16GB", None, 112.0),
        ("NVIDIA GeForce RTX 4090", 165.2, 165.2),
    ],
)
def test_peaks_are_found_by_the_name_a_driver_gives(name: str, bf16: float | None, fp16: float) -> None:
    peak = hardware.find_peak(name)
    assert peak is not None and (peak.bf16, peak.fp16) == (bf16, fp16)


@pytest.mark.parametrize(
    "name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA Z9000"]
)
def test_no_peak_is_invented(name: str) -> None:
    assert hardware.find_peak(name) is None


def test_dense_rates_halve_from_16_bit_to_tf32() -> None:
    """True of every tensor core so far: a sparse number typed into one column would break it."""
    for peak in hardware.PEAKS:
        if peak.tf32 is not None:
            assert peak.fp16 / peak.tf32 == pytest.approx(2.0, rel=0.02), peak
    assert all(a.pattern != b.pattern for a, b in pairwise(hardware.PEAKS))

"""Counting, formulas, bytes by kind, parts of a step: each against arithmetic done by hand or another way."""

from __future__ import annotations

import weakref
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.options import criterion_of, head_of
from visft_ds.config import resolve
from visft_ds.costs import hardware
from visft_ds.costs.counting import FlopMeter
from visft_ds.costs.flops import Flops, TowerShape, packed_flops, tower_flops
from visft_ds.costs.ledger import (
    ACTIVATIONS,
    BUCKETS,
    GATHERED,
    GRADIENTS,
    OTHER,
    TRAINED,
    TRANSIENT,
    Ledger,
    saved_tensors_counted,
)
from visft_ds.data.samples import Batch
from visft_ds.model import MultiTaskModel, TaskModule
from visft_ds.models.eva_vit import EvaViT, build_backbone
from visft_ds.models.lora import inject_lora
from visft_ds.profiling import session
from visft_ds.profiling.harness import Spread, in_turn, ratio
from visft_ds.profiling.memory import step_watched
from visft_ds.profiling.timing import (
    BACKBONE,
    CRITERION,
    DATA_WAIT,
    HEAD,
    MATCHER,
    PARTS,
    REST,
    Stopwatch,
    covered,
    divide,
    matchers,
    metered,
    typical_parts,
)
from visft_ds.resilience import host_memory
from visft_ds.tasks import TASKS
from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.detection.flops import detection_flops

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
        (("q", "v"), "", True, "all_but_attention"),
        (("fc1",), "", False, "all_but_attention"),
        (("q", "v"), "", True, "gelu_8bit"),
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
    assert (recompute not in ("none", "gelu_8bit")) == bool(formula.recompute)


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


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("trains", [True, False])
def test_a_detection_head_costs_what_the_formula_says(trains: bool, dropout: float) -> None:
    options = {
        **{"num_classes": 5, "num_queries": 7, "encoder_dim": 16, "decoder_dim": 24, "encoder_layers": 2},
        **{"decoder_layers": 3, "num_heads": 2, "ffn_dim": 20, "dropout": dropout},
    }
    head = head_of("detection", 10, **options).train().requires_grad_(trains)
    features = torch.randn(2, 10, 3, 4, requires_grad=not trains)
    meter = FlopMeter()
    with meter.counting():
        output = head(features, torch.ones(2, 3, 4, dtype=torch.bool))
        forward = meter.total
        layers = (*output.aux, output)
        sum(layer.logits.square().sum() + layer.boxes.square().sum() for layer in layers).backward()
    formula = detection_flops(options, 10, images=2, patches=12, trains=trains, flows=not trains)
    assert (forward, meter.total - forward) == (formula.forward, formula.backward)


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


def test_the_peak_is_divided_to_the_byte() -> None:
    """Without a graph, two of the 400-byte results of a chain live at a time."""
    module = nn.Sequential(*(nn.Linear(10, 10, bias=False) for _ in range(4)))
    ledger, batch = Ledger("cpu"), torch.randn(10, 10)
    ledger.add_all(module.parameters(), TRAINED)
    ledger.add(batch, OTHER)
    with step_watched(ledger, module), torch.no_grad():
        result = module(batch)
    expected = dict.fromkeys(ledger.at_peak, 0) | {TRAINED: 1600, OTHER: 400, TRANSIENT: 800}
    assert ledger.at_peak == expected
    assert ledger.now[TRANSIENT] == result.numel() * 4


def test_gradients_are_told_apart_when_they_arrive() -> None:
    module = nn.Linear(10, 10)
    ledger = Ledger("cpu")
    ledger.add_all(module.parameters(), TRAINED)
    with step_watched(ledger, module):
        module(torch.randn(2, 10)).sum().backward()
    assert ledger.now[GRADIENTS] == ledger.now[TRAINED] == 440


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


def test_the_parts_of_a_step_sum_to_it() -> None:
    measured = {BACKBONE: 0.25, HEAD: 0.125, CRITERION: 0.0625, MATCHER: 0.03125}
    step = divide(1.0, 0.125, measured)
    assert sum(step.parts[part] for part in PARTS) == 1.0  # binary fractions: exact
    assert step.parts[DATA_WAIT] == 0.125 and step.parts[REST] == 0.4375
    slower, outlier = divide(2.0, 0.5, measured), divide(64.0, 32.0, measured)
    parts = typical_parts([outlier, step, slower, step])
    assert sum(parts[part] for part in PARTS) == 1.5  # mean of the two in the middle
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.5, 2.5, 1.0, 3.0, 3)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0, 2.0, 1)


def test_all_are_measured_in_every_round_and_the_first_only_warms_up() -> None:
    calls: list[str] = []

    def measure(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = in_turn(("a", "b", "c"), measure, 2)
    assert "".join(calls) == "bcacababc"  # everyone comes after everyone
    assert found == {"a": [5, 7], "b": [6, 8], "c": [4, 9]}


def test_ratios_are_formed_within_rounds() -> None:
    found = ratio((30.0, 10.0, 90.0), (10.0, 5.0, 10.0))
    assert (found["least"], found["median"], found["most"], found["count"]) == (2.0, 3.0, 9.0, 3)


def test_time_under_way_is_a_union() -> None:
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 1.75)]) == 4.0
    assert covered([]) == 0.0


class Calls:
    """A meter that keeps the order of what it was told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def start(self, part: str) -> None:
        self.seen.append(f"+{part}")

    def stop(self, part: str) -> None:
        self.seen.append(f"-{part}")


def small_model() -> MultiTaskModel:
    backbone = build_backbone("debug", width=16, depth=1, num_heads=2, image_size=28)
    sizes = {"num_queries": 3, "decoder_layers": 1}
    narrow = {"encoder_dim": 8, "decoder_dim": 8, "num_heads": 2, "encoder_layers": 1, "ffn_dim": 8}
    head = head_of("detection", 16, dropout=0.0, **narrow, **sizes)
    criterion = TASKS["detection"].criterion(sizes, {})
    return MultiTaskModel(backbone, {"detection": TaskModule(head, criterion)}, train_backbone=False, heads_active=True)


def test_hooks_see_every_part_in_order_and_leave_nothing_behind() -> None:
    module = small_model()
    kind = type("Kind", (), {"backward": lambda *_: 1, "step": lambda *_: 2})
    engine: Any = SimpleNamespace(module=module, deepspeed=kind())
    targets = DetectionTargets(torch.full((1, 4), 0.5), torch.tensor([3]), torch.tensor([1]))
    side, first = torch.full((1, 2), 28), torch.zeros(1, dtype=torch.int64)
    images, real = torch.zeros(1, 3, 28, 28, dtype=torch.uint8), torch.ones(1, dtype=torch.bool)
    batch = Batch(images, side, side, first, first, first, real, {"detection": targets})
    one = torch.tensor(1.0)
    criterion, before = module.criteria["detection"], dict(vars(engine.deepspeed))
    calls = Calls()
    with metered(engine, calls):
        plain = module(batch, {"detection": {"boxes": one, "images": one}})
        engine.deepspeed.backward(None)
        engine.deepspeed.step()
    parts = [BACKBONE, HEAD, CRITERION, MATCHER]
    assert calls.seen == [
        *(f"{sign}{part}" for part in parts[:2] for sign in "+-"),
        *(f"+{CRITERION}", f"+{MATCHER}", f"-{MATCHER}", f"-{CRITERION}"),
        *("+backward", "-backward", "+optimizer", "-optimizer"),
    ]
    again = module(batch, {"detection": {"boxes": one, "images": one}})
    assert len(calls.seen) == 12 and module.criteria["detection"] is criterion and vars(engine.deepspeed) == before
    assert torch.equal(plain["loss"], again["loss"])


@pytest.mark.parametrize("task", [name for name in TASKS if name != "captioning"])
def test_the_matcher_of_every_set_prediction_is_found(task: str) -> None:
    """It is found by its name; a new name would silently be shown as zero time."""
    assert len(matchers(criterion_of(task))) == 1


def test_a_stopwatch_sums_what_happens_several_times() -> None:
    watch = Stopwatch(CPU)
    for _ in range(3):
        watch.start("a")
        watch.start("b")
        watch.stop("b")
        watch.stop("a")
    seconds = watch.seconds()
    assert 0 <= seconds["b"] <= seconds["a"] and watch.seconds() == {}


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


def test_a_cpu_is_compared_with_a_rate_that_is_called_measured() -> None:
    reference = hardware.reference_rate(CPU, "fp32")
    assert reference.measured and "measured here" in reference.text and reference.flops_per_second > 0


def test_a_full_memory_is_an_error_and_not_the_end_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "host_memory_available", lambda: 64 * 2**20)
    with host_memory.memory_bounded(CPU, 1), pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(2**30)
    assert torch.empty(2**28).numel() == 2**28  # the bound is gone (and nothing is touched)


def test_a_pipeline_is_refused_with_what_to_do_instead() -> None:
    config = resolve(stage=1, model="debug", engine="pipeline", settings=["pipeline.stages=2"])
    with pytest.raises(ValueError, match="another --engine"), session.open_session(config, synthetic=True):
        raise AssertionError("it has a session")


@pytest.mark.parametrize(("stage", "named"), [(1, "fewer processes"), (2, "visft.model.precision=bf16")])
def test_a_model_that_cannot_fit_is_refused_before_it_is_built(
    stage: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "host_memory_available", lambda: 8 * 2**30)
    config = resolve(stage=stage, model="eva_e")
    with pytest.raises(ValueError, match=r"eva_e does not fit: 16\.\d GiB before the first activation") as caught:
        session.check_fits(config, "fp32", CPU)
    assert named in str(caught.value)
    monkeypatch.setattr(session, "host_memory_available", lambda: 32 * 2**30)
    session.check_fits(config, "fp32", CPU)


def test_what_is_divided_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 no process has all weights at any time; otherwise each of them has."""
    monkeypatch.setattr(session, "host_memory_available", lambda: 16 * 2**30)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    session.check_fits(resolve(stage=2, model="eva_e", engine="zero3"), "bf16", CPU)
    with pytest.raises(ValueError, match=r"weights of 4 processes on this machine 3\d\.\d.*--engine zero3"):
        session.check_fits(resolve(stage=2, model="eva_e", engine="zero1"), "bf16", CPU)


@pytest.mark.parametrize(("engine", "too_little", "enough"), [("zero2", 272, 294), ("zero3", 112, 124)])
def test_what_trains_is_divided_as_the_engine_divides_it(
    engine: str, too_little: int, enough: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights W of 16 to 17 GiB, gradients W, moments and masters 3 W, on 8 processes of a machine: 5 W under ZeRO-3,
    under ZeRO-2 8 W and 4 W, and of the memory 70 % may be spoken for."""
    whole = ["visft.lora=null", "visft.param_groups=backbone.*"]
    config = resolve(stage=2, model="eva_e", engine=engine, settings=whole)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_SIZE", "8")
    monkeypatch.setattr(session, "host_memory_available", lambda: enough * 2**30)
    session.check_fits(config, "bf16", CPU)
    monkeypatch.setattr(session, "host_memory_available", lambda: too_little * 2**30)
    with pytest.raises(ValueError, match=r"eva_e does not fit: .*gradients and optimizer state 6\d\.\d"):
        session.check_fits(config, "bf16", CPU)

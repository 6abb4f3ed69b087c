"""The planner: planned memory beside a real step's, clusters, the roofline, searches and suggestions."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.planner.made_up import FIRST_IDS, OBJECTS, VOCABULARY, real_peak
from visft_ds.config import ResolvedConfig, changed, derive_batches, resolve
from visft_ds.planner.hardware import (
    GPUS,
    LINK_SHARE,
    NETWORK_SHARE,
    Cluster,
    find_gpu,
    parse_cluster,
    peak_rate,
)
from visft_ds.planner.memory import (
    PlannedRun,
    model_operations,
    plan_largest,
    plan_stream,
    planned_run,
    trace_step,
)
from visft_ds.planner.search import fitting_settings, forecast, search
from visft_ds.planner.time import PRODUCT_SHARE, step_time, work_seconds
from visft_ds.planner.trace import Tracer, Work, operators_of
from visft_ds.tasks.task import Content

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BLOCK_AGAIN = ("visft.model.activation_checkpointing=block",)


def debug(stage: int, *settings: str, model: str = "debug") -> ResolvedConfig:
    config = resolve(
        stage=stage,
        model=model,
        settings=(
            "visft.mode=sampled",
            "visft.data.prefetch_steps=0",
            "zero_optimization.reduce_bucket_size=100000",
            *(f"visft.tasks.{task}.micro_batch=2" for task in ("detection", "segmentation", "captioning")),
            *(f"visft.tasks.{task}.batch_size=2" for task in ("detection", "segmentation", "captioning")),
            *settings,
        ),
    )
    heads = config.visft.heads.model_copy(update={"path": None})
    return replace(config, visft=config.visft.model_copy(update={"heads": heads}))


@pytest.mark.parametrize(
    ("stage", "task", "settings"),
    [(1, "detection", ()), (2, "segmentation", ()), (2, "captioning", BLOCK_AGAIN), (2, "detection", ())],
)
def test_a_planned_step_keeps_what_a_real_one_keeps(stage: int, task: str, settings: tuple[str, ...]) -> None:
    config = debug(stage, "zero_optimization.stage=0", *settings)
    run = PlannedRun(
        config, derive_batches(config, 1), "fp32", VOCABULARY, CPU, Content(OBJECTS, FIRST_IDS + 1)
    )
    plan = plan_stream(run, config.visft.streams()[task])
    assert plan.total - plan.weights - plan.optimizer - plan.kept == pytest.approx(
        real_peak(config, task), rel=0.1
    )


@pytest.mark.parametrize(("model", "least", "most"), [("debug", 1.0, 1.2), ("debug_convnext", 2.0, 4.0)])
def test_images_that_differ_in_size_are_planned_apart(model: str, least: float, most: float) -> None:
    """Without padding the arithmetic stays; four calls of a timm model cost the host, one packed row hardly
    more.
    """
    found = []
    for side in (112, None):
        sizes = {"fixed_size": side, "max_size_train": 112}
        settings = [f"visft.tasks.detection.image.{key}={json.dumps(value)}" for key, value in sizes.items()]
        settings += ["visft.tasks.detection.micro_batch=4", "visft.tasks.detection.batch_size=4"]
        config = debug(2, "visft.model.activation_checkpointing=none", *settings, model=model)
        run = PlannedRun(config, derive_batches(config, 1), "fp32", VOCABULARY, CPU)
        found.append(trace_step(run, config.visft.streams()["detection"]))
    squares, mixed = found
    operations = [sum(count * work.operations for work, count in step.work.items()) for step in found]
    assert operations[0] == operations[1] and mixed.activations == pytest.approx(
        squares.activations, rel=0.01
    )
    assert least < mixed.work.total() / squares.work.total() < most


def test_saved_activations_of_a_block_are_those_of_arithmetic() -> None:
    """15.6 D values a token and block in 16 bit: inputs of norms and LoRA, q, k, v, the mixture, the GELU's
    input.
    """
    peaks = []
    for depth in (2, 4):
        sets = ("visft.model.activation_checkpointing=none", f'visft.model.overrides={{"depth": {depth}}}')
        config = resolve(stage=2, model="eva_e", settings=(*sets, "visft.tasks.captioning.image.size=224"))
        run = PlannedRun(config, derive_batches(config, 8), "bf16", 100, CUDA, Content(caption_ids=4))
        peaks.append(trace_step(run, config.visft.streams()["captioning"]).activations)
    a_token = (peaks[1] - peaks[0]) / (2 * 8 * 256)
    assert a_token == pytest.approx(15.6 * 1792 * 2, rel=0.05)


def test_zero_divides_what_its_stage_says() -> None:
    plans = []
    for stage in range(4):
        sizes = ("visft.tasks.detection.micro_batch=1", "visft.tasks.detection.batch_size=4")
        config = debug(2, "visft.tasks=detection", f"zero_optimization.stage={stage}", *sizes)
        plans.append(plan_largest(planned_run(config, 2, "fp32", VOCABULARY, CUDA)))
    assert [plan.gradients * 2 for plan in plans[2:]] == [plans[0].gradients] * 2 == [plans[1].gradients] * 2
    assert (
        plans[1].optimizer == plans[0].optimizer * 3 // 4
    )  # masters beside the moments, a half of all three
    # All of this small model is fetched ahead: in a flat buffer, and copied out of it.
    assert plans[3].weights == plans[0].weights // 2 and plans[3].gathered == 2 * plans[0].weights
    assert plans[2].gathered == 0
    assert plans[3].activations > plans[2].activations  # DeepSpeed's linear layer keeps what torch's need not
    config = debug(
        2, "visft.tasks=detection", "zero_optimization.stage=2", "zero_optimization.overlap_comm=true", *sizes
    )
    overlapping = plan_largest(planned_run(config, 2, "fp32", VOCABULARY, CUDA))
    assert (
        overlapping.buckets == 2 * 4 * 100_000 == 2 * plans[2].buckets
    )  # one is filled while the other is sent


def test_a_stage_of_a_pipeline_holds_its_share() -> None:
    config = resolve(
        stage=2, model="debug", engine="pipeline", settings=("visft.mode=sampled", "visft.tasks=detection")
    )
    run = PlannedRun(config, derive_batches(config, 2), "fp32", VOCABULARY, CPU)
    found = trace_step(run, config.visft.streams()["detection"])
    assert plan_largest(run).weights == (found.frozen + 4 * found.trained) // 2


def test_clusters_are_read() -> None:
    assert parse_cluster("8xA100-80GB") == Cluster(8, GPUS["A100-80GB"], 200, 8)
    assert (
        parse_cluster("1xH100").gpu.name == "H100-80GB" and parse_cluster("8x4090").gpu.memory == 24 * 2**30
    )
    assert (
        parse_cluster("8x8xH100-80GB")
        == parse_cluster("64xH100-80GB")
        == Cluster(64, GPUS["H100-80GB"], 400, 8)
    )
    assert parse_cluster("16xH100", 12.5).network == 12.5
    assert parse_cluster("8xV100-32GB").gpu.precision() == "fp16"


@pytest.mark.parametrize("text", ["8xA100", "8xH10", "A100-80GB", "0xH100", "8x0xH100"])
def test_clusters_that_are_not_known_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--cluster"):
        parse_cluster(text)


@pytest.mark.parametrize(
    ("driver", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H100 PCIe", "H100PCIe-80GB"),
        ("NVIDIA GH200 480GB", "H200-141GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("NVIDIA B200", "B200-180GB"),
        ("NVIDIA GB200", "GB200-186GB"),
        ("NVIDIA L40S", "L40S-48GB"),
        ("NVIDIA L4", "L4-24GB"),
        ("NVIDIA A10", "A10-24GB"),
        ("Tesla T4", "T4-16GB"),
        ("NVIDIA H20", "H20-96GB"),
        ("NVIDIA RTX A6000", "A6000-48GB"),
        ("NVIDIA GeForce RTX 5090", "5090-32GB"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40", "L40-48GB"),
        ("NVIDIA A40", "A40-48GB"),
        ("NVIDIA A10G", "A10G-24GB"),
        ("NVIDIA RTX 6000 Ada Generation", "6000Ada-48GB"),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_gpus_are_found_by_their_drivers_names(driver: str, gpu: str | None) -> None:
    found = find_gpu(driver)
    assert (found and found.name) == gpu


def test_the_peak_of_a_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_rate(CUDA, "bf16") == pytest.approx(989.4e12) and peak_rate(CUDA, "fp32") == pytest.approx(
        66.9e12
    )
    assert peak_rate(CPU, "fp32") is None


def test_a_ring_crosses_each_network_once() -> None:
    one, two, slow = parse_cluster("8xH100"), parse_cluster("16xH100"), parse_cluster("16xH100", 25)
    inside, between = LINK_SHARE * 450e9, NETWORK_SHARE * 25e9
    assert one.rate(8) == two.rate(16) == slow.rate(4) == inside  # groups of four are within a machine
    assert slow.rate(16) == between


def test_the_roofline_takes_the_slowest_of_three() -> None:
    gpu = replace(GPUS["H100-80GB"], bandwidth=1000)

    def seconds(work: Work) -> float:
        return work_seconds(Counter({work: 1000}), gpu)

    bf16 = torch.bfloat16
    assert seconds(Work("product", bf16, 10**12, 10)) == pytest.approx(1e15 / (PRODUCT_SHARE * 989.4e12))
    tf32 = work_seconds(Counter({Work("product", torch.float32, 10**12, 10): 1000}), gpu, tf32=True)
    assert tf32 == pytest.approx(1e15 / (PRODUCT_SHARE * 494.7e12))
    assert seconds(Work("plain", bf16, 0, 10**10)) == pytest.approx(1e13 / 0.85e12)
    assert seconds(Work("plain", bf16, 0, 1)) == pytest.approx(1000 * 19e-6)  # the host is slower than a call


@pytest.mark.parametrize("model", ["debug", "debug_convnext"])
def test_products_count_in_what_they_are_computed_in(model: str) -> None:
    """Backbones of timm and heads too, which leave rounding to autocast; pooling stays in float32."""
    exact = []
    for heads in ("auto", "fp32"):
        config = debug(1, f"visft.heads.precision={heads}", "visft.tasks=captioning", model=model)
        work = trace_step(
            planned_run(config, 1, "bf16", VOCABULARY, CUDA), config.visft.streams()["captioning"]
        ).work
        products = [(what.dtype, what.operations * n) for what, n in work.items() if what.kind == "product"]
        found = Counter[torch.dtype]()
        for dtype, operations in products:
            found[dtype] += operations
        exact.append(found[torch.float32] / found.total())
    assert exact[0] < 0.05 < exact[1] < 0.9


def test_tf32_goes_with_16_bit_unless_stated() -> None:
    def tf32(precision: Any, *settings: str) -> bool:
        return planned_run(debug(1, *settings), 1, precision, None, CUDA).tf32

    assert [tf32(precision) for precision in ("fp32", "bf16", "fp16")] == [False, True, True]
    assert tf32("fp32", "visft.model.tf32=true") and not tf32("bf16", "visft.model.tf32=false")


def test_recomputing_costs_operations_and_none_of_the_models() -> None:
    config = debug(2, 'visft.model.overrides={"width": 512, "depth": 2, "num_heads": 4}')
    run, stream = planned_run(config, 1, "bf16", VOCABULARY, CUDA), config.visft.streams()["detection"]
    plain, again = (
        sum(what.operations * n for what, n in trace_step(run.with_policy(policy), stream).work.items())
        for policy in ("none", "block")
    )
    assert 1.1 < again / plain < 1.5 and model_operations(run.with_policy("block"), stream) == plain


def test_settings_that_are_said_to_fit_do() -> None:
    sizes = ("visft.tasks.detection.micro_batch=8", "visft.tasks.detection.batch_size=8")
    run = planned_run(debug(2, *sizes, "visft.tasks=detection"), 1, "fp32", None, CUDA)
    room = int(0.8 * plan_largest(run).total)
    (found,) = fitting_settings(run, room)
    changes = changed(run.config, [word for word in found.split() if "micro_batch" in word])
    assert plan_largest(run.changed(changes)).total <= room
    assert fitting_settings(run, 1000) == []


def test_engines_that_refuse_what_is_set_are_not_searched() -> None:
    config = debug(1, "visft.features={}", "visft.tasks=detection")  # which ZeRO-3 does not take
    assert [arm.engine for arm in search(config, parse_cluster("2xH100"))] == ["ZeRO-1", "ZeRO-0", "ZeRO-2"]


def test_what_all_engines_refuse_is_told() -> None:
    with pytest.raises(ValueError, match="V100-32GB has no bf16"):
        search(debug(2, "visft.model.precision=bf16", "visft.tasks=detection"), parse_cluster("1xV100-32GB"))


def test_a_model_that_no_gpu_holds_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one GPU too, on which ZeRO divides nothing."""
    shape = 'visft.model.overrides={"width": 1024, "depth": 24, "num_heads": 8}'
    alone = (
        "visft.tasks.detection.batch_size=1",
        "visft.model.activation_checkpointing=none",
        "visft.model.precision=auto",
    )
    config = debug(2, "visft.tasks=detection", shape, *alone)
    monkeypatch.setattr("visft_ds.planner.search.MEMORY_SHARE", 0.5 / 16)
    best, *others = search(config, parse_cluster("1xT4"))
    assert (best.engine, best.flags[:2]) == ("ZeRO-3 offload", ("--engine", "zero3_offload"))
    assert best.fits and {arm.engine for arm in others if not arm.fits} == {
        "ZeRO-0",
        "ZeRO-1",
        "ZeRO-2",
        "ZeRO-3",
    }


def test_gradients_cross_the_links_twice() -> None:
    """To be summed, each rank a part, and back as sums: of eight parts seven leave a rank each time."""
    sizes = ("visft.tasks.detection.batch_size=8", "visft.tasks.detection.micro_batch=1")
    config = debug(2, "visft.tasks=detection", "zero_optimization.stage=0", *sizes)
    run, stream = planned_run(config, 8, "fp32", VOCABULARY, CUDA), config.visft.streams()["detection"]
    crossing = 2 * 7 / 8 * 4 * trace_step(run, stream).with_gradient
    assert step_time(run, stream, parse_cluster("8xH100")).communication == pytest.approx(
        crossing / (0.8 * 450e9)
    )


def test_offloaded_weights_come_from_the_host() -> None:
    """Forward and backward, in each micro-batch; a GPU keeps neither them nor the optimizer."""
    sizes = ("visft.tasks.detection.batch_size=2", "visft.tasks.detection.micro_batch=1")
    config = changed(debug(2, "visft.tasks=detection", *sizes), engine="zero3_offload")
    stream = config.visft.streams()["detection"]
    run = planned_run(config, 1, "bf16", VOCABULARY, CUDA)
    assert plan_stream(run, stream).weights == plan_stream(run, stream).optimizer == 0
    on_cpu = plan_stream(planned_run(config, 1, "bf16", VOCABULARY, CPU), stream)
    assert on_cpu.weights > 0 and on_cpu.optimizer > 0, "the host is where a CPU computes"
    found, slow = trace_step(run, stream), replace(GPUS["H100-80GB"], host=1e-3)
    time = step_time(run, stream, Cluster(1, slow, 400))
    moved = 2 * 2 * (found.frozen + 4 * found.trained)
    assert time.compute + time.communication == pytest.approx(moved / (0.8 * 1e6))


@pytest.mark.parametrize("turns", [1, 3])
def test_a_pipeline_fills_and_drains(turns: int) -> None:
    """The first micro-batch passes every stage one after the other; each further one takes as long as the
    slowest.
    """
    sizes = (f"visft.tasks.detection.batch_size={turns}", "visft.tasks.detection.micro_batch=1")
    config = changed(debug(2, "visft.tasks=detection", *sizes), engine="pipeline")
    run, stream = planned_run(config, 2, "bf16", VOCABULARY, CUDA), config.visft.streams()["detection"]
    cluster = parse_cluster("2xH100")
    whole = work_seconds(trace_step(run, stream).work, cluster.gpu)
    assert run.partition is not None
    costs = run.partition.stage_costs()
    slowest = max(costs) / sum(costs) * whole
    time = step_time(run, stream, cluster)
    assert time.compute + time.waiting == pytest.approx(whole + (turns - 1) * slowest)


@pytest.mark.parametrize(
    ("model", "count"), [pytest.param("debug_convnext", 2, marks=pytest.mark.slow), ("debug", 8)]
)
def test_models_without_so_many_layers_are_planned(model: str, count: int) -> None:
    """timm's models cannot be divided into stages, the debug model not into eight."""
    assert search(debug(2, "visft.tasks=captioning", model=model), Cluster(count, GPUS["L40S-48GB"], 25))


def test_a_forecast_of_a_cluster() -> None:
    arm = forecast(debug(2, "visft.tasks=detection"), parse_cluster("1xH100"))
    assert arm.fits and arm.engine == "ZeRO-1" and set(arm.seconds) == {"detection"}
    assert 0 < arm.mfu < 1 and arm.hours == pytest.approx(
        arm.run.config.total_steps * arm.step_seconds / 3600
    )
    memory = arm.memory["detection"]
    assert arm.needed == memory.total == sum(asdict(memory).values()) and dict(memory.rows())["total"]
    with pytest.raises(ValueError, match="has no bf16"):
        forecast(debug(2, "visft.model.precision=bf16"), parse_cluster("1xV100-32GB"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("named", [{}, {"is_causal": False, "scale": 0.5}, {"dropout_p": 0.1}], ids=str)
def test_attention_is_planned_however_a_model_calls_it(device: str, named: dict[str, Any]) -> None:
    """timm's towers name every argument of torch's attention; shapes alone are computed."""
    q = torch.empty((2, 3, 5, 8), dtype=torch.bfloat16, device="meta", requires_grad=True)
    with operators_of(torch.device(device)):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=None, **named)
        out.sum().backward()
    assert out.shape == q.shape and q.grad is not None and q.grad.shape == q.shape


@pytest.mark.parametrize("groups", [1, 64])
def test_gradients_of_a_convolution_cost_twice_its_forward(groups: int) -> None:
    """Of a depthwise one, too, which torch counts as if it were dense."""
    x, counted = torch.empty(2, 64, 12, 20, device="meta", requires_grad=True), []
    for layer in (
        nn.Conv2d(64, 64, 3, padding=1, groups=groups),
        nn.ConvTranspose2d(64, 64, 2, stride=2, groups=groups),
    ):
        with Tracer(torch.device("cpu")) as tracer:
            out = layer.to("meta")(x)
            counted.append(tracer.operations)
            torch.autograd.backward(out, torch.empty_like(out))
        assert tracer.operations == 3 * counted[-1] == 3 * 2 * 2 * 240 * layer.weight.numel()


@pytest.mark.slow
def test_the_page_quotes_the_plan() -> None:
    """Rows that one trace gives; the others of the table take minutes each."""
    page = (Path(__file__).parents[2] / "docs/memory-and-speed.md").read_text(encoding="utf-8")
    for cluster in ("8xA100-80GB", "8xH100"):
        (row,) = re.findall(rf"^\| {cluster.replace('x', ' x ', 1)} \| (.+) \|$", page, re.MULTILINE)
        engine, policy, memory, speed, hours = row.split(" | ")
        best = search(resolve(stage=2, model="eva_e"), parse_cluster(cluster))[0]
        assert (engine, policy) == (best.engine, f"`{best.run.config.visft.model.activation_checkpointing}`")
        assert float(memory) == pytest.approx(best.needed / 2**30, rel=0.02)
        assert float(speed) == pytest.approx(best.images_per_second, rel=0.02)
        assert float(hours) == pytest.approx(best.hours, rel=0.05)
    page = (Path(__file__).parents[2] / "docs/backbones.md").read_text(encoding="utf-8")
    (hours_of_stages,) = re.findall(r"^\| `dinov3_b` .* ([\d.]+) \+ ([\d.]+) \|$", page, re.MULTILINE)
    for stage, hours in enumerate(hours_of_stages, 1):
        best = search(resolve(stage=stage, model="dinov3_b"), parse_cluster("8xH100"))[0]
        assert float(hours) == pytest.approx(best.hours, rel=0.05)


def test_an_operator_that_is_called_again_gives_what_it_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shapes are kept: of equal numbers of other types, of views and of what is written in place too."""
    monkeypatch.setattr("visft_ds.planner.trace._MADE", {})
    numbers = torch.ones(2, 3, dtype=torch.int64, device="meta")
    tracers = [Tracer(torch.device("cpu")), Tracer(torch.device("cpu"))]
    for tracer in tracers:
        with tracer:
            types = [(numbers + more).dtype for more in (1, 1.0, True)]
            assert types == [torch.int64, torch.float32, torch.int64]
            assert numbers.t().clone().stride() == (1, 3) and numbers.clone().stride() == (3, 1)
            assert numbers.t().untyped_storage()._cdata == numbers.untyped_storage()._cdata
            assert numbers.add_(1) is numbers
            values, places = numbers.float().max(dim=1)
            assert values.dtype == torch.float32 and places.dtype == torch.int64 and places.shape == (2,)
    first, second = tracers
    assert first.work == second.work and first.peak == second.peak > 0

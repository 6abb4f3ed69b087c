"""The planner: traced steps against real ones, engines' shares by hand, clusters, choices."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from tests.planner.made_up import FIRST_IDS, OBJECTS, VOCABULARY, real_peak
from visft_ds.config import ResolvedConfig, derive_batches, resolve
from visft_ds.costs.ledger import ACTIVATIONS
from visft_ds.planner.cluster import (
    GPUS,
    LINK_SHARE,
    NETWORK_SHARE,
    PRODUCT_SHARE,
    Cluster,
    Rates,
    parse_cluster,
    rates_of,
    step_time,
)
from visft_ds.planner.fitting import fitting_settings
from visft_ds.planner.messages import ALL_GATHER, ALL_REDUCE
from visft_ds.planner.meta_step import Work, chosen_kernels
from visft_ds.planner.search import forecast, search
from visft_ds.planner.step import PlannedRun, plan_largest, plan_stream, run_of, trace_step
from visft_ds.planner.zero import Zero
from visft_ds.tasks.spec import Content

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BLOCK_AGAIN = ("visft.model.recompute=block",)


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


def test_saved_activations_of_a_block_are_those_of_arithmetic() -> None:
    """15.6 D values a token and block in 16 bit: inputs of norms and LoRA, q, k, v, the mixture, the GELU's input."""
    peaks = []
    for depth in (2, 4):
        sets = ("visft.model.recompute=none", f'visft.model.overrides={{"depth": {depth}}}')
        config = resolve(stage=2, model="eva_e", settings=(*sets, "visft.tasks.captioning.image.size=224"))
        run = PlannedRun(config, derive_batches(config, 8), "bf16", 100, CUDA, Content(caption_ids=4))
        peaks.append(trace_step(run, config.visft.streams()["captioning"]).moments[0][ACTIVATIONS])
    a_token = (peaks[1] - peaks[0]) / (2 * 8 * 256)
    assert a_token == pytest.approx(15.6 * 1792 * 2, rel=0.05)


def test_shares_of_zero_by_hand() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (10, 7)]

    def zero(stage: int, **keys: Any) -> Zero:
        return Zero.of({"zero_optimization": {"stage": stage, **keys}}, 4, 1, CUDA)

    assert zero(0).shares([parameters]) == [10, 7]
    assert zero(1).shares([parameters]) == [6]  # 17 of 4 ranks in pairs: 24 / 4
    assert zero(3).shares([parameters]) == [3 + 2]
    assert zero(0).optimizer([parameters]) == 17 * 8 and zero(2).optimizer([parameters]) == 6 * 12
    assert zero(1).weights(parameters) == 17 * 4
    assert zero(3, stage3_param_persistence_threshold=7).weights(parameters) == (3 + 2 + 7) * 4
    offloaded = zero(3, stage3_param_persistence_threshold=0, offload_param={"device": "cpu"})
    assert offloaded.weights(parameters) == 0


def test_gathered_weights_stay_within_the_limits() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(10)) for _ in range(10)]

    def zero(prefetch: int, live: int, reuse: int) -> Zero:
        limits = {"prefetch_bucket_size": prefetch, "max_live_parameters": live, "max_reuse_distance": reuse}
        keys = {f"stage3_{name}": value for name, value in limits.items()}
        keys["stage3_param_persistence_threshold"] = 0
        return Zero.of({"zero_optimization": {"stage": 3, **keys}}, 4, 1, CUDA)

    assert zero(10, 20, 60).gathered(parameters, lambda _: True) == 3 * 40  # 30 elements there and back
    assert zero(10, 45, 60).gathered(parameters, lambda _: True) == 5 * 40  # gathering goes on below 45
    assert zero(10, 1000, 60).gathered(parameters, lambda _: True) == 10 * 40
    assert zero(10, 1000, 60).gathered(parameters, lambda parameter: parameter is parameters[9]) == 40
    assert zero(0, 1000, 60).gathered(parameters, lambda _: True) == 3 * 40
    large = [*parameters, torch.nn.Parameter(torch.zeros(30))]
    assert zero(10, 20, 0).ahead(large) == (10 + 30) * 4  # 10 are fewer than 20
    assert zero(10, 21, 0).ahead(large) == (20 + 30) * 4


def test_clusters_are_read() -> None:
    assert parse_cluster("8xA100-80GB") == Cluster(8, GPUS["A100-80GB"], 200e9, 8)
    assert parse_cluster("1xH100").gpu.name == "H100-80GB" and parse_cluster("8x4090").gpu.memory == 24 * 2**30
    assert parse_cluster("8x8xH100-80GB") == parse_cluster("64xH100-80GB") == Cluster(64, GPUS["H100-80GB"], 400e9, 8)
    assert parse_cluster("3x4x4090") == Cluster(12, GPUS["4090-24GB"], 25e9, 4)
    assert parse_cluster("16xH100", 12.5).network == 12.5e9
    assert parse_cluster("16xH100").machines == 2 and parse_cluster("8xH100").machines == 1
    assert parse_cluster("8xV100-32GB").gpu.precision() == "fp16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(("8xA100", "which one"), ("8xH10", "did you mean H100-80GB")),
        *(
            (text, "COUNTxNAME .*MACHINESxGPUSxNAME")
            for text in ("A100-80GB", "0xH100", "0x8xH100", "8x0xH100", "x8xH100")
        ),
    ],
)
def test_clusters_that_are_not_known_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cluster(text)


def test_a_ring_crosses_each_network_once() -> None:
    one, two, slow = parse_cluster("8xH100"), parse_cluster("16xH100"), parse_cluster("16xH100", 25)
    inside, between = LINK_SHARE * 450e9, NETWORK_SHARE * 25e9
    assert one.ring_seconds(ALL_GATHER, 8000, 8) == pytest.approx(7000 / inside)
    assert one.ring_seconds(ALL_REDUCE, 8000, 8) == pytest.approx(14000 / inside)
    assert two.ring_seconds(ALL_REDUCE, 8000, 16) == pytest.approx(15000 / min(inside, NETWORK_SHARE * 400e9))
    assert slow.ring_seconds(ALL_REDUCE, 8000, 16) == pytest.approx(15000 / between)
    assert slow.ring_seconds(ALL_REDUCE, 8000, 4) == pytest.approx(12000 / inside)  # groups within a machine
    assert one.ring_seconds(ALL_REDUCE, 8000, 1) == 0
    # Two stages on two machines: eight ranks send at once. Eight stages: the last two of a machine do.
    assert slow.send_seconds(8000, 8) == pytest.approx(8000 * 8 / between)
    assert slow.send_seconds(8000, 2) == pytest.approx(8000 * 2 / between)
    assert one.send_seconds(8000, 4) == pytest.approx(8000 / inside)


@pytest.mark.parametrize(("model", "count"), [pytest.param("debug_convnext", 2, marks=pytest.mark.slow), ("debug", 8)])
def test_models_without_so_many_layers_are_planned(model: str, count: int) -> None:
    """timm's models cannot be divided into stages, the debug model not into eight."""
    assert search(debug(2, "visft.tasks=captioning", model=model), Cluster(count, GPUS["L40S-48GB"], 25e9))


def test_the_roofline_takes_the_slowest_of_three() -> None:
    rates = Rates({"fp32": 100.0}, {"fp32": 10.0}, {"plain": 1000.0, "curve": 1.0, "sampling": 1.0}, call=0.01)
    fp32 = torch.float32

    def seconds(work: Work) -> float:
        return rates.seconds({work: 2})  # type: ignore[arg-type]

    assert seconds(Work("product", fp32, 1000, 10)) == pytest.approx(20.0)
    assert seconds(Work("product", fp32, 1, 5000)) == pytest.approx(10.0)
    assert seconds(Work("attention", fp32, 1000, 10)) == pytest.approx(200.0)
    assert seconds(Work("plain", fp32, 0, 1)) == pytest.approx(0.02)
    reached = rates_of(GPUS["H100-80GB"]).product["bf16"]
    assert reached == pytest.approx(PRODUCT_SHARE * 989.4e12)


def test_recomputing_costs_operations() -> None:
    rates, cluster = rates_of(GPUS["A100-80GB"]), parse_cluster("1xA100-80GB")
    seconds = {}
    for name, sets in (("nothing", ()), ("again", BLOCK_AGAIN)):
        config = debug(2, 'visft.model.overrides={"width": 512, "depth": 2, "num_heads": 4}', *sets)
        run = PlannedRun(config, derive_batches(config, 1), "bf16", VOCABULARY, CUDA, Content())
        work = trace_step(run, config.visft.streams()["detection"]).work
        seconds[name] = sum(what.operations * count for what, count in work.items())
        assert step_time(run, config.visft.streams()["detection"], rates, cluster).communication == 0
    assert 1.1 < seconds["again"] / seconds["nothing"] < 1.5


def test_settings_that_fit_are_of_different_kinds_and_fit() -> None:
    sizes = ("visft.tasks.detection.micro_batch=8", "visft.tasks.detection.batch_size=8")
    config = debug(2, *sizes, "visft.tasks=detection")
    run = run_of(config, 1, "fp32", None, CPU)
    room = int(0.8 * plan_largest(run).total)
    found = fitting_settings(run, room)
    assert len(found) == 2 and all(one.memory.total <= room for one in found)
    assert any("recompute" in one.settings[0] for one in found)
    assert any("micro_batch" in one.settings[0] for one in found)
    assert [one.relative_time for one in found] == sorted(one.relative_time for one in found)
    assert fitting_settings(run, 1000) == []


def test_engines_that_refuse_a_model_are_not_suggested() -> None:
    config = debug(2, "visft.tasks=detection", model="debug_convnext")  # which no pipeline takes
    assert fitting_settings(run_of(config, 2, "fp32", None, CPU), 1000) == []


def test_engines_that_refuse_what_is_set_are_not_searched() -> None:
    config = debug(2, "visft.model.compile=blocks", "visft.tasks=detection")  # which ZeRO-3 does not take
    assert [arm.engine for arm in search(config, parse_cluster("2xH100"))] == ["ZeRO-1"]


def test_a_forecast_of_a_cluster() -> None:
    arm = forecast(debug(2, "visft.tasks=detection"), parse_cluster("1xH100"))
    assert arm.fits and arm.engine == "ZeRO-1" and set(arm.streams) == {"detection"}
    assert 0 < arm.of_limit < 1 and arm.hours == pytest.approx(arm.steps * arm.step_seconds / 3600)
    memory = arm.fullest
    assert memory.total == sum(asdict(memory).values()) and dict(memory.rows())["whole"]
    with pytest.raises(ValueError, match="has no bf16"):
        forecast(debug(2, "visft.model.precision=bf16"), parse_cluster("1xV100-32GB"))


def test_a_stage_of_a_pipeline_holds_its_layers() -> None:
    config = resolve(
        stage=2,
        model="debug",
        engine="pipeline",
        settings=("visft.mode=sampled", "visft.data.prefetch_steps=0", "visft.tasks=detection"),
    )
    run = PlannedRun(config, derive_batches(config, 2), "fp32", VOCABULARY, CPU, Content())
    stream = config.visft.streams()["detection"]
    first, last, whole = (trace_step(run, stream, stage) for stage in (0, 1, None))
    assert first.weights + last.weights == whole.weights
    assert first.moments[0][ACTIVATIONS] > 0 and last.moments[0][ACTIVATIONS] > 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("named", [{}, {"is_causal": False, "scale": 0.5}, {"dropout_p": 0.1}], ids=str)
def test_attention_is_planned_however_a_model_calls_it(device: str, named: dict[str, Any]) -> None:
    """timm's towers name every argument of torch's attention; shapes alone are computed."""
    q = torch.empty((2, 3, 5, 8), dtype=torch.bfloat16, device="meta", requires_grad=True)
    with chosen_kernels(torch.device(device), linear_keeps_input=False):
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=None, **named)
        out.sum().backward()
    assert out.shape == q.shape and q.grad is not None and q.grad.shape == q.shape


def test_a_mask_for_all_heads_and_queries_is_planned_as_one_row() -> None:
    """Torch pads the rows of a mask to a multiple of 8 before it expands them."""
    q, k = (torch.empty((2, 3, n, 8), dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (5, 19))
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    mask = torch.empty((2, 1, 1, 19), dtype=torch.bool, device="meta")
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with chosen_kernels(CUDA, linear_keeps_input=False), hooks:
        torch.nn.functional.scaled_dot_product_attention(q, k, k, mask)
    (bias,) = (tensor for tensor in kept if tensor.shape == (2, 3, 5, 19))
    assert bias.untyped_storage().nbytes() == 2 * 24 * bias.element_size()


@pytest.mark.parametrize(
    ("stage", "task", "settings"),
    [(1, "detection", ()), (2, "segmentation", ()), (2, "captioning", BLOCK_AGAIN), (2, "detection", ())],
)
def test_a_planned_step_keeps_what_a_real_one_keeps(stage: int, task: str, settings: tuple[str, ...]) -> None:
    config = debug(stage, "zero_optimization.stage=0", *settings)
    content = Content(OBJECTS, FIRST_IDS + 1)
    run = PlannedRun(config, derive_batches(config, 1), "fp32", VOCABULARY, CPU, content)
    plan = plan_stream(run, config.visft.streams()[task])
    assert plan.total - plan.weights - plan.optimizer == pytest.approx(real_peak(config, task), rel=0.1)

"""The planner's links and rates against what others have published, with sources."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from tests.random_tower import build_backbone
from visft_ds.planner.hardware import parse_cluster
from visft_ds.planner.time import BANDWIDTH_SHARE, UPDATE_BYTES, work_seconds
from visft_ds.planner.trace import Tracer, operators_of

_ISSUES = "https://github.com/NVIDIA/nccl-tests/issues"


class Bus(NamedTuple):
    """Bus bandwidth of large messages, as nccl-tests define it."""

    cluster: str
    network: float | None
    collective: str
    gb_s: float
    source: str


#: Within 1.1 of the plan: what a ring reaches. NVLink SHARP adds in the switch, so that more seems to cross
#: each link.
BUSES = [
    Bus(
        "8xH100", None, "all_gather", 370, f"{_ISSUES}/212, NVIDIA: NVLink without SHARP, also NCCL_ALGO=RING"
    ),
    Bus(
        "8xA100-80GB", None, "all_reduce", 240, "https://github.com/NVIDIA/nccl/issues/1712, NVIDIA: expected"
    ),
    Bus(
        "64xH100",
        None,
        "all_reduce",
        8 * 47,
        f"{_ISSUES}/290, NVIDIA: 46 to 48 of each NDR adapter, eight of them",
    ),
    Bus(
        "24xA100-40GB", 100, "all_reduce", 96, f"{_ISSUES}/119: three machines, four HDR adapters each, peak"
    ),
    Bus(
        "16xA100-80GB",
        100,
        "all_reduce",
        95.3,
        f"{_ISSUES}/252: ring, four HDR adapters, mean of 0.5 to 8 GiB",
    ),
    Bus(
        "4x4090",
        None,
        "all_reduce",
        25.9,
        "https://github.com/tinygrad/open-gpu-kernel-modules/issues/36: peer to peer",
    ),
]
SHARP = Bus("8xH100", None, "all_reduce", 480, f"{_ISSUES}/212, NVIDIA: with NVLink SHARP")


class Training(NamedTuple):
    """Images a second of a GPU that trains a whole ViT in 16 bit, AdamW included."""

    cluster: str
    shape: tuple[int, int, float, int, int]  #: width, depth, MLP ratio, patch, side of the image
    images: int  #: of a micro-batch
    published: float
    factor: float  #: planned / published at most; at least 0.9
    source: str


_TIMM = "https://github.com/huggingface/pytorch-image-models, results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv"
_NEMO = "https://docs.nvidia.com/nemo-framework/user-guide/latest/MultimodalModels/VisionLanguageFoundation/Vit/Perf.html"
LARGE, HUGE, GIANT = (1024, 24, 4.0, 16, 224), (1280, 32, 4.0, 14, 224), (1408, 40, 6144 / 1408, 14, 224)
TRAININGS = [
    Training("1x3090", LARGE, 64, 117.08, 1.15, f"{_TIMM}: vit_large_patch16_224"),
    Training("1x3090", (1024, 24, 4.0, 16, 384), 12, 29.07, 1.35, f"{_TIMM}: vit_large_patch16_384"),
    Training("1x3090", HUGE, 16, 39.94, 1.15, f"{_TIMM}: vit_huge_patch14_224"),
    Training("1x3090", GIANT, 8, 22.29, 1.2, f"{_TIMM}: vit_giant_patch14_224"),
    Training("1xA100-80GB", GIANT, 64, 693 / 8, 1.4, f"{_NEMO}: ViT g/14, one DGX A100"),
    Training("1xH100", GIANT, 64, 1428 / 8, 1.75, f"{_NEMO}: ViT g/14, one DGX H100"),
]


@pytest.mark.parametrize("bus", [*BUSES, SHARP], ids=lambda bus: f"{bus.cluster}, {bus.collective}")
def test_bus_bandwidths_are_within_a_tenth_of_published_ones(bus: Bus) -> None:
    cluster = parse_cluster(bus.cluster, bus.network)
    low, high = (0.7, 0.8) if bus is SHARP else (1 / 1.1, 1.1)  # SHARP is not planned
    assert low < cluster.rate(cluster.count) / 1e9 / bus.gb_s < high


def planned_images(training: Training) -> float:
    """Images a second of a GPU."""
    gpu = parse_cluster(training.cluster).gpu
    width, depth, ratio, patch, side = training.shape
    shape: dict[str, Any] = {"width": width, "depth": depth, "mlp_ratio": ratio, "patch_size": patch}
    tower = build_backbone(
        "eva_g", device="meta", seed=None, num_heads=16, image_size=side, class_token=True, **shape
    )
    with (
        Tracer(torch.device("cuda"), torch.bfloat16, tower.parameters()) as tracer,
        operators_of(tracer.stands_for),
    ):
        out = tower(torch.empty(training.images, 3, side, side, device="meta"))[0]
        torch.autograd.backward(out, torch.empty_like(out))
    update = (
        UPDATE_BYTES * sum(p.numel() for p in tower.parameters()) / (BANDWIDTH_SHARE * 1e9 * gpu.bandwidth)
    )
    return training.images / (work_seconds(tracer.work, gpu) + update)


@pytest.mark.parametrize("training", TRAININGS, ids=lambda one: f"{one.cluster}, {one.shape}")
def test_throughputs_are_within_the_stated_factor_of_published_ones(training: Training) -> None:
    assert 0.9 < planned_images(training) / training.published < training.factor


@pytest.mark.parametrize(
    ("gpu", "published"), [("A100-80GB", 10644 / (16 * 693)), ("H100", 21561 / (16 * 1428))]
)
def test_what_sixteen_machines_lose_is_as_published(gpu: str, published: float) -> None:
    """ViT g/14 on 128 GPUs against 8 at 4,096 images a step (NeMo, see above).

    All gradients and all weights travel in bf16 for its distributed optimizer, nothing of it hidden;
    computation as measured on one machine.
    """
    cluster = parse_cluster(f"16x8x{gpu}")
    values, each = 2 * 1.011e9, 4096 / 128
    one_machine = {"A100-80GB": 693, "H100": 1428}[gpu] / 8
    compute = each / one_machine
    sent = 2 * 127 / 128 * values / cluster.rate(128)
    assert compute / (compute + sent) == pytest.approx(published, abs=0.04)

"""One rank of a DeepSpeed pipeline of two stages that are fed apart: pixels to the first, labels to the last.

    python -m tests.parallel.pipeline_feed_case SHARDS

Every stage has its own reader, its own number of workers and the same plan. Then the last stage follows another plan,
which its check must find.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from tests.options import alone
from visft_ds.data.dataset import DataSet, SamplePipeline
from visft_ds.data.loader import StepLoader
from visft_ds.data.manifest import Manifest
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.roles import check_same_samples, role_of_stage, sample_checksum
from visft_ds.data.samples import Batch
from visft_ds.data.shards import ShardReader
from visft_ds.parallel.engine import start_process_group
from visft_ds.tasks.transform import collate_joint

STEPS, MICRO = 5, 2


class Layer(nn.Module):
    """Passes the checksum on beside its activation."""

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.work(both[0]), both[1]


class First(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.work = nn.Conv2d(3, 4, 8, stride=8)


class Second(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.work = nn.Sequential(nn.Flatten(2), nn.LazyLinear(4))
        self.work(torch.zeros(1, 4, 4, 4))


def loader_of(manifest: Manifest, seed: int, stage: int) -> StepLoader:
    plan = Plan({"detection": TaskPlan({"toy": SetPlan(manifest.selection())}, 4)}, seed)
    pipeline = SamplePipeline(alone("detection", True, fixed_size=32), collate_joint)
    role = role_of_stage(stage, 2)
    assert role in ("images", "labels")
    workers = {"images": 1, "labels": 3}[role]
    sets, pipelines = {"toy": DataSet(ShardReader(manifest))}, {"detection": {"toy": pipeline}}
    return StepLoader(sets, plan, pipelines, accumulation=MICRO, role=role, num_workers=workers)


def main(shards: Path) -> None:
    start_process_group()
    torch.manual_seed(0)
    stage = torch.distributed.get_rank()
    step = 0
    seen: list[list[int]] = []

    def loss(output: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        check_same_samples(step, output[1], batch)
        assert batch.images.shape[2:] == (0, 0), "the last stage reads no pixels"
        seen.append(batch.indices.tolist())
        return output[0].square().mean() + batch.targets["detection"].boxes.sum() * 0

    net = PipelineModule([First(), Second()], num_stages=2, loss_fn=loss, partition_method="uniform")
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 0},
        "pipeline": {"use_reentrant": False},
        "steps_per_print": 1000,
    }
    engine, *_ = deepspeed.initialize(model=net, model_parameters=list(net.parameters()), config=config)

    def fed(batches: list[Batch]) -> Iterator[Any]:
        for batch in batches:
            if stage == 0:
                seen.append(batch.indices.tolist())
                yield (batch.images.float() / 255, sample_checksum(batch)), ()
            else:
                yield (), batch

    manifest = Manifest.load(shards, "toy")
    for whole, batches in loader_of(manifest, 5, stage).steps(0, STEPS):
        step = whole.step
        engine.train_batch(fed(batches))
    print(f"stage {stage} has seen {seen}", flush=True)
    try:
        for _, batches in loader_of(manifest, 5 + stage, stage).steps(0, 1):
            engine.train_batch(fed(batches))
    except RuntimeError as error:
        print(f"stage {stage}: {error}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

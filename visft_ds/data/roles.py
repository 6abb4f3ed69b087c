"""Reading for a pipeline: the first stage needs pixels, the last one labels, both of the same samples.

Every stage that reads follows the same plan by itself. A checksum of the samples' indices and random keys travels down
the pipeline with the activations, and the last stage compares it with that of its labels.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from visft_ds.data.batches import Skipped
from visft_ds.data.plan import Plan, StepPlan
from visft_ds.data.samples import Batch
from visft_ds.data.shards import Role
from visft_ds.data.spans import Spent


def role_of_stage(stage: int, stages: int) -> Role | None:
    """Role of a pipeline stage in reading; None in the middle: nothing."""
    assert 0 <= stage < stages
    if stages == 1:
        return "both"
    return {0: "images", stages - 1: "labels"}.get(stage)  # type: ignore[return-value]


@dataclass(frozen=True)
class Place:
    """Place of a rank: its stage, and its pipeline among the data-parallel ones."""

    stage: int
    stages: int
    dp_rank: int
    dp_size: int

    @classmethod
    def of_rank(cls, rank: int, world_size: int, stages: int) -> Place:
        """As DeepSpeed numbers them: first all ranks of stage 0, then all of stage 1, and so on."""
        assert world_size % stages == 0, (world_size, stages)
        dp_size = world_size // stages
        return cls(rank // dp_size, stages, rank % dp_size, dp_size)

    @property
    def role(self) -> Role | None:
        """Role of this rank in reading; None: it reads nothing."""
        return role_of_stage(self.stage, self.stages)


class IdleLoader:
    """Replacement of `StepLoader` in a pipeline stage that reads nothing: steps without batches."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.wait_seconds = 0.0
        self.skipped: list[Skipped] = []

    def steps(self, start: int, stop: int) -> Iterator[tuple[StepPlan, list[Batch]]]:
        """Steps start, ..., stop - 1, without batches."""
        for step in range(start, stop):
            yield self.plan.step(step), []

    def close(self) -> None:
        """Nothing is open."""

    def spent(self) -> Mapping[str, Spent]:
        """Nothing: see `StepLoader.spent`."""
        return {}


def sample_checksum(batch: Batch) -> Tensor:
    """(1,) int64: crc32 over indices, image ids and random keys, in their order."""
    value = 0
    for tensor in (batch.indices, batch.image_ids, batch.random_keys):
        value = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), value)
    return torch.tensor([value])


def check_same_samples(step: int, received: Tensor, batch: Batch, every: int = 1) -> None:
    """Compare the checksum that came with activations with that of the labels, in every `every`-th step.

    Comparing makes the host wait for the device, which is why it need not happen in each step.

    Args:
        received: (1,) int64, `sample_checksum` of the stage that read the pixels.
        batch: what this stage has read.

    Raises:
        RuntimeError: activations and labels belong to different samples.
    """
    if step % every:
        return
    ours, theirs = int(sample_checksum(batch)), int(received)
    if ours != theirs:
        raise RuntimeError(
            f"step {step}: the last pipeline stage has labels of other samples than the pixels that went in (checksum "
            f"{ours:08x} against {theirs:08x}, first label of image {int(batch.image_ids[0])}): the stages do not "
            "follow the same plan"
        )

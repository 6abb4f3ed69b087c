"""From a prepared model to the engine that trains it."""

from __future__ import annotations

from typing import Any

import torch

from visft_ds.config.schema import OptimizerParams
from visft_ds.models import require_eva_vit
from visft_ds.parallel.engine import Engine, Schedule
from visft_ds.parallel.partition import Partition
from visft_ds.prepare.model import PreparedModel


def build_engine(
    prepared: PreparedModel,
    deepspeed_config: dict[str, Any],
    optimizer: OptimizerParams,
    schedule: Schedule,
    *,
    seed: int,
    partition: Partition | None = None,
    compile: str = "none",
) -> Engine:
    """The engine: a pipeline where a partition is given, else ZeRO over the whole model.

    Args:
        deepspeed_config: from `deepspeed_dict`.
        optimizer: of AdamW; groups of the model may have rates of their own.
        seed: of dropout and of sampled points.
        compile: "blocks": those of the backbone run through torch.compile, which is done once for all of them.
    """

    def build_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )

    module, groups = prepared.module, prepared.optimizer_groups()
    common: dict[str, Any] = {"build_optimizer": build_optimizer, "schedule": schedule, "seed": seed}
    engine: Engine
    if partition is None:
        engine = Engine(module, groups, deepspeed_config, **common)
    else:
        from visft_ds.parallel.pipeline import PipelineEngine  # few runs have one

        engine = PipelineEngine(module, groups, deepspeed_config, bounds=partition.bounds, **common)
    if compile == "blocks":
        require_eva_vit(module.backbone).compile_blocks()
    return engine

"""From a configuration and a prepared model to the engine that trains it."""

from __future__ import annotations

from typing import Any

import torch

from visft_ds.config import ResolvedConfig
from visft_ds.parallel.engine import Engine, Schedule, ZeroEngine
from visft_ds.parallel.partition import Partition
from visft_ds.parallel.pipeline import PipelineEngine
from visft_ds.prepare.model import PreparedModel


def build_engine(
    config: ResolvedConfig,
    prepared: PreparedModel,
    deepspeed_config: dict[str, Any],
    partition: Partition | None = None,
) -> Engine:
    """The engine: a pipeline where a partition is given, else ZeRO over the whole model."""
    optimizer, scheduler = config.optimizer.params, config.scheduler
    schedule = Schedule(
        scheduler.type,
        scheduler.params.warmup_num_steps,
        config.total_steps,
        scheduler.params.warmup_min_ratio,
        scheduler.params.cos_min_ratio,
    )

    def build_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=optimizer.weight_decay
        )

    module, groups, seed = prepared.module, prepared.optimizer_groups(), config.visft.seed
    if partition is None:
        return ZeroEngine(
            module, groups, deepspeed_config, build_optimizer=build_optimizer, schedule=schedule, seed=seed
        )
    return PipelineEngine(
        module,
        groups,
        deepspeed_config,
        bounds=partition.bounds,
        build_optimizer=build_optimizer,
        schedule=schedule,
        seed=seed,
    )

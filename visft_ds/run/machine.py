"""Checks of a machine, and that all machines are alike, before a run starts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from visft_ds import distributed
from visft_ds.config import ResolvedConfig, changed, derive_batches
from visft_ds.config.record import recorded_config
from visft_ds.config.resolve import flatten
from visft_ds.flags import check_extra
from visft_ds.monitor.metrics import versions
from visft_ds.ops import use_numerics
from visft_ds.ops.lora import use_kernels
from visft_ds.parallel.deepspeed_fixes import check_zero
from visft_ds.planner.memory import MEMORY_SHARE, PlannedRun
from visft_ds.prepare.model import PUBLISHED_VOCABULARY, choose_precision, deepspeed_dict
from visft_ds.resilience.memory import host_memory
from visft_ds.run_files import saved_something
from visft_ds.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class Machine:
    """Hardware of this process, and what a run uses of it."""

    planned: PlannedRun  #: device, precision, batches and, in a pipeline, who has which layers
    why_precision: str
    why_recompute: str
    deepspeed_config: dict[str, Any]  #: the configuration for `deepspeed.initialize`


def check_machine(
    config: ResolvedConfig, vocabulary: Vocabulary | None, world_size: int | None = None
) -> Machine:
    """Choose precision, kernels, batches and layers for the processes that there are. Nothing is allocated.

    Args:
        vocabulary: of the captions; None where no task works with words.
        world_size: of a run that is only planned.

    Raises:
        ValueError: hardware that cannot do what is asked, or batches that cannot be divided.
    """
    zero = config.deepspeed["zero_optimization"]
    if not zero.keys() <= {
        "stage",
        "reduce_bucket_size",
    }:  # which the schema has checked; DeepSpeed's takes seconds
        check_zero(zero)
    model, device, world_size = (
        config.visft.model,
        distributed.local_device(),
        world_size or distributed.world_size(),
    )
    precision, why_precision = choose_precision(model.precision, device)
    use_kernels(model.kernels, device)
    if tracker := config.visft.run.track:
        check_extra("visft.run.track", tracker, [tracker])
    batches, words = (
        derive_batches(config, world_size),
        vocabulary.size if vocabulary else PUBLISHED_VOCABULARY,
    )
    run = PlannedRun(config, batches, precision, words, device)
    use_numerics(device, tf32=run.tf32, deterministic=config.visft.run.deterministic)
    return Machine(run, why_precision, "as configured", deepspeed_dict(config, world_size, precision))


def memory_of(device: torch.device) -> int:
    """Bytes that a plan may fill on this process's device: most of a GPU, or a process's part of the host's
    memory.
    """
    if device.type == "cuda":
        return int(MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(0.8 * host_memory()) // distributed.processes_here()


def settle_recompute(
    config: ResolvedConfig, machine: Machine, *, must_fit: bool = True
) -> tuple[ResolvedConfig, Machine]:
    """Replace visft.model.recompute = "auto" by the first policy that fits every rank. Collective.

    A resumed run keeps the policy it began with: memory changes, and so would results in their last bits.

    Args:
        must_fit: False: if none fits, take the one that needs least.

    Raises:
        ValueError: on every rank, if no policy fits; it says what helps.
    """
    from visft_ds.planner.search import choose_recompute, fitting_settings

    out, run = Path(config.visft.run.out or ""), machine.planned
    rooms = distributed.gather_objects(memory_of(run.device))

    def choose() -> tuple[str, str]:
        if saved_something(out):
            return recorded_config(out).visft.model.recompute, "as the run began"
        if config.visft.stage == 1:
            return "none", "a frozen backbone keeps no activations"
        room = min(rooms or ())
        chosen, needed = choose_recompute(run, room)
        policy = chosen.config.visft.model.recompute
        if must_fit and needed > room:
            raise ValueError(
                f"visft.model.recompute = auto: even with {policy} a step needs {needed / 2**30:.2f} of "
                f"{room / 2**30:.2f} GiB, as predicted. What helps: "
                f"{'; '.join(fitting_settings(chosen, room)) or 'a smaller --model, or more memory'}. A policy "
                "that you set is tried in any case"
            )
        return policy, f"chosen: needs {needed / 2**30:.1f} of {room / 2**30:.1f} GiB"

    policy, why = distributed.by_main_process(choose)
    config = replace(config, visft=changed(config, [f"visft.model.recompute={policy}"]).visft)
    return config, replace(machine, planned=run.changed(config), why_recompute=why)


def rank_facts(config: ResolvedConfig) -> dict[str, str]:
    """Facts that must be equal on all ranks, by name: every setting, and the versions of what decides
    results.
    """
    facts = {key: json.dumps(value) for key, value in flatten(config.to_dict())}
    return facts | {
        f"version of {name}": version for name, version in versions().items() if name != "platform"
    }

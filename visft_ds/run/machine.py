"""Decisions that the hardware makes for a run, and checks that all machines are alike."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from visft_ds import distributed
from visft_ds.config import Batches, ResolvedConfig, derive_batches
from visft_ds.config.resolve import Draft
from visft_ds.config.tree import flatten
from visft_ds.monitor.metrics import versions
from visft_ds.ops import use_numerics
from visft_ds.ops.lora import use_kernels
from visft_ds.parallel.deepspeed_fixes import check_zero
from visft_ds.prepare.model import PUBLISHED_VOCABULARY, choose_precision, deepspeed_dict
from visft_ds.resilience.memory import host_memory
from visft_ds.run.folder import EarlierStarts
from visft_ds.settings.fields import Precision
from visft_ds.tasks.vocabulary import Vocabulary

if TYPE_CHECKING:
    from visft_ds.planner.memory import PlannedRun

#: Keys of ZeRO that the schema has checked; any other is checked by DeepSpeed itself, which takes seconds.
_CHECKED_KEYS = {"stage", "reduce_bucket_size"}
#: Bytes that a process which trains on a CPU holds before it has a model, nearly all of it libraries.
_PROCESS_MEMORY = 950_000_000
_CHECKPOINTING = "visft.model.activation_checkpointing"


@dataclass(frozen=True)
class Machine:
    """Hardware of this process, and what a run uses of it."""

    device: torch.device
    precision: Precision
    why_precision: str
    batches: Batches
    deepspeed_config: dict[str, Any]  #: the configuration for `deepspeed.initialize`
    why_checkpointing: str = "as configured"


def check_machine(config: ResolvedConfig, processes: int | None = None) -> Machine:
    """Choose precision, kernels and batches for the processes that there are. Nothing is allocated.

    Args:
        processes: of a run that is only planned.

    Raises:
        ValueError: hardware that cannot do what is asked, or batches that cannot be divided.
    """
    zero = config.deepspeed["zero_optimization"]
    if not zero.keys() <= _CHECKED_KEYS:
        check_zero(zero)
    model = config.visft.model
    device = distributed.local_device()
    processes = processes or distributed.world_size()
    precision, why_precision = choose_precision(model.precision, device)
    use_kernels(model.kernels, device)
    batches = derive_batches(config, processes)
    tf32 = model.computes_in_tf32(precision)
    use_numerics(device, tf32=tf32, deterministic=config.visft.run.deterministic)
    return Machine(device, precision, why_precision, batches, deepspeed_dict(config, batches, precision))


def planned_run(config: ResolvedConfig, machine: Machine, vocabulary: Vocabulary | None) -> PlannedRun:
    """The run as the planner sees it.

    Args:
        vocabulary: of the captions; None: as many words as the published heads know.
    """
    from visft_ds.planner.memory import PlannedRun  # only pipelines and plans need it

    words = PUBLISHED_VOCABULARY if vocabulary is None else vocabulary.size
    return PlannedRun(config, machine.batches, machine.precision, words, machine.device)


def memory_of(device: torch.device) -> int:
    """Bytes that a plan may fill on this process's device: most of a GPU, or a process's part of the host's
    memory.
    """
    from visft_ds.planner.memory import MEMORY_SHARE

    if device.type == "cuda":
        return int(MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(0.8 * host_memory()) // distributed.processes_here() - _PROCESS_MEMORY


def settle_checkpointing(
    config: ResolvedConfig,
    machine: Machine,
    vocabulary: Vocabulary | None,
    earlier: EarlierStarts,
    *,
    must_fit: bool = True,
) -> tuple[ResolvedConfig, Machine]:
    """Replace visft.model.activation_checkpointing = "auto" by the first policy that fits every rank.

    Collective.
    A resumed run keeps the policy it began with: memory changes, and so would results in their last bits.

    Args:
        vocabulary: of the captions; None: as many words as the published heads know.
        must_fit: False: if none fits, take the one that needs least.

    Raises:
        ValueError: on every rank, if no policy fits; it says what helps.
    """
    if config.visft.model.activation_checkpointing != "auto":
        return config, machine
    capacities = distributed.gather_objects(memory_of(machine.device))

    def choose() -> tuple[str, str]:
        if earlier.record is not None:
            return earlier.record.config["visft"]["model"]["activation_checkpointing"], "as the run began"
        if config.visft.stage == 1:
            return "none", "a frozen backbone keeps no activations"
        capacity = min(capacities or ())
        return _choose_policy(planned_run(config, machine, vocabulary), capacity, must_fit=must_fit)

    policy, why = distributed.by_main_process(choose)
    draft = Draft.of(config)
    draft.decide({_CHECKPOINTING: policy}, why, over_user=True)
    return draft.config(), replace(machine, why_checkpointing=why)


def _choose_policy(run: PlannedRun, capacity: int, *, must_fit: bool) -> tuple[str, str]:
    """The fastest policy of recomputing with which a step needs at most `capacity` bytes, and why."""
    from visft_ds.planner.search import choose_recompute, fitting_settings

    chosen, needed = choose_recompute(run, capacity)
    policy = chosen.config.visft.model.activation_checkpointing
    if must_fit and needed > capacity:
        helps = "; ".join(fitting_settings(chosen, capacity)) or "a smaller --model, or more memory"
        raise ValueError(
            f"{_CHECKPOINTING} = auto: even with {policy} a step needs {needed / 2**30:.2f} of "
            f"{capacity / 2**30:.2f} GiB, as predicted. What helps: {helps}. A policy that you set is tried "
            "in any case"
        )
    return policy, f"chosen: needs {needed / 2**30:.1f} of {capacity / 2**30:.1f} GiB"


def rank_facts(config: ResolvedConfig) -> dict[str, str]:
    """Facts that must be equal on all ranks, by name: every setting, and the versions of what decides
    results.
    """
    facts = {key: json.dumps(value) for key, value in flatten(config.to_dict())}
    facts |= {f"version of {name}": version for name, version in versions().items()}
    facts.pop("version of platform")
    return facts

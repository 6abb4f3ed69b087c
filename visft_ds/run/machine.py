"""Checks of a machine, and that all machines are alike, before a run starts."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from visft_ds.config import Batches, ResolvedConfig, changed, deepspeed_dict
from visft_ds.config.resolve import flatten
from visft_ds.flags import check_extra
from visft_ds.monitor.metrics import versions
from visft_ds.ops import use_kernels
from visft_ds.ops.numerics import use_numerics
from visft_ds.parallel import distributed
from visft_ds.parallel.placement import placement_for
from visft_ds.planner.memory import PlannedRun, run_of
from visft_ds.planner.search import MEMORY_SHARE, fitting_settings
from visft_ds.planner.search import choose_recompute as choose_policy
from visft_ds.prepare.datasets import workers_of
from visft_ds.prepare.materialize import Placement
from visft_ds.prepare.model import choose_precision
from visft_ds.resilience.host_memory import host_memory
from visft_ds.resilience.out_of_memory import MemoryWatch
from visft_ds.run.folder import open_run_folder, recorded_config, saved_something, set_aside
from visft_ds.run.lock import locked

_SHARED_MEMORY = Path("/dev/shm")
_PIXEL = 3  #: bytes; images travel as uint8


@dataclass(frozen=True)
class Machine:
    """Hardware of this process, and what becomes of a run on it."""

    planned: PlannedRun  #: device, precision, batches and, in a pipeline, who has which layers
    why_precision: str
    why_recompute: str
    deepspeed_config: dict[str, Any]  #: the configuration for `deepspeed.initialize`
    placement: Placement  #: who holds which parameters
    memory: MemoryWatch  #: explains a step that does not fit


def check_machine(config: ResolvedConfig, vocabulary_size: int | None) -> Machine:
    """Choose precision, kernels, batches and layers for the processes that there are.

    Nothing is allocated. What is recomputed is chosen later, by all ranks together.

    Args:
        vocabulary_size: of the captions; None where no task works with words.

    Raises:
        ValueError: hardware that cannot do what is asked, batches that cannot be divided, or no shared memory.
    """
    model, device, world_size = config.visft.model, distributed.local_device(), distributed.world_size()
    precision, why_precision = choose_precision(model.precision, device)
    use_kernels(model.kernels, device)
    use_numerics(device, tf32=model.tf32, deterministic=config.visft.run.deterministic)
    if tracker := config.visft.run.track:
        check_extra("visft.run.track", tracker, [tracker])
    run = run_of(config, world_size, precision, vocabulary_size, device)
    for_deepspeed = deepspeed_dict(config, world_size, precision)
    placement = placement_for(for_deepspeed, run.partition)
    check_shared_memory(config, run.batches)
    return Machine(run, why_precision, "as configured", for_deepspeed, placement, MemoryWatch(run))


def memory_of(device: torch.device) -> int:
    """Bytes that a plan may fill on this process's device: most of a GPU, or a process's part of the host's memory."""
    if device.type == "cuda":
        return int(MEMORY_SHARE * torch.cuda.get_device_properties(device).total_memory)
    return int(0.8 * host_memory()) // distributed.processes_here()


def settle_recompute(config: ResolvedConfig, machine: Machine) -> tuple[ResolvedConfig, Machine]:
    """Decide what visft.model.recompute = "auto" means, the same on all ranks; a stated policy stays. Collective.

    Raises:
        ValueError: on every rank, as `choose_recompute`.
    """
    if config.visft.model.recompute != "auto":
        return config, machine
    config, why = choose_recompute(config, machine.planned, Path(config.visft.run.out or ""))
    run = machine.planned.changed(config)
    placement = placement_for(machine.deepspeed_config, run.partition)  # a pipeline divides by cost
    return config, replace(machine, planned=run, why_recompute=why, placement=placement, memory=MemoryWatch(run))


def choose_recompute(
    config: ResolvedConfig, run: PlannedRun, out: Path | None, *, must_fit: bool = True
) -> tuple[ResolvedConfig, str]:
    """The configuration with the first policy that fits every rank, and why. Collective; the main process decides.

    A run that goes on keeps the policy it began with: memory changes, and so would results in their last bits.

    Args:
        out: folder of a run that may go on; None: of none.
        must_fit: False: where none fits, that which needs least.

    Raises:
        ValueError: on every rank: no policy fits; says what helps.
    """
    found = list[tuple[str, str]]()
    rooms = distributed.gather_objects(memory_of(run.device))

    def choose() -> None:
        if out is not None and saved_something(out):
            found.append((recorded_config(out).visft.model.recompute, "as the run began"))
        elif config.visft.stage == 1:
            found.append(("none", "a frozen backbone keeps nothing"))
        else:
            assert rooms is not None  # this is the main process
            choice = choose_policy(run, min(rooms))
            if must_fit and not choice.fits:
                least = run.changed(changed(config, [f"visft.model.recompute={choice.policy}"]))
                others = fitting_settings(least, choice.capacity)
                helps = "; ".join(" ".join(suggestion.settings) for suggestion in others)
                raise ValueError(
                    f"visft.model.recompute = auto: even with {choice.policy} a step needs {choice.needed / 2**30:.2f} "
                    f"of {choice.capacity / 2**30:.2f} GiB, as predicted. What helps: "
                    f"{helps or 'a smaller --model, or more memory'}. A stated policy is tried whatever is predicted"
                )
            found.append((choice.policy, choice.why))

    by_main_process(choose)
    policy, why = distributed.broadcast_object(found)[0]
    visft = changed(config, [f"visft.model.recompute={policy}"]).visft
    return replace(config, visft=visft), why


def rank_facts(config: ResolvedConfig) -> dict[str, str]:
    """Facts that must be equal on all ranks, by name: every setting, and the versions of what decides results."""
    facts = {key: json.dumps(value) for key, value in flatten(config.to_dict())}
    installed = {f"version of {name}": version for name, version in versions().items() if name != "platform"}
    return {**facts, **installed}


def check_shared_memory(config: ResolvedConfig, batches: Batches, folder: Path = _SHARED_MEMORY) -> None:
    """Worker processes hand batches over in shared memory; where it runs out they die with a bus error.

    Raises:
        ValueError: it cannot hold what the workers of this machine may have ready at once.
    """
    number = workers_of(config.visft.data)
    if not number or not folder.is_dir():
        return
    largest = 0
    for name, stream in config.visft.streams().items():
        largest = max(largest, batches.micro[name] * _PIXEL * stream.largest_side() ** 2)
    ready = config.visft.data.prefetch_steps * batches.accumulation + 1 + number
    needed, free = largest * ready * distributed.processes_here(), shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {_megabytes(free)} free; {ready} batches for each training process of this machine may "
            f"need {_megabytes(needed)}: give the container more (docker run --shm-size=8g), or use --set "
            "visft.data.num_workers=0, or a smaller visft.data.prefetch_steps"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.{0 if size >= 1e7 else 2}f} MB"


@contextlib.contextmanager
def locked_for_all_ranks(out: Path) -> Iterator[None]:
    """`locked` by the main process for all of them. Collective.

    Raises:
        ValueError: on every rank, as `locked`.
    """
    with contextlib.ExitStack() as stack:
        by_main_process(lambda: stack.enter_context(locked(out)))
        yield


def clear_run_folder(out: Path, config: ResolvedConfig, resume: str) -> None:
    """Set a run aside that saved nothing. Collective: the folder is ours by now, whatever another run did meanwhile.

    Raises:
        ValueError: on every rank, as `open_run_folder`.
    """

    def clear() -> None:
        if open_run_folder(out, config, resume):
            aside = set_aside(out)
            print(f"the run in {out} saved nothing: it is kept in {aside}, this one starts anew", flush=True)

    by_main_process(clear)


def by_main_process(action: Callable[[], object]) -> None:
    """Let the main process act for all. Collective.

    Raises:
        ValueError: on every rank, where the action raised that or an OSError.
    """
    problem = None
    if distributed.is_main():
        try:
            action()
        except (ValueError, OSError) as error:
            problem = str(error)
    problem = distributed.broadcast_object(problem)
    if problem:
        raise ValueError(problem)

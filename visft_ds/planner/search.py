"""Settings that fit: the fastest on a cluster, the first recomputing policy that fits, and changes that
would.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from visft_ds.config import ResolvedConfig, changed
from visft_ds.config.resolve import flatten
from visft_ds.planner.hardware import Cluster
from visft_ds.planner.memory import (
    MEMORY_SHARE,
    MemoryPlan,
    PlannedRun,
    is_offloaded,
    plan_largest,
    plan_stream,
    run_of,
    trace_step,
)
from visft_ds.planner.time import PlannedTime, peak_seconds, step_time
from visft_ds.pretrained import TIMM

#: Share by which the predicted times of two engines have to differ before one is preferred.
ALIKE = 0.01


@dataclass(frozen=True)
class SearchArm:
    """A configuration on a cluster; numbers of all streams together are means by their shares of the
    steps.
    """

    flags: tuple[str, ...]  #: words of visft train that lead to it
    engine: str
    run: PlannedRun  #: with its policy of recomputing, its batches
    capacity: int  #: bytes that a plan may fill of a GPU
    memory: Mapping[str, MemoryPlan]  #: by stream
    seconds: Mapping[str, PlannedTime]  #: by stream, of a step
    images_per_second: float  #: over all GPUs
    step_seconds: float
    hours: float  #: of the schedule, without evaluation, saving and waiting for data
    of_limit: float  #: share of the peak: the time of all arithmetic needed once over the predicted one

    @property
    def needed(self) -> int:
        """Bytes of the stream that needs most."""
        return max(plan.total for plan in self.memory.values())

    @property
    def fits(self) -> bool:
        """Return True if the steps of every stream fit."""
        return self.needed <= self.capacity


def forecast(config: ResolvedConfig, cluster: Cluster, flags: Sequence[str] = ()) -> SearchArm:
    """Memory and time of a configuration on a cluster. Raises ValueError: batches that cannot be divided over
    it.
    """
    gpu, stated = cluster.gpu, config.visft.model.precision
    precision = gpu.precision() if stated == "auto" else stated
    if gpu.rate(precision) is None:
        raise ValueError(f"visft.model.precision: {gpu.name} has no {precision}")
    run, capacity = (
        run_of(config, cluster.count, precision, None, torch.device("cuda")),
        int(MEMORY_SHARE * gpu.memory),
    )
    plain, batches, streams = run.with_policy("none"), run.batches, config.visft.streams()
    if config.visft.stage == 1 or config.visft.model.recompute == "auto":
        run, _ = choose_recompute(run, capacity)

    def mean(numbers: Mapping[str, float]) -> float:
        shared = sum(streams[name].share * number for name, number in numbers.items())
        return shared / sum(stream.share for stream in streams.values())

    seconds = {name: step_time(run, stream, cluster) for name, stream in streams.items()}
    step = mean({name: one.total for name, one in seconds.items()})
    ideal = {
        name: peak_seconds(trace_step(plain, one).work, gpu, tf32=run.tf32) for name, one in streams.items()
    }
    zero = config.deepspeed["zero_optimization"]
    engine = f"ZeRO-{zero['stage']}" + (" offload" if is_offloaded(zero, "param") else "")
    return SearchArm(
        flags=tuple(flags),
        engine=f"pipeline of {batches.stages}" if batches.stages > 1 else engine,
        run=run,
        capacity=capacity,
        memory={name: plan_stream(run, stream) for name, stream in streams.items()},
        seconds=seconds,
        images_per_second=mean(batches.batch_size) / step,
        step_seconds=step,
        hours=config.total_steps * step / 3600,
        of_limit=mean(ideal) * batches.accumulation / batches.stages / step,
    )


def search(config: ResolvedConfig, cluster: Cluster) -> list[SearchArm]:
    """Arms, one for each engine that the cluster allows, with its fastest settings that fit; the fastest
    first.

    Where nothing fits, an engine's arm is the one that needs least. Each policy is tried with the fewest
    micro-batches that fit; a stated one is the only one. Raises ValueError where all engines refuse what is
    configured.
    """
    arms = list[SearchArm]()
    refusals = list[ValueError]()
    for engine, settings in _engines(cluster.count):
        if engine == "pipeline" and any(arm.fits for arm in arms):
            continue  # a pipeline divides what does not fit; it waits while it fills
        try:
            arms += _fastest(changed(config, settings, engine), cluster, _flags(settings, engine))
        except (
            ValueError
        ) as error:  # more stages than the model has layers; an engine that refuses what is configured
            refusals.append(error)
    if not arms and refusals:
        raise refusals[0]
    fastest = min((arm.step_seconds for arm in arms if arm.fits), default=0.0)
    # Of engines that are as fast, the first one that was tried.
    return sorted(arms, key=lambda arm: (not arm.fits, max(arm.step_seconds, (1 + ALIKE) * fastest)))


def _fastest(config: ResolvedConfig, cluster: Cluster, flags: Sequence[str]) -> list[SearchArm]:
    """The fastest settings of an engine that fit, else those that need least; none: batches cannot be
    divided.
    """
    stated = config.visft.model.recompute
    dp = cluster.count // config.pipeline_stages
    streams = config.visft.streams().values()
    if any(stream.batch_size % dp for stream in streams):
        return []
    shares = {stream.key: stream.batch_size // dp for stream in streams}
    counts = [
        n for n in range(1, max(shares.values()) + 1) if all(share % n == 0 for share in shares.values())
    ]
    policies = policies_of(config) if stated == "auto" else (stated,)
    configured = [f"{key}={value}" for key, value in flatten(config.to_dict())]

    def arm(policy: str, accumulation: int) -> SearchArm:
        sizes = {key: share // accumulation for key, share in shares.items()}
        settings = [f"{key}.micro_batch={size}" for key, size in sizes.items()]
        settings += [f"visft.model.recompute={policy}"] if config.visft.stage == 2 else []
        news = [setting for setting in settings if setting not in configured]
        return forecast(changed(config, settings), cluster, (*flags, *_flags(news)))

    if config.pipeline_stages > 1:
        counts = counts[-1:]  # a pipeline is the faster the more micro-batches there are
    tried = [arm(policies[0], counts[0])]
    if tried[0].fits:
        return tried  # nothing is recomputed, or computed in several turns: nothing takes less time
    for policy in policies:
        tried.append(arm(policy, counts[-1]))
        for accumulation in counts if tried[-1].fits else ():
            tried.append(arm(policy, accumulation))
            if tried[-1].fits:
                break
    return sorted(tried, key=lambda one: (not one.fits, one.step_seconds if one.fits else one.needed))[:1]


def _engines(count: int) -> Sequence[tuple[str, list[str]]]:
    """Engines and their settings: those that are as fast as any first, then those that hold less on a GPU."""
    pipelines = [("pipeline", [f"pipeline.stages={stages}"]) for stages in (2, 4, 8) if count % stages == 0]
    without = list[str]()
    whole = [(engine, without) for engine in ("zero1", "zero0", "zero2", "zero3")]
    return [*whole, *pipelines, ("zero3_offload", without)]


def _flags(settings: Sequence[str], engine: str | None = None) -> tuple[str, ...]:
    chosen = ("--engine", engine) if engine else ()
    return (*chosen, *(word for setting in settings for word in ("--set", setting)))


def policies_of(config: ResolvedConfig) -> tuple[str, ...]:
    """Values of visft.model.recompute, from the one that computes least to the one that keeps least."""
    if config.visft.stage == 1:
        return ("none",)  # a frozen backbone keeps nothing
    return ("none", "block") if config.visft.model.preset.startswith(TIMM) else ("none", "mlp", "block")


def choose_recompute(run: PlannedRun, capacity: int) -> tuple[PlannedRun, int]:
    """The run with the first policy that fits into `capacity` bytes, or the smallest, and the bytes that it
    needs.
    """
    tried = list[tuple[PlannedRun, int]]()
    for policy in policies_of(run.config):
        candidate = run.with_policy(policy)
        tried.append((candidate, plan_largest(candidate).total))
        if tried[-1][1] <= capacity:
            break
    return min(tried, key=lambda choice: choice[1])


def fitting_settings(now: PlannedRun, capacity: int) -> list[str]:
    """Flags of fewer images at once, and of another engine, after which the fullest rank of a run holds no
    more than `capacity` bytes; without those that are not enough."""
    config, micro = now.config, now.batches.micro
    streams = config.visft.streams()
    fewer = list[tuple[str | None, list[str]]]()
    for halvings in range(1, max(micro.values()).bit_length()):
        smaller = {streams[name].key: max(1, count >> halvings) for name, count in micro.items()}
        fewer.append((None, [f"{key}.micro_batch={count}" for key, count in smaller.items()]))
    engines = list[tuple[str | None, list[str]]]()
    if config.pipeline_stages == 1:
        engines += _engines(now.batches.processes)
    helpful = list[str]()
    for kind in (fewer, engines):
        for engine, settings in kind:
            # Refused: batches that do not divide that way, more stages than layers, an engine for other
            # models.
            with suppress(ValueError):
                if plan_largest(now.changed(changed(config, settings, engine))).total <= capacity:
                    helpful.append(shlex.join(_flags(settings, engine)))
                    break
    return helpful

"""Settings that fit: the fastest on a cluster, the first recomputing policy that fits, and changes that would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from visft_ds.config import ResolvedConfig, changed
from visft_ds.planner.hardware import Cluster
from visft_ds.planner.memory import MEMORY_SHARE, MemoryPlan, PlannedRun, plan_largest, plan_stream, run_of, trace_step
from visft_ds.planner.time import PlannedTime, peak_seconds, step_time
from visft_ds.pretrained import TIMM


@dataclass(frozen=True)
class SearchArm:
    """A configuration on a cluster; numbers of all streams together are means by their shares of the steps."""

    flags: tuple[str, ...]  #: of visft train that lead to it
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
    """Memory and time of a configuration on a cluster. Raises ValueError: batches that cannot be divided over it."""
    gpu, stated = cluster.gpu, config.visft.model.precision
    precision = gpu.precision() if stated == "auto" else stated
    if gpu.rate(precision) is None:
        raise ValueError(f"visft.model.precision: {gpu.name} has no {precision}")
    run, capacity = run_of(config, cluster.count, precision, None, torch.device("cuda")), int(MEMORY_SHARE * gpu.memory)
    plain, batches, streams = run.with_policy("none"), run.batches, config.visft.streams()
    if config.visft.stage == 1 or config.visft.model.recompute == "auto":
        run, _ = choose_recompute(run, capacity)

    def mean(numbers: Mapping[str, float]) -> float:
        shared = sum(streams[name].share * number for name, number in numbers.items())
        return shared / sum(stream.share for stream in streams.values())

    seconds = {name: step_time(run, stream, cluster) for name, stream in streams.items()}
    step = mean({name: one.total for name, one in seconds.items()})
    ideal = {name: peak_seconds(trace_step(plain, one).work, gpu, tf32=run.tf32) for name, one in streams.items()}
    zero = config.deepspeed["zero_optimization"]["stage"]
    return SearchArm(
        flags=tuple(flags),
        engine=f"pipeline of {batches.stages}" if batches.stages > 1 else f"ZeRO-{zero}",
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
    """Arms, one for each engine that the cluster allows, with its fastest settings that fit; the fastest first.

    Where nothing fits, an engine's arm is the one that needs least. Each policy is tried with the fewest micro-batches
    that fit; a stated one is the only one.
    """
    arms = _fastest(changed(config, engine="zero1"), cluster, _flags([], "zero1"))
    for engine, settings in _engines(cluster.count):
        if engine == "pipeline" and any(arm.fits for arm in arms):
            break  # a pipeline divides what does not fit; it waits while it fills
        with suppress(ValueError):  # more stages than the model has layers; an engine that refuses what is configured
            arms += _fastest(changed(config, settings, engine), cluster, _flags(settings, engine))
    return sorted(arms, key=lambda arm: (not arm.fits, arm.step_seconds))


def _fastest(config: ResolvedConfig, cluster: Cluster, flags: Sequence[str]) -> list[SearchArm]:
    """The fastest settings of an engine that fit, else those that need least; none: batches cannot be divided."""
    stated, tried = config.visft.model.recompute, list[SearchArm]()
    dp, streams = cluster.count // config.pipeline_stages, config.visft.streams().values()
    if any(stream.batch_size % dp for stream in streams):
        return []
    shares = {stream.key: stream.batch_size // dp for stream in streams}
    # A pipeline is the faster the more micro-batches there are; elsewhere fewer and larger ones are.
    counts = [n for n in range(1, max(shares.values()) + 1) if all(share % n == 0 for share in shares.values())]
    for policy in policies_of(config) if stated == "auto" else (stated,):
        for accumulation in counts[-1:] if config.pipeline_stages > 1 else counts:
            settings = [f"{key}.micro_batch={share // accumulation}" for key, share in shares.items()]
            settings += [f"visft.model.recompute={policy}"] if config.visft.stage == 2 else []
            tried.append(forecast(changed(config, settings), cluster, (*flags, *_flags(settings))))
            if tried[-1].fits:
                break
        if len(tried) == 1 and tried[0].fits:
            break  # nothing recomputed, in one micro-batch: nothing takes less
    return sorted(tried, key=lambda arm: (not arm.fits, arm.step_seconds if arm.fits else arm.needed))[:1]


def _engines(count: int) -> Sequence[tuple[str | None, list[str]]]:
    """Engines, and their settings, that hold less of a model on each of several GPUs."""
    pipelines = [("pipeline", [f"pipeline.stages={stages}"]) for stages in (2, 4, 8) if count % stages == 0]
    return [("zero3", []), *pipelines] if count > 1 else []


def _flags(settings: Sequence[str], engine: str | None = None) -> tuple[str, ...]:
    return (*([f"--engine {engine}"] if engine else []), *(f"--set {setting}" for setting in settings))


def policies_of(config: ResolvedConfig) -> tuple[str, ...]:
    """Values of visft.model.recompute, from the one that computes least to the one that keeps least."""
    if config.visft.stage == 1:
        return ("none",)  # a frozen backbone keeps nothing
    return ("none", "block") if config.visft.model.preset.startswith(TIMM) else ("none", "mlp", "block")


def choose_recompute(run: PlannedRun, capacity: int) -> tuple[PlannedRun, int]:
    """The run with the first policy that fits into `capacity` bytes, or the smallest, and the bytes that it needs."""
    tried = list[tuple[PlannedRun, int]]()
    for policy in policies_of(run.config):
        tried.append((candidate := run.with_policy(policy), plan_largest(candidate).total))
        if tried[-1][1] <= capacity:
            break
    return min(tried, key=lambda choice: choice[1])


def fitting_settings(now: PlannedRun, capacity: int) -> list[str]:
    """Flags of fewer images at once, and of another engine, after which the fullest rank of a run holds no more than
    `capacity` bytes; without those that are not enough."""
    config, micro, found, fewer = now.config, now.batches.micro, list[str](), list[tuple[str | None, list[str]]]()
    streams = config.visft.streams()
    for halvings in range(1, max(micro.values()).bit_length()):
        smaller = {streams[name].key: max(1, count >> halvings) for name, count in micro.items()}
        fewer.append((None, [f"{key}.micro_batch={count}" for key, count in smaller.items()]))
    engines = [] if config.pipeline_stages > 1 else _engines(now.batches.processes)
    for kind in (fewer, engines):
        for engine, settings in kind:
            # Refused: batches that do not divide that way, more stages than layers, an engine for other models.
            with suppress(ValueError):
                if plan_largest(now.changed(changed(config, settings, engine))).total <= capacity:
                    found.append(" ".join(_flags(settings, engine)))
                    break
    return found

"""Settings that fit: the fastest on a cluster, the first recomputing policy that fits, and changes that
would.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from visft_ds.config import ResolvedConfig, changed
from visft_ds.config.tree import flatten
from visft_ds.planner.hardware import Cluster
from visft_ds.planner.memory import (
    MEMORY_SHARE,
    MemoryPlan,
    PlannedRun,
    is_offloaded,
    plan_largest,
    plan_stream,
    planned_run,
    trace_step,
)
from visft_ds.planner.time import PlannedTime, peak_seconds, step_time
from visft_ds.pretrained import TIMM

#: Share by which the predicted times of two engines have to differ before one is preferred.
ALIKE = 0.01


@dataclass(frozen=True)
class Forecast:
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
    mfu: float  #: share of the peak: the time of all arithmetic needed once over the predicted one

    @property
    def needed(self) -> int:
        """Bytes of the stream that needs most."""
        return max(plan.total for plan in self.memory.values())

    @property
    def fits(self) -> bool:
        """Return True if the steps of every stream fit."""
        return self.needed <= self.capacity


def forecast(config: ResolvedConfig, cluster: Cluster, flags: Sequence[str] = ()) -> Forecast:
    """Memory and time of a configuration on a cluster. Raises ValueError: batches that cannot be divided over
    it.
    """
    gpu = cluster.gpu
    visft = config.visft
    precision = gpu.precision() if visft.model.precision == "auto" else visft.model.precision
    if gpu.rate(precision) is None:
        raise ValueError(f"visft.model.precision: {gpu.name} has no {precision}")
    capacity = int(MEMORY_SHARE * gpu.memory)
    run = planned_run(config, cluster.count, precision, None, torch.device("cuda"))
    without_recomputing = run.with_policy("none")
    if visft.stage == 1 or visft.model.activation_checkpointing == "auto":
        run, _ = choose_recompute(run, capacity)

    streams = visft.streams()
    shares = [stream.share for stream in streams.values()]
    memory = {name: plan_stream(run, stream) for name, stream in streams.items()}
    seconds = {name: step_time(run, stream, cluster) for name, stream in streams.items()}
    works = [trace_step(without_recomputing, stream).work for stream in streams.values()]

    def mean(of_streams: Iterable[float]) -> float:
        """Mean over the streams by their shares of the steps."""
        weighted = [share * value for share, value in zip(shares, of_streams, strict=True)]
        return sum(weighted) / sum(shares)

    batches = run.batches
    step_seconds = mean(time.total for time in seconds.values())
    ideal = mean(peak_seconds(work, gpu, tf32=run.tf32) for work in works)
    ideal *= batches.accumulation / batches.stages
    return Forecast(
        flags=tuple(flags),
        engine=_engine_name(run),
        run=run,
        capacity=capacity,
        memory=memory,
        seconds=seconds,
        images_per_second=mean(batches.batch_size.values()) / step_seconds,
        step_seconds=step_seconds,
        hours=config.total_steps * step_seconds / 3600,
        mfu=ideal / step_seconds,
    )


def _engine_name(run: PlannedRun) -> str:
    if run.batches.stages > 1:
        return f"pipeline of {run.batches.stages}"
    name = f"ZeRO-{run.zero_stage}"
    return f"{name} offload" if is_offloaded(run.zero, "param") else name


def search(config: ResolvedConfig, cluster: Cluster) -> list[Forecast]:
    """Forecasts, one for each engine that the cluster allows, with its fastest settings that fit; the fastest
    first.

    Where nothing fits, an engine's forecast is the one that needs least. Each policy is tried with the fewest
    micro-batches that fit; a stated one is the only one. Raises ValueError where all engines refuse what is
    configured.
    """
    forecasts = list[Forecast]()
    refusals = list[ValueError]()
    for engine, settings in _engines(cluster.count):
        if engine == "pipeline" and any(option.fits for option in forecasts):
            continue  # a pipeline divides what does not fit; it waits while it fills
        try:
            best = _fastest(changed(config, settings, engine), cluster, _flags(settings, engine))
        except ValueError as error:
            # More stages than the model has layers, or an engine that refuses what is configured.
            refusals.append(error)
            continue
        if best is not None:
            forecasts.append(best)
    if not forecasts and refusals:
        raise refusals[0]
    fastest = min((option.step_seconds for option in forecasts if option.fits), default=0.0)

    def order(option: Forecast) -> tuple[bool, float]:
        """Of engines that are as fast, the first one that was tried: sorting keeps their order."""
        return not option.fits, max(option.step_seconds, (1 + ALIKE) * fastest)

    return sorted(forecasts, key=order)


def _fastest(config: ResolvedConfig, cluster: Cluster, flags: Sequence[str]) -> Forecast | None:
    """The fastest settings of an engine that fit, else those that need least; None: batches cannot be
    divided.
    """
    dp = cluster.count // config.pipeline_stages
    streams = config.visft.streams().values()
    if any(stream.batch_size % dp for stream in streams):
        return None
    shares = {stream.key: stream.batch_size // dp for stream in streams}
    most = math.gcd(*shares.values())  # with more accumulation some share would not be whole
    accumulations = [count for count in range(1, most + 1) if most % count == 0]
    if config.pipeline_stages > 1:
        accumulations = accumulations[-1:]  # a pipeline is the faster the more micro-batches there are
    configured_policy = config.visft.model.activation_checkpointing
    policies = policies_of(config) if configured_policy == "auto" else (configured_policy,)
    configured = [f"{key}={value}" for key, value in flatten(config.to_dict())]

    def planned(policy: str, accumulation: int) -> Forecast:
        settings = [f"{key}.micro_batch={share // accumulation}" for key, share in shares.items()]
        if config.visft.stage == 2:
            settings.append(f"visft.model.activation_checkpointing={policy}")
        differing = [setting for setting in settings if setting not in configured]
        return forecast(changed(config, settings), cluster, (*flags, *_flags(differing)))

    first = planned(policies[0], accumulations[0])
    if first.fits:
        return first  # nothing is recomputed, or computed in several turns: nothing takes less time
    options = [first]
    for policy in policies:
        smallest = planned(policy, accumulations[-1])
        options.append(smallest)
        if not smallest.fits:
            continue
        for accumulation in accumulations:
            options.append(planned(policy, accumulation))
            if options[-1].fits:
                break
    fitting = [option for option in options if option.fits]
    if fitting:
        return min(fitting, key=lambda option: option.step_seconds)
    return min(options, key=lambda option: option.needed)


def _engines(count: int) -> list[tuple[str | None, list[str]]]:
    """Engines and their settings: those that are as fast as any first, then those that hold less on a GPU."""
    engines: list[tuple[str | None, list[str]]] = [("zero1", []), ("zero0", []), ("zero2", []), ("zero3", [])]
    engines += [("pipeline", [f"pipeline.stages={stages}"]) for stages in (2, 4, 8) if count % stages == 0]
    engines.append(("zero3_offload", []))
    return engines


def _flags(settings: Sequence[str], engine: str | None = None) -> tuple[str, ...]:
    """Words of visft train."""
    words = ["--engine", engine] if engine else []
    for setting in settings:
        words += ["--set", setting]
    return tuple(words)


def policies_of(config: ResolvedConfig) -> tuple[str, ...]:
    """Values of visft.model.activation_checkpointing, from what computes least to what keeps least."""
    if config.visft.stage == 1:
        return ("none",)  # a frozen backbone keeps nothing
    if config.visft.model.preset.startswith(TIMM):
        return ("none", "block")
    return ("none", "mlp", "block")


def choose_recompute(run: PlannedRun, capacity: int) -> tuple[PlannedRun, int]:
    """The run with the first policy that fits into `capacity` bytes, or the smallest, and the bytes that it
    needs.
    """
    tried = list[tuple[PlannedRun, int]]()
    for policy in policies_of(run.config):
        candidate = run.with_policy(policy)
        needed = plan_largest(candidate).total
        tried.append((candidate, needed))
        if needed <= capacity:
            break
    return min(tried, key=lambda choice: choice[1])


def fitting_settings(run: PlannedRun, capacity: int) -> list[str]:
    """Flags of fewer images at once, and of another engine, after which the fullest rank of a run holds no
    more than `capacity` bytes; without those that are not enough."""
    config = run.config
    streams = config.visft.streams()
    micro_batches = run.batches.micro
    fewer_images = list[tuple[str | None, list[str]]]()
    for halvings in range(1, max(micro_batches.values()).bit_length()):
        smaller = {streams[name].key: max(1, images >> halvings) for name, images in micro_batches.items()}
        fewer_images.append((None, [f"{key}.micro_batch={images}" for key, images in smaller.items()]))
    engines = _engines(run.batches.processes) if config.pipeline_stages == 1 else []

    helpful = list[str]()
    for changes in (fewer_images, engines):
        for engine, settings in changes:
            # Refused: batches that do not divide that way, more stages than layers, an engine for other
            # models.
            with suppress(ValueError):
                if plan_largest(run.changed(changed(config, settings, engine))).total <= capacity:
                    helpful.append(shlex.join(_flags(settings, engine)))
                    break
    return helpful

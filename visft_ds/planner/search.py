"""Settings that fit: the fastest on a cluster, the first recomputing policy that fits, and changes that would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from visft_ds.config import ResolvedConfig, changed, derive_batches
from visft_ds.config.task_schema import SHARED
from visft_ds.models.eva_vit import PRESETS
from visft_ds.planner.hardware import Cluster
from visft_ds.planner.memory import MemoryPlan, PlannedRun, plan_largest, plan_stream, trace_step
from visft_ds.planner.time import PlannedTime, peak_seconds, step_time
from visft_ds.prepare.model import PUBLISHED_VOCABULARY

CUDA = torch.device("cuda")
#: Of a GPU's memory, what a plan may fill: the CUDA context, libraries' workspaces and fragmentation take the rest.
MEMORY_SHARE = 0.92


@dataclass(frozen=True)
class StreamForecast:
    """Forecast for the steps of a stream."""

    images: int  #: of an optimiser step, over all GPUs
    micro: int  #: of one GPU at once
    memory: MemoryPlan
    time: PlannedTime
    limit: float  #: seconds at the GPUs' peak, all arithmetic needed once, nothing else


@dataclass(frozen=True)
class SearchArm:
    """A configuration on a cluster."""

    config: ResolvedConfig
    flags: tuple[str, ...]  #: of visft train that lead to it
    engine: str
    policy: str  #: what is recomputed
    accumulation: int
    streams: dict[str, StreamForecast]
    shares: dict[str, float]  #: of the steps, sum 1
    steps: int
    capacity: int  #: bytes that a plan may fill of a GPU

    @property
    def fullest(self) -> MemoryPlan:
        """Memory of the stream that needs most."""
        return max((stream.memory for stream in self.streams.values()), key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """Return True if the steps of every stream fit."""
        return self.fullest.total <= self.capacity

    @property
    def step_seconds(self) -> float:
        """Seconds of a step, mean over the run."""
        return sum(self.shares[name] * stream.time.total for name, stream in self.streams.items())

    @property
    def images_per_second(self) -> float:
        """Images a second over all GPUs, of all streams in their shares."""
        return sum(self.shares[name] * stream.images for name, stream in self.streams.items()) / self.step_seconds

    @property
    def hours(self) -> float:
        """Duration of the schedule, without evaluation, saving and waiting for data."""
        return self.steps * self.step_seconds / 3600

    @property
    def of_limit(self) -> float:
        """Share of the peak: the time of the arithmetic alone over the predicted one."""
        return sum(self.shares[name] * stream.limit for name, stream in self.streams.items()) / self.step_seconds


def forecast(config: ResolvedConfig, cluster: Cluster, flags: Sequence[str] = ()) -> SearchArm:
    """Memory and time of a configuration on a cluster. Raises ValueError: batches that cannot be divided over it."""
    gpu, stated = cluster.gpu, config.visft.model.precision
    precision = gpu.precision() if stated == "auto" else stated
    if gpu.rate(precision) is None:
        raise ValueError(f"visft.model.precision: {gpu.name} has no {precision}")
    batches, capacity = derive_batches(config, cluster.count), int(MEMORY_SHARE * gpu.memory)
    run = PlannedRun(config, batches, precision, PUBLISHED_VOCABULARY, CUDA)
    plain = run.with_policy("none")
    if config.visft.model.recompute == "auto":
        run = run.with_policy(choose_recompute(run, capacity).policy)
    streams = {
        name: StreamForecast(
            images=stream.batch_size,
            micro=batches.micro[name],
            memory=plan_stream(run, stream),
            time=step_time(run, stream, cluster),
            limit=peak_seconds(trace_step(plain, stream).work, gpu) * batches.accumulation / batches.stages,
        )
        for name, stream in config.visft.streams().items()
    }
    zero = config.deepspeed["zero_optimization"]["stage"]
    shares = {name: stream.share for name, stream in config.visft.streams().items()}
    return SearchArm(
        config=run.config,
        flags=tuple(flags),
        engine=f"pipeline of {batches.stages}" if batches.stages > 1 else f"ZeRO-{zero}",
        policy=run.config.visft.model.recompute if config.visft.stage == 2 else "none",
        accumulation=batches.accumulation,
        streams=streams,
        shares={name: share / sum(shares.values()) for name, share in shares.items()},
        steps=config.total_steps,
        capacity=capacity,
    )


def search(config: ResolvedConfig, cluster: Cluster) -> list[SearchArm]:
    """Arms, one for each engine that the cluster allows, with its fastest settings that fit; the fastest first.

    Where nothing fits, an engine's arm is the one that needs least. Each policy is tried with the fewest micro-batches
    that fit; a stated one is the only one.
    """
    arms: list[SearchArm] = []
    for flags, of_engine in _engines_of(config, cluster):
        if of_engine.pipeline_stages > 1 and any(arm.fits for arm in arms):
            break  # a pipeline divides what does not fit; it waits while it fills
        if (arm := _fastest(of_engine, cluster, flags)) is not None:
            arms.append(arm)
    return sorted(arms, key=lambda arm: (not arm.fits, arm.step_seconds))


def _fastest(config: ResolvedConfig, cluster: Cluster, flags: Sequence[str]) -> SearchArm | None:
    """The fastest settings of an engine that fit, else those that need least; None: batches cannot be divided."""
    stated, tried = config.visft.model.recompute, list[SearchArm]()
    for policy in policies_of(config) if stated == "auto" else (stated,):
        for settings, candidate in _variants(config, cluster, policy):
            tried.append(forecast(candidate, cluster, (*flags, *_flags(settings))))
            if tried[-1].fits:
                break
        if len(tried) == 1 and tried[0].fits:
            break  # nothing recomputed, in one micro-batch: nothing takes less
    return min(tried, key=lambda arm: (not arm.fits, arm.step_seconds if arm.fits else arm.fullest.total), default=None)


def _engines_of(config: ResolvedConfig, cluster: Cluster) -> Iterator[tuple[tuple[str, ...], ResolvedConfig]]:
    yield ("--engine zero1",), changed(config, engine="zero1")
    if cluster.count > 1:
        yield from _under_engine(config, "zero3")
    model = config.visft.model
    depth = 0 if model.timm else model.overrides.depth or PRESETS[model.preset].depth
    depth = max(model.layers) + 1 if model.layers and not model.timm else depth
    for stages in (2, 4, 8):  # of the embedding, the blocks and the heads; timm's models are not divided
        if cluster.count % stages == 0 and stages <= depth + 2 * bool(depth):
            yield from _under_engine(config, "pipeline", (f"pipeline.stages={stages}",))


def _variants(
    config: ResolvedConfig, cluster: Cluster, policy: str
) -> Iterator[tuple[tuple[str, ...], ResolvedConfig]]:
    """Settings from the largest micro-batches to the smallest, where batches can be divided."""
    dp = cluster.count // config.pipeline_stages
    streams = config.visft.streams()
    if any(stream.batch_size % dp for stream in streams.values()):
        return
    shares = {name: stream.batch_size // dp for name, stream in streams.items()}
    # A pipeline is the faster the more micro-batches there are; elsewhere fewer and larger ones are.
    counts = [n for n in range(1, max(shares.values()) + 1) if all(share % n == 0 for share in shares.values())]
    counts = counts[::-1][:1] if config.pipeline_stages > 1 else counts
    for accumulation in counts:
        settings = [f"{_key(name)}.micro_batch={share // accumulation}" for name, share in shares.items()]
        settings += [f"visft.model.recompute={policy}"] if config.visft.stage == 2 else []
        yield tuple(settings), changed(config, settings)


# ------------------------------------------------------------------------------------------------- what would fit


@dataclass(frozen=True)
class RecomputeChoice:
    """Policy of recomputing that was chosen for a run."""

    policy: str  #: value of visft.model.recompute
    needed: int  #: bytes of the largest step
    capacity: int  #: bytes that a step may fill

    @property
    def fits(self) -> bool:
        """Return True if the largest step fits."""
        return self.needed <= self.capacity

    @property
    def why(self) -> str:
        """Reason for the console."""
        return f"chosen: needs {self.needed / 2**30:.1f} of {self.capacity / 2**30:.1f} GiB"


def policies_of(config: ResolvedConfig) -> tuple[str, ...]:
    """Values of visft.model.recompute, from the one that computes least to the one that keeps least."""
    if config.visft.stage == 1:
        return ("none",)  # a frozen backbone keeps nothing
    return ("none", "block") if config.visft.model.timm is not None else ("none", "mlp", "block")


def choose_recompute(run: PlannedRun, capacity: int) -> RecomputeChoice:
    """The first policy that fits into `capacity` bytes, or the smallest where none does."""
    tried = list[RecomputeChoice]()
    for policy in policies_of(run.config):
        tried.append(RecomputeChoice(policy, plan_largest(run.with_policy(policy)).total, capacity))
        if tried[-1].fits:
            return tried[-1]
    return min(tried, key=lambda choice: choice.needed)


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit."""

    settings: tuple[str, ...]  #: flags of visft train, e.g. "--set visft.model.recompute=block"
    memory: MemoryPlan


def fitting_settings(now: PlannedRun, capacity: int) -> list[Suggestion]:
    """At most three changes after which the fullest rank of a run holds no more than `capacity` bytes.

    Each is of another kind: recomputing, fewer images at once, another engine. Empty where none of them is enough.
    """
    config, world_size, found = now.config, now.batches.processes, list[Suggestion]()
    for kind in (_recomputing(config), _fewer_images(config, world_size), _engines(config, world_size)):
        for flags, candidate in kind:
            try:
                plan = plan_largest(now.changed(candidate))
            except ValueError:
                continue  # its batches do not divide that way, or there are more stages than layers
            if plan.total <= capacity:
                found.append(Suggestion(flags, plan))
                break
    return found


def _key(stream: str) -> str:
    return "visft.shared" if stream == SHARED else f"visft.tasks.{stream}"


def _flags(settings: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"--set {setting}" for setting in settings)


Candidates = Iterator[tuple[tuple[str, ...], ResolvedConfig]]  #: flags, what they lead to


def _recomputing(config: ResolvedConfig) -> Candidates:
    for policy in policies_of(config):
        if policy not in ("none", config.visft.model.recompute):
            settings = (f"visft.model.recompute={policy}",)
            yield _flags(settings), changed(config, settings)


def _fewer_images(config: ResolvedConfig, world_size: int) -> Candidates:
    now, halvings = derive_batches(config, world_size).micro, 1
    while any(count >> halvings for count in now.values()):
        settings = tuple(
            f"{_key(name)}.micro_batch={max(1, count >> halvings)}" for name, count in now.items() if count > 1
        )
        yield _flags(settings), changed(config, settings)
        halvings += 1


def _engines(config: ResolvedConfig, world_size: int) -> Candidates:
    if config.pipeline_stages > 1:
        return
    if world_size > 1 and config.deepspeed["zero_optimization"]["stage"] < 3:
        yield from _under_engine(config, "zero3")
    for stages in (2, 4, 8):
        if world_size % stages == 0:
            yield from _under_engine(config, "pipeline", (f"pipeline.stages={stages}",))


def _under_engine(config: ResolvedConfig, engine: str, settings: Sequence[str] = ()) -> Candidates:
    """(flags, configuration) under another engine; nothing where the engine refuses what is configured."""
    try:
        candidate = changed(config, settings, engine=engine)
    except ValueError:
        return  # a pipeline takes no model of timm, ZeRO-3 no compiled blocks
    yield (f"--engine {engine}", *_flags(settings)), candidate

"""Search for the fastest engine, accumulation, recomputation and number of pipeline stages that fits a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from visft_ds.config import ResolvedConfig, changed, derive_batches
from visft_ds.config.task_schema import SHARED
from visft_ds.models.eva_vit import PRESETS
from visft_ds.planner.cluster import Cluster, PlannedTime, Rates, micro_batch_seconds, rates_of, step_time
from visft_ds.planner.fitting import MEMORY_SHARE, policies_of, recompute_setting, under_engine
from visft_ds.planner.step import MemoryPlan, PlannedRun, plan_largest, plan_stream, trace_step
from visft_ds.prepare.model import PUBLISHED_VOCABULARY
from visft_ds.tasks.spec import Content

CUDA = torch.device("cuda")


@dataclass(frozen=True)
class StreamForecast:
    """Forecast for the steps of a stream."""

    images: int  #: of an optimiser step, over all GPUs
    micro: int  #: of one GPU at once
    memory: MemoryPlan
    time: PlannedTime
    limit: float  #: seconds at the GPUs' peak, all arithmetic needed once, nothing else

    @property
    def images_per_second(self) -> float:
        """Images a second over all GPUs."""
        return self.images / self.time.total


@dataclass(frozen=True)
class SearchArm:
    """A configuration on a cluster."""

    config: ResolvedConfig
    count: int  #: GPUs
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


def forecast(
    config: ResolvedConfig, cluster: Cluster, flags: Sequence[str] = (), like: SearchArm | None = None
) -> SearchArm:
    """Memory and time of a configuration on a cluster.

    Args:
        like: whose memory this one has, as micro-batches and policy are the same; None: it is planned.

    Raises:
        ValueError: batches that cannot be divided over its GPUs.
    """
    gpu = cluster.gpu
    stated = config.visft.model.precision
    precision = gpu.precision() if stated == "auto" else stated
    if precision not in gpu.tflops:
        raise ValueError(f"visft.model.precision: {gpu.name} has no {precision}; it has {', '.join(gpu.tflops)}")
    batches = derive_batches(config, cluster.count)
    rates, capacity, streams = rates_of(gpu), int(MEMORY_SHARE * gpu.memory), {}
    # Typical batches for the time, full ones for the memory.
    full = PlannedRun(config, batches, precision, PUBLISHED_VOCABULARY, CUDA, Content())
    plain = full.changed(changed(config, (recompute_setting("none"),)))
    if config.visft.model.recompute == "auto":
        full = full.changed(changed(config, (recompute_setting(choose_recompute(full, capacity, rates).policy),)))
    for name, stream in config.visft.streams().items():
        work = trace_step(plain.alone(), stream).work
        peak = sum(n * what.operations / gpu.tflops_of(what.dtype) for what, n in work.items()) / 1e12
        streams[name] = StreamForecast(
            images=stream.batch_size,
            micro=batches.micro[name],
            memory=plan_stream(full, stream) if like is None else like.streams[name].memory,
            time=step_time(full, stream, rates, cluster),
            limit=peak * batches.accumulation / batches.stages,
        )
    zero = config.deepspeed["zero_optimization"]["stage"]
    engine = f"pipeline of {batches.stages}" if batches.stages > 1 else f"ZeRO-{zero}"
    all_shares = sum(stream.share for stream in config.visft.streams().values())
    return SearchArm(
        config=full.config,
        count=cluster.count,
        flags=tuple(flags),
        engine=engine,
        policy=full.config.visft.model.recompute if config.visft.stage == 2 else "none",
        accumulation=batches.accumulation,
        streams=streams,
        shares={name: stream.share / all_shares for name, stream in config.visft.streams().items()},
        steps=config.total_steps,
        capacity=capacity,
    )


@dataclass(frozen=True)
class RecomputeChoice:
    """Policy of recomputing that was chosen for a run."""

    policy: str  #: value of visft.model.recompute
    needed: int  #: bytes of the largest step
    capacity: int  #: bytes that a step may fill
    speedup: float  #: over computing every block again

    @property
    def fits(self) -> bool:
        """Return True if the largest step fits."""
        return self.needed <= self.capacity

    @property
    def why(self) -> str:
        """Reason for the console."""
        needs = f"chosen: needs {self.needed / 2**30:.1f} of {self.capacity / 2**30:.1f} GiB"
        return needs if self.policy == "block" else f"{needs}; {self.speedup:.1f}x as fast as block"


def choose_recompute(run: PlannedRun, capacity: int, rates: Rates) -> RecomputeChoice:
    """The policy with which a mean step is fastest among those that fit, or the smallest where none does.

    Compiled blocks and CUDA graphs are no part of the choice: they have not been measured on a GPU.

    Args:
        capacity: bytes that a step may fill.
        rates: of the device.
    """
    streams = run.config.visft.streams().values()

    def seconds(policy: str) -> float:
        candidate = run.changed(changed(run.config, (recompute_setting(policy),)))
        return sum(stream.share * micro_batch_seconds(candidate, stream, rates) for stream in streams)

    needed, fitting = dict[str, int](), dict[str, float]()
    for policy in policies_of(run.config):
        needed[policy] = plan_largest(run.changed(changed(run.config, (recompute_setting(policy),)))).total
        if needed[policy] <= capacity:
            fitting[policy] = seconds(policy)
            if policy == "none":
                break  # nothing computes less
    policy = min(fitting, key=fitting.__getitem__) if fitting else min(needed, key=needed.__getitem__)
    slow = seconds("block")
    return RecomputeChoice(policy, needed[policy], capacity, slow / fitting.get(policy, slow))


def search(config: ResolvedConfig, cluster: Cluster) -> list[SearchArm]:
    """Arms, one for each engine that the cluster allows, with its fastest settings that fit; the fastest first.

    Where nothing fits, an engine's arm is the one that needs least. Each policy is tried with the fewest micro-batches
    that fit; a stated one is the only one.
    """
    arms: list[SearchArm] = []
    for flags, of_engine in _engines(config, cluster):
        if of_engine.pipeline_stages > 1 and any(arm.fits for arm in arms):
            break  # a pipeline divides what does not fit; it waits while it fills
        if (arm := _fastest(of_engine, cluster, flags)) is not None:
            arms.append(arm)
    return sorted(arms, key=lambda arm: (not arm.fits, arm.step_seconds))


def _fastest(config: ResolvedConfig, cluster: Cluster, flags: Sequence[str] = ()) -> SearchArm | None:
    """The fastest settings of an engine that fit, else those that need least; None: batches cannot be divided."""
    stated, tried = config.visft.model.recompute, list[SearchArm]()
    for policy in policies_of(config) if stated == "auto" else (stated,):
        for settings, candidate in _variants(config, cluster, policy):
            tried.append(forecast(candidate, cluster, (*flags, *(f"--set {setting}" for setting in settings))))
            if tried[-1].fits:
                break
        if len(tried) == 1 and tried[0].fits:
            break  # nothing recomputed, in one micro-batch: nothing takes less
    return min(tried, key=lambda arm: (not arm.fits, arm.step_seconds if arm.fits else arm.fullest.total), default=None)


def _key(stream: str) -> str:
    return "visft.shared" if stream == SHARED else f"visft.tasks.{stream}"


def _engines(config: ResolvedConfig, cluster: Cluster) -> Iterator[tuple[tuple[str, ...], ResolvedConfig]]:
    yield ("--engine zero1",), changed(config, engine="zero1")
    if cluster.count > 1:
        yield from under_engine(config, "zero3")
    model = config.visft.model
    depth = 0 if model.timm else model.overrides.depth or PRESETS[model.preset].depth
    depth = max(model.layers) + 1 if model.layers and not model.timm else depth
    for stages in (2, 4, 8):  # of the embedding, the blocks and the heads; timm's models are not divided
        if cluster.count % stages == 0 and stages <= depth + 2 * bool(depth):
            yield from under_engine(config, "pipeline", (f"pipeline.stages={stages}",))


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
        settings += [recompute_setting(policy)] if config.visft.stage == 2 else []
        yield tuple(settings), changed(config, settings)

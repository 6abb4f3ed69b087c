"""Steps of the real run, measured: the model, engine and loader that `train` builds, without a run folder.

Whole steps are timed in turn with steps that have marks around their parts, so that a machine whose speed
drifts does so for both. With gloo and NCCL alike, what a rank waits for others lies in the part that waits.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from visft_ds import distributed
from visft_ds.config import ResolvedConfig, changed
from visft_ds.data.loader import StepLoader
from visft_ds.data.plan import Plan, StepPlan
from visft_ds.data.samples import Batch
from visft_ds.monitor.metrics import versions
from visft_ds.ops import replaced
from visft_ds.parallel.engine import Engine, build_engine, start_process_group
from visft_ds.parallel.pipeline import PipelineEngine
from visft_ds.parallel.placement import placement_for
from visft_ds.planner.hardware import peak_rate
from visft_ds.planner.memory import PlannedRun, model_operations, plan_stream
from visft_ds.prepare.data import RunData, open_data, open_loader
from visft_ds.prepare.model import prepare_model
from visft_ds.prepare.settle import settle_data
from visft_ds.pretrained import local
from visft_ds.resilience.memory import library_pages, memory_before, memory_explained, peak_memory
from visft_ds.run.folder import EarlierStarts
from visft_ds.run.machine import Machine, check_machine, planned_run, settle_checkpointing
from visft_ds.shards.build import build
from visft_ds.shards.options import Options
from visft_ds.toy.coco import write_toy_coco

_HEIGHT = 480  #: pixels of a generated picture: COCO's most frequent size
_WIDTH = 640
#: Instruction of a pipeline -> part of a step.
_INSTRUCTIONS = {"ForwardPass": "forward", "BackwardPass": "backward", "OptimizerStep": "optimizer"}


def measure(
    config: ResolvedConfig, steps: int, warmup: int, *, synthetic: bool, trace: Path | None
) -> dict[str, Any]:
    """The record of all streams on the main process, empty elsewhere. Collective."""
    with open_session(config, synthetic=synthetic) as session:
        profiles = {}
        for stream in session.config.visft.streams():
            profiles[stream] = session.measure(stream, steps, warmup)
            if trace is not None:
                session.trace(stream, trace)
        ranks = distributed.gather_objects(profiles)
        record = {"config": session.config.to_dict(), "versions": versions(), "ranks": ranks}
    distributed.close()
    return {} if ranks is None else record


def measure_loader(config: ResolvedConfig, steps: int, warmup: int, *, synthetic: bool) -> dict[str, Any]:
    """Samples and seconds of this rank's loader by itself, for each stream."""
    speeds = {}
    with open_run_data(config, synthetic=synthetic) as (opened, data):
        machine = check_machine(opened)
        for stream in opened.visft.streams():
            with closing(loader_of(opened, data, stream, machine)) as loader:
                batches_of_steps = loader.steps(0, warmup + steps)
                for _ in range(warmup):
                    next(batches_of_steps)
                began = time.perf_counter()
                samples = sum(len(batch.images) for _, batches in batches_of_steps for batch in batches)
                speeds[stream] = {"samples": samples, "seconds": time.perf_counter() - began}
    return {"config": opened.to_dict(), "versions": versions(), "loader": speeds}


@contextmanager
def open_run_data(config: ResolvedConfig, *, synthetic: bool) -> Iterator[tuple[ResolvedConfig, RunData]]:
    """The data of a run that begins, of generated pictures if asked for, and its configuration. No run is
    read.
    """
    with tempfile.TemporaryDirectory(prefix="visft-profile-") as folder:
        run = config.visft.run.model_copy(update={"out": f"{folder}/run", "eval_every": 0, "keep_best": None})
        config = replace(config, visft=config.visft.model_copy(update={"run": run, "features": None}))
        if synthetic:
            config = with_random_weights(config, drawn_shards(config, Path(folder)))
        config, sets = settle_data(config, distributed.world_size())
        yield config, open_data(config.visft, sets)


@contextmanager
def open_session(config: ResolvedConfig, *, synthetic: bool) -> Iterator[Session]:
    """Build what `train` builds, in its order, without a run folder."""
    with open_run_data(config, synthetic=synthetic) as (config, data):
        machine = check_machine(config)
        start_process_group()
        config, machine = settle_checkpointing(config, machine, data.vocabulary, EarlierStarts())
        planned = planned_run(config, machine, data.vocabulary)
        before = memory_before(machine.device)
        prepared = prepare_model(
            config,
            precision=planned.precision,
            heads_from=Path(config.visft.heads.path) if config.visft.heads.path else None,
            categories=data.categories,
            vocabulary=data.vocabulary,
            placement=placement_for(machine.deepspeed_config, planned.bounds),
        )
        engine = build_engine(
            prepared,
            config,
            machine.deepspeed_config,
            planned.bounds,
        )
        yield Session(config, data, machine, planned, engine, before)


def drawn_shards(config: ResolvedConfig, folder: Path) -> Path:
    """Shards of generated pictures, twice the largest batch of them: in a few there is nothing for a task."""
    count = 2 * max(stream.batch_size for stream in config.visft.streams().values())
    tree = folder / "coco"
    shards = folder / "shards"
    write_toy_coco(tree, train=count, val=0, height=_HEIGHT, width=_WIDTH, max_shapes=18)
    instances = tree / "annotations/instances_train2017.json"
    captions = tree / "annotations/captions_train2017.json"
    build(Options(config.visft.data.train, tree / "train2017", instances, captions, out=shards))
    return shards


def with_random_weights(config: ResolvedConfig, shards: Path) -> ResolvedConfig:
    """The same on other shards, with random values where files are not here: speed does not depend on
    values.
    """
    visft = config.visft
    settings = [f"visft.data.root={shards}", "visft.data.sets=[]"]
    captions = visft.tasks.with_words()
    if captions is not None:
        task, options = captions
        if options.vocabulary.file is None:
            settings.append(f"visft.tasks.{task}.vocabulary.min_count=1")
    if visft.model.weights is not None and not local(visft.model.weights).is_file():
        settings.append("visft.model.weights=null")
    if visft.heads.path is not None and not Path(visft.heads.path).exists():
        settings += ["visft.heads.path=null", "visft.heads.start=random"]
    return changed(config, settings)


def loader_of(config: ResolvedConfig, data: RunData, stream: str, machine: Machine) -> StepLoader:
    """The loader of a run that has this stream only: its batches in the order in which training meets
    them.
    """
    plan = data.plan
    alone = replace(data, plan=Plan({stream: plan.tasks[stream]}, plan.seed, plan.views))
    return open_loader(config.visft, alone, machine.batches)


@dataclass(frozen=True)
class Session:
    """A run that is ready to make steps."""

    config: ResolvedConfig
    data: RunData
    machine: Machine
    planned: PlannedRun
    engine: Engine
    memory_before: int  #: bytes

    def measure(self, stream: str, count: int, warmup: int) -> dict[str, Any]:
        """Numbers of whole steps, in turn with steps by part. Collective."""
        device = self.engine.device
        whole: list[float] = []
        by_part: list[dict[str, float]] = []
        with closing(loader_of(self.config, self.data, stream, self.machine)) as loader:
            steps = loader.steps(0, warmup + 2 * count)
            for _ in range(warmup):
                self._step(stream, steps)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            for _ in range(count):
                seconds, images = self._step(stream, steps)
                whole.append(seconds)
                with timed_parts(self.engine) as watch:
                    seconds, _ = self._step(stream, steps)
                parts = {"data wait": loader.wait_seconds, **watch.seconds()}
                parts["rest"] = seconds - sum(parts.values())
                by_part.append(parts)

        planned = self.planned
        step_kind = self.config.visft.streams()[stream]
        operations = model_operations(planned, step_kind)
        peak = peak_rate(device, planned.precision)
        return {
            "images": images,  # of a step, over all ranks
            "seconds": whole,  # of each step
            # Seconds of a step by part, mean.
            "parts": {part: statistics.fmean(of.get(part, 0.0) for of in by_part) for part in by_part[0]},
            # Bytes beyond what this process held before it had a model, without pages of library files.
            "peak": peak_memory(device) - library_pages(device) - self.memory_before,
            "planned": asdict(plan_stream(planned, step_kind)),  # bytes by part
            "operations": operations,  # of this rank's step, nothing computed twice
            # Share of the GPU's dense peak, where that is known.
            "mfu": None if peak is None else operations / statistics.median(whole) / peak,
        }

    def trace(self, stream: str, folder: Path) -> None:
        """Trace a step by torch.profiler: FOLDER/STREAM-rankN.json.gz for Perfetto, and a table of its
        operators.
        """
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it reports its own starts and stops
        activities = [ProfilerActivity.CPU]
        sort_by = "self_cpu_time_total"
        if self.engine.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            sort_by = "self_device_time_total"
        with closing(loader_of(self.config, self.data, stream, self.machine)) as loader:
            steps = loader.steps(0, 2)
            self._step(stream, steps)
            with profile(activities=activities, acc_events=True) as profiler:
                self._step(stream, steps)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{stream}-rank{distributed.rank()}.json.gz"
        profiler.export_chrome_trace(str(path))
        if distributed.is_main():
            table = profiler.key_averages().table(sort_by=sort_by, row_limit=15)
            print(f"{stream}: {path}\n{table}", flush=True)

    def _step(self, stream: str, steps: Iterator[tuple[StepPlan, list[Batch]]]) -> tuple[float, int]:
        """A step as the training loop makes it: seconds from asking for the data to its end, images of all
        ranks.
        """
        engine = self.engine
        synchronize(engine.device)
        began = time.perf_counter()
        step_plan, batches = next(steps)
        label = f"step {step_plan.step} of {stream}"
        denominators, _ = engine.agree_on_step(label, batches, self.machine.batches.micro_batches)
        with memory_explained(label, stream, batches, engine.device):
            engine.train_step(step_plan.step, batches, denominators)
        synchronize(engine.device)
        return time.perf_counter() - began, len(step_plan.indices)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Stopwatch:
    """Seconds by part: CUDA events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = defaultdict[str, list[Any]](list)

    def mark(self, part: str, *_: Any) -> None:
        """Begin or end a part; a hook, too."""
        now: Any = time.perf_counter()
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks[part].append(now)

    def marked(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, its time counted for a part."""

        def call(*arguments: Any, **named: Any) -> Any:
            self.mark(part)
            result = function(*arguments, **named)
            self.mark(part)
            return result

        return call

    def seconds(self) -> dict[str, float]:
        """Seconds of each part, from every odd mark to the even one behind it; waits for the device."""
        synchronize(self._device)
        seconds: dict[str, float] = {}
        for part, marks in self._marks.items():
            pairs = zip(marks[::2], marks[1::2], strict=True)
            seconds[part] = sum(self._between(*pair) for pair in pairs)
        return seconds

    def _between(self, first: Any, last: Any) -> float:
        if self._device.type == "cuda":
            return float(first.elapsed_time(last)) / 1e3
        return float(last - first)


@contextmanager
def timed_parts(engine: Engine) -> Iterator[Stopwatch]:
    """Marks around the parts of a step, removed at the end; of a pipeline, around what this stage is told to
    do.
    """
    watch = Stopwatch(engine.device)
    deepspeed = engine.deepspeed
    with ExitStack() as stack:
        if isinstance(engine, PipelineEngine):
            instructions = {}
            for kind, function in deepspeed._INSTRUCTION_MAP.items():
                part = _INSTRUCTIONS.get(kind.__name__, "between stages")
                instructions[kind] = watch.marked(function, part)
            stack.enter_context(replaced(deepspeed, "_INSTRUCTION_MAP", instructions))
            yield watch
            return
        module = engine.module
        for part, children in {"backbone": [module.backbone], "heads": module.heads.values()}.items():
            mark = partial(watch.mark, part)
            for child in children:
                stack.enter_context(child.register_forward_pre_hook(mark, prepend=True))
                stack.enter_context(child.register_forward_hook(mark))
        for kind in {type(criterion) for criterion in module.criteria.values()}:
            stack.enter_context(replaced(kind, "__call__", watch.marked(kind.__call__, "criteria")))
        stack.enter_context(replaced(deepspeed, "backward", watch.marked(deepspeed.backward, "backward")))
        stack.enter_context(replaced(deepspeed, "step", watch.marked(deepspeed.step, "optimizer")))
        yield watch

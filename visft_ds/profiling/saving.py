"""What a save costs the training: standing still while everything is written, against while it is copied to the host.

Both save the same state of one engine, in turn. The tensors have the sizes of adapters; nothing is trained.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from visft_ds.checkpoint.format import delete_checkpoints, save_checkpoint, saved_steps
from visft_ds.checkpoint.saver import Retention, Saver
from visft_ds.config.layers import CONFIG_ROOT
from visft_ds.costs.hardware import describe
from visft_ds.model import MultiTaskModel
from visft_ds.monitor.console import Section
from visft_ds.monitor.metrics import versions
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import ZeroEngine, start_process_group
from visft_ds.parallel.state import gather_state
from visft_ds.profiling.timing import Spread, synchronize

FORMAT, VERSION = "visft_ds save profile", 1
#: Rows and columns of one made-up tensor: A of a LoRA of rank 64 on q and v of EVA-ViT-E.
_SHAPE = (128, 1792)


@dataclass(frozen=True)
class SaveOptions:
    """What is measured."""

    parameters: float = 29.4e6  #: values that train; a save writes three times as many
    engine: str = "zero1"  #: file of ds_configs/engines
    repeats: int = 10  #: saves of each kind
    folder: Path | None = None  #: where to write; None: the system's folder for temporary files


@dataclass(frozen=True)
class Times:
    """One duration, in seconds."""

    wall: float
    cpu: float  #: of the thread that did it: what a busy machine does not change


def measure_saves(options: SaveOptions) -> dict[str, Any] | None:
    """Save both ways in turn. Collective; the record on the main process, None on the others.

    Raises:
        ValueError: fewer than one repeat, no parameters, a folder that is not there.
    """
    if options.repeats < 1 or options.parameters < 1:
        raise ValueError("--repeats and --parameters must be at least 1")
    if options.folder is not None and not options.folder.is_dir():
        raise ValueError(f"--folder {options.folder}: no such folder")
    start_process_group()
    engine = _engine(options)
    times: dict[str, list[Times]] = {name: [] for name in ("synchronous", "beside", "write")}
    with tempfile.TemporaryDirectory(dir=options.folder) as place, Saver(Path(place) / "b", {}, Retention(1)) as saver:
        for turn in range(options.repeats + 1):
            at_once = _timed(engine, partial(_save_here, engine, Path(place) / "a", turn))
            process, thread = time.process_time(), time.thread_time()
            held = _timed(engine, partial(saver.save, turn, partial(gather_state, engine)))
            reports = saver.finished(wait=True)
            process, thread = time.process_time() - process, time.thread_time() - thread
            if turn and reports:  # the first turn warms up
                times["synchronous"].append(at_once)
                times["beside"].append(held)
                times["write"].append(Times(reports[0].write_seconds, process - thread))
    record = _record(options, engine, times) if distributed.is_main() else None
    distributed.close()
    return record


def _engine(options: SaveOptions) -> ZeroEngine:
    count = max(1, round(options.parameters / (_SHAPE[0] * _SHAPE[1])))
    module = nn.ParameterDict({f"block{index}": nn.Parameter(torch.randn(_SHAPE)) for index in range(count)})
    config = json.loads((CONFIG_ROOT / f"engines/{options.engine}.json").read_text(encoding="utf-8"))
    config |= {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 10**9}
    groups = [{"name": "all", "params": list(module.parameters()), "lr": 1e-3, "weight_decay": 0.0}]
    # No step is made, so nothing of a model is asked of it but its parameters.
    return ZeroEngine(
        cast(MultiTaskModel, module),
        groups,
        config,
        build_optimizer=torch.optim.AdamW,
        schedule=lambda step: 1.0,
        seed=0,
    )


def _save_here(engine: ZeroEngine, folder: Path, step: int) -> None:
    """A save as it is without a thread: every rank waits until all is on disk."""
    state = gather_state(engine)
    if state is not None:
        save_checkpoint(folder, step, state, {})
        delete_checkpoints(folder, [old for old in saved_steps(folder) if old < step])
    distributed.barrier()


def _timed(engine: ZeroEngine, action: Callable[[], None]) -> Times:
    synchronize(engine.device)
    distributed.barrier()
    began, cpu = time.perf_counter(), time.thread_time()
    action()
    return Times(time.perf_counter() - began, time.thread_time() - cpu)


def _record(options: SaveOptions, engine: ZeroEngine, times: Mapping[str, list[Times]]) -> dict[str, Any]:
    pairs = list(zip(times["synchronous"], times["beside"], strict=True))
    numel = sum(int(getattr(p, "ds_numel", p.numel())) for p in engine.module.parameters())
    return {
        "format": FORMAT,
        "version": VERSION,
        "hardware": describe(engine.device),
        "versions": versions(),
        "engine": options.engine,
        "ranks": distributed.world_size(),
        "parameters": numel,
        "bytes": 3 * 4 * numel,
        "seconds": {name: asdict(Spread.of([one.wall for one in values])) for name, values in times.items()},
        "cpu_seconds": {name: asdict(Spread.of([one.cpu for one in values])) for name, values in times.items()},
        "ratio": asdict(Spread.of([first.wall / second.wall for first, second in pairs])),
        "cpu_ratio": asdict(Spread.of([first.cpu / second.cpu for first, second in pairs])),
    }


def make_title(record: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    return (
        f"profile: a save of {record['bytes'] / 1e6:,.0f} MB, {record['engine']}, "
        f"{record['ranks']} process{'es' if record['ranks'] > 1 else ''}"
    )


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables."""
    names = {
        "synchronous": "training stands still, written at once",
        "beside": "training stands still, written by a thread",
        "write": "the thread writes",
    }
    head = ("", "median", "quartiles", "n")
    sections = [
        Section(title, [(text, *_cells(record[key][name], 1e3, ".0f")) for name, text in names.items()], head)
        for key, title in (("seconds", "milliseconds"), ("cpu_seconds", "milliseconds of a processor"))
    ]
    ratios = [("time", *_cells(record["ratio"], 1, ".1f")), ("of a processor", *_cells(record["cpu_ratio"], 1, ".1f"))]
    return [*sections, Section("standing still: written at once / by a thread, pair by pair", ratios, head)]


def _cells(spread: Mapping[str, Any], factor: float, form: str) -> tuple[str, str, str]:
    low, median, high = (format(factor * spread[name], form) for name in ("low", "median", "high"))
    return median, f"{low}-{high}", f"{spread['count']}"

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

from visft_ds.config.layers import CONFIG_ROOT
from visft_ds.monitor.console import Section
from visft_ds.monitor.metrics import versions
from visft_ds.multitask import MultiTaskModel
from visft_ds.parallel import distributed
from visft_ds.parallel.checkpoint import delete_checkpoints, save_checkpoint, saved_steps
from visft_ds.parallel.engine import ZeroEngine, start_process_group
from visft_ds.parallel.engine_state import gather_state
from visft_ds.parallel.saving import Retention, Saver
from visft_ds.profiling.hardware import describe
from visft_ds.profiling.timing import Spread, synchronize

FORMAT, VERSION = "visft_ds save profile", 1
#: Rows and columns of one made-up tensor: A of a LoRA of rank 64 on q and v of EVA-ViT-E.
_SHAPE = (128, 1792)
#: Rows and columns of the matrices that are multiplied beside a write, in place of training.
_BESIDE = 256


@dataclass(frozen=True)
class SaveOptions:
    """What is measured."""

    parameters: float = 29.4e6  #: values that train; a save writes three times as many
    engine: str = "zero1"  #: file of ds_configs/engines
    repeats: int = 10  #: saves of each kind
    folder: Path | None = None  #: where to write; None: the system's folder for temporary files


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
    seconds: dict[str, list[float]] = {name: [] for name in ("synchronous", "beside", "write")}
    rates: dict[str, list[float]] = {"alone": [], "during a write": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as place, Saver(Path(place) / "b", {}, Retention(1)) as saver:
        for turn in range(options.repeats + 1):
            waited = _timed(engine, partial(_save_here, engine, Path(place) / "a", turn))
            alone = _rate(engine.device, lambda began: time.perf_counter() - began < 0.5)
            held = _timed(engine, partial(saver.save, turn, partial(gather_state, engine)))
            during = _rate(engine.device, lambda began: not saver.finished_writing())
            reports = saver.finished(wait=True)
            distributed.barrier()
            if turn and reports:  # the first turn warms up
                seconds["synchronous"].append(waited)
                seconds["beside"].append(held)
                seconds["write"].append(reports[0].write_seconds)
                rates["alone"].append(alone)
                rates["during a write"].append(during)
    record = _record(options, engine, seconds, rates) if distributed.is_main() else None
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


def _timed(engine: ZeroEngine, action: Callable[[], None]) -> float:
    synchronize(engine.device)
    distributed.barrier()
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _rate(device: torch.device, goes_on: Callable[[float], bool]) -> float:
    """Matrix products a second for as long as `goes_on`, at least one."""
    matrix = torch.randn(_BESIDE, _BESIDE, device=device)
    began, done = time.perf_counter(), 0
    while not done or goes_on(began):
        matrix @ matrix
        synchronize(device)
        done += 1
    return done / (time.perf_counter() - began)


def _record(
    options: SaveOptions, engine: ZeroEngine, seconds: Mapping[str, list[float]], rates: Mapping[str, list[float]]
) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(seconds["synchronous"], seconds["beside"], strict=True)]
    slower = [a / b for a, b in zip(rates["alone"], rates["during a write"], strict=True)]
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
        "seconds": {name: asdict(Spread.of(values)) for name, values in seconds.items()},
        "ratio": asdict(Spread.of(ratios)),
        "slower_during_a_write": asdict(Spread.of(slower)),
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
    rows = [(text, *_cells(record["seconds"][name], 1e3, ".0f")) for name, text in names.items()]
    ratios = [
        ("written at once / by a thread", *_cells(record["ratio"], 1, ".1f")),
        ("a matrix product during a write / alone", *_cells(record["slower_during_a_write"], 1, ".2f")),
    ]
    head = ("median", "quartiles", "n")
    return [Section("milliseconds", rows, ("", *head)), Section("ratios, pair by pair", ratios, ("", *head))]


def _cells(spread: Mapping[str, Any], factor: float, form: str) -> tuple[str, str, str]:
    low, median, high = (format(factor * spread[name], form) for name in ("low", "median", "high"))
    return median, f"{low}-{high}", f"{spread['count']}"

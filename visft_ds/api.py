"""Training from Python: visft train as a function. Torch is imported only when the run can really start."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visft_ds.config.resolve import DEFAULT_ENGINE, AnyPath
from visft_ds.flags import speaking_python
from visft_ds.monitor.metrics import Callback
from visft_ds.prepare.inputs import missing_inputs, render_missing
from visft_ds.prepare.settle import settle
from visft_ds.resilience.stop import StopFlag

if TYPE_CHECKING:
    from visft_ds.train import FitResult


@speaking_python()
def fit(
    data: AnyPath | None = None,
    *,
    stage: int | None = None,
    model: AnyPath | None = None,
    backbone: AnyPath | None = None,
    download: bool = False,
    engine: AnyPath = DEFAULT_ENGINE,
    tasks: str | Sequence[str] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    tile: int | str | None = None,
    heads: AnyPath | None = None,
    start: AnyPath | None = None,
    reset_heads: bool = False,
    out: AnyPath | None = None,
    resume: str = "auto",
    callbacks: Sequence[Callback] = (),
    settings: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train one stage, as visft train does: alone in a script or notebook, or in each process of a launcher.

    It may be called again and again in one process. Ctrl-C, SIGTERM and SIGUSR1 stop the run after the step,
    which is saved (heard in the main thread only); a second Ctrl-C raises KeyboardInterrupt. With several
    processes, all call it, and one that fails ends the others. Called again with the same arguments, it
    continues a stopped run, and returns at once for a finished one.

    Args:
        data: folder or URL of the shards that visft shards wrote.
        stage: 1 trains the heads, 2 the backbone's adapters; None with `data`: heads for your own
            photographs.
        model: name of a file in ds_configs/models, or path of one; default: eva_e, what goes with the
            backbone, or in stage 2 that of the finished stage 1 on `data`.
        backbone: instead of the model's: "timm:NAME", "hf-hub:ORG/NAME", a file in ds_configs/models,
            weights, or a folder for timm.
        download: download missing weights from the Hugging Face hub.
        engine: name of a file in ds_configs/engines, or path of one.
        tasks: names, in a list or with commas; default: all that the data has labels for.
        steps: optimiser steps of the run, at least 1.
        epochs: passes through the training images, instead of `steps`.
        batch_size: images per step over all processes.
        lr: learning rate at its highest, above 0.
        tile: side in pixels of the squares that images are cut into, or "none"; default: none, but own
            photographs that are large and have small objects.
        heads: stage 2: folder of trained heads, such as the `export` of a `FitResult`.
        start: run, checkpoint or adapter whose weights (of a run also its settings) this one starts from.
        reset_heads: with `start`: initialise its heads anew, e.g. for other categories.
        out: run folder; default: runs/stage1-MODEL or runs/stage2-MODEL.
        resume: "auto" continues from the newest checkpoint, if there is one; "must" needs one; "no" wants a
            new folder.
        callbacks: functions of a step, counted from 1, and its numbers by name: `loss/loss`, those of each
            task, `lr/...`, or those of its evaluation, `val/box/AP`, which come some steps later. One that
            returns True ends the run after the next step: it is exported, and the same call would train on.
            They run on the main process, which waits for them; an error in one ends the run.
        settings: configuration key -> value, applied last, e.g. {"visft.seed": 1}.

    Raises:
        ValueError: what you can fix: arguments, settings, missing inputs (with the commands that make them),
            a folder in use.
        FloatingPointError: training diverged.
        RuntimeError: processes that differ, or another one that ended first.

    Example:
        >>> losses = {}
        >>> def follow(step, metrics):
        ...     losses[step] = metrics["loss/loss"]
        ...     return losses[step] < 0.01
        >>> heads = visft_ds.fit(
        ...     "shards", stage=1, model="debug", tasks="detection", steps=2, batch_size=4,
        ...     out="runs/heads", callbacks=[follow],
        ... )
        >>> list(losses)
        [1, 2]
    """
    # Before torch is imported: a launcher that dies meanwhile must be missed.
    stop = StopFlag(launched="RANK" in os.environ)
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise ValueError(f"callbacks={callbacks!r}: give a list of functions of a step and its metrics")
    flags = {
        "data": data,
        "stage": stage,
        "model": model,
        "backbone": backbone,
        "engine": engine,
        "tasks": tasks if tasks is None or isinstance(tasks, str) else ",".join(map(str, tasks)),
        "steps": steps,
        "epochs": epochs,
        "batch-size": batch_size,
        "lr": lr,
        "tile": tile,
        "heads": heads,
        "from": start,
        "out": out,
        "resume": resume,
    }
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    words += [f"--set={text}" for text in _assignments(settings or {})]
    if download:
        words.append("--download")
    if reset_heads:
        words.append("--reset-heads")
    _, config, sets = settle(words, int(os.environ.get("WORLD_SIZE", "1")))
    missing = missing_inputs(config)
    if missing:
        raise ValueError(render_missing(missing))
    assert sets is not None  # nothing is missing

    from visft_ds import distributed
    from visft_ds.train import train

    distributed.keep_open()
    launched = "LOCAL_RANK" in os.environ
    gc.collect()  # a run that failed before may still hold its model: in a cycle, which only this breaks
    try:
        command = ["visft", "train", *words]
        return train(config, sets, resume=resume, command=command, stop=stop, callbacks=callbacks)
    finally:
        if not launched:  # a program that is started later must not think that a launcher started it
            os.environ.pop("LOCAL_RANK", None)
        stop.restore()
        gc.collect()


def _assignments(settings: Mapping[str, Any]) -> list[str]:
    """KEY=VALUE of each setting. Raises ValueError for what JSON cannot hold."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"settings is of type {type(settings).__name__}: give a dict of keys and values")
    assignments = []
    for key, value in settings.items():
        try:
            assignments.append(f"{key}={json.dumps(value, default=os.fspath)}")
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise ValueError(
                f"settings[{key!r}] is of type {kind}: give numbers, texts, paths, lists or dicts"
            ) from error
    return assignments

"""Training from Python: visft train as a function. Torch is imported only when the run can really start."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visft_ds.config.resolve import DEFAULT_ENGINE, AnyPath
from visft_ds.monitor.callbacks import Callback
from visft_ds.prepare.inputs import missing_inputs, render_missing
from visft_ds.prepare.settle import settle
from visft_ds.resilience.stop import StopFlag

if TYPE_CHECKING:
    from visft_ds.train import FitResult


def fit(
    *,
    stage: int | None = None,
    model: str | None = None,
    backbone: AnyPath | None = None,
    download: bool = False,
    engine: str = DEFAULT_ENGINE,
    data: AnyPath | None = None,
    out: AnyPath | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: str = "auto",
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train one stage, as visft train does: alone in a script or notebook, or in each process of a launcher.

    It may be called again and again in one process. Ctrl-C, SIGTERM and SIGUSR1 stop the run after the step,
    which is saved (heard in the main thread only); a second Ctrl-C raises KeyboardInterrupt. With several
    processes, all call it, and one that fails ends the others.

    Args:
        stage: 1 trains the heads, 2 the backbone's adapters; None with `data`: heads for your own
            photographs.
        model: name of a file in ds_configs/models, or path of one; default: eva_e, what goes with the
            backbone, or in stage 2 that of the finished stage 1 on `data`.
        backbone: instead of the model's: "timm:NAME", "hf-hub:ORG/NAME", a file in ds_configs/models,
            weights, or a folder for timm.
        download: download missing weights from the Hugging Face hub.
        engine: name of a file in ds_configs/engines, or path of one.
        data: folder or URL of the shards.
        out: run folder.
        settings: dotted key -> value, applied last.
        resume: "auto" continues from the newest checkpoint, if there is one; "must" needs one; "no" wants a
            new folder.
        callbacks: listeners to the run.

    Raises:
        ValueError: what you can fix: settings, missing inputs (with the commands that make them), a folder in
            use.
        FloatingPointError: training diverged.
        RuntimeError: processes that differ, or another one that ended first.
    """
    # Before torch is imported: a launcher that dies meanwhile must be missed.
    stop = StopFlag(launched="RANK" in os.environ)
    flags = {"stage": stage, "model": model, "backbone": backbone, "engine": engine, "data": data, "out": out}
    words = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    for key, value in (settings or {}).items():
        words.append(f"--set={key}={json.dumps(value, default=os.fspath)}")
    words.append(f"--resume={resume}")
    if download:
        words.append("--download")
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
        return train(config, sets, resume=resume, command=sys.argv, stop=stop, callbacks=callbacks)
    finally:
        if not launched:  # a program that is started later must not think that a launcher started it
            os.environ.pop("LOCAL_RANK", None)
        stop.restore()
        gc.collect()

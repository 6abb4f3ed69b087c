"""Trackers that follow a run, Weights & Biases and MLflow: a `Callback` that sends on what metrics.jsonl gets.

Losing a tracker must not lose a run: an error of its library is printed once, and training goes on. A start that goes
on with a run goes on with its record there, too, whose name is kept in OUT/tracker-NAME.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from visft_ds.monitor.callbacks import Callback
from visft_ds.redaction import redacted

Name = Literal["wandb", "mlflow"]
Send = Callable[[int, dict[str, float]], None]
PROJECT = "visft_ds"  #: in the tracker, where its own environment variables name no other
STEP = "optimiser_step"  #: what wandb counts by: numbers of an evaluation come after those of later steps


class Tracker(Callback):
    """Callback that sends the numbers of steps and evaluations to a tracker.

    Args:
        out: the run folder.
        settings: dotted key -> value of the configuration, without secrets.
    """

    def __init__(self, name: Name, out: Path, settings: Mapping[str, Any]) -> None:
        self._name, self._send, self._close = name, None, None
        self._errors = _errors_of(name)
        known = out / f"tracker-{name}"
        identity = known.read_text(encoding="utf-8").strip() if known.is_file() else None

        def start() -> None:
            found, self._send, self._close = _STARTS[name](out, settings, identity)
            known.write_text(found + "\n", encoding="utf-8")

        self._attempt(start)

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step, under their names in metrics.jsonl."""
        if send := self._send:
            self._attempt(lambda: send(step, dict(values)))

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the numbers of an evaluation, with "val/" before their names."""
        self.on_step(step, {f"val/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        """Send what is left, and end the record."""
        if close := self._close:
            self._attempt(close)
        self._send = self._close = None

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except self._errors as error:
            text = f"warning: {self._name} gets nothing any more: {redacted(error)}; training goes on"
            print(text, file=sys.stderr, flush=True)
            self._send = self._close = None


def _errors_of(name: Name) -> tuple[type[Exception], ...]:
    """Exceptions of a tracker's library for a server, an account, a disk or a record that it cannot use."""
    if name == "wandb":
        from wandb.errors import Error

        return (Error, OSError)
    return (Exception,)  # mlflow has a class of its own, and raises a bare one for a record that is open already


def _start_wandb(out: Path, settings: Mapping[str, Any], known: str | None) -> tuple[str, Send, Callable[[], None]]:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=out.name,
        id=known,
        resume="allow",
        dir=str(out),
        config=dict(settings),
        # Nothing but numbers and settings leaves: no command lines, no console. Nobody may be there to log in.
        settings=wandb.Settings(
            console="off", disable_git=True, save_code=False, x_disable_meta=True, login_timeout=30
        ),
    )
    run.define_metric("*", step_metric=STEP)
    return run.id, lambda step, values: run.log({STEP: step, **values}), run.finish


def _start_mlflow(out: Path, settings: Mapping[str, Any], known: str | None) -> tuple[str, Send, Callable[[], None]]:
    import mlflow

    experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
    run = mlflow.start_run(run_id=known, experiment_id=experiment.experiment_id, run_name=out.name)
    if known is None:  # a parameter is written once
        try:
            mlflow.log_params(settings)
        except Exception:
            mlflow.end_run("FAILED")  # an open record would be in the way of the next run of this process
            raise

    def send(step: int, values: dict[str, float]) -> None:
        # Names with a slash are paths there, and "loss/detection" has "loss/detection/ce" below it.
        mlflow.log_metrics({name.replace("/", "."): value for name, value in values.items()}, step=step)

    return run.info.run_id, send, mlflow.end_run


_STARTS = {"wandb": _start_wandb, "mlflow": _start_mlflow}

"""Weights & Biases follows a run: a callback that sends on what metrics.jsonl gets. Needs the extra
`wandb`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from visft_ds.redaction import redacted

STEP = "optimiser_step"  #: what wandb counts by: numbers of an evaluation come after those of later steps


class Tracker:
    """Sends the numbers of the run in OUT, whose name there is kept in OUT/tracker-wandb, and its settings.

    An error of wandb is printed once, and training continues.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = None
        id_file = out / "tracker-wandb"

        def start() -> None:
            self._run = wandb.init(
                id=id_file.read_text(encoding="utf-8") if id_file.is_file() else None,
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", "visft_ds"),
                name=out.name,
                config=dict(settings),
                dir=str(out),
                # Nothing but numbers and settings leaves: no command lines, no console. Nobody may be there
                # to log in.
                settings=wandb.Settings(
                    console="off",
                    disable_git=True,
                    save_code=False,
                    x_disable_meta=True,
                    login_timeout=30,
                ),
            )
            self._run.define_metric("*", step_metric=STEP)
            id_file.write_text(self._run.id, encoding="utf-8")

        self._attempt(start)

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        self._attempt(lambda: self._run and self._run.log({STEP: step, **values}))

    def close(self) -> None:
        """Send what is left, and end the record."""
        self._attempt(lambda: self._run and self._run.finish())

    def _attempt(self, action: Callable[[], object]) -> None:
        from wandb.errors import Error

        try:
            action()
        except (Error, OSError) as error:
            self._run = None
            text = f"warning: wandb receives nothing more: {redacted(error)}; training continues"
            print(text, file=sys.stderr, flush=True)

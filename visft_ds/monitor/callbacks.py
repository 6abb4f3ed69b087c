"""Listeners to a run, given to `visft_ds.fit`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Callback(Protocol):
    """Listener to a run: subclass it and write those of its methods that are wanted; the others do nothing.

    Called on the main process only, by the training loop itself: the run waits for it, and one that takes
    longer than `visft.run.step_timeout` counts as hanging. An error in it ends the run on all ranks, and
    `fit` raises it. `signal.raise_signal(signal.SIGINT)` in it stops the run after the next step, which is
    saved.
    """

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """Follow an optimiser step, whose numbers are in metrics.jsonl now. `step` counts from 1."""
        return

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Follow the numbers of the evaluation after `step`; they are measured beside the training and come
        later.
        """
        return

    def on_save(self, step: int, folder: Path) -> None:
        """Called for a checkpoint that is completely on disk; later ones may replace it."""
        return

"""Data of a run as a start opens it."""

from __future__ import annotations

from visft_ds.config import ResolvedConfig
from visft_ds.prepare.data import RunData, open_data
from visft_ds.prepare.settle import settle_data


def open_run(config: ResolvedConfig, processes: int = 1) -> tuple[ResolvedConfig, RunData]:
    """The settled configuration, and its data."""
    config, sets = settle_data(config, processes)
    return config, open_data(config.visft, sets)

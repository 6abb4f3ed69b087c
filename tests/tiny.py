"""Runs of the debug model that train all three tasks in a second or two: their settings, command and
results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

THREE = ("detection", "segmentation", "captioning")  #: the tasks of the recipes
#: Key of a configuration -> value. Dropout is on: random numbers must survive a resume too.
TINY: dict[str, Any] = {
    "visft.model.overrides": {"width": 32, "depth": 2, "num_heads": 2, "image_size": 56},
    "visft.run.memory_check": False,  # takes a second or two; tests of it turn it on
    "visft.run.visualizations": 0,  # drawing and packing them takes half of the time of such a run
    "visft.shared.image.fixed_size": 56,
    "visft.shared.batch_size": 4,
    "visft.shared.micro_batch": 1,
    **{f"visft.tasks.{task}.image.fixed_size": 56 for task in ("detection", "segmentation")},
    "visft.tasks.captioning.image.size": 56,
    **{f"visft.tasks.{task}.batch_size": 4 for task in ("detection", "segmentation", "captioning")},
    **{f"visft.tasks.{task}.micro_batch": 1 for task in ("detection", "segmentation", "captioning")},
    "visft.tasks.detection.head.encoder_layers": 1,
    "visft.tasks.detection.head.decoder_layers": 1,
    "visft.tasks.detection.head.dropout": 0.1,
    "visft.tasks.segmentation.head.encoder_layers": 1,
    "visft.tasks.segmentation.head.decoder_layers": 1,
    "visft.tasks.segmentation.head.hidden_dim": 32,
    "visft.tasks.segmentation.head.n_points": 4,
    "visft.tasks.segmentation.loss.train_num_points": 32,
    "visft.tasks.captioning.head": {
        "attention_dim": 16,
        "embed_dim": 16,
        "decoder_dim": 16,
        "encoded_image_size": 4,
        "dropout": 0.1,
    },
}
#: Over `TINY`: images of different sizes, as every recipe for real data has them, and nothing drawn by a
#: rank.
MIXED: dict[str, Any] = {
    "visft.shared.image": {
        "min_size_train": [30, 42, 57],
        "max_size_train": 84,
        "min_size_test": 50,
        "max_size_test": 84,
    },
    "visft.tasks.detection.image": {
        **{"min_size_train": [30, 42, 57], "max_size_train": 84, "min_size_test": 50, "max_size_test": 84},
        **{"crop_min_size": [48, 60], "crop_size": [30, 50]},
    },
    "visft.tasks.segmentation.image": {"size": 56, "min_size_test": 50, "max_size_test": 84},
    "visft.tasks.detection.head.dropout": 0.0,
    "visft.tasks.captioning.head.dropout": 0.0,
}
STEPS = 8
SETTINGS = {
    **TINY,
    "scheduler.params.total_num_steps": STEPS,
    "scheduler.params.warmup_num_steps": 2,
    "visft.run.save_every": 4,
    "visft.run.log_every": 1,
}


class Here(ThreadPoolExecutor):
    """Takes the place of `visft_ds.run.evaluation.ProcessPoolExecutor`: measures in this process, since
    another one takes seconds to start.
    """

    _processes: Mapping[int, Any] = {}

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(1)


def words_of(settings: dict[str, Any]) -> list[str]:
    """As arguments."""
    return [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]


def command(shards: Path, out: Path, *, stage: int = 1, extra: dict[str, object] | None = None) -> list[str]:
    """Arguments of launchers/train.py for the tiny model."""
    given = ["--stage", str(stage), "--model", "debug", "--data", str(shards), "--out", str(out)]
    return [*given, *words_of({**SETTINGS, **(extra or {})})]


def trained(out: Path, step: int = STEPS, kept: str = "checkpoints") -> dict[str, torch.Tensor]:
    """What a run had learnt at a step, moments included."""
    folder = out / kept / f"step_{step:08d}"
    return {**load_file(folder / "parameters.safetensors"), **load_file(folder / "moments.safetensors")}


def records(out: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[dict[str, float]]:
    """Of each step, by name."""
    return [
        {k: v for k, v in line.items() if k.startswith("loss/")}
        for line in records(out)
        if "loss/loss" in line
    ]


def equal(ours: Path, theirs: Path, step: int = STEPS) -> bool:
    """Two runs learnt the same bit for bit. (Two ranks add the same two numbers wherever they are.)"""
    first, second = trained(ours, step), trained(theirs, step)
    same = first.keys() == second.keys() and all(
        torch.equal(first[name], value) for name, value in second.items()
    )
    return same and losses(ours) == losses(theirs)


def steps_recorded(out: Path) -> list[int]:
    """Steps in metrics.jsonl, in order."""
    return [record["step"] for record in records(out) if record["kind"] == "step"]

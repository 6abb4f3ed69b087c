"""Finished runs of the tiny model, made once for all processes that test side by side: shards of two splits,
stage1 and, on its heads, stage2.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

from filelock import FileLock

from tests.coco_tree import draw_shards
from tests.ranks import run_ranks, shared
from tests.tiny import command

#: Smaller than what `tests.tiny` trains, so that every reader of a run can have one.
SMALL: dict[str, object] = {
    "scheduler.params.total_num_steps": 4,
    "scheduler.params.warmup_num_steps": 1,
    "visft.run.save_every": 2,
    "visft.shared.micro_batch": 2,
    **{f"visft.tasks.{task}.micro_batch": 2 for task in ("detection", "segmentation", "captioning")},
    "visft.model.overrides": {"width": 16, "depth": 2, "num_heads": 2, "image_size": 56},
    "visft.tasks.detection.head": {
        **{"num_queries": 4, "encoder_dim": 16, "decoder_dim": 16, "encoder_layers": 1, "decoder_layers": 1},
        **{"num_heads": 2, "ffn_dim": 16, "dropout": 0.0},
    },
    "visft.tasks.segmentation.head": {
        **{"num_queries": 4, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 1, "num_heads": 2},
        **{"n_points": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16},
    },
    "visft.tasks.captioning.head": {
        "attention_dim": 16,
        "embed_dim": 16,
        "decoder_dim": 16,
        "encoded_image_size": 2,
        "dropout": 0.1,
    },
}


@cache
def shards() -> Path:
    """Folder of two splits of drawings, twelve and four, with boxes, masks and captions. Nobody may change
    it.
    """
    return (
        _once("drawings", lambda folder: draw_shards(folder, train=12, val=4, height=56, width=56)) / "shards"
    )


@cache
def runs() -> Path:
    """Folder with stage1 and stage2, four steps each. Nobody may change it."""
    return _once("runs", _train)


def _train(folder: Path) -> None:
    for stage, extra in (
        (1, dict[str, object]()),
        (2, {"visft.heads.path": f"{folder}/stage1/export", "visft.lora.rank": 2, "visft.lora.alpha": 2}),
    ):
        words = command(shards(), folder / f"stage{stage}", stage=stage, extra={**SMALL, **extra})
        run_ranks(["launchers/train.py", *words], world=1)


def _once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first process that asks for it makes, while others wait."""
    folder = shared() / name
    made = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # what an attempt left that failed
            make(folder)
            made.touch()
    return folder

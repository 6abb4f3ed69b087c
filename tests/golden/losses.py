"""Golden losses of the debug model: what the first steps of both stages cost, to many digits.

`make golden` (python -m tests.golden.losses) writes them again after a deliberate change of maths.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.coco_tree import draw_shards
from tests.ranks import run_ranks
from tests.tiny import losses, words_of

FOLDER = Path(__file__).parent
STEPS = 6


def train_stages(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Both stages of ds_configs' debug model on 64 toy images: {"stage1": losses of each step, "stage2":
    ...}.
    """
    shards, found = draw_shards(folder, train=64, height=112, width=112), {}
    for stage in (1, 2):
        out = folder / f"stage{stage}"
        settings = {
            "scheduler.params.total_num_steps": STEPS,
            "scheduler.params.warmup_num_steps": 2,
            "visft.run.memory_check": False,  # leaves no trace, and takes longer than the steps
            **({"visft.heads.path": str(folder / "stage1/export")} if stage == 2 else {}),
        }
        places = ["--data", str(shards), "--out", str(out)]
        run_ranks(
            ["launchers/train.py", f"--stage={stage}", "--model=debug", *places, *words_of(settings)], world=1
        )
        found[f"stage{stage}"] = losses(out)
    return found


def golden(stage: str) -> Path:
    """The file that holds a stage's losses."""
    return FOLDER / f"debug_{stage}.json"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name, steps in train_stages(Path(temporary)).items():
            golden(name).write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
            print(f"wrote {golden(name)}")

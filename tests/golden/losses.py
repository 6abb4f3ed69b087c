"""Golden losses of the debug model: what the first steps of both stages cost, to many digits.

`make golden` (python -m tests.golden.losses) writes them again after a deliberate change of maths.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.ranks import run_ranks
from visft_ds.shards.build import Options, build
from visft_ds.toy.coco import write_toy_coco

FOLDER = Path(__file__).parent
STEPS = 6


def train_stages(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Both stages of ds_configs' debug model on 64 toy images: {"stage1": losses of each step, "stage2": ...}."""
    write_toy_coco(folder / "coco", train=64, val=1, height=112, width=112)
    coco, shards = folder / "coco", folder / "shards"
    annotations = coco / "annotations"
    files = (annotations / "instances_train2017.json", annotations / "captions_train2017.json")
    build(Options(coco / "train2017", *files, shards, "train"))
    losses = {}
    for stage in (1, 2):
        out = folder / f"stage{stage}"
        settings = {
            "scheduler.params.total_num_steps": STEPS,
            "scheduler.params.warmup_num_steps": 2,
            "visft.run.rehearsal": "false",  # leaves no trace, and takes longer than the steps
            **({"visft.heads.path": json.dumps(str(folder / "stage1" / "export"))} if stage == 2 else {}),
        }
        command = ["launchers/train.py", "--stage", str(stage), "--model", "debug"]
        command += ["--data", str(shards), "--out", str(out), *(f"--set={k}={v}" for k, v in settings.items())]
        run_ranks(command, world=1)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[f"stage{stage}"] = [
            {name: value for name, value in record.items() if name.startswith("loss/")}
            for record in records
            if record["kind"] == "step"
        ]
    return losses


def golden(stage: str) -> Path:
    """The file that holds a stage's losses."""
    return FOLDER / f"debug_{stage}.json"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name, steps in train_stages(Path(temporary)).items():
            golden(name).write_text(json.dumps(steps, indent=1) + "\n", encoding="utf-8")
            print(f"wrote {golden(name)}")

"""The training command itself: through the launcher, killed and resumed, stopped by a signal, and fed rubbish."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.coco_tree import write_tree
from tests.ranks import REPOSITORY, deepspeed, finish, run_ranks, start_ranks, wait_for
from tests.tiny import STEPS, command, steps_recorded, trained
from visft_ds.launch import main
from visft_ds.shards.build import Options, build
from visft_ds.tasks import TASKS

#: launchers/train.py, and a look at what it leaves: a process in a group may die in a destructor (code -6, sometimes).
TRAIN_AND_LOOK = """
import sys
import torch.distributed
from visft_ds.launch import main
code = main(sys.argv[1:])
sys.exit(code or ("still in the process group" if torch.distributed.is_initialized() else 0))
"""


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of stage 1 on two ranks."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    run_ranks(["-c", TRAIN_AND_LOOK, *command(shards, out)])
    return out


def test_killed_and_resumed_equals_the_undisturbed_run(shards: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    processes = start_ranks(["launchers/train.py", *command(shards, out)])
    wait_for(processes[0], "step 5/")  # step 4 is saved, step 5 is lost
    processes[0].kill()
    codes, outputs = finish(processes)
    assert codes == [-signal.SIGKILL, 3], outputs
    assert "[rank 1] stopped: another rank ended first" in outputs[1]

    run_ranks(["launchers/train.py", *command(shards, out)])
    assert steps_recorded(out) == list(range(1, STEPS + 1))
    resumed, expected = trained(out), trained(straight)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_a_signal_to_one_rank_stops_all_after_the_same_step(shards: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    processes = start_ranks(["launchers/train.py", *command(shards, out, extra={"visft.run.save_every": 100})])
    wait_for(processes[0], "step 1/")
    processes[1].send_signal(signal.SIGTERM)
    codes, outputs = finish(processes, timeout=600)
    assert codes == [143, 143], outputs
    assert "stopped after step" in outputs[0]
    (checkpoint,) = (out / "checkpoints").iterdir()
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert step < STEPS
    assert not any((out / "export" / f"{task}.safetensors").exists() for task in TASKS)


def test_the_deepspeed_command_trains_both_stages(shards: Path, straight: Path, tmp_path: Path) -> None:
    """Stage 2 learns from the heads of stage 1, under the launcher; adapter and base stand side by side afterwards."""
    out = tmp_path / "stage2"
    extra = {"visft.heads.path": str(straight / "export"), "visft.lora.rank": 2}
    done = subprocess.run(
        deepspeed(["launchers/train.py", *command(shards, out, stage=2, extra=extra)], world=1),
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    names = set(load_file(out / "checkpoints" / f"step_{STEPS:08d}" / "parameters.safetensors"))
    assert {name.rsplit(".", 1)[1] for name in names} == {"lora_A", "lora_B"}
    assert (out / "export" / "adapter" / "adapter_config.json").is_file()
    first, second = (load_file(run / "export" / "backbone.safetensors") for run in (straight, out))
    assert all(torch.equal(first[name], second[name]) for name in first)


def refused(capsys: pytest.CaptureFixture[str], argv: list[str]) -> str:
    """Run the command in this process, expect one message and exit code 2."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_more_ranks_than_images(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    message = refused(capsys, command(shards, tmp_path / "run"))
    assert "batch_size = 4 on 8 processes" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_shards(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "coco")
    build(Options(tree.images, tree.instances, tree.captions, tmp_path / "shards", "train"))
    tar = tmp_path / "shards" / "train-000000.tar"
    if damage == "missing":
        tar.unlink()
    else:
        tar.write_bytes(tar.read_bytes()[:-1000])
    message = refused(capsys, command(tmp_path / "shards", tmp_path / "run"))
    assert "train-000000.tar" in message


def test_missing_inputs_are_named_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, ["--stage", "2", "--data", str(tmp_path), "--out", str(tmp_path / "run")])
    for wanted in ("visft shards", "EVA02_CLIP_E_psz14_plus_s9B.pt", "visft train --stage 1"):
        assert wanted in message
    assert len(message.splitlines()) < 30


@pytest.mark.slow
def test_an_evaluation_that_a_kill_cut_off_is_made_up_for(shards: Path, tmp_path: Path) -> None:
    extra = {"visft.run.eval_every": STEPS, "visft.data.val": "train"}
    arguments = ["launchers/train.py", *command(shards, tmp_path / "run", extra=extra)]
    run_ranks(arguments, world=1)
    records = tmp_path / "run" / "metrics.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    assert sum("val/box/AP50" in line for line in lines) == 1
    records.write_text("".join(line for line in lines if "val/" not in line))  # as if killed while evaluating
    run_ranks(arguments, world=1)
    assert sum("val/box/AP50" in line for line in records.read_text().splitlines()) == 1
    run_ranks(arguments, world=1)
    assert sum("val/box/AP50" in line for line in records.read_text().splitlines()) == 1


def test_a_diverged_run_stops_all_ranks_and_names_where_it_begins(shards: Path, tmp_path: Path) -> None:
    """No rank updates; step, task and checkpoint are named, and what is not finite first."""
    out = tmp_path / "run"
    extra = {"optimizer.params.lr": 1e30, "visft.run.save_every": 1}
    codes, outputs = finish(start_ranks(["launchers/train.py", *command(shards, out, extra=extra)]))
    assert codes == [4, 4], outputs
    assert "Traceback" not in "".join(outputs) and "error" not in outputs[1]
    (step,) = re.findall(r"error: step (\d+) \(shared\): .*no update was made on any rank", outputs[0])
    assert f"the last good checkpoint is that of step {int(step) - 1}" in outputs[0]
    assert re.search(r"rank \d: it begins with the .* values are not finite", outputs[0])
    for folder in (out / "checkpoints").iterdir():
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "parameters.safetensors").values())

"""Runs that begin with another run's values: what is taken over, what is refused, what the record says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.coco_tree import write_shards
from tests.ranks import finish, start_ranks
from tests.tiny import TINY, words_of
from visft_ds.data.fetch import sha256_of
from visft_ds.evals.cli import main as evaluate
from visft_ds.evals.records import read_evaluation
from visft_ds.interop.published import read_adapter
from visft_ds.launch import main
from visft_ds.prepare.settle import settle

STEPS = 2
SETTINGS: dict[str, Any] = {
    **TINY,
    "visft.mode": "sampled",
    "visft.tasks": "detection,segmentation",
    "visft.model.overrides": {"width": 16, "depth": 1, "num_heads": 2, "image_size": 28},
    **{f"visft.tasks.{task}.image.fixed_size": 28 for task in ("detection", "segmentation")},
    "visft.tasks.segmentation.head.decoder_layers": 1,
    "scheduler.params.warmup_num_steps": 0,
    "scheduler.params.total_num_steps": STEPS,
    "visft.run.visualizations": 0,
}
LORA = {"visft.lora.rank": 2, "visft.lora.alpha": 4.0}
OTHER = {"emu": 0, "owl": 1, "cat": 2, "dog": 7}
NAMES = {"thing 3": "cat", "thing 8": "dog", "thing 13": "owl"}


def own(ids: dict[str, int]) -> Callable[[dict[str, Any]], None]:
    """The tree's three categories under other ids, in the order of `ids`, and one more that has no object."""

    def change(content: dict[str, Any]) -> None:
        table = {category["id"]: NAMES[category["name"]] for category in content["categories"]}
        content["categories"] = [{"id": number, "name": name} for name, number in ids.items()]
        for annotation in content["annotations"]:
            annotation["category_id"] = ids[table[annotation["category_id"]]]

    return change


def run(*words: object) -> tuple[int, str]:
    """`visft train`: its exit code, and what it printed."""
    (code,), (printed,) = finish(start_ranks(["launchers/train.py", *map(str, words)], world=1))
    return code, printed


def done(*words: object) -> str:
    code, printed = run(*words)
    assert code == 0, printed
    return printed


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What the command says in this process, where nothing but files and settings has to be looked at."""
    assert main([*map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two sets of categories, a stage 1 on the first, a stage 2 on that."""
    folder = tmp_path_factory.mktemp("start")
    for name, ids in (("first", {"cat": 0, "dog": 1, "owl": 12, "fox": 500}), ("second", OTHER)):
        write_shards(folder / name, captions=False, change=own(ids), train=8, val=8)
    common = ("--model", "debug", "--data", folder / "first/shards", *words_of(SETTINGS))
    printed = done("--stage", 1, "--out", folder / "one", *common)
    assert "classes, segmentation  4, the categories of the data" in printed
    more = {**LORA, "visft.heads.path": f"{folder}/one/export"}
    done("--stage", 2, "--out", folder / "two", *common, *words_of(more))
    return folder


def test_numbers_and_results_are_of_own_categories(work: Path, tmp_path: Path) -> None:
    """Of each by its name; no object is of the last."""
    assert evaluate(["--run", str(work / "two"), "--out", str(tmp_path), "--visualizations", "2"]) == 0
    found = read_evaluation("two", tmp_path)
    names = ("cat", "dog", "owl", "fox")
    assert {f"{kind}/AP/{name}" for kind in ("box", "mask") for name in names} <= found.metrics.keys()
    assert found.metrics["mask/AP/fox"] == -1 < found.metrics["mask/AP/owl"]
    for task in ("detection", "segmentation"):
        results = json.loads((tmp_path / f"{task}_results.json").read_text())
        assert results and {result["category_id"] for result in results} <= {0, 1, 12, 500}
        assert (tmp_path / f"{task}.jpg").is_file()


def learnt(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step_{step:08d}/parameters.safetensors")


#: Steps that change nothing but zeros, by 1e-30: the checkpoint after one has the values that the run began
#: with.
FROZEN = words_of({"optimizer.params.lr": 1e-30, "optimizer.params.weight_decay": 0})
ONE_STEP = words_of({"scheduler.params.total_num_steps": 1})


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, rtol=0, atol=1e-20)


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_fork_begins_where_the_run_is_and_goes_on_without_it(work: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(work / name, tmp_path / "parent")
    settings = {"visft.run.save_every": 1, "visft.run.eval_every": 0}
    words = ["--from", tmp_path / "parent", *FROZEN, *words_of(settings)]
    said = " ".join(done(*words).split())  # long lines are broken
    assert f"started from step {STEPS} of {tmp_path / 'parent'}" in said
    fork, step = tmp_path / "parent-fork", tmp_path / f"parent/checkpoints/step_{STEPS:08d}"
    before, after = learnt(tmp_path / "parent", STEPS), learnt(fork, 1)
    assert before.keys() == after.keys()
    assert all(same(before[name], value) for name, value in after.items())
    record, parent = (json.loads((out / "run.json").read_text()) for out in (fork, tmp_path / "parent"))
    origin = {"path": str(step), "step": STEPS, "sha256": sha256_of(step / "parameters.safetensors")}
    assert record["parent"] == origin and parent["parent"] is None
    assert record["config"]["optimizer"]["params"]["lr"] == 1e-30
    if name == "one":
        return
    shutil.rmtree(fork / "checkpoints/step_00000002")
    shutil.rmtree(tmp_path / "parent")
    for spelled in ("parent", "parent/", f"parent/checkpoints/step_{STEPS:08d}"):
        assert settle(["--from", f"{tmp_path}/{spelled}"]).config.visft.run.out == str(fork)
    done(*words)
    assert (fork / "checkpoints/step_00000002").is_dir()
    assert json.loads((fork / "run.json").read_text())["parent"] == origin


def test_heads_of_other_categories_are_drawn_anew_or_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--from", work / "one", "--data", work / "second/shards", *FROZEN, *ONE_STEP, "--out"]
    assert "does not know 0 'emu'" in refused(capsys, *words, tmp_path / "fork")
    assert not (tmp_path / "fork/run.json").exists()
    done(*words, tmp_path / "reset", "--reset-heads")
    before, reset = learnt(work / "one", STEPS), learnt(tmp_path / "reset", 1)
    assert len(reset["heads.detection.class_embed.weight"]) == 5
    assert not all(same(reset[name], before[name]) for name in reset if "class_embed" not in name)


def test_an_adapter_is_a_start(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, base, out = work / "two/export/adapter", work / "two/export/backbone.safetensors", tmp_path / "out"
    adapter = read_adapter(place)
    words = ["--stage", 2, "--model", "debug", "--data", work / "first/shards", "--out", out, "--from", place]
    words += words_of(
        {**SETTINGS, "visft.heads.path": f"{work}/one/export", "visft.model.weights": str(base)}
    )
    expected = f"""has other settings: --set 'visft.lora={{"rank":2,"alpha":{adapter.alpha},"""
    assert expected in refused(capsys, *words, *FROZEN)
    assert expected in refused(capsys, *words, *FROZEN, "--dry-run")
    done(*words, *words_of({"visft.lora.rank": 2, "visft.lora.alpha": adapter.alpha}), *FROZEN, *ONE_STEP)
    after = learnt(out, 1)
    assert after.keys() == {f"backbone.{name}" for name in adapter.tensors}
    assert all(same(after[f"backbone.{name}"], value) for name, value in adapter.tensors.items())
    assert json.loads((out / "run.json").read_text())["parent"]["sha256"] == adapter.fingerprint()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from", "{two}", "--set", "visft.lora.rank=4"], "other settings: --set 'visft.lora="),
        (["--from", "{two}", "--reset-heads"], "trains no heads"),
        (["--from", "{one}", "--stage", "2"], "is of stage 1 and stays in it"),
        (["--from", "{one}", "--model", "debug"], "leave out --model"),
        (["--from", "{one}", "--out", "{one}"], "is the run to start from"),
        (["--from", "nowhere"], "no such run, checkpoint or adapter"),
        (["--stage", "1", "--reset-heads"], "needs --from RUN"),
    ],
)
def test_what_cannot_be_a_start(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    given = [word.format(one=work / "one", two=work / "two") for word in words]
    assert message in refused(capsys, *given, *([] if "--out" in words else ["--out", tmp_path / "fork"]))
    assert not (tmp_path / "fork/run.json").exists()


def test_what_the_model_shows_to_be_no_start(work: Path, tmp_path: Path) -> None:
    for setting, message in (
        ("visft.model.weights_seed=3", "was trained on other base weights"),
        ("visft.tasks.detection.head.num_queries=5", "does not fit what this run trains"),
    ):
        code, error = run("--from", work / "one", "--set", setting, "--out", tmp_path / "fork")
        assert code == 2 and message in error, error
    assert not (tmp_path / "fork/run.json").exists()


def test_settings_of_a_fork_are_those_of_the_run(work: Path) -> None:
    config = settle(["--from", str(work / "one"), "--engine", "zero2", "--set", "visft.seed=7"]).config
    assert config.visft.run.out == f"{work}/one-fork" and config.visft.seed == 7
    assert config.deepspeed["zero_optimization"]["stage"] == 2 and config.total_steps == STEPS
    assert config.visft.tasks.enabled().keys() == {"detection", "segmentation"}
    step = work / "one/checkpoints" / f"step_{STEPS:08d}"
    assert settle(["--from", str(step)]).config.visft.run.out == f"{work}/one-fork"

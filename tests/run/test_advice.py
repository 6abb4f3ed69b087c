"""What a run says about its data and its numbers: each sentence for a case in which another one would
mislead.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import finished
from tests.opened import open_run
from visft_ds.config import ResolvedConfig, resolve
from visft_ds.prepare.data import RunData
from visft_ds.run import advice
from visft_ds.run.advice import Finding, findings_of, lines_of, verdicts
from visft_ds.tasks import config_class

CELL = 16
#: Percentage of the objects -> their largest side, in parts of the picture's.
SMALL = {"5": 0.01, "10": 0.0125, "25": 0.017, "50": 0.0195, "75": 0.024, "90": 0.05, "95": 0.1}
LARGE = {part: 10 * side for part, side in SMALL.items()}


@pytest.fixture(autouse=True)
def enough_for_a_detr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose warning has a test of its own."""
    monkeypatch.setattr(advice, "FEW_FOR_DETR", 0)


def opened(*settings: str) -> tuple[ResolvedConfig, RunData]:
    """The drawings of other tests, seen as squares of 320 pixels; all tasks share them."""
    given = [f"visft.data.root={finished.shards()}", "visft.mode=shared", "visft.shared.image.fixed_size=320"]
    return open_run(resolve(stage=1, model="debug", settings=[*given, *settings]))


def with_manifest(data: RunData, **changes: Any) -> RunData:
    """Data whose training split says something else about itself."""
    ((name, one),) = data.sets.items()
    index = changes.pop("index", one.manifest.index)
    manifest = replace(one.manifest, **changes)
    manifest.__dict__["index"] = index
    return replace(data, sets={name: replace(one, manifest=manifest)})


def many(data: RunData) -> dict[str, int]:
    return {str(category.coco_id): 30 for category in data.categories}


def told(config: ResolvedConfig, data: RunData) -> dict[str, str]:
    """Text -> the tasks that it concerns."""
    return {text: names for names, text in lines_of(findings_of(config.visft, data, [CELL]))}


def test_data_that_nothing_stands_in_the_way_of_needs_no_word() -> None:
    config, data = opened()
    assert not told(config, with_manifest(data, having_category=many(data), object_sides=LARGE))


def test_classes_with_few_images_are_counted() -> None:
    config, data = opened()
    having = {**{str(number): 4 for number in range(60)}, **{str(number): 40 for number in range(60, 80)}}
    (found,) = told(config, with_manifest(data, having_category=having, object_sides=LARGE)).items()
    assert found[0].startswith(
        "60 of 80 classes are in fewer than 10 training images each (half of all classes in 4"
    )
    assert found[1] == "detection, segmentation"
    having = {str(number): 0 for number in range(60)} | {"60": 40}
    (found,) = told(config, with_manifest(data, having_category=having, object_sides=LARGE)).items()
    assert "(half of all classes in none)" in found[0]


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        (1.0, ("75 % of the objects are below 8 px", "half a cell", "hardly ever", "fixed_size=1280")),
        (2.0, ("75 % of the objects are below 16 px", "a cell", "often", "fixed_size=640")),
        (0.2, ("95 % of the objects are below 8 px", "hardly ever", "cut the images into tiles")),
        (4.0, ()),
    ],
)
def test_objects_smaller_than_a_cell_are_counted_in_pixels_that_the_network_sees(
    scale: float, words: Sequence[str]
) -> None:
    """As photographs of 1920 x 1280 pixels at 320, whose objects of 25 to 50 pixels become 4 to 8."""
    config, data = opened()
    sides = {part: scale * side for part, side in SMALL.items()}
    lines = [*told(config, with_manifest(data, having_category=many(data), object_sides=sides))]
    assert len(lines) == bool(words) and all(word in lines[0] for word in words)


def test_sizes_are_those_of_the_task_where_images_keep_their_shape() -> None:
    """Drawings of 56 x 56 pixels are seen at 672 in the paper's recipe."""
    settings = ["visft.mode=sampled", "visft.tasks=detection", "visft.tasks.detection.batch_size=4"]
    config, data = opened(*settings, "visft.tasks.detection.image.fixed_size=null")
    assert not told(config, with_manifest(data, having_category=many(data), object_sides=LARGE))
    (line,) = told(config, with_manifest(data, having_category=many(data), object_sides=SMALL))
    assert "50 % of the objects are below 16 px" in line and "visft.tasks.detection.image" in line


@pytest.mark.parametrize(
    ("task", "head"), [("detection", "detr"), ("segmentation", "mask2former"), ("segmentation", "plain")]
)
def test_objects_beyond_the_queries_are_counted(task: str, head: str) -> None:
    options = json.dumps({"type": head, "num_queries": 3})
    config, data = opened(f"visft.tasks={task}", f"visft.tasks.{task}.head={options}")
    ((_, one),) = data.sets.items()
    index = np.array(one.manifest.index)
    index["num_annotations"] = [5, 4, 2] * 4
    found = told(config, with_manifest(data, having_category=many(data), object_sides=LARGE, index=index))
    expected = "12 of 44 objects are ignored, as 8 of 12 images have more than 3"
    assert found == {f"{expected} (visft.tasks.{task}.head.num_queries)": task}


def test_a_run_without_validation_hears_which_splits_there_are(tmp_path: Path) -> None:
    for path in finished.shards().iterdir():
        if path.name.startswith("train"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "dev.manifest.json").write_text("{}")
    config, data = opened(f"visft.data.root={tmp_path}", "visft.run.eval_every=0")
    (text,) = [text for text, names in told(config, data).items() if names == "all"]
    assert (
        f"no validation split {tmp_path}/val (there: dev, train" in text
        and "--val 0.2` splits a fifth" in text
    )
    assert "all" not in told(*opened("visft.run.eval_every=0")).values(), "who wants none knows"


RARE = Finding("detection", "60 of 80 classes are in fewer than 10 training images each", ": expect little")
IGNORED = Finding("segmentation", "185 of 731 objects are ignored", ", as some")
MORE_STEPS = "train for more steps"


@pytest.mark.parametrize(
    ("name", "value", "scores", "words"),
    [
        # Flat: more steps alone change nothing.
        (
            "semantic/mIoU",
            0.29,
            [0.293, 0.292, 0.291],
            ["no longer rises (0.293, 0.292, 0.291)", "larger images"],
        ),
        ("mask/AP50", 0.21, [0.016, 0.029, 0.028], ["no longer rises", IGNORED.fact]),
        ("box/AP50", 0.30, [0.1, 0.103, 0.104], ["no longer rises", RARE.fact]),
        # Rising.
        ("semantic/mIoU", 0.35, [0.10, 0.20, 0.31], ["still rises (0.100, 0.200, 0.310)", MORE_STEPS]),
        ("box/AP50", 0.35, [0.10, 0.31], ["still rises", MORE_STEPS, RARE.fact]),
        # Too early to tell.
        ("semantic/mIoU", 0.3, [0.3], ["fewer than two evaluations cannot tell"]),
        ("semantic/mIoU", 0.3, [], ["not known on validation", "cannot tell"]),
        ("semantic/mIoU", 0.3, [0.30, 0.30], ["does not rise"]),
        ("mask/AP50", 0.02, [0.0, 0.0, 0.0], ["nothing is learnt yet", MORE_STEPS, IGNORED.fact]),
        # Learnt.
        ("box/AP50", 0.9, [0.1], ["memorised", RARE.fact]),
        ("semantic/mIoU", 1.0, [0.72], ["partly memorised"]),
        ("box/AP50", 0.9, [0.8], []),
        ("box/AP50", 0.9, [], []),
    ],
)
def test_a_number_means_what_its_history_and_the_data_say(
    name: str, value: float, scores: Sequence[float], words: Sequence[str]
) -> None:
    tasks = {task: config_class(task).model_construct() for task in ("detection", "segmentation", "semantic")}
    evaluations = [{f"val/{name}": score, "val/other": 1.0} for score in scores]
    (line,) = verdicts({name: value}, [{}, *evaluations], tasks, [RARE, IGNORED])
    assert line.startswith(f"{name} is {value:.2f} on training images and ")
    assert all(word in line for word in words), line
    assert (MORE_STEPS in line) == (MORE_STEPS in words)
    assert words or line.endswith("on validation")

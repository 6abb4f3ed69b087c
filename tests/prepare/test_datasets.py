"""Several data sets in one run: each teaches what it has labels for, in the categories of the first one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.coco_tree import write_tree
from visft_ds.config import resolve
from visft_ds.config.schema import VisftConfig
from visft_ds.data.loader import StepLoader
from visft_ds.data.shards import ShardReader
from visft_ds.prepare.data import pipelines_of, plan_of, vocabulary_of
from visft_ds.prepare.datasets import captioned, data_identity, open_training_data
from visft_ds.shards.build import Options, build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO-like shards, "objects" with boxes and no masks, "words" with captions only, "others" of other categories."""
    folder = tmp_path_factory.mktemp("sets")
    tree = write_tree(folder / "coco", 12)
    build(Options(tree.images, tree.instances, tree.captions, folder / "shards", "train"))

    def change(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            del annotation["segmentation"]

    tree.edit(change)
    build(Options(tree.images, tree.instances, None, folder / "shards", "objects"))
    tree.edit(lambda content: content["categories"][0].update(name="kettle"))
    build(Options(tree.images, tree.instances, None, folder / "shards", "others"))
    tree.edit(lambda content: content.update(annotations=[]))
    build(Options(tree.images, tree.instances, tree.captions, folder / "shards", "words"))
    return folder


def config_of(folder: Path, *settings: str, mode: str = "sampled", sets: Any = None) -> VisftConfig:
    own = [f"visft.tasks.{task}.batch_size=2" for task in ("detection", "segmentation", "captioning")]
    objects = {"name": "objects", "root": str(folder / "shards"), "split": "objects", "tasks": ["detection"]}
    words = {"name": "words", "root": str(folder / "shards"), "split": "words", "tasks": ["captioning"]}
    given = [f"visft.data.root={folder / 'shards'}", f"visft.mode={mode}", "visft.shared.batch_size=2"]
    given.append(f"visft.data.sets={json.dumps([objects, words] if sets is None else sets)}")
    return resolve(stage=1, model="debug", settings=[*own, *given, *settings]).visft


def load(config: VisftConfig, steps: int) -> list[Any]:
    sets = open_training_data(config)
    vocabulary = vocabulary_of(config, *captioned(sets))
    loader = StepLoader(
        {name: ShardReader(one.manifest) for name, one in sets.items()},
        plan_of(config, sets),
        pipelines_of(config, sets, vocabulary),
        num_workers=0,
    )
    return [(whole, batches[0]) for whole, batches in loader.steps(0, steps)]


def test_a_step_takes_labels_from_the_set_it_draws(folder: Path) -> None:
    seen: dict[tuple[str, str], list[Any]] = {}
    for whole, batch in load(config_of(folder), 40):
        assert batch.tasks == (whole.task,)
        seen.setdefault((whole.task, whole.dataset), []).append(batch)
    assert set(seen) == {
        ("detection", "train"),
        ("detection", "objects"),
        ("segmentation", "train"),
        ("captioning", "train"),
        ("captioning", "words"),
    }
    labels = torch.cat([batch.targets["detection"].labels for batch in seen["detection", "objects"]])
    assert set(labels.tolist()) == {3, 8, 13}


def test_shared_steps_have_targets_only_for_what_their_set_teaches(folder: Path) -> None:
    """Empty targets would say that there is nothing in the picture."""
    tasks = {whole.dataset: batch.tasks for whole, batch in load(config_of(folder, mode="shared"), 12)}
    assert tasks == {
        "train": ("detection", "segmentation", "captioning"),
        "objects": ("detection",),
        "words": ("captioning",),
    }


def test_weights_decide_how_often_a_set_is_drawn(folder: Path) -> None:
    sets = [{"name": "objects", "root": str(folder / "shards"), "split": "objects", "tasks": ["detection"]}]
    config = config_of(folder, "visft.data.weight=3", "visft.tasks=detection", sets=sets)
    plan = plan_of(config, open_training_data(config))
    drawn = [plan.step(step).dataset for step in range(400)]
    assert drawn.count("objects") == pytest.approx(100, abs=3)


def test_the_words_of_all_captions_are_known(folder: Path) -> None:
    config = config_of(folder, "visft.tasks.captioning.vocabulary.min_count=25")
    with pytest.raises(ValueError, match="min_count = 25"):
        vocabulary_of(config, open_training_data(config)["train"].manifest)
    words = vocabulary_of(config, *captioned(open_training_data(config)))
    assert words is not None and "picture" in words.words  # 24 times in each of the two


def test_the_content_of_all_sets_is_part_of_a_runs_identity(folder: Path) -> None:
    alone, with_sets = (open_training_data(config_of(folder, sets=sets)) for sets in ([], None))
    assert data_identity(alone) == alone["train"].manifest.fingerprint != data_identity(with_sets)


def test_a_set_of_other_categories_is_refused(folder: Path) -> None:
    sets = [{"name": "others", "root": str(folder / "shards"), "split": "others", "tasks": ["detection"]}]
    with pytest.raises(ValueError, match="'kettle'"):
        open_training_data(config_of(folder, sets=sets))

"""What a run reads: its data sets, the order of the samples, words, and how samples become batches of each
stream.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.coco_tree import write_tree
from tests.opened import open_run
from visft_ds.config import ResolvedConfig, resolve
from visft_ds.data.loader import StepLoader
from visft_ds.data.plan import Plan
from visft_ds.data.samples import RawSample
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.data.transforms import ShortSides
from visft_ds.prepare.data import read_vocabulary, vocabulary_of
from visft_ds.prepare.datasets import (
    TrainingSet,
    check_samples,
    load_splits,
    open_training_sets,
)
from visft_ds.tasks.transform import pipeline_of
from visft_ds.tasks.vocabulary import Vocabulary

SILENT = (1, 4, 5)  #: places of the pictures without captions in "partly"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures as "train", "mute" (no captions), "partly" (of some pictures), "objects" (boxes and no
    masks), "others" (of other categories), "words" (captions of some pictures alone)."""
    folder = tmp_path_factory.mktemp("sets")
    tree = write_tree(folder / "coco", 12)

    def without_masks(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            del annotation["segmentation"]

    tree.pack(folder, "train")
    tree.pack(folder, "mute", captions=False)
    silent = {1000 + 7 * place for place in SILENT}
    tree.edit(
        lambda content: content.update(
            annotations=[a for a in content["annotations"] if a["image_id"] not in silent]
        ),
        "captions",
    )
    tree.pack(folder, "partly")
    tree.edit(without_masks)
    tree.pack(folder, "objects", captions=False)
    tree.edit(lambda content: content["categories"][0].update(name="kettle"))
    tree.pack(folder, "others", captions=False)
    tree.edit(lambda content: content.update(annotations=[]))
    tree.pack(folder, "words")
    return folder


@pytest.fixture(scope="module")
def splits(folder: Path) -> dict[str, Manifest]:
    return {split: Manifest.load(folder, split) for split in ("train", "mute", "partly")}


def config_of(*settings: str, stage: int = 2) -> ResolvedConfig:
    given = [f"visft.tasks.{task}.batch_size=2" for task in ("detection", "segmentation", "captioning")]
    given += ["visft.shared.batch_size=2", "visft.run.eval_every=0"]
    return resolve(stage=stage, model="debug", settings=[*given, *settings])


# Several data sets in one run: each teaches what it has labels for, in the categories of the first one


def with_sets(folder: Path, *settings: str, sets: Any = None) -> ResolvedConfig:
    objects = {"name": "objects", "root": str(folder), "split": "objects", "tasks": ["detection"]}
    words = {"name": "words", "root": str(folder), "split": "words", "tasks": ["captioning"]}
    given = json.dumps([objects, words] if sets is None else sets)
    places = f"visft.data.root={folder}", f"visft.data.sets={given}"
    return config_of(*places, "visft.mode=sampled", *settings, stage=1)


def load(config: ResolvedConfig, steps: int) -> list[Any]:
    data = open_run(config)[1]
    loader = StepLoader(
        {name: ShardReader(one.manifest) for name, one in data.sets.items()}, data.plan, data.pipelines
    )
    return [(whole, batches[0]) for whole, batches in loader.steps(0, steps)]


def test_a_step_takes_labels_from_the_set_it_draws(folder: Path) -> None:
    seen: dict[tuple[str, str], list[Any]] = {}
    for whole, batch in load(with_sets(folder), 40):
        assert tuple(batch.targets) == (whole.task,)
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
    tasks = {
        whole.dataset: tuple(batch.targets)
        for whole, batch in load(with_sets(folder, "visft.mode=shared"), 12)
    }
    assert tasks == {
        "train": ("detection", "segmentation", "captioning"),
        "objects": ("detection",),
        "words": ("captioning",),
    }


def test_weights_decide_how_often_a_set_is_drawn(folder: Path) -> None:
    sets = [{"name": "objects", "root": str(folder), "split": "objects", "tasks": ["detection"]}]
    config = with_sets(folder, "visft.data.weight=3", "visft.tasks=detection", sets=sets)
    plan = open_run(config)[1].plan
    drawn = [plan.step(step).dataset for step in range(400)]
    assert drawn.count("objects") == pytest.approx(100, abs=3)


def test_the_words_of_all_captions_are_known(folder: Path) -> None:
    config = with_sets(folder, "visft.tasks.captioning.vocabulary.min_count=25").visft
    sets = open_training_sets(config, load_splits(config.data))
    with pytest.raises(ValueError, match="min_count = 25"):
        vocabulary_of(config, {"train": sets["train"]})
    words = vocabulary_of(config, sets)
    assert words is not None and "picture" in words.words  # 24 times in one, 18 times in the other


def test_the_content_of_all_sets_is_part_of_a_runs_identity(folder: Path) -> None:
    def content(sets: list[Any] | None) -> str:
        return open_run(with_sets(folder, sets=sets))[1].identity()["data set"]

    assert content([]) == Manifest.load(folder, "train").fingerprint != content(None)


def test_a_set_of_other_categories_is_refused(folder: Path) -> None:
    sets = [{"name": "others", "root": str(folder), "split": "others", "tasks": ["detection"]}]
    config = with_sets(folder, sets=sets).visft
    manifests = load_splits(config.data)
    with pytest.raises(ValueError, match="'kettle'"):
        open_training_sets(config, manifests)
    with pytest.raises(ValueError, match="'kettle'"):
        plan_of(folder, "train", "visft.tasks=detection", "visft.run.eval_every=1", "visft.data.val=others")


# The plan


def only(manifest: Manifest, config: ResolvedConfig) -> dict[str, TrainingSet]:
    return {"train": TrainingSet(manifest, tuple(config.visft.tasks.enabled()))}


def plan_of(folder: Path, split: str, *settings: str, stage: int = 2) -> Plan:
    config = config_of(f"visft.data.root={folder}", f"visft.data.train={split}", *settings, stage=stage)
    return open_run(config)[1].plan


def places(folder: Path, task: str, *settings: str) -> set[int]:
    """Which places of the tree a stream has drawn from "partly" after some steps."""
    plan, ids = plan_of(folder, "partly", *settings), Manifest.load(folder, "partly").index["image_id"]
    drawn = {i for step in map(plan.step, range(60)) if step.task == task for i in step.indices.tolist()}
    return {(int(ids[i]) - 1000) // 7 for i in drawn}


def test_captioning_plans_only_pictures_with_captions(folder: Path) -> None:
    assert places(folder, "captioning") == set(range(12)) - set(SILENT)
    assert all(places(folder, task) == set(range(12)) for task in ("detection", "segmentation"))


def test_shared_pictures_are_those_that_teach_any_of_the_tasks(folder: Path) -> None:
    assert places(folder, "shared", "visft.mode=shared") == set(range(12))
    alone = places(folder, "shared", "visft.mode=shared", "visft.tasks=captioning")
    assert alone == set(range(12)) - set(SILENT)


def test_steps_are_shared_out_by_updates(folder: Path) -> None:
    plan, stage1 = plan_of(folder, "train"), plan_of(folder, "train", "visft.mode=sampled", stage=1)
    counts = Counter(plan.step(step).task for step in range(1000))
    assert counts["captioning"] == pytest.approx(400, abs=3) and counts["detection"] == pytest.approx(
        300, abs=3
    )
    stage1_counts = Counter(stage1.step(step).task for step in range(1000))
    assert stage1_counts["captioning"] == pytest.approx(250, abs=3)  # 100,000 of 400,000 updates


# Batches


def sample() -> RawSample:
    """One picture with one object and one caption."""
    outline = [2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0]
    annotation: dict[str, Any] = {
        "id": 1,
        "category_id": 3,
        "bbox": [2, 2, 10, 10],
        "iscrowd": 0,
        "area": 100.0,
    }
    pixels = np.zeros((24, 30, 3), dtype=np.uint8)
    return RawSample(0, 7, (24, 30), pixels, [{**annotation, "segmentation": [outline]}], ["A red picture."])


@pytest.mark.parametrize("train", [True, False])
def test_each_stream_makes_batches_for_its_own_tasks(train: bool) -> None:
    words = Vocabulary(("red", "picture"))
    for name, stream in config_of("visft.tasks.captioning.image.size=48").visft.streams().items():
        pipeline = pipeline_of(stream, words, train=train)
        batch = pipeline.collate([pipeline.transform(sample(), np.random.default_rng(0))])
        assert tuple(batch.targets) == (name,)
        # The configured sizes arrive: the debug model's squares, and the one set here.
        assert batch.sizes.tolist() == [[48, 48] if name == "captioning" else [112, 112]]


def test_a_shared_stream_makes_one_batch_for_all() -> None:
    (stream,) = config_of("visft.mode=shared", "visft.tasks=captioning,detection").visft.streams().values()
    pipeline = pipeline_of(stream, Vocabulary(("red",)), train=True)
    assert isinstance(pipeline.transform.geometry, ShortSides)
    batch = pipeline.collate([pipeline.transform(sample(), np.random.default_rng(0))])
    assert tuple(batch.targets) == ("detection", "captioning") and batch.images.shape == (1, 3, 112, 112)


# Words


def test_the_minimum_count_decides_which_captions_words_are_known(splits: dict[str, Manifest]) -> None:
    counts = {"picture": 24, "it's": 24, "red": 24, "0": 12, "1": 12}
    assert dict(splits["train"].vocabulary) == counts
    by_count = ("it's", "picture", "red", "0", "1")
    for least, known in ((12, by_count), (13, by_count[:3])):
        config = config_of(f"visft.tasks.captioning.vocabulary.min_count={least}")
        words = vocabulary_of(config.visft, only(splits["train"], config))
        assert words is not None and words.words == known


def test_only_tasks_with_words_have_a_vocabulary(splits: dict[str, Manifest]) -> None:
    assert vocabulary_of(config_of("visft.tasks=detection,segmentation").visft, {}) is None
    cut_otherwise = replace(splits["train"], options={**splits["train"].options, "tokenizer": "spaces-1"})
    for manifest, word in ((splits["mute"], "captions"), (cut_otherwise, "spaces-1")):
        with pytest.raises(ValueError, match=word):
            vocabulary_of(config_of().visft, only(manifest, config_of()))


def test_a_file_of_words_counts_instead_of_the_captions(splits: dict[str, Manifest], tmp_path: Path) -> None:
    own, published = tmp_path / "own.json", tmp_path / "WORDMAP.json"
    words = Vocabulary(("zebra", "red"))
    own.write_text(json.dumps(words.to_dict()))
    # As the published heads' word maps: in any order, special tokens included.
    published.write_text(json.dumps({"<start>": 4, "red": 2, "<pad>": 0, "<end>": 5, "zebra": 1, "<unk>": 3}))
    for file in (own, published):
        for manifest in (splits["train"], splits["mute"]):
            config = config_of(f"visft.tasks.captioning.vocabulary.file={file}")
            assert vocabulary_of(config.visft, only(manifest, config)) == words
        assert read_vocabulary(file) == words


# Samples


def test_a_split_in_which_a_task_finds_nothing_is_refused(folder: Path, splits: dict[str, Manifest]) -> None:
    with pytest.raises(ValueError, match="has no sample with captions, which captioning needs"):
        plan_of(folder, "mute")
    check_samples(["detection", "segmentation"], splits["mute"])
    check_samples(config_of().visft.tasks.enabled(), splits["partly"])

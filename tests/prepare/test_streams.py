"""What a run reads: words, the order of the samples, and how samples become batches of each stream."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.coco_tree import write_tree
from visft_ds.config import resolve
from visft_ds.config.schema import VisftConfig
from visft_ds.data.samples import RawSample
from visft_ds.data.shards import Manifest
from visft_ds.data.transforms import ShortSides
from visft_ds.prepare.data import (
    pipeline_of,
    plan_of,
    read_vocabulary,
    vocabulary_of,
)
from visft_ds.prepare.datasets import TrainingSet, check_samples, needs_vocabulary
from visft_ds.shards.build import Options, build
from visft_ds.tasks.vocabulary import Vocabulary

SPLIT = "toy"
SILENT = (1, 4, 5)  #: places of the pictures without captions in `partly`
FILE = "visft.tasks.captioning.vocabulary.file"


def config_of(*settings: str, stage: int = 2) -> VisftConfig:
    sizes = [f"visft.tasks.{task}.batch_size=2" for task in ("detection", "segmentation", "captioning")]
    return resolve(
        stage=stage,
        model="debug",
        settings=[*sizes, "visft.shared.batch_size=2", f"visft.data.train={SPLIT}", *settings],
    ).visft


def make(folder: Path, *, silent: tuple[int, ...] = (), captions: bool = True) -> Manifest:
    """Shards of twelve pictures; those at the places `silent` have no captions."""
    tree = write_tree(folder / "tree")
    mute = {1000 + 7 * place for place in silent}
    tree.edit(
        lambda content: content.update(annotations=[a for a in content["annotations"] if a["image_id"] not in mute]),
        "captions",
    )
    build(Options(tree.images, tree.instances, tree.captions if captions else None, folder / "shards", SPLIT))
    return Manifest.load(folder / "shards", SPLIT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Every picture has captions."""
    return make(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Some have none."""
    return make(tmp_path_factory.mktemp("partly"), silent=SILENT)


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Made without a captions file."""
    return make(tmp_path_factory.mktemp("mute"), captions=False)


# The plan


def only(manifest: Manifest, config: VisftConfig) -> dict[str, TrainingSet]:
    return {SPLIT: TrainingSet(manifest, tuple(config.tasks.enabled()))}


def places(manifest: Manifest, config: VisftConfig, task: str, steps: int = 60) -> set[int]:
    """Which places of the tree a stream has drawn from after some steps."""
    plan = plan_of(config, only(manifest, config))
    drawn = {i for step in map(plan.step, range(steps)) if step.task == task for i in step.indices.tolist()}
    return {(int(manifest.index["image_id"][i]) - 1000) // 7 for i in drawn}


def test_captioning_plans_only_pictures_with_captions(partly: Manifest) -> None:
    config = config_of()
    assert places(partly, config, "captioning") == set(range(12)) - set(SILENT)
    assert places(partly, config, "detection") == places(partly, config, "segmentation") == set(range(12))


def test_shared_pictures_are_those_that_teach_any_of_the_tasks(partly: Manifest) -> None:
    assert places(partly, config_of("visft.mode=shared"), "shared") == set(range(12))
    alone = config_of("visft.mode=shared", "visft.tasks=captioning")
    assert places(partly, alone, "shared") == set(range(12)) - set(SILENT)


def test_steps_are_shared_out_by_updates(whole: Manifest) -> None:
    config = config_of()
    plan = plan_of(config, only(whole, config))
    counts = Counter(plan.step(step).task for step in range(1000))
    assert counts["captioning"] == pytest.approx(400, abs=3) and counts["detection"] == pytest.approx(300, abs=3)
    stage1 = plan_of(config_of("visft.mode=sampled", stage=1), only(whole, config))
    stage1_counts = Counter(stage1.step(step).task for step in range(1000))
    assert stage1_counts["captioning"] == pytest.approx(250, abs=3)  # 100,000 of 400,000 updates


def test_fewer_samples_than_a_batch_are_refused(partly: Manifest) -> None:
    config = config_of("visft.tasks.captioning.batch_size=10")
    with pytest.raises(ValueError, match="toy has 9 samples for captioning"):
        plan_of(config, only(partly, config))


# Batches


def sample() -> RawSample:
    """One picture with one object and one caption."""
    outline = [2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0]
    annotation: dict[str, Any] = {"id": 1, "category_id": 3, "bbox": [2, 2, 10, 10], "iscrowd": 0, "area": 100.0}
    pixels = np.zeros((24, 30, 3), dtype=np.uint8)
    return RawSample(0, 7, (24, 30), pixels, [{**annotation, "segmentation": [outline]}], ["A red picture."])


@pytest.mark.parametrize("train", [True, False])
def test_each_stream_makes_batches_for_its_own_tasks(train: bool) -> None:
    words = Vocabulary(("red", "picture"))
    for name, stream in config_of("visft.tasks.captioning.image.size=48").streams().items():
        pipeline = pipeline_of(stream, words, train=train)
        batch = pipeline.collate([pipeline.transform(sample(), np.random.default_rng(0))])
        assert batch.tasks == (name,)
        # The configured sizes arrive: the debug model's squares, and the one set here.
        assert batch.sizes.tolist() == [[48, 48] if name == "captioning" else [112, 112]]


def test_a_shared_stream_makes_one_batch_for_all() -> None:
    (stream,) = config_of("visft.mode=shared", "visft.tasks=captioning,detection").streams().values()
    pipeline = pipeline_of(stream, Vocabulary(("red",)), train=True)
    assert isinstance(pipeline.transform.geometry, ShortSides)
    batch = pipeline.collate([pipeline.transform(sample(), np.random.default_rng(0))])
    assert batch.tasks == ("detection", "captioning") and batch.images.shape == (1, 3, 112, 112)


# Words


def test_the_minimum_count_decides_which_captions_words_are_known(whole: Manifest) -> None:
    counts = {"picture": 24, "it's": 24, "red": 24, "0": 12, "1": 12}
    assert dict(whole.vocabulary) == counts
    for least in (12, 13):
        words = vocabulary_of(config_of(f"visft.tasks.captioning.vocabulary.min_count={least}"), whole)
        assert words is not None and set(words.words) == {word for word, count in counts.items() if count >= least}


def test_only_tasks_with_words_have_a_vocabulary(mute: Manifest) -> None:
    assert vocabulary_of(config_of("visft.tasks=detection,segmentation"), mute) is None
    assert needs_vocabulary(["detection", "captioning"]) and not needs_vocabulary({"detection": 1, "segmentation": 2})
    with pytest.raises(ValueError, match="captions"):
        vocabulary_of(config_of(), mute)


def test_words_that_were_cut_in_another_way_are_refused(whole: Manifest) -> None:
    other = replace(whole, options={**whole.options, "tokenizer": "spaces-1"})
    with pytest.raises(ValueError, match="spaces-1"):
        vocabulary_of(config_of(), other)


def test_a_file_of_words_counts_instead_of_the_captions(whole: Manifest, mute: Manifest, tmp_path: Path) -> None:
    own, published = tmp_path / "own.json", tmp_path / "WORDMAP.json"
    words = Vocabulary(("zebra", "red"))
    own.write_text(json.dumps(words.to_dict()))
    # As the published heads' word maps: in any order, special tokens included.
    published.write_text(json.dumps({"<start>": 4, "red": 2, "<pad>": 0, "<end>": 5, "zebra": 1, "<unk>": 3}))
    for file in (own, published):
        for manifest in (whole, mute):
            assert vocabulary_of(config_of(f"{FILE}={file}"), manifest) == words
        assert read_vocabulary(file) == words


# Samples


def test_a_split_in_which_a_task_finds_nothing_is_refused(mute: Manifest, partly: Manifest) -> None:
    with pytest.raises(ValueError, match="has no sample with captions, which captioning needs") as caught:
        check_samples(config_of().tasks.enabled(), mute)
    assert "--captions FILE" in str(caught.value) and "--set visft.tasks.captioning=null" in str(caught.value)
    check_samples(["detection", "segmentation"], mute)
    check_samples(config_of().tasks.enabled(), partly)

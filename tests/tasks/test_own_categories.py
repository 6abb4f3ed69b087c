"""Categories of other ids than COCO's: as many classes as the data has, in both heads, and its own ids in
results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.coco_tree import write_tree
from tests.opened import open_run
from tests.tasks.cases import batch_of
from visft_ds.config import ResolvedConfig, resolve
from visft_ds.data.dataset import coco_dataset
from visft_ds.data.loader import StepLoader
from visft_ds.data.shards import Category, Manifest, ShardReader
from visft_ds.interop.heads import HeadInfo, check_categories, check_heads, classes_of_heads
from visft_ds.prepare.data import RunData
from visft_ds.tasks import TASKS
from visft_ds.tasks.classes import COCO_CATEGORY_IDS, classes_of
from visft_ds.tasks.detection.head import DetectionOutput
from visft_ds.tasks.masks.output import MaskOutput

BOTH = ("detection", "segmentation")
#: Ids of the small tree, and what they become.
TREE = (3, 8, 13)
OWN = {0: "paint", 1: "scratch", 2: "dent", 12: "rust"}
INTO: Mapping[str, tuple[Mapping[int, str], tuple[int, ...]]] = {
    "own": (OWN, (0, 2, 12)),
    "coco": ({3: "car", 8: "truck", 13: "stop sign"}, TREE),
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Manifest]:
    folder, made = tmp_path_factory.mktemp("own"), {}
    for name, (table, ids) in INTO.items():
        tree = write_tree(folder / name / "tree")
        mapped = dict(zip(TREE, ids, strict=True))

        def rename(content: dict[str, Any], table: Any = table, mapped: Any = mapped) -> None:
            # not in the order of their ids: that must not matter
            content["categories"] = [{"id": number, "name": table[number]} for number in reversed(table)]
            for annotation in content["annotations"]:
                annotation["category_id"] = mapped[annotation["category_id"]]

        tree.edit(rename)
        made[name] = tree.pack(folder / name, "train")
    return made


def settled(split: Manifest, *settings: str) -> tuple[ResolvedConfig, RunData]:
    own = [f"visft.tasks.{task}.batch_size=12" for task in BOTH]
    given = [f"visft.data.root={split.root}", "visft.mode=sampled", "visft.tasks=" + ",".join(BOTH)]
    config = resolve(stage=1, model="debug", settings=[*own, *given, "visft.run.eval_every=0", *settings])
    return open_run(config)


def num_classes(config: ResolvedConfig) -> list[int]:
    tasks: Any = config.visft.tasks.enabled()
    return [tasks[task].head.num_classes for task in BOTH]


def test_labels_count_the_categories_of_the_data_and_results_have_its_ids(
    splits: dict[str, Manifest],
) -> None:
    config, data = settled(splits["own"])
    assert num_classes(config) == [len(OWN)] * 2
    reader = ShardReader(data.sets["train"].manifest)
    loader = StepLoader({"train": reader}, data.plan, data.pipelines)
    classes = {name: one.classes for name, one in data.streams.items()}
    true: dict[int, list[int]] = {}
    for annotation in coco_dataset(reader)["annotations"]:
        if not annotation["iscrowd"]:
            true.setdefault(annotation["image_id"], []).append(annotation["category_id"])
    seen = set[str]()
    for whole, (batch,) in loader.steps(0, 4):
        for task in batch.targets:
            seen.add(task)
            own, targets = classes[whole.task][task], batch.targets[task]
            assert own == tuple(sorted(OWN))
            each = zip(batch.image_ids.tolist(), targets.labels.split(targets.counts.tolist()), strict=True)
            for image, labels in each:
                assert [own[label] for label in labels.tolist()] == true.get(image, [])
            found = TASKS[task].results(_each_class(task, len(own)), batch_of(1), None, own)
            assert sorted(result["category_id"] for result in found[: len(own)]) == list(own)
    assert seen == set(BOTH)


def _each_class(task: str, number: int) -> Any:
    """Of one image, a query for each class, and "no object" likelier than all of them."""
    logits = torch.cat([torch.eye(number), torch.full((number, 1), 9.0)], dim=1)[None, None]
    if task == "detection":
        return DetectionOutput(logits, torch.full((1, 1, number, 4), 0.5))
    return MaskOutput(logits, torch.ones(1, 1, number, 2, 2), torch.ones(1, 2))


def test_the_ids_of_coco_keep_the_classes_of_the_published_heads(splits: dict[str, Manifest]) -> None:
    config, data = settled(splits["coco"])
    assert num_classes(config) == [91, 80]
    assert all(not stream.classes for stream in data.streams.values())
    streams = settled(splits["coco"], *(f"visft.tasks.{task}.head.num_classes=3" for task in BOTH))[1].streams
    assert [streams[task].classes for task in BOTH] == [{task: TREE} for task in BOTH]


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("own", "segmentation.head.num_classes=80"),
        ("own", "detection.head.num_classes=3"),
        ("coco", "segmentation.head.num_classes=9"),
        ("own", "segmentation.head.class_ids=published"),
    ],
)
def test_numbers_of_classes_that_do_not_agree_are_refused(
    splits: dict[str, Manifest], name: str, setting: str
) -> None:
    with pytest.raises(ValueError, match=setting.partition("=")[0]):
        settled(splits[name], f"visft.tasks.{setting}")


def test_every_class_of_coco_is_its_place_among_the_80() -> None:
    table = {number: str(number) for number in COCO_CATEGORY_IDS}
    assert classes_of("segmentation", {"num_classes": 80}, table) is None
    assert classes_of("detection", {"num_classes": 91}, table) is None
    assert classes_of("detection", {"num_classes": 80}, table) == COCO_CATEGORY_IDS
    assert classes_of("detection", {"num_classes": 2}, {-3: "below", 5: "above"}) == (-3, 5)


def _info(task: str, number: int, table: Mapping[int, str], **extra: Any) -> HeadInfo:
    categories = [
        {"id": index, "coco_id": id_, "name": name} for index, (id_, name) in enumerate(table.items())
    ]
    return HeadInfo(task, [(8, 14)], {"num_classes": number}, categories, extra)


def _table(names: Mapping[int, str]) -> list[Category]:
    return [Category(index, id_, name) for index, (id_, name) in enumerate(names.items())]


@pytest.mark.parametrize("task", BOTH)
def test_heads_know_which_categories_their_classes_stand_for(task: str) -> None:
    heads = {task: _info(task, 4, OWN)}
    assert classes_of_heads(heads) == {task: (0, 1, 2, 12)}
    for without_classes in ("captioning", "depth"):
        assert classes_of_heads({without_classes: HeadInfo(without_classes, [(8, 14)])}) == {}
    check_categories(
        heads, _table({12: "rust"}), "here", "Do it"
    )  # what the data lacks does no harm in evaluation
    with pytest.raises(ValueError, match="5 'hole'"):
        check_categories(heads, _table({**OWN, 5: "hole"}), "here", "Do it")
    check_heads(heads, {task: (0, 1, 2, 12)}, _table(OWN), None)
    with pytest.raises(ValueError, match="lacks 0 'paint', 12 'rust'"):
        check_heads(heads, {}, _table({1: "scratch", 2: "dent"}), None)


@pytest.mark.parametrize("task", BOTH)
def test_published_heads_know_cocos_categories_by_id_and_name(task: str) -> None:
    """Tools number categories from 1, so ids say nothing: such a head would call each scratch a person."""
    heads = {
        task: HeadInfo(
            task, [(8, 14)], {"num_classes": 91, "class_ids": "published"}, extra={"format": "visft"}
        )
    }
    assert classes_of_heads(heads) == {}
    check_categories(heads, _table({1: "person", 90: "toothbrush"}), "here", "Do it")
    for name in ("scratch", "Person"):
        with pytest.raises(ValueError, match=f"1 '{name}'"):
            check_categories(heads, _table({1: name, 90: "toothbrush"}), "here", "Do it")


def test_segmentation_heads_whose_classes_are_not_told_are_not_guessed_at() -> None:
    with pytest.raises(ValueError, match="num_classes is 3"):
        classes_of_heads({"segmentation": _info("segmentation", 3, OWN)})
    few = {"num_classes": 3, "class_ids": "contiguous"}
    with pytest.raises(ValueError, match="does not say which categories"):
        classes_of_heads({"segmentation": HeadInfo("segmentation", [(8, 14)], few)})

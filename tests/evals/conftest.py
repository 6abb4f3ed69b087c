"""Two runs as training would leave them, and data whose labels are near to what their models predict."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from PIL import Image

from tests.clip_case import make_clip, save_clip
from tests.coco_tree import Tree, write_tree
from tests.random_tower import adapter_of, merge, save_adapter, save_backbone
from tests.tiny import THREE, TINY
from visft_ds.config import ResolvedConfig, resolve
from visft_ds.data.shards import Category, Manifest, ShardReader
from visft_ds.evals.judge.model_text import parse_model
from visft_ds.evals.judge.models import load_encoder
from visft_ds.evaluation import collect
from visft_ds.interop.heads import HeadInfo, head_file, save_head
from visft_ds.interop.layouts import fingerprint_of
from visft_ds.interop.published import read_adapter
from visft_ds.models.lora import inject_lora
from visft_ds.predict.loading import LoadedModel, ModelSource, files_of_run
from visft_ds.prepare.data import vocabulary_of
from visft_ds.prepare.datasets import TrainingSet
from visft_ds.prepare.model import prepare_model
from visft_ds.run.record import write_run
from visft_ds.run_files import ADAPTER_FOLDER, BACKBONE_FILE, EXPORT_RECORD_FILE
from visft_ds.shards.build import build
from visft_ds.shards.options import Options
from visft_ds.tasks import Results
from visft_ds.tasks.classes import COCO_CATEGORY_IDS
from visft_ds.tasks.vocabulary import Vocabulary

IMAGES = 7  # two ranks with batches of two cannot share them evenly
QUERIES = 12
SETTINGS = [
    *(f"{key}={json.dumps(value)}" for key, value in {**TINY, "visft.data.val": "val"}.items()),
    *("visft.tasks.captioning.decoding.max_length=6", "visft.shared.micro_batch=2"),
]


@dataclass(frozen=True)
class World:
    """Two runs, their data as a COCO tree and as shards, and the merged weights."""

    folder: Path
    configs: dict[int, ResolvedConfig]  #: of the stages
    tree: Tree

    def run(self, stage: int) -> Path:
        return self.folder / f"stage{stage}"

    @property
    def merged(self) -> Path:
        return self.folder / "merged.safetensors"

    @property
    def adapter(self) -> Path:
        return self.run(2) / "export" / ADAPTER_FOLDER

    @property
    def shards(self) -> Path:
        return self.folder / "shards"


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Nobody may change it."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    flags = {"visft.data.root": (str(folder / "shards"), "--data")}
    second = [*SETTINGS, f"visft.heads.path={folder}/stage1/export", "visft.lora.alpha=64.0"]
    configs = {
        stage: resolve(stage=stage, model="debug", settings=settings, flags=flags)
        for stage, settings in ((1, SETTINGS), (2, second))
    }
    world = World(folder, configs, write_tree(folder / "tree", IMAGES))
    world.tree.edit(_many_words, "captions")
    pack(world.tree, folder / "draft")
    _export(
        world,
        vocabulary_of(
            configs[1].visft, {"val": TrainingSet(Manifest.load(folder / "draft", "val"), ("captioning",))}
        ),
    )
    collected = _predictions(world, folder / "draft")
    world.tree.edit(lambda content: _annotate(content, collected["detection"], collected["segmentation"]))
    world.tree.edit(lambda content: _caption(content, collected["captioning"]), "captions")
    pack(world.tree, world.shards)
    merge(world.run(2) / "export" / BACKBONE_FILE, read_adapter(world.adapter), world.merged)
    return world


def pack(tree: Tree, out: Path, captions: bool = True) -> None:
    build(
        Options(
            "val", tree.images, tree.instances, tree.captions if captions else None, out=out, max_size=20_480
        )
    )


def _export(world: World, vocabulary: Vocabulary | None) -> None:
    """What both runs would leave, with random heads and adapters of some size."""
    first, second = world.configs.values()
    assert vocabulary is not None
    prepared = prepare_model(first, vocabulary=vocabulary)
    heads = prepared.module.heads
    with torch.no_grad():  # larger than at the start, so that results depend on the image
        for task, head in heads.items():
            for parameter in head.parameters():
                parameter.mul_(3 if task == "captioning" else 2)
    categories = [
        asdict(Category(index, number, f"thing {number}")) for index, number in enumerate(COCO_CATEGORY_IDS)
    ]
    infos = {}
    for task, settings in first.visft.tasks.enabled().items():
        words = task == "captioning"
        options = settings.head.model_dump(mode="json") | (
            {"vocabulary_size": vocabulary.size} if words else {}
        )
        extra = {
            "base_weights": prepared.base.identity,
            **({"vocabulary": vocabulary.to_dict()} if words else {}),
        }
        infos[task] = HeadInfo(
            task, prepared.module.backbone.shapes, options, [] if words else categories, extra
        )
    for stage, config in world.configs.items():
        record = write_run(world.run(stage), config.to_dict(), 1, ["train.py"])
        save_backbone(prepared.module.backbone, world.run(stage) / "export" / BACKBONE_FILE)
        shutil.copyfile(record, world.run(stage) / "export" / EXPORT_RECORD_FILE)
        for task, head in heads.items():
            save_head(head_file(world.run(stage) / "export", task), infos[task], head.state_dict())
    adapted = prepare_model(second, vocabulary=vocabulary).module.backbone
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.2)
    save_adapter(adapter_of(adapted, prepared.base.identity), world.adapter)


def load_stage2(world: World) -> LoadedModel:
    config = world.configs[2].visft
    files = files_of_run(world.run(2), config, list(THREE))
    source = ModelSource(files, config.streams(), decoding={"captioning": {"max_length": 6}})
    return source.build("fp32", torch.device("cpu"))[0]


def _predictions(world: World, shards: Path) -> dict[str, Results]:
    model = load_stage2(world)
    with ShardReader(Manifest.load(shards, "val")) as reader:
        collected = collect(
            model.predict, reader, world.configs[2].visft.streams(), model.vocabulary, num_workers=0
        )
    assert collected is not None
    return collected


def _annotate(content: dict[str, Any], boxes: Results, masks: Results) -> None:
    """Replace the ground truth by what the model predicts, moved or cut a little: AP is neither 0 nor 1."""
    rng = np.random.default_rng(0)
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    annotations = content["annotations"] = []

    def add(result: dict[str, Any], box: list[float], area: float, segmentation: Any) -> None:
        names = {name: result[name] for name in ("image_id", "category_id")}
        shape = {"bbox": box, "area": area, "iscrowd": 0, "segmentation": segmentation}
        if result["category_id"] in COCO_CATEGORY_IDS and rng.random() < 0.6:
            annotations.append({"id": len(annotations) + 1, **names, **shape})

    for result in boxes:
        width, height = sizes[result["image_id"]]
        x, y, w, h = result["bbox"]
        left, top = max(0.0, x + w * rng.normal(0, 0.1)), max(0.0, y)
        box = [left, top, max(2.0, min(w, width - left)), max(2.0, min(h, height - top))]
        if left + 2 < width and top + 2 < height:
            right, bottom = left + box[2], top + box[3]
            add(result, box, box[2] * box[3], [[left, top, right, top, right, bottom, left, bottom]])
    for result in masks:
        width, height = sizes[result["image_id"]]
        cover = np.zeros((height, width), dtype=np.uint8, order="F")
        cover[:, : int(width * rng.uniform(0.5, 1))] = 1
        code = coco_mask.merge([result["segmentation"], coco_mask.encode(cover)], intersect=True)
        if area := float(coco_mask.area(code)):
            add(result, coco_mask.toBbox(code).tolist(), area, {**code, "counts": code["counts"].decode()})
    used = sorted({annotation["category_id"] for annotation in annotations})
    content["categories"] = [{"id": category, "name": f"thing {category}"} for category in used]


def _many_words(content: dict[str, Any]) -> None:
    sentences = (
        "a small red bird sits on the old wall",
        "near two large white boats",
        "grey water in a wide bay",
    )
    for index, entry in enumerate(content["annotations"]):
        entry["caption"] = sentences[index % len(sentences)]


def _caption(content: dict[str, Any], captions: Results) -> None:
    """One true caption of each image is what the model says, without one word; n-grams match, not all of
    them.
    """
    entries = content["annotations"] = []
    for index, result in enumerate(captions):
        words = result["caption"].split()
        for text in (" ".join([*words[:3], *words[4:], "here"]), f"a number {index} of some"):
            entries.append({"id": len(entries), "image_id": result["image_id"], "caption": text})


CLASSES = ("circle", "square")  # of the drawings that a small CLIP looks at


@pytest.fixture(scope="session")
def clip_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP file, an adapter for it, merged weights, a folder of classes and a COCO tree with captions and
    boxes; nobody may change them.
    """
    root = tmp_path_factory.mktemp("world")
    base = save_clip(make_clip(), root / "clip.safetensors")
    encoder = load_encoder(parse_model(str(base)), "fp32")
    backbone: Any = encoder.module.backbone
    inject_lora(backbone, rank=4, alpha=4, targets=("q", "v"))
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=1.0)
    adapter = adapter_of(backbone, fingerprint_of(backbone, base))
    save_adapter(adapter, root / "adapter")
    whole = merge(base, adapter, root / "merged", "--format", "open_clip")
    (whole / "open_clip_model.safetensors").rename(root / "merged.safetensors")
    _draw_shapes(root)
    return root


def _draw_shapes(root: Path) -> None:
    rng = np.random.default_rng(0)
    coco: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    captions: list[dict[str, Any]] = []
    for number, name in enumerate(CLASSES):
        coco["categories"].append({"id": number, "name": name})
        for index in range(6):
            # each its own colour: towers of random weights tell little else apart
            pixels = (rng.integers(0, 180, 3) + rng.integers(0, 75, (40, 52, 3))).astype(np.uint8)
            file = f"{number}-{index}.png"
            for path in (
                root / "shapes" / name / file,
                root / "coco/val2017" / file,
                root / "coco/train2017" / file,
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            image = len(coco["images"])
            coco["images"].append({"id": image, "file_name": file, "height": 40, "width": 52})
            box = {"bbox": [2, 3, 20, 30], "iscrowd": 0, "category_id": number, "image_id": image}
            coco["annotations"].append({"id": image, **box})
            captions += [
                {"image_id": image, "caption": f"{name} {index}, {word}"} for word in ("seen", "drawn")
            ]
    (root / "coco/annotations").mkdir()
    for part in ("train", "val"):
        (root / f"coco/annotations/instances_{part}2017.json").write_text(json.dumps(coco))
    told = {"images": coco["images"], "annotations": captions}
    (root / "coco/annotations/captions_val2017.json").write_text(json.dumps(told))

"""tools/evaluate.py on the files of two finished runs: right numbers, any number of ranks, clear errors."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from coco_tree import Tree, write_tree
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visft_ds.config import ResolvedConfig, resolve
from visft_ds.data.convert import Options, build
from visft_ds.data.loader import evaluation_batches
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader
from visft_ds.evals.model import EvaluationModel, files_of_run, load_model
from visft_ds.evals.report import compare_results, read_evaluation
from visft_ds.evals.runner import pipeline_of
from visft_ds.interop.adapters import adapter_of
from visft_ds.interop.backbones import save_backbone
from visft_ds.interop.files import sha256_file
from visft_ds.interop.heads import HeadInfo, save_head_files
from visft_ds.interop.layouts import tower_of
from visft_ds.interop.merge import merge_into_file, read_adapter
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.monitor.metrics import RunRecord
from visft_ds.parallel import export
from visft_ds.run_folder import ADAPTER_FOLDER, BACKBONE_FILE
from visft_ds.stages import prepare_model
from visft_ds.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
IMAGES = 7  # two ranks with batches of two cannot share them evenly
SETTINGS = [
    *("visft.model.overrides.width=32", "visft.model.overrides.depth=2", "visft.model.overrides.num_heads=2"),
    *("visft.tasks.detection.image.fixed_size=56", "visft.tasks.detection.micro_batch=2"),
    *("visft.tasks.detection.head.num_queries=6", "visft.tasks.detection.head.encoder_dim=16"),
    *("visft.tasks.detection.head.decoder_dim=32", "visft.tasks.detection.head.num_heads=2"),
    *("visft.tasks.detection.head.ffn_dim=32", "visft.data.val=val"),
]


@dataclass(frozen=True)
class World:
    """Two runs, their data as a COCO tree and as shards, and the merged weights."""

    folder: Path
    config: ResolvedConfig  #: of stage 2

    def run(self, stage: int) -> Path:
        return self.folder / f"stage{stage}"

    @property
    def merged(self) -> Path:
        return self.folder / "merged.safetensors"

    @property
    def instances(self) -> Path:
        return self.folder / "coco/annotations/instances_val2017.json"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools/evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "coco/annotations").mkdir(parents=True)
    tree = write_tree(folder / "tree", IMAGES)
    tree.images.rename(folder / "coco/val2017")
    tree = Tree(folder / "coco/val2017", folder / "coco/annotations/instances_val2017.json", tree.captions)
    (folder / "tree/instances.json").rename(tree.instances)
    settings = [*SETTINGS, f"visft.heads.path={folder}/stage1/export", "visft.lora.alpha=64.0"]
    flags = {"--data": ("visft.data.root", str(folder / "shards"))}
    first = resolve(stage=1, model="debug", settings=SETTINGS, flags=flags)
    second = resolve(stage=2, model="debug", settings=settings, flags=flags)
    world = World(folder, second)
    _export(world, first, second)
    _pack(tree, folder / "draft")
    tree.edit(lambda content: _annotate(content, world))
    _pack(tree, folder / "shards")
    base, adapter = world.run(2) / "export" / BACKBONE_FILE, read_adapter(world.run(2) / "export" / ADAPTER_FOLDER)
    merge_into_file(base, adapter, world.merged)
    return world


def _pack(tree: Tree, out: Path) -> None:
    build(Options(tree.images, tree.instances, tree.captions, out, "val", max_count=3))


def _export(world: World, first: ResolvedConfig, second: ResolvedConfig) -> None:
    """What both runs would leave, with random heads and adapters of some size."""
    prepared = prepare_model(first.visft, first.optimizer.params)
    head = prepared.module.heads["detection"]
    with torch.no_grad():  # larger than at the start, so that results depend on the image
        for parameter in head.parameters():
            parameter.mul_(2)
    options = first.visft.tasks.enabled()["detection"].head.model_dump(mode="json")
    categories = [{"id": place, "coco_id": place, "name": f"thing {place}"} for place in range(91)]
    info = HeadInfo("detection", prepared.module.backbone.width, options, categories)
    for stage, config in ((1, first), (2, second)):
        RunRecord(config.to_dict(), 1, ["train.py"]).write(world.run(stage))
        save_backbone(prepared.module.backbone, world.run(stage) / "export" / BACKBONE_FILE, layout="timm")
    save_head_files({"detection": head}, world.run(1) / "export", {"detection": info})
    adapted = prepare_model(second.visft, second.optimizer.params).module.backbone
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.2)
    adapter = adapter_of(adapted, base_sha256=sha256_file(world.run(2) / "export" / BACKBONE_FILE))
    save_peft_adapter(adapter, world.run(2) / "export" / ADAPTER_FOLDER, tower_of(adapted))


def _annotate(content: dict[str, Any], world: World) -> None:
    """Replace the ground truth by what the model predicts, moved a little, so that AP is neither 0 nor 1."""
    rng = np.random.default_rng(0)
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    annotations = []
    for result in _results(_model(world), world.folder / "draft"):
        width, height = sizes[result["image_id"]]
        x, y, w, h = result["bbox"]
        left, top = max(0.0, x + w * rng.normal(0, 0.1)), max(0.0, y)
        box = [left, top, max(2.0, min(w, width - left)), max(2.0, min(h, height - top))]
        if rng.random() < 0.6 and left + 2 < width and top + 2 < height:
            area = box[2] * box[3]
            corners = [left, top, left + box[2], top, left + box[2], top + box[3], left, top + box[3]]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": result["image_id"], "category_id": result["category_id"]}
                | {"bbox": box, "area": area, "iscrowd": 0, "segmentation": [corners]}
            )
    used = sorted({annotation["category_id"] for annotation in annotations})
    content["annotations"] = annotations
    content["categories"] = [{"id": category, "name": f"thing {category}"} for category in used]


def _model(world: World) -> EvaluationModel:
    files = files_of_run(world.run(2), world.config.visft)
    return load_model(files, ["detection"], precision="fp32", device=torch.device("cpu"))


def _results(model: EvaluationModel, shards: Path) -> list[dict[str, Any]]:
    reader = ShardReader(Manifest.load(shards, "val"))
    task = resolve(stage=1, model="debug", settings=SETTINGS).visft.tasks.enabled()["detection"]
    batches = evaluation_batches(reader, pipeline_of("detection", task, train=False), 1, 0, 1, threads=0)
    return [
        result
        for batch in batches
        for result in TASKS["detection"].postprocess(model.predict(batch)["detection"], batch)
    ]


def _evaluate(tool: ModuleType, *arguments: Any) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = tool.main([str(argument) for argument in arguments])
    return status, out.getvalue(), errors.getvalue()


def test_the_names_of_exported_files_are_those_that_training_writes() -> None:
    assert (BACKBONE_FILE, ADAPTER_FOLDER) == (export.BACKBONE_FILE, export.ADAPTER_FOLDER)


def test_numbers_are_those_of_pycocotools(tool: ModuleType, world: World, tmp_path: Path) -> None:
    status, printed, errors = _evaluate(tool, "--run", world.run(2), "--out", tmp_path / "out", "--images", 2)
    assert (status, errors) == (0, "")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(world.instances))
        found = json.loads((tmp_path / "out/detection_results.json").read_text())
        known = [result for result in found if result["category_id"] in truth.cats]
        oracle = COCOeval(truth, truth.loadRes(known), "bbox")
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
    record = json.loads((tmp_path / "out/metrics.json").read_text())
    measured = [record["metrics"][f"box/{name}"] for name in ("AP", "AP50", "AP75")]
    assert 0.01 < oracle.stats[0] < 0.95  # else the comparison below would not say much
    assert measured == pytest.approx(oracle.stats[:3].tolist(), abs=1e-9)
    assert len(found) == IMAGES * 6 and record["data"]["images"] == IMAGES
    assert f"box/AP50   {oracle.stats[1]:.4f}" in printed
    drawn = record["pictures"]["detection"]
    assert len(drawn) == 2
    for entry in drawn:
        assert np.asarray(Image.open(tmp_path / "out" / entry["file"])).std() > 0


def test_the_model_is_the_one_that_trains(world: World) -> None:
    """Rebuilt from files and prepared for training, the same images give the same bits."""
    model, config = _model(world), world.config
    prepared = prepare_model(config.visft, config.optimizer.params, heads_from=world.run(1) / "export").module.eval()
    adapter = read_adapter(world.run(2) / "export" / ADAPTER_FOLDER)
    with torch.no_grad():
        for name, value in adapter.tensors.items():
            prepared.backbone.get_parameter(name).copy_(value)
    reader = ShardReader(Manifest.load(world.folder / "shards", "val"))
    pipeline = pipeline_of("detection", config.visft.tasks.enabled()["detection"], train=False)
    batch = next(iter(evaluation_batches(reader, pipeline, 3, 0, 1, threads=0)))
    with torch.no_grad():
        wanted = prepared(batch)["detection"]
    got = model.predict(batch)["detection"]
    assert torch.equal(got.logits, wanted.logits) and torch.equal(got.boxes, wanted.boxes)


def test_merged_weights_do_what_the_adapter_does(tool: ModuleType, world: World, tmp_path: Path) -> None:
    for name, extra in {"adapter": [], "merged": ["--backbone", world.merged], "base": ["--adapter", "none"]}.items():
        arguments = ["--run", world.run(2), "--out", tmp_path / name, "--images", 0, *extra]
        assert _evaluate(tool, *arguments)[0] == 0
    opened = {name: read_evaluation(name, tmp_path / name) for name in ("adapter", "merged", "base")}
    same = compare_results(opened["adapter"], opened["merged"])
    effect = compare_results(opened["adapter"], opened["base"])
    assert effect.score > 1e-2 and effect.box > 1 and same.results == IMAGES * 6
    # W x + B A x against (W + B A) x in float32, through a random net that amplifies: far below what the adapter does
    assert same.score < 1e-3 * effect.score and same.box < 1e-3 * effect.box and same.other_class == 0


def test_files_without_a_run(tool: ModuleType, world: World, tmp_path: Path) -> None:
    """A COCO tree and single files give what the run gives; the shards made on the way are gone afterwards."""
    exported = [world.run(1) / "export" / BACKBONE_FILE, world.run(1) / "export"]
    files = ["--backbone", exported[0], "--heads", exported[1], "--adapter", world.run(2) / "export" / ADAPTER_FOLDER]
    data = ["--coco", world.folder / "coco", "--image-size", 56, "--batch-size", 3]
    assert _evaluate(tool, *files, *data, "--out", tmp_path / "files", "--images", 0)[0] == 0
    assert _evaluate(tool, "--run", world.run(2), "--out", tmp_path / "run", "--images", 0)[0] == 0
    metrics = [read_evaluation("", tmp_path / name).metrics for name in ("files", "run")]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "run"]


def test_two_ranks_find_what_one_finds(tool: ModuleType, world: World, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = ["--run", str(world.run(2)), "--coco", str(world.folder / "coco"), "--split", "val", "--images", "1"]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tool_command = [sys.executable, str(ROOT / "tools/evaluate.py")]
    ranks = [
        subprocess.Popen(
            [*tool_command, f"--local_rank={rank}", *common, "--out", str(tmp_path / "two")],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    ends = [process.communicate(timeout=60) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], ends
    assert "box/AP50" in ends[0][0] and ends[1][0] == ""
    assert _evaluate(tool, *common, "--out", tmp_path / "one")[0] == 0
    two, one = (read_evaluation(name, tmp_path / name) for name in ("two", "one"))
    assert two.record["processes"] == 2 and two.metrics == pytest.approx(one.metrics, abs=1e-6)
    # Image by image the same, whatever else was in the batch: float32 rounding of other batch sizes.
    difference = compare_results(two, one)
    assert difference.results == IMAGES * 6 and difference.score < 1e-5 and difference.box < 1e-3


def _other_base(world: World, folder: Path) -> list[Any]:
    other = folder / "other.safetensors"
    plain = resolve(stage=1, model="debug", settings=[*SETTINGS, "visft.model.weights_seed=1"])
    save_backbone(prepare_model(plain.visft, plain.optimizer.params).module.backbone, other)
    return ["--run", world.run(2), "--backbone", other]


def _other_width(world: World, folder: Path) -> list[Any]:
    plain = resolve(stage=1, model="debug", settings=[*SETTINGS, "visft.model.overrides.width=64"])
    save_backbone(prepare_model(plain.visft, plain.optimizer.params).module.backbone, folder / "wide.safetensors")
    return ["--run", world.run(1), "--backbone", folder / "wide.safetensors"]


def _other_categories(world: World, folder: Path) -> list[Any]:
    tree = write_tree(folder / "strangers", 3)
    tree.edit(lambda content: content["categories"][0].update(name="stranger"))
    _pack(tree, folder / "strange")
    return ["--run", world.run(1), "--data", folder / "strange"]


def _unfinished(world: World, folder: Path) -> list[Any]:
    RunRecord(world.config.to_dict(), 1, ["train.py"]).write(folder / "unfinished")
    return ["--run", folder / "unfinished"]


def _no_coco(world: World, folder: Path) -> list[Any]:
    return ["--run", world.run(1), "--coco", world.folder / "coco", "--split", "train"]


MISTAKES: dict[str, tuple[Any, str]] = {
    "no run there": (lambda world, folder: ["--run", folder / "nothing"], "holds no readable run record"),
    "unfinished run": (_unfinished, "the same training command goes on"),
    "unknown split": (lambda world, folder: ["--run", world.run(1), "--split", "test"], "finished splits in .*: val"),
    "split not in the tree": (_no_coco, "annotated there: val2017"),
    "missing backbone": (
        lambda world, folder: ["--run", world.run(1), "--backbone", folder / "no.pt"],
        "not found: .*no.pt",
    ),
    "missing adapter": (
        lambda world, folder: ["--run", world.run(2), "--adapter", folder / "no"],
        "not found: .*no",
    ),
    "adapter of another base": (_other_base, "was trained on base weights with sha256 [0-9a-f]{64}, but .*other"),
    "adapter on merged weights": (
        lambda world, folder: [
            *("--run", world.run(2), "--backbone", world.merged),
            *("--adapter", world.run(2) / "export" / ADAPTER_FOLDER),
        ],
        "would count twice",
    ),
    "heads of another width": (_other_width, "reads features of width 32, but the backbone has width 64"),
    "heads of other categories": (_other_categories, "other categories than .*does not know 13 'stranger'"),
    "two kinds of data": (lambda world, folder: ["--run", world.run(1), "--data", "a", "--coco", "b"], "give one"),
    "neither run nor files": (lambda world, folder: ["--heads", folder], "needed: --backbone, --data or --coco"),
    "no batch": (lambda world, folder: ["--run", world.run(1), "--batch-size", 0], "--batch-size 0 is not allowed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake: str, tool: ModuleType, world: World, tmp_path: Path) -> None:
    make, message = MISTAKES[mistake]
    (tmp_path / "made").mkdir()
    arguments = make(world, tmp_path / "made")
    status, printed, errors = _evaluate(tool, *arguments, "--out", tmp_path / "out")
    assert status == 2 and printed.count("box/") == 0
    assert errors.startswith("evaluate: ")
    assert re.search(message, errors), errors
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tool: ModuleType, world: World, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    status, _, errors = _evaluate(tool, "--run", world.run(1), "--out", tmp_path)
    assert status == 2 and "nothing in it is overwritten" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

"""Every reader of files: how to make a valid set, how to read all of it, what damages it, what it may raise."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import safetensors.torch
import torch
from PIL import Image

from tests.fuzz import mutations as m
from tests.options import alone, head_of
from tests.yolo_folder import write_yolo
from visft_ds.checkpoint.format import check_identity, newest_checkpoint, open_checkpoint
from visft_ds.checkpoint.saver import recorded_scores
from visft_ds.config.backbones import named
from visft_ds.config.cli import resolve_arguments
from visft_ds.config.layers import parse_assignment
from visft_ds.config.resolve import resolve
from visft_ds.data.dataset import caption_dataset, coco_dataset, read_raw
from visft_ds.data.decode import decode_image
from visft_ds.data.features import FeatureCache, StoredFeatures
from visft_ds.data.labels import parse_label
from visft_ds.data.manifest import Manifest, read_manifest
from visft_ds.data.shards import ShardReader
from visft_ds.evals.benchmarks.class_sets import read_classes
from visft_ds.evals.benchmarks.dense_sets import read_train_and_test
from visft_ds.evals.benchmarks.images import from_tars
from visft_ds.evals.benchmarks.retrieval import read_captions
from visft_ds.evals.report import report_runs
from visft_ds.interop.backbones import timm_settings
from visft_ds.interop.files import open_weights, recorded_bases
from visft_ds.interop.foreign_code import check_folder
from visft_ds.interop.heads import (
    check_categories,
    classes_of_heads,
    find_head,
    load_heads,
    of_other_base,
    read_head_info,
    save_heads,
)
from visft_ds.interop.layouts import find_layout, tower_in
from visft_ds.interop.merge import merge_into_file, read_adapter
from visft_ds.interop.towers import open_tower, resolve_tower
from visft_ds.interop.visft import write_visft_lora
from visft_ds.monitor.metrics import RunRecord, read_metrics, truncate_metrics
from visft_ds.planner.cluster import parse_cluster
from visft_ds.predict.command import Record
from visft_ds.predict.images import open_image
from visft_ds.prepare.datasets import _read_map
from visft_ds.prepare.places import DATA, find, paths_of
from visft_ds.prepare.streams import read_vocabulary
from visft_ds.resilience.heartbeat import Beat, ended_well, process_state, read_beats
from visft_ds.resilience.watchdog import Peers
from visft_ds.run.adapter import read_change
from visft_ds.run.folder import recorded_config
from visft_ds.shards.caption_lines import read_lines
from visft_ds.shards.images import check_image
from visft_ds.shards.info import describe
from visft_ds.shards.shard_content import read_shard
from visft_ds.shards.source import SourceImage, SourceSelection, read_source
from visft_ds.shards.verify import verify
from visft_ds.shards.yolo import read_description, read_yolo
from visft_ds.tasks.average_precision import coco_average_precision
from visft_ds.tasks.vocabulary import Vocabulary

TASKS = ("detection", "segmentation", "captioning")
RUNS = Path(__file__).parents[1] / "golden/runs-0.1"


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    `make` writes a valid set into an empty folder, `read` reads all that is said in it, `damage` are kinds of mutation,
    `allowed` what may be raised beside a right result, `share` how many inputs it gets of those of the others.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    damage: tuple[m.Damage, ...]
    allowed: tuple[type[Exception], ...] = (ValueError,)
    share: float = 1.0


def copy(*places: str) -> Callable[[Path], object]:
    """Files of the golden runs, under their own names: "qv/run.json", or "qv/run.json>other.json"."""

    def make(folder: Path) -> None:
        for place in places:
            source, _, name = place.partition(">")
            (folder / (name or Path(source).name)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(RUNS / source, folder / (name or Path(source).name))

    return make


SPLIT = copy(*(f"shards/val{end}" for end in (".manifest.json", ".index.npy", "-000000.tar")))
_WORDS = Vocabulary(("a", "star"))
_SMALL = {"detection": {"fixed_size": 28}, "segmentation": {"fixed_size": 28}, "captioning": {"size": 28}}


def read_split(folder: Path) -> None:
    manifest = Manifest.load(folder, "val")
    manifest.select("captions"), manifest.selection("annotations"), manifest.labels
    if manifest.vocabulary:
        Vocabulary.from_counts(manifest.vocabulary, min_count=1, tokenizer=str(manifest.options.get("tokenizer")))
    orjson.dumps(describe(manifest, shards=True))
    generator = np.random.default_rng(0)
    transforms = [alone(task, task != "detection", vocabulary=_WORDS, **_SMALL[task]) for task in TASKS]
    with ShardReader(manifest) as reader:
        for place in range(min(len(reader), 8)):
            raw = read_raw(reader, place, categories=dict.fromkeys(range(100), 1))
            for transform in transforms:
                transform(raw, generator)


def read_truth(folder: Path) -> None:
    with ShardReader(Manifest.load(folder, "val")) as reader:
        reader.prefetch(range(len(reader)))
        truth, _ = coco_dataset(reader), caption_dataset(reader)
    results = [
        {"image_id": image["id"], "category_id": 1, "bbox": [0, 0, 9, 9], "score": 1.0} for image in truth["images"]
    ]
    coco_average_precision(truth, results)


def make_coco(folder: Path) -> None:
    square = [[1, 1, 9, 1, 9, 9, 1, 9]]
    entry = {"iscrowd": 0, "area": 64, "segmentation": square}
    code = {"size": [30, 40], "counts": [100, 200, 900]}
    instances = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30, "license": 1} for n in (1, 2, 3)],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 8], **entry},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [1, 1, 8.5, 8], **entry},
            {
                "id": 3,
                "image_id": 2,
                "category_id": 2,
                "bbox": [1, 1, 8, 8],
                **entry,
                "iscrowd": 1,
                "segmentation": code,
            },
        ],
        "categories": [{"id": 1, "name": "star"}, {"id": 2, "name": "ring"}],
    }
    captions = {"annotations": [{"id": n, "image_id": n, "caption": "A star."} for n in (1, 2, 3)]}
    rules = {"star": {"id": 5, "name": "star"}, "2": None}
    for name, content in (("instances", instances), ("captions", captions), ("rules", rules)):
        (folder / f"{name}.json").write_text(json.dumps(content))


def read_coco(folder: Path) -> None:
    files = folder / "instances.json", folder / "captions.json"
    source = read_source(*files, SourceSelection(allow_drops=True))
    for image in source.images:
        parse_label(image.label)
    orjson.dumps(source.findings.listed())
    read_source(*files, SourceSelection(categories=str(folder / "rules.json")))


def photo(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def make_yolo(folder: Path) -> None:
    path = write_yolo(folder / "a/b/mine", ("0 0.5 0.5 0.5 0.25\n2 0.25 0.25 0.75 0.25 0.75 0.75", "1 0 0 1 1"))
    path.write_text(path.read_text() + "kpt_shape: []\ntest: list.txt\n")
    (path.parent / "list.txt").write_text("train/images/0.jpg\n./valid/images/1.jpg\n")


def read_yolo_folder(folder: Path) -> None:
    description = read_description(folder / "a/b/mine/data.yaml")
    for split in description.images:
        images, made = read_yolo(description, split)
        read_source(made, None, SourceSelection(allow_drops=True))
        assert images.is_dir()


def make_lines(folder: Path) -> None:
    lines = ({"file_name": "a.jpg", "text": "A dog."}, {"file_name": "b.jpg", "captions": ["A cat.", "One."], "x": 1})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "a.jpg").write_bytes(photo("JPEG"))


def read_captioned(folder: Path) -> None:
    read_source(None, read_lines(folder / "metadata.jsonl"), SourceSelection(allow_drops=True))


KINDS = {"a.jpg": "JPEG", "b.png": "PNG", "c.webp": "WEBP", "d.gif": "GIF", "e.tif": "TIFF", "f.bmp": "BMP"}


def make_images(folder: Path) -> None:
    for name, kind in KINDS.items():
        (folder / name).write_bytes(photo(kind))


def read_images(folder: Path) -> None:
    errors = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        image = SourceImage(1, path.name, 16, 12, b"{}", (), 0, 0, 0)
        check_image(data, image, "decode"), check_image(data, image, "header"), check_image(data, image, convert=True)
        try:
            if path.suffix in (".jpg", ".png"):
                decode_image(data)
            open_image(path)
        except ValueError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def make_weights(folder: Path) -> None:
    tensors = {f"module.layer.{n}.weight": torch.arange(12.0).reshape(3, 4) for n in range(3)}
    safetensors.torch.save_file(tensors, folder / "a.safetensors", {"format": "pt"})
    torch.save({"model": tensors, "epoch": 3}, folder / "a.pt")
    torch.save({"state_dict": tensors}, folder / "b.pt", _use_new_zipfile_serialization=False)
    for n in (1, 2):
        safetensors.torch.save_file({f"x.{n}": torch.ones(2)}, folder / f"m-{n}.safetensors")
    index = {"metadata": {"total_size": 16}, "weight_map": {f"x.{n}": f"m-{n}.safetensors" for n in (1, 2)}}
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))


def reads(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        file = open_weights(folder / name)
        for tensor in file:
            file.get(tensor).float().sum()
        recorded_bases(file)

    return read


def rezipped(name: str) -> m.Damage:
    """Damage inside a member of a zip, whose checksums fit."""

    def damage(rng: Any, files: m.Files) -> dict[str, bytes]:
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(files[name])) as old, zipfile.ZipFile(buffer, "w") as new:
            chosen = rng.choice(old.namelist())
            for member in old.namelist():
                data = old.read(member)
                inner = m.pickled(member) if member.endswith(".pkl") else m.raw(member)
                new.writestr(member, inner(rng, {member: data})[member] if member == chosen else data)
        return {name: buffer.getvalue()}

    return damage


STEP = "step_00000002"
_OF_STEP = ("state.json", "parameters.safetensors", "moments.safetensors")
CHECKPOINT = copy(*(f"qv/checkpoints/{STEP}/{name}>checkpoints/{STEP}/{name}" for name in _OF_STEP))


def read_checkpoint(folder: Path) -> None:
    checkpoint, skipped = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise ValueError(skipped[0])
    opened = open_checkpoint(checkpoint.path)
    state = opened.load()
    assert [sorted(named) for named in state.moments.values()] == [sorted(state.parameters)] * 2
    {name: float(value) for name, value in state.loss_scale.items()}
    opened.identity("precision")
    assert state.updates >= 0
    check_identity(opened, opened.record["identity"])


_FILES = {name: f"checkpoints/{STEP}/{name}" for name in _OF_STEP}

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def read_lora(folder: Path) -> None:
    adapter = read_change(folder / "adapter")
    adapter.describe(), adapter.fingerprint(), adapter.record(), adapter.timm
    for weight in adapter.weights():
        adapter.delta(weight)
    if adapter.timm is None and (folder / "base.safetensors").is_file():
        file, layout = open_tower(folder / "base.safetensors")
        adapter.fit(tower_in(file, layout))


def read_base(folder: Path) -> None:
    out = folder / "merged.safetensors"
    out.unlink(missing_ok=True)
    file, layout = open_tower(folder / "base.safetensors")
    resolve_tower(tower_in(file, layout))
    timm_settings(file)
    merge_into_file(folder / "base.safetensors", read_adapter(folder / "adapter"), out, allow_other_base=True)
    timm_settings(open_weights(out)), find_layout(open_weights(out))
    merge_into_file(
        out, read_adapter(folder / "adapter"), folder / "back.safetensors", unmerge=True, allow_other_base=True
    )


def make_visft(folder: Path) -> None:
    adapter = read_adapter(RUNS / "qv/export/adapter")
    write_visft_lora(adapter, folder / "lora.pt")


HEADS = tuple(f"{task}.safetensors" for task in TASKS)


def read_heads(folder: Path) -> None:
    infos = {task: read_head_info(find_head(folder, task), task) for task in TASKS}
    of_other_base(infos, set())
    classes_of_heads(infos)
    for info in infos.values():
        if "vocabulary" in info.extra:
            Vocabulary.from_dict(info.extra["vocabulary"])
        info.built_with()
    check_categories(infos, Manifest.load(RUNS / "shards", "val", check_shards=False).categories, "x", "y")
    for task in TASKS:
        load_heads(folder / f"{task}.safetensors", task)


def make_published(folder: Path) -> None:
    sizes = {"num_queries": 2, "encoder_dim": 16, "decoder_dim": 16, "ffn_dim": 16, "num_heads": 8}
    head = head_of("detection", 16, num_classes=3, encoder_layers=1, decoder_layers=1, **sizes)
    save_heads(head, folder / "heads.pt")


def read_run(folder: Path) -> None:
    config = recorded_config(folder).visft
    for key in paths_of(config):
        find(folder, config, key, "val")
    report_runs([folder], None, None)
    RunRecord({}, 1, [], {}).write(folder)
    RunRecord({}, 1, [], {}).write(folder)


def make_run(folder: Path) -> None:
    """A record of today: with schema, inputs, a parent and categories."""
    config = json.loads((RUNS / "qv/run.json").read_text())["config"]
    inputs = {
        DATA: {
            "path": str(RUNS / "shards"),
            "beside": "../shards",
            "split": "train",
            "fingerprint": read_manifest(RUNS / "shards", "train")["fingerprint"],
        }
    }
    parent = {"path": "/there", "beside": "../there", "step": 2, "sha256": "0" * 64}
    RunRecord(config, 2, ["visft", "train"], inputs, parent).write(folder)
    (folder / "inputs").mkdir()
    (folder / "inputs/categories.json").write_text('[{"id": 0, "coco_id": 1, "name": "star"}]')


def read_fork(folder: Path) -> None:
    resolve_arguments(["--from", str(folder)])
    read_run(folder)


def read_run_metrics(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    recorded_scores(path, "box/AP")
    for entry in read_metrics(path):
        {name: value for name, value in entry.items() if name.startswith("val/")}
        (
            entry["step"] <= 3,
            entry["kind"] == "step" and float(entry.get("loss/loss", 0)),
            float(entry.get("loss_scale", 1.0)),
        )
    {name: float(value) for name, value in truncate_metrics(path, 3).items()}


def draw_metrics(folder: Path) -> None:
    report_runs([folder], None, None)


def make_beats(folder: Path) -> None:
    for rank in (0, 1):
        beat = Beat("start", rank, "host", 2**22 + 5, "1", 3, 4, "step 1", 5, "", 0, "machine")
        (folder / f"rank_{rank:05d}.json").write_text(json.dumps(beat.__dict__))


def look_at_beats(folder: Path) -> None:
    peers = Peers(2, 0, 60, 60, 0.0)
    ended_well(folder, "")
    for now in (1.0, 20.0, 70.0):
        beats = {beat.rank: beat for beat in read_beats(folder) if beat.start == "start"}
        _, blamed = peers.look(beats, now, timed=True)
        [process_state(beat) for beat in blamed]
        sum(beat.code for beat in beats.values())


def make_words(folder: Path) -> None:
    (folder / "ours.json").write_text(json.dumps(Vocabulary(("a", "the", "star")).to_dict()))
    words = ["<pad>", "a", "star", "<unk>", "<start>", "<end>"]
    (folder / "map.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "categories.json").write_text(json.dumps({"star": 1, "ring": None, "*": None}))


def read_words(folder: Path) -> None:
    for name in ("ours.json", "map.json"):
        words = read_vocabulary(folder / name)
        words.encode("a star"), words.decode([1, 2, words.end]), json.dumps(words.to_dict())
    _read_map(folder / "categories.json")


def fit_words(changed: dict[str, bytes], files: m.Files) -> None:
    """The fingerprint of changed words fits."""
    try:
        fields = json.loads(changed["ours.json"])
        fields["fingerprint"] = Vocabulary(tuple(fields["words"])).fingerprint
        changed["ours.json"] = json.dumps(fields).encode()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return


def make_features(folder: Path) -> None:
    cache = FeatureCache(folder / "cache", {"base": "x"}, "fp32")
    for key in (1, 2):
        cache.put(key, key, (14, 28), StoredFeatures(torch.ones(4, 1, 2), None))
    cache.close()
    for path in (folder / "cache").rglob("*"):
        if path.is_file():
            path.rename(folder / ("features.tar" if path.suffix == ".tar" else "identity.json"))
    shutil.rmtree(folder / "cache")


def read_features(folder: Path) -> None:
    shutil.rmtree(folder / "cache", ignore_errors=True)
    own = FeatureCache(folder / "cache", {"base": "x"}, "fp32")
    other = folder / "cache/other"
    other.mkdir()
    shutil.copy(folder / "identity.json", other)
    assert own.folder is not None
    shutil.copy(folder / "features.tar", own.folder)
    own.others()
    for key in (1, 2):
        own.get(key, key)
    own.close()


def make_layer(folder: Path) -> None:
    whole = resolve(stage=1, model="debug", settings=["visft.data.root=shards"]).to_dict()
    (folder / "whole.json").write_text(json.dumps(whole))
    (folder / "set.txt").write_text(json.dumps({"num_queries": 4, "dropout": 0.1}))
    cluster = {"count": 8, "name": "X", "memory_gib": 80, "bandwidth_gb_s": 2000, "link_gb_s": 300}
    (folder / "cluster.json").write_text(json.dumps({**cluster, "tflops": {"fp32": 19.5, "bf16": 312}, "per_node": 4}))


def read_layer(folder: Path) -> None:
    resolve(file=folder / "whole.json")
    text = (folder / "set.txt").read_bytes().decode("utf-8", "replace")
    parse_assignment(f"visft.tasks.detection.head={text}")
    resolve(stage=1, model="debug", settings=[f"visft.tasks.detection.head={text}"])
    parse_cluster(str(folder / "cluster.json"))


def make_predictions(folder: Path) -> None:
    line = {
        "id": 1,
        "file_name": "a.jpg",
        "width": 4,
        "height": 3,
        "found": {"detection": [{"id": 1, "category_id": 1}]},
    }
    with Record(folder, {"model": "x"}) as record:
        record._write(line)


def read_predictions(folder: Path) -> None:
    with Record(folder, {"model": "x"}) as record:
        record.finish({1: "star"}, {})


def make_sets(folder: Path) -> None:
    for name in ("cat", "dog"):
        (folder / "objectnet/images" / name).mkdir(parents=True)
        (folder / "objectnet/images" / name / "1.jpg").write_bytes(photo("JPEG"))
    (folder / "objectnet/mappings").mkdir()
    (folder / "objectnet/mappings/folder_to_objectnet_label.json").write_text(json.dumps({"cat": "Cat", "dog": "Dog"}))
    (folder / "objectnet/mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps({"Cat": "cat", "Dog": "dog"}))
    (folder / "karpathy").mkdir()
    (folder / "karpathy/a.jpg").write_bytes(photo("JPEG"))
    images = [{"split": "test", "filename": "a.jpg", "sentences": [{"raw": "a star"}]}]
    (folder / "karpathy/dataset_flickr.json").write_text(json.dumps({"images": images}))
    (folder / "coco/val2017").mkdir(parents=True)
    (folder / "coco/val2017/a.jpg").write_bytes(photo("JPEG"))
    coco = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "a star"}]}
    (folder / "coco/annotations").mkdir()
    (folder / "coco/annotations/captions_val2017.json").write_text(json.dumps(coco))
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, data in (("a.jpg", photo("JPEG")), ("a.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for kind, data in (("images-idx3", bytes(9)), ("labels-idx1", b"\1")):
        axes = (1, 3, 3) if "3" in kind else (1,)
        head = bytes((0, 0, 8, len(axes))) + b"".join(axis.to_bytes(4, "big") for axis in axes)
        (folder / f"t10k-{kind}-ubyte").write_bytes(head + data)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / f"maps/{kind}/{part}").mkdir(parents=True)
            (folder / f"maps/{kind}/{part}/a.png").write_bytes(photo("PNG"))
        (folder / f"outlines/{part}2017").mkdir(parents=True)
        (folder / f"outlines/{part}2017/a.jpg").write_bytes(photo("JPEG"))
    with Image.open(folder / "maps/labels/train/a.png") as image:
        for part in ("train", "val"):
            image.convert("L").point(lambda level: level // 64).save(folder / f"maps/labels/{part}/a.png")
    box = {"image_id": 1, "category_id": 1, "iscrowd": 0, "area": 9.0, "bbox": [0, 0, 8, 8]}
    shapes = ([[0, 0, 8, 0, 8, 8]], {"size": [32, 32], "counts": [0, 500, 524]}, None)
    outlines = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 32, "width": 32}],
        "categories": [{"id": 1, "name": "star"}],
        "annotations": [{**box, "id": number, "segmentation": shape} for number, shape in enumerate(shapes)],
    }
    (folder / "outlines/annotations").mkdir()
    for part in ("train", "val"):
        (folder / f"outlines/annotations/instances_{part}2017.json").write_text(json.dumps(outlines))


_SETS = (
    "objectnet/mappings/folder_to_objectnet_label.json",
    "objectnet/mappings/objectnet_to_imagenet_1k.json",
    "karpathy/dataset_flickr.json",
    "coco/annotations/captions_val2017.json",
    "x.tar",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
    "maps/labels/train/a.png",
    "outlines/annotations/instances_train2017.json",
)


def read_sets(folder: Path) -> None:
    errors = []
    for read in (
        lambda: read_classes(str(folder / "objectnet")).images.read(0),
        lambda: read_captions(str(folder / "karpathy"), "test").images.read(0),
        lambda: read_captions(str(folder / "coco"), "val").images.read(0),
        lambda: from_tars([folder / "x.tar"], ".cls")[0].read(0),
        lambda: read_classes(str(folder), "test").images.read(0),
        lambda: read_train_and_test(str(folder / "maps"), None, None),
        lambda: read_train_and_test(str(folder / "outlines"), None, None),
    ):
        try:
            read()
        except ValueError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def make_configs(folder: Path) -> None:
    config = {"model_cfg": {"embed_dim": 8, "text_cfg": {"hf_tokenizer_name": "local-dir:x"}}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def make_backbone(folder: Path) -> None:
    settings = {"tag": "openai", "input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "test_vit", "pretrained_cfg": settings, "model_args": {"img_size": [224, 224]}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    named(str(folder))  # imports timm, which costs seconds


_M = "val.manifest.json"
READERS = (
    Reader(
        "shards",
        SPLIT,
        read_split,
        (
            m.raw(_M),
            m.record(_M),
            m.record(_M, m.manifest(_M)),
            m.record(_M, m.manifest(_M)),
            m.raw("val-000000.tar", "val.index.npy"),
            m.index_bytes("val"),
            m.index_rows("val"),
            m.labels("val"),
        ),
    ),
    Reader("evaluated shards", SPLIT, read_truth, (m.labels("val"), m.index_rows("val"), m.record(_M, m.manifest(_M)))),
    Reader(
        "verify",
        SPLIT,
        lambda folder: verify(folder, "val", decode=True),
        (
            m.raw(_M, "val-000000.tar", "val.index.npy"),
            m.record(_M, m.manifest(_M)),
            m.labels("val"),
            m.index_bytes("val"),
            m.index_rows("val"),
        ),
        (ValueError, OSError),
    ),
    Reader(
        "foreign tar",
        copy("shards/val-000000.tar"),
        lambda folder: read_shard(folder / "val-000000.tar", plain=True, decode=True),
        (m.raw("val-000000.tar"),),
    ),
    Reader(
        "COCO JSON",
        make_coco,
        read_coco,
        tuple(kind(f"{name}.json") for name in ("instances", "captions", "rules") for kind in (m.record, m.raw)),
    ),
    Reader(
        "YOLO",
        make_yolo,
        read_yolo_folder,
        tuple(
            kind(f"a/b/mine/{name}")
            for name in ("data.yaml", "train/labels/0.txt", "list.txt")
            for kind in (m.raw, m.words)
        ),
        share=0.5,
    ),
    Reader(
        "lines of captions",
        make_lines,
        read_captioned,
        (m.lines("metadata.jsonl"), m.raw("metadata.jsonl", "a.jpg")),
        share=0.5,
    ),
    Reader("images", make_images, read_images, (m.raw(*KINDS),)),
    Reader(
        "safetensors",
        make_weights,
        reads("a.safetensors"),
        (m.raw("a.safetensors"), m.safetensors_header("a.safetensors")),
    ),
    Reader("torch zip", make_weights, reads("a.pt"), (m.raw("a.pt"), m.pickled("a.pt"), rezipped("a.pt"))),
    Reader("torch legacy", make_weights, reads("b.pt"), (m.raw("b.pt"), m.pickled("b.pt"), m.pickled("b.pt"))),
    Reader(
        "weight shards",
        make_weights,
        reads("m.safetensors.index.json"),
        (m.record("m.safetensors.index.json"), m.raw("m.safetensors.index.json", "m-1.safetensors")),
    ),
    Reader(
        "checkpoint",
        CHECKPOINT,
        read_checkpoint,
        (
            m.raw(*_FILES.values()),
            m.record(_FILES["state.json"]),
            m.record(_FILES["state.json"], m.state(_FILES["state.json"])),
            *(
                m.hashed(_FILES["state.json"], name, kind(_FILES[name]))
                for name in _OF_STEP[1:]
                for kind in (m.raw, m.safetensors_header)
            ),
        ),
    ),
    Reader(
        "PEFT adapter",
        copy(
            *(f"qv/export/adapter/{name}>adapter/{name}" for name in ADAPTER),
            "qv/export/backbone.safetensors>base.safetensors",
        ),
        read_lora,
        (
            m.record("adapter/adapter_config.json"),
            m.raw(*(f"adapter/{name}" for name in ADAPTER)),
            m.safetensors_header("adapter/adapter_model.safetensors"),
            m.safetensors_header("adapter/adapter_model.safetensors", "visft_adapter"),
        ),
    ),
    Reader(
        "DoRA adapter",
        copy(*(f"dora/export/adapter/{name}>adapter/{name}" for name in ADAPTER)),
        read_lora,
        (m.record("adapter/adapter_config.json"), m.safetensors_header("adapter/adapter_model.safetensors")),
    ),
    Reader(
        "adapter of timm",
        copy("convnext2/export/adapter/lora.safetensors>adapter/lora.safetensors"),
        read_lora,
        (
            m.raw("adapter/lora.safetensors"),
            m.safetensors_header("adapter/lora.safetensors"),
            m.safetensors_header("adapter/lora.safetensors", "visft_module_adapter"),
        ),
    ),
    Reader(
        "ViSFT LoRA",
        make_visft,
        lambda folder: read_adapter(folder / "lora.pt").describe(),
        (m.pickled("lora.pt"), rezipped("lora.pt")),
    ),
    Reader(
        "base and merge",
        copy(
            *(f"qv/export/adapter/{name}>adapter/{name}" for name in ADAPTER),
            "qv/export/backbone.safetensors>base.safetensors",
        ),
        read_base,
        (
            m.raw("base.safetensors"),
            m.safetensors_header("base.safetensors"),
            m.safetensors_header("base.safetensors", "tower"),
            m.safetensors_header("adapter/adapter_model.safetensors", "visft_adapter"),
        ),
    ),
    Reader(
        "trained backbone",
        copy("full/export/trained_backbone.safetensors"),
        lambda folder: read_change(folder / "trained_backbone.safetensors").describe(),
        (m.safetensors_header("trained_backbone.safetensors"),),
    ),
    Reader(
        "heads",
        copy(*(f"stage1/export/{name}" for name in HEADS)),
        read_heads,
        (*(m.safetensors_header(name, "visft_head") for name in HEADS), m.safetensors_header(HEADS[0]), m.raw(*HEADS)),
        share=0.2,
    ),
    Reader(
        "published heads",
        make_published,
        lambda folder: load_heads(folder / "heads.pt", "detection"),
        (m.pickled("heads.pt"), rezipped("heads.pt")),
        share=0.3,
    ),
    Reader("run of 0.1", copy("qv/run.json"), read_run, (m.record("run.json"), m.raw("run.json")), share=0.3),
    Reader(
        "run",
        make_run,
        read_fork,
        (m.record("run.json"), m.raw("run.json"), m.record("inputs/categories.json"), m.raw("inputs/categories.json")),
        share=0.3,
    ),
    Reader("metrics", copy("qv/metrics.jsonl"), read_run_metrics, (m.lines("metrics.jsonl"), m.raw("metrics.jsonl"))),
    Reader("curves", copy("qv/run.json", "qv/metrics.jsonl"), draw_metrics, (m.lines("metrics.jsonl"),), share=0.05),
    Reader(
        "heartbeats",
        make_beats,
        look_at_beats,
        (m.record("rank_00001.json"), m.raw("rank_00001.json"), m.record("rank_00000.json")),
        (),
    ),
    Reader(
        "words",
        make_words,
        read_words,
        (
            m.record("ours.json"),
            m.record("ours.json", fit_words),
            m.record("map.json"),
            m.record("categories.json"),
            m.raw("ours.json", "map.json", "categories.json"),
        ),
    ),
    Reader(
        "features",
        make_features,
        read_features,
        (m.raw("features.tar"), m.record("identity.json"), m.raw("identity.json")),
    ),
    Reader(
        "configuration",
        make_layer,
        read_layer,
        (
            *(m.record(name) for name in ("whole.json", "set.txt", "cluster.json")),
            m.raw("whole.json", "cluster.json"),
        ),
    ),
    Reader(
        "predictions",
        make_predictions,
        read_predictions,
        (m.lines("predictions.jsonl"), m.raw("predictions.jsonl")),
    ),
    Reader("data of benchmarks", make_sets, read_sets, (*(m.record(name) for name in _SETS[:4]), m.raw(*_SETS))),
    Reader(
        "folders of models",
        make_configs,
        check_folder,
        (m.record("open_clip_config.json"), m.raw("open_clip_config.json")),
    ),
    Reader(
        "folders of backbones",
        make_backbone,
        lambda folder: named(str(folder)),
        (m.record("config.json"), m.raw("config.json")),
    ),
)

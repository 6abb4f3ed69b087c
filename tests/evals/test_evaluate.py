"""`visft evaluate` on the files of two finished runs: right numbers, any number of ranks, clear errors."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.coco_tree import write_tree
from tests.evals.conftest import IMAGES, QUERIES, SETTINGS, World, load_stage2, pack
from tests.published import save_published_head
from tests.random_tower import merge, save_backbone
from tests.ranks import run_ranks
from tests.tiny import MIXED, THREE
from visft_ds import distributed
from visft_ds.config import resolve
from visft_ds.data.loader import evaluation_batches
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.cli import main
from visft_ds.evals.evaluate import _Evaluation, evaluate
from visft_ds.evals.records import Evaluation, read_evaluation
from visft_ds.evaluation import collect
from visft_ds.interop.published import read_adapter
from visft_ds.prepare.model import prepare_model
from visft_ds.run_files import BACKBONE_FILE
from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.captioning.metrics import caption_metrics
from visft_ds.tasks.captioning.tokenizer import TOKENIZER
from visft_ds.tasks.transform import pipeline_of


def _evaluate(*arguments: Any) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), errors.getvalue()


def _finished(out: Path, *arguments: Any) -> Evaluation:
    """Evaluate without pictures; there must be nothing to complain about."""
    status, _, errors = _evaluate(*arguments, "--out", out, "--visualizations", 0)
    assert status == 0, errors
    return read_evaluation(out.name, out)


#: Of an image: boxes of all queries, and the best pairs of a mask and a class.
RESULTS = {"detection": QUERIES, "segmentation": 100}


def _found(evaluation: Evaluation, task: str) -> Results:
    results: Results = json.loads((evaluation.folder / f"{task}_results.json").read_text())
    return results


def _captions(evaluation: Evaluation) -> dict[int, str]:
    return {result["image_id"]: result["caption"] for result in _found(evaluation, "captioning")}


def _differ(first: Evaluation, second: Evaluation, task: str = "detection") -> tuple[float, float, int]:
    """Largest difference of a score and of a box, and how many classes differ, query by query."""
    pairs = list(zip(_found(first, task), _found(second, task), strict=True))
    assert len(pairs) == IMAGES * RESULTS[task] and all(a["image_id"] == b["image_id"] for a, b in pairs)
    boxes = [abs(x - y) for a, b in pairs for x, y in zip(a.get("bbox", ()), b.get("bbox", ()), strict=True)]
    score = max(abs(a["score"] - b["score"]) for a, b in pairs)
    return score, max(boxes, default=0.0), sum(a["category_id"] != b["category_id"] for a, b in pairs)


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """The evaluation of stage 2, as it comes."""
    return _finished(tmp_path_factory.mktemp("whole") / "out", "--run", world.run(2))


def test_numbers_are_those_of_pycocotools(whole: Evaluation, world: World) -> None:
    for task, kind, prefix in (("detection", "bbox", "box"), ("segmentation", "segm", "mask")):
        actual = _found(whole, task)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(world.tree.instances))
            judged = truth.loadRes([result for result in actual if result["category_id"] in truth.cats])
            oracle = COCOeval(truth, judged, kind)
            oracle.evaluate()
            oracle.accumulate()
            oracle.summarize()
        stats = oracle.stats[:3].tolist()
        assert 0.01 < stats[0] < 0.95, "the comparison below would not say much"
        measured = [whole.metrics[f"{prefix}/{name}"] for name in ("AP", "AP50", "AP75")]
        assert measured == pytest.approx(stats, abs=1e-9)
        assert len(actual) == IMAGES * RESULTS[task]
    said = [{"image_id": image, "caption": text} for image, text in _captions(whole).items()]
    expected = caption_metrics(json.loads(world.tree.captions.read_text()), said)
    assert {name: value for name, value in whole.metrics.items() if name.startswith("caption/")} == expected
    assert 0.05 < expected["caption/BLEU-4"] < 0.95 and expected["caption/CIDEr"] > 0


def test_the_model_is_the_one_that_trains(world: World) -> None:
    """Rebuilt from files and prepared for training, the same images give the same bits."""
    model, config = load_stage2(world), world.configs[2]
    prepared = prepare_model(
        config, heads_from=world.run(1) / "export", vocabulary=model.vocabulary
    ).module.eval()
    with torch.no_grad():
        for name, value in read_adapter(world.adapter).tensors.items():
            prepared.backbone.get_parameter(name).copy_(value)
    with ShardReader(Manifest.load(world.shards, "val")) as reader:
        for task, stream in config.visft.streams().items():
            pipeline = pipeline_of(stream, model.vocabulary, train=False)
            batch = next(iter(evaluation_batches(reader, pipeline, 3, 0, 1, np.arange(3))))
            with torch.no_grad():
                expected = prepared(batch)[task]
            got = model.predict(batch)[task]
            names = [name for name in vars(got) if isinstance(getattr(got, name), torch.Tensor)]
            assert names
            assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in names)


def test_merged_weights_do_what_the_adapter_does(world: World, whole: Evaluation, tmp_path: Path) -> None:
    merged = _finished(tmp_path / "merged", "--run", world.run(2), "--backbone", world.merged)
    base = _finished(tmp_path / "base", "--run", world.run(2), "--adapter", "none")
    same, effect = _differ(whole, merged), _differ(whole, base)
    assert effect[0] > 1e-2 and effect[1] > 1
    # W x + B A x against (W + B A) x in float32, through a random net that amplifies: far below what the
    # adapter does
    assert same[0] < 1e-3 * effect[0] and same[1] < 1e-3 * effect[1] and same[2] == 0
    same, effect = (_differ(whole, other, "segmentation") for other in (merged, base))
    assert effect[0] > 1e-3 and same[0] < 1e-2 * effect[0]
    assert _captions(merged) == _captions(whole) != _captions(base)


def test_heads_go_with_what_training_made_of_their_base(world: World, tmp_path: Path) -> None:
    """A fingerprint of content knows the base in another form, too, and merged weights say what they were
    made of.
    """
    base, other = (
        world.run(1) / "export" / BACKBONE_FILE,
        _save_plain(tmp_path / "other.safetensors", "visft.model.weights_seed=1"),
    )
    again = merge(base, None, tmp_path / "bf16.safetensors", "--dtype", "bf16")
    for name, file in {"base": again, "merged": world.merged, "other": other}.items():
        files = ["--heads", world.run(1) / "export", "--backbone", file, "--data", world.shards]
        found = _finished(tmp_path / name, *files, "--limit", 2, "--tasks", "detection")
        assert ("warning" in found.record["model"]) == (name == "other")
    assert "the detection head was trained on other base weights" in found.record["model"]["warning"]


def test_files_without_a_run(world: World, whole: Evaluation, tmp_path: Path) -> None:
    """Single files give what the run gives; a search with beams says something else."""
    export = world.run(1) / "export"
    files = ["--backbone", export / BACKBONE_FILE, "--heads", export, "--adapter", world.adapter]
    files += ["--data", world.shards, "--tasks", "captioning"]
    captions = _finished(tmp_path / "captions", *files, "--batch-size", 1)
    assert captions.record["data"] == whole.record["data"] and len(_captions(captions)) == IMAGES
    searched = _finished(tmp_path / "searched", *files, "--beam-size", 2)
    assert searched.record["decoding"]["captioning"]["beam_size"] == 2
    assert _captions(searched) != _captions(captions)


def test_results_of_an_image_do_not_depend_on_its_batch(world: World) -> None:
    """Pictures of different sizes, in evaluation as of a run without `fixed_size`."""
    model, found = load_stage2(world), []
    for batch_size in (1, 3):
        settings = {
            **MIXED,
            "visft.mode": "sampled",
            **{f"visft.tasks.{task}.micro_batch": batch_size for task in THREE},
        }
        given = [*SETTINGS, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
        streams = resolve(stage=2, model="debug", settings=given).visft.streams()
        with ShardReader(Manifest.load(world.shards, "val")) as reader:
            found.append(collect(model.predict, reader, streams, model.vocabulary))
    alone, together = found
    assert alone is not None and together is not None and alone.keys() == set(THREE)
    assert alone["captioning"] == together["captioning"]
    for task in ("detection", "segmentation"):
        for ours, theirs in zip(together[task], alone[task], strict=True):
            assert ours.get("segmentation") == theirs.get("segmentation")
            assert ours["category_id"] == theirs["category_id"]
            numbers = [[*one["bbox"], one["score"]] for one in (ours, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-4)  # boxes in pixels of 24 to 60


def test_two_ranks_find_what_one_finds(world: World, tmp_path: Path) -> None:
    """All tasks from one pass over the images (mode shared), each image once, and the same pictures."""
    common = ["--run", str(world.run(1)), "--visualizations", "1"]
    outputs = run_ranks(["-m", "visft_ds", "evaluate", *common, "--out", str(tmp_path / "two")])
    others = [line for line in outputs[1].splitlines() if not line.startswith("[Gloo]")]  # torch 2.10's own
    assert "mask/AP50" in outputs[0] and not others
    assert _evaluate(*common, "--out", tmp_path / "one")[0] == 0
    two, one = (read_evaluation(name, tmp_path / name) for name in ("two", "one"))
    assert two.record["processes"] == 2 and two.metrics == pytest.approx(one.metrics, abs=1e-6)
    # Image by image the same, whatever else was in the batch: float32 rounding of other batch sizes.
    for task in ("detection", "segmentation"):
        score, _, other = _differ(two, one, task)
        assert score < 1e-5 and other == 0
    assert _differ(two, one)[1] < 1e-3
    pairs = [[result["segmentation"] for result in _found(each, "segmentation")] for each in (two, one)]
    filled = [pair for pair in zip(*pairs, strict=True) if coco_mask.area(pair[0])]
    assert len(filled) > IMAGES and all(coco_mask.iou([a], [b], [0])[0, 0] > 0.99 for a, b in filled)
    assert list(_captions(two).items()) == list(_captions(one).items()) and len(_captions(two)) == IMAGES
    for task in THREE:
        pictures = [each.visualizations(task) for each in (two, one)]
        assert pictures[0].keys() == pictures[1].keys() and len(pictures[0]) > 0
        assert all(np.array_equal(pictures[0][image], pictures[1][image]) for image in pictures[0])


def test_some_of_the_tasks(world: World, whole: Evaluation, tmp_path: Path) -> None:
    """Numbers, what is printed and drawn; from Python, nothing is written unless asked for."""
    some = ["--run", world.run(2), "--tasks", "captioning, detection"]
    status, printed, errors = _evaluate(*some, "--visualizations", 1, "--out", tmp_path / "out")
    assert status == 0, errors
    evaluation = read_evaluation("", tmp_path / "out")
    assert evaluation.metrics == {
        name: of for name, of in whole.metrics.items() if not name.startswith("mask/")
    }
    assert not (tmp_path / "out/segmentation_results.json").exists() and TOKENIZER in printed
    for name in ("box/AP50", "caption/CIDEr"):
        assert re.search(rf"{name} +{evaluation.metrics[name]:.4f}", printed)
    for task in ("captioning", "detection"):
        drawn = next(iter(evaluation.visualizations(task).values()))
        assert (
            drawn.std() > 0 and np.asarray(Image.open(tmp_path / f"out/{task}.jpg")).shape[1] > drawn.shape[1]
        )
    found = evaluate(world.run(2), tasks="captioning, detection", limit=2)
    assert {task: len(of) for task, of in found.results.items()} == {
        "captioning": 2,
        "detection": 2 * QUERIES,
    }
    assert found.out is None and sorted(path.name for path in world.run(2).iterdir()) == [
        "export",
        "run.json",
    ]


def test_a_head_that_finds_nothing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subject = SimpleNamespace(task_facts={}, images=2, manifest="ab", folder=tmp_path)
    _Evaluation.print_results(subject, {"box/AP": 0.0}, {"detection": [], "captioning": [{}]}, 1.0)  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert "   detection  found nothing: no result of any score\n   box/AP     0.0000\n" in printed
    assert "captioning " not in printed.replace("captioning_results", "")


def test_no_rank_waits_while_one_measures(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python with several ranks, too, whose process group stays open."""
    done: list[str] = []
    monkeypatch.setattr(distributed, "close", lambda: done.append("close"))
    monkeypatch.setattr(
        "visft_ds.evals.evaluate.measure", lambda *_, **__: done.append("measure") or ({}, [])
    )
    for name in ("barrier", "gather_objects", "by_main_process"):
        own = getattr(distributed, name)
        monkeypatch.setattr(
            distributed, name, lambda *given, own=own, name=name: (done.append(name), own(*given))[1]
        )
    evaluate(world.run(2), tasks="detection", limit=2)
    assert done[-2:] == ["close", "measure"] and "gather_objects" in done
    done.clear()
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr("visft_ds.evals.evaluate.collect", lambda *_, **__: None)
    assert evaluate(world.run(2), tasks="detection", limit=2).metrics == {} and done == ["close"]


def test_published_heads_need_their_word_map(world: World, tmp_path: Path) -> None:
    """Files without any description of themselves: words come from beside, the rest from the tensors."""
    words = ["red", "green", "blue", "one"]
    torch.manual_seed(0)
    head = TASKS["captioning"].build_head(
        [(32, 14)], TASKS["captioning"].settings("head", {}), len(words) + 4
    )
    save_published_head(head, "captioning", tmp_path / "heads/eva_e_caption_heads.ckpt")
    files = ["--backbone", world.run(1) / "export" / BACKBONE_FILE, "--heads", tmp_path / "heads"]
    common = [*files, "--data", world.shards, "--limit", 2]
    word_map = {word: index for index, word in enumerate(["<pad>", *words, "<unk>", "<start>", "<end>"])}
    (tmp_path / "words.json").write_text(json.dumps(word_map))
    evaluation = _finished(tmp_path / "out", *common, "--vocabulary", tmp_path / "words.json")
    said = {word for caption in _captions(evaluation).values() for word in caption.split()}
    assert said and said <= set(words)
    status, _, errors = _evaluate(*common, "--out", tmp_path / "no")
    assert status == 2 and "--vocabulary FILE" in errors


def _save_plain(path: Path, setting: str) -> Path:
    config = resolve(stage=1, model="debug", settings=[*SETTINGS, "visft.tasks=detection", setting])
    save_backbone(prepare_model(config).module.backbone, path)
    return path


def test_mistakes_are_named(world: World, tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree", 3)
    pack(tree, tmp_path / "silent", captions=False)
    tree.edit(lambda content: content["categories"][0].update(name="stranger"))
    pack(tree, tmp_path / "strange")
    wide = _save_plain(tmp_path / "wide.safetensors", "visft.model.overrides.width=64")
    for stage, words, said in (
        (2, ["--backbone", world.merged, "--adapter", world.adapter], "twice"),
        (1, ["--backbone", wide], "does not fit"),
        (
            0,
            ["--backbone", wide, "--heads", world.run(1) / "export", "--data", world.shards],
            "maps of width",
        ),
        (1, ["--data", tmp_path / "strange"], "stranger"),
        (1, ["--data", tmp_path / "silent"], "no captions"),
    ):
        run = ["--run", world.run(stage)] if stage else []
        status, printed, errors = _evaluate(*run, *words, "--out", tmp_path / "out", "--visualizations", 0)
        assert status == 2 and printed.count("box/") == 0 and said in errors
        assert not (tmp_path / "out").exists()


def test_a_task_that_cannot_be_judged_takes_nothing_from_the_others(
    world: World, whole: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of predictions are written all the same, and so are the other tasks' numbers."""

    def judge(*_: Any) -> dict[str, float]:
        raise ValueError("the score of a result for image_id 7 is nan")

    monkeypatch.setattr(TASKS["detection"], "measure", judge)
    status, printed, errors = _evaluate(
        "--run", world.run(2), "--out", tmp_path / "out", "--visualizations", 0
    )
    assert status == 2 and errors == "evaluate: detection: the score of a result for image_id 7 is nan\n"
    assert "mask/AP50" in printed and "caption/CIDEr" in printed and "box/" not in printed
    kept = {name: value for name, value in whole.metrics.items() if not name.startswith("box/")}
    assert read_evaluation("out", tmp_path / "out").metrics == kept
    written = (tmp_path / "out" / "detection_results.json").read_bytes()
    assert written == (whole.folder / "detection_results.json").read_bytes()

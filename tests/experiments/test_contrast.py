"""tools/contrast.py from the command line to a file that evaluation, training and open_clip read."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.clip_case import make_clip, save_clip
from tests.ranks import run_ranks
from visft_ds.evals.benchmarks.class_sets import read_classes
from visft_ds.evals.benchmarks.models import LoadOptions, load_encoder, parse_model
from visft_ds.experiments.contrastive.cli import main
from visft_ds.experiments.contrastive.output import RECORD
from visft_ds.interop.adapter import adapter_of
from visft_ds.interop.backbones import load_backbone
from visft_ds.interop.files import open_weights, sha256_file
from visft_ds.interop.layouts import tower_of
from visft_ds.interop.merge import check_base, read_adapter
from visft_ds.interop.open_clip import CONFIG, FILE
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.models.eva_vit import build_backbone
from visft_ds.models.lora import inject_lora
from visft_ds.shards.build import Options, build
from visft_ds.toy.annotations import write_toy_coco
from visft_ds.toy.classes import class_names, write_toy_classes

SIDE, TRAIN, VAL = 28, 96, 48
TOWER = {"width": 32, "depth": 1, "num_heads": 2, "image_size": SIDE, "patch_size": 7}
SMALL = [
    *(word for name, value in TOWER.items() for word in ("--set", f"{name}={value}")),
    *("--text-width", "32", "--text-layers", "1", "--embedding", "16", "--batch-size", "32", "--lr", "3e-3"),
    *("--log-every", "1000"),
]
#: Of each text tower: what must be another value after training, by the names in the file.
TRAINED = {
    "all": "text.",
    "lora": "text.transformer.resblocks.0.attn.in_proj_weight",
    "projection": "text.text_projection",
}


def run(*arguments: Any) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main([str(word) for word in arguments])
    return status, out.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "coco"
    write_toy_coco(out, train=TRAIN, val=VAL, height=SIDE, width=SIDE)
    return out


@pytest.fixture(scope="module")
def pretrained(tree: Path) -> Path:
    out = tree.parent / "clip"
    status, said, errors = run("pretrain", "--data", tree, "--out", out, *SMALL, "--steps", 90)
    assert status == 0, errors
    assert "image to text R@5" in said and str(out / FILE) in said
    return out


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / RECORD).read_text())
    return record


def test_pretraining_learns_and_finds_images_it_has_not_seen(pretrained: Path) -> None:
    record = record_of(pretrained)
    losses, recall = record["losses"], record["recall"]
    assert len(losses) == 90 and sum(losses[-9:]) < 0.75 * sum(losses[:9])
    chance = 5 / VAL  # five captions of an image among all of them; the best one counts
    for way in ("image to text R@5", "text to image R@5"):
        assert recall["after"][way] > max(2 * chance, recall["before"][way])


def test_open_clip_loads_the_folder_and_computes_the_same(pretrained: Path) -> None:
    model = open_clip.create_model(f"local-dir:{pretrained}").eval()
    encoder = load_encoder(parse_model(str(pretrained / FILE)), LoadOptions("fp32"))
    texts, images = ["A red star.", "two blue bars on a lined gray background"], torch.randn(3, 3, SIDE, SIDE)
    assert encoder.text is not None and encoder.side == SIDE
    with torch.no_grad():
        wanted = model.encode_image(images, normalize=True)
        torch.testing.assert_close(encoder.module(images, ("clip",))["clip"], wanted, rtol=1e-5, atol=1e-6)
        wanted = model.encode_text(open_clip.get_tokenizer(f"local-dir:{pretrained}")(texts), normalize=True)
        torch.testing.assert_close(encoder.text.encode(texts), wanted, rtol=1e-5, atol=1e-6)
    assert json.loads((pretrained / CONFIG).read_text())["model_cfg"]["vision_cfg"]["image_size"] == SIDE


def test_the_file_is_base_weights_of_a_training(pretrained: Path) -> None:
    backbone = build_backbone("debug", seed=None, **TOWER)  # as training builds it: without class token
    summary = load_backbone(backbone, pretrained / FILE)
    assert f" {len(list(backbone.parameters()))} tensors" in summary and "(CLIP projection)" in summary
    random = build_backbone("debug", seed=0, **TOWER)
    assert (backbone.blocks[0].attn.qkv.weight != random.blocks[0].attn.qkv.weight).float().mean() > 0.99


def test_the_same_command_gives_the_same_bytes_from_shards_too(tree: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for split in ("train", "val"):
        annotations = tree / "annotations"
        build(
            Options(
                images=tree / f"{split}2017",
                instances=annotations / f"instances_{split}2017.json",
                captions=annotations / f"captions_{split}2017.json",
                out=shards,
                split=split,
            )
        )
    words = [*SMALL, "--steps", 3, "--val-split", "none"]
    for name, data in (("one", tree), ("two", tree), ("three", shards)):
        assert run("pretrain", "--data", data, "--out", tmp_path / name, *words)[0] == 0
    one, two = ((tmp_path / name / FILE).read_bytes() for name in ("one", "two"))
    assert one == two
    # Shards are in another order, and their decoder rounds otherwise: the same pairs are learnt from, no more.
    assert record_of(tmp_path / "three")["losses"] == pytest.approx(record_of(tmp_path / "one")["losses"], rel=0.2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "shards", "three", "two"]  # nothing temporary


@pytest.mark.parametrize("train", sorted(TRAINED))
def test_text_training_changes_what_it_says_and_nothing_else(
    tree: Path, pretrained: Path, tmp_path: Path, train: str
) -> None:
    words = ["--data", tree, "--split", "val", "--val-split", "none", "--train", train, "--rank", 2, "--threads", 0]
    words += ["--steps", 8, "--batch-size", 32, "--lr", "1e-2", "--log-every", 1000]
    status, _, errors = run("text", "--model", pretrained / FILE, *words, "--out", tmp_path / "out")
    assert status == 0, errors
    before, after = load_file(pretrained / FILE), load_file(tmp_path / "out" / FILE)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    wanted = {name for name in before if name.startswith(TRAINED[train])} | {"logit_scale"}
    assert changed == wanted
    losses = record_of(tmp_path / "out")["losses"]
    assert sum(losses[-3:]) < sum(losses[:3])
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()  # the vision tower out of its own folder
    assert torch.equal(model.logit_scale, after["logit_scale"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_micro_batches_give_the_gradient_of_the_whole(tree: Path, pretrained: Path, tmp_path: Path) -> None:
    words = ["--data", tree, "--val-split", "none", "--steps", 4, "--batch-size", 24, "--lr", "1e-3", "--threads", 0]
    for name, more in (("whole", []), ("parts", ["--micro-batch", 7])):
        assert run("text", "--model", pretrained / FILE, *words, *more, "--out", tmp_path / name)[0] == 0
    assert_same_model(tmp_path / "whole", tmp_path / "parts")


def assert_same_model(one: Path, two: Path) -> None:
    """Sums of gradients in another order: fp32 rounding, which Adam's first steps make a share of the step of."""
    ours, theirs = load_file(one / FILE), load_file(two / FILE)
    for name, value in ours.items():
        torch.testing.assert_close(
            theirs[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in ("losses", "gradient_norms"):  # Adam forgives a gradient that is twice as long, these do not
        assert record_of(one)[name] == pytest.approx(record_of(two)[name], rel=1e-4)


@pytest.mark.slow
def test_two_processes_are_one(tree: Path, pretrained: Path, tmp_path: Path) -> None:
    words = ["--data", tree, "--val-split", "none", "--steps", 4, "--batch-size", 24, "--lr", "1e-3", "--threads", 0]
    words = [str(word) for word in ("text", "--model", pretrained / FILE, *words)]
    assert run(*words, "--out", tmp_path / "one")[0] == 0
    run_ranks(["tools/contrast.py", *words, "--out", str(tmp_path / "two")])
    assert_same_model(tmp_path / "one", tmp_path / "two")


def test_text_side_of_an_open_clip_model(tree: Path, tmp_path: Path) -> None:
    """CLIP's own architecture: text tower at the top of the model, vision tower of open_clip."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 64, "patch_size": 7},
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "Tiny-contrast.json").write_text(json.dumps(config))
    model = f"open_clip:{tmp_path}/Tiny-contrast.json:random"
    words = ["--data", tree, "--split", "val", "--val-split", "none", "--steps", 3, "--batch-size", 16, "--threads", 0]
    torch.manual_seed(5)
    status, _, errors = run("text", "--model", model, *words, "--train", "lora", "--out", tmp_path / "out")
    assert status == 0, errors
    torch.manual_seed(5)
    before = open_clip.create_model("Tiny-contrast", load_weights=False).state_dict()
    after = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"transformer.resblocks.0.attn.in_proj_weight", "logit_scale"}
    (tmp_path / "Tiny-sigmoid.json").write_text(json.dumps({**config, "init_logit_bias": -10.0}))
    model = f"open_clip:{tmp_path}/Tiny-sigmoid.json:random"
    status, _, errors = run("text", "--model", model, *words, "--out", tmp_path / "sigmoid")
    assert status == 2 and "sigmoid loss of SigLIP" in errors


def test_eva_clips_file_with_an_adapter_keeps_its_vision_tower(tree: Path, tmp_path: Path) -> None:
    """A flat EVA-CLIP file in half precision: open_clip's names come out, and what did not train in its own dtype.

    The texts learn from what the adapter makes of the images, and the adapter stays out of the file.
    """
    base = save_clip(make_clip().half(), tmp_path / "clip.safetensors", layout="eva_clip")
    backbone: Any = load_encoder(parse_model(str(base)), LoadOptions("fp32")).module.backbone
    inject_lora(backbone, rank=2, alpha=2)
    for name, parameter in backbone.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    save_peft_adapter(adapter_of(backbone, base_sha256=sha256_file(base)), tmp_path / "adapter", tower_of(backbone))
    words = ["--data", tree, "--split", "val", "--val-split", "none", "--steps", 2, "--batch-size", 8, "--threads", 0]
    words += ["--train", "projection", "--precision", "fp32"]
    before, losses = load_file(base), []
    for number, model in enumerate((base, f"{base}+{tmp_path}/adapter")):
        out = tmp_path / f"out{number}"
        status, _, errors = run("text", "--model", model, *words, "--out", out)
        assert status == 0, errors
        losses.append(record_of(out)["losses"])
        after = load_file(out / FILE)
        for name, value in before.items():
            new = after[name.replace("visual.", "visual.trunk.")]
            if name in ("text.text_projection", "logit_scale"):
                assert new.dtype == torch.float32 and not torch.equal(new, value.float())
            else:
                assert new.dtype == value.dtype and torch.equal(new, value)
    assert losses[0][0] != losses[1][0]
    assert "adapter, times 1" in str(record_of(tmp_path / "out1")["facts"])
    # The adapter belongs to the tower, whatever texts stand beside it; one for another tower is still refused.
    tuned, adapter = tmp_path / "out1" / FILE, read_adapter(tmp_path / "adapter")
    load_encoder(parse_model(f"{tuned}+{tmp_path}/adapter"), LoadOptions("fp32"))
    assert check_base(open_weights(tuned), adapter, allow_other=False)[1] == []
    with pytest.raises(ValueError, match="trained on the base with sha256 other"):
        check_base(open_weights(tuned), replace(adapter, base_sha256="other"), allow_other=False)


def test_dry_run_writes_nothing(tree: Path, pretrained: Path, tmp_path: Path) -> None:
    status, said, _ = run("pretrain", "--data", tree, "--out", tmp_path / "out", *SMALL, "--dry-run")
    assert status == 0 and "width 32, depth 1" in said
    status, said, _ = run(
        "text", "--model", pretrained / FILE, "--data", tree, "--batch-size", 8, "--out", tmp_path / "out", "--dry-run"
    )
    assert status == 0 and "the vision tower is frozen" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "--data", "nowhere"], "nowhere: no such folder"),
        (["pretrain", "--data", "TREE", "--batch-size", "97"], "give 2 to 96"),
        (["pretrain", "--data", "TREE", "--split", "test"], "captions_test2017.json"),
        (["pretrain", "--data", "TREE", "--set", "widht=3"], "did you mean 'width'"),
        (["pretrain", "--data", "TREE", "--set", "width=1.5"], "width is a whole number"),
        (["pretrain", "--data", "TREE", "--set", "depth=true"], "depth is a whole number"),
        (["pretrain", "--data", "TREE", "--text-width", "100"], "at most 64, or a multiple"),
        (["pretrain", "--data", "TREE", "--steps", "0"], "steps=0"),
        (["text", "--data", "TREE", "--model", "nowhere.pt"], "does not exist"),
        (["text", "--data", "TREE", "--model", "timm:test_vit:random", "--batch-size", "8"], "no text side"),
        (
            ["text", "--data", "TREE", "--model", "CLIP", "--rank", "0", "--train", "lora", "--batch-size", "8"],
            "rank 0",
        ),
        (["text", "--data", "TREE", "--model", "CLIP", "--micro-batch", "0"], "micro batch of 0"),
        (["text", "--data", "TREE", "--model", "CLIP#blocks.0", "--batch-size", "8"], "give the whole model"),
    ],
)
def test_what_is_wrong_is_said(tree: Path, pretrained: Path, tmp_path: Path, words: list[str], said: str) -> None:
    clip = str(pretrained / FILE)
    places = {"TREE": str(tree), "CLIP": clip, "CLIP#blocks.0": f"{clip}#blocks.0"}
    status, _, errors = run(*(places.get(word, word) for word in words), "--out", tmp_path / "out")
    assert status == 2 and said in errors, errors
    assert list(tmp_path.iterdir()) == []


def test_bad_data_and_files_are_named(tree: Path, pretrained: Path, tmp_path: Path) -> None:
    own = tmp_path / "tree"
    shutil.copytree(tree, own)
    first = min((own / "val2017").iterdir())
    words = ["pretrain", "--data", own, "--split", "val", "--val-split", "none", *SMALL, "--out", tmp_path / "out"]
    first.write_bytes(first.read_bytes()[:300])
    assert "cannot be read as an image" in run(*words)[2]
    first.unlink()
    assert first.name in run(*words)[2]
    backbone = tmp_path / "tower.safetensors"
    whole = load_file(pretrained / FILE)
    metadata = {"tower": json.dumps({"num_heads": 2, "post_norm": False})}
    save_file({k.removeprefix("visual.trunk."): v for k, v in whole.items() if "trunk" in k}, backbone, metadata)
    text = ["text", "--data", tree, "--batch-size", 8, "--out", tmp_path / "out"]
    assert "without text side" in run(*text, "--model", backbone)[2]
    narrow = tmp_path / "narrow.safetensors"
    whole["text.token_embedding.weight"] = whole["text.token_embedding.weight"][:1000].clone()
    save_file(whole, narrow, metadata)
    assert "trained with another tokenizer" in run(*text, "--model", narrow)[2]
    (tmp_path / "out").mkdir()
    assert "exists and is not overwritten" in run(*words)[2]


def test_toy_classes_are_what_benchmarks_read(tmp_path: Path) -> None:
    for kind in ("shape", "colour"):
        options: dict[str, Any] = {"train": 12, "test": 25, "height": SIDE, "width": SIDE, "style": "b"}
        write_toy_classes(tmp_path / kind, kind, **options)
        write_toy_classes(tmp_path / f"{kind} again", kind, **options)
        data = read_classes(str(tmp_path / kind))
        assert len(data.images) == 25 and len(data.classes) == 12
        assert [name.removeprefix("an ").removeprefix("a ") for name in data.classes] == class_names(kind, "b")
        assert read_classes(str(tmp_path / kind), "train").classes == data.classes
        files = sorted(path.relative_to(tmp_path / kind) for path in (tmp_path / kind).rglob("*.jpg"))
        assert all((tmp_path / kind / f).read_bytes() == (tmp_path / f"{kind} again" / f).read_bytes() for f in files)
    with pytest.raises(ValueError, match="12 classes need as many test images"):
        write_toy_classes(tmp_path / "few", "shape", **(options | {"test": 11}))
    with pytest.raises(ValueError, match="no toy classes of 'size'"):
        write_toy_classes(tmp_path / "few", "size", **options)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """open_clip tells at length what it loads."""
    logging.getLogger().setLevel(logging.WARNING)

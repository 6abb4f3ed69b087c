"""Numbers that others published, by the published protocols: the column "ours", which takes a GPU and the
data.

VISFT_WEIGHTS names a folder of NAME.safetensors for names of timm; VISFT_VOC, VISFT_ADE20K, VISFT_NYU and
VISFT_IMAGENET name the data. What is not there is skipped. A published number may be the best of several test
evaluations; ours is not.

Sources: linear VOC, and DINO's and DINOv2's ADE20k and NYU: Jiawei-Yang/Denoising-ViT, README.md (whose
recipe has decay 1e-4, no dropout and a linear fall of the rate); DINOv3's: facebookresearch/dinov3,
MODEL_CARD.md; ImageNet: facebookresearch/dinov2, MODEL_CARD.md; in-context VOC:
vpariza/open-hummingbird-eval, README.md.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visft_ds.evals.judge.benchmark import PUBLISHED_SIDE, ImageSet
from visft_ds.evals.judge.classes import ClassSet
from visft_ds.evals.judge.classification import classification
from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.evals.judge.depth import RMSE
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.kinds import parse_benchmark
from visft_ds.evals.judge.model_text import parse_model
from visft_ds.evals.judge.models import load_encoder
from visft_ds.evals.judge.protocol import PUBLISHED, QUICK
from visft_ds.evals.judge.segmentation import segmentation

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

DINO = ("vit_small_patch16_224.dino", "vit_base_patch16_224.dino")
DINOV2 = tuple(f"vit_{size}_patch14_dinov2.lvd142m" for size in ("small", "base", "large", "giant"))
DINOV3 = tuple(
    f"vit_{size}_patch16_dinov3.lvd1689m" for size in ("small", "small_plus", "base", "large", "huge_plus")
)
NUMBERS: list[tuple[str, str, str, tuple[str, ...], tuple[float, ...]]] = [
    ("segmentation", "VOC", "linear mIoU", (*DINOV2[:3], DINO[1]), (81.8, 83.5, 83.4, 62.9)),
    ("segmentation", "ADE20K", "linear mIoU", (*DINOV2[:3], DINO[1]), (44.1, 47.0, 47.5, 31.0)),
    ("segmentation", "ADE20K", "linear mIoU", DINOV3, (47.0, 48.8, 51.8, 54.9, 54.8)),
    ("depth", "NYU", "RMSE", (*DINOV2[:3], DINO[1]), (0.434, 0.397, 0.383, 0.574)),
    ("depth", "NYU", "RMSE", DINOV3, (0.403, 0.399, 0.373, 0.352, 0.352)),
    ("classification", "IMAGENET", "kNN", DINOV2, (79.0, 82.1, 83.5, 83.5)),
    ("classification", "IMAGENET", "linear", DINOV2, (81.1, 84.5, 86.3, 86.5)),
    ("segmentation", "VOC", "in-context mIoU", (*DINO, *DINOV2), (46.6, 55.7, 77.0, 76.9, 74.8, 73.6)),
]
CASES = [
    (kind, data, number, model, value)
    for kind, data, number, models, values in NUMBERS
    for model, value in zip(models, values, strict=True)
]


@pytest.mark.parametrize(("kind", "data", "number", "model", "published"), CASES)
def test_a_published_number(
    kind: str, data: str, number: str, model: str, published: float, tmp_path: Path
) -> None:
    """Within a point, or within 0.01 m."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    folder, weights = os.environ.get(f"VISFT_{data}"), os.environ.get("VISFT_WEIGHTS")
    if not folder or not weights or not Path(weights, f"{model}.safetensors").is_file():
        pytest.skip(f"VISFT_{data} and VISFT_WEIGHTS with {model}.safetensors are not there")
    benchmark = parse_benchmark(f"{kind}={folder}", PUBLISHED)
    encoder = load_encoder(parse_model(f"timm:{model}:{weights}/{model}.safetensors"), "fp32")
    patch = encoder.module.backbone.patch_size  # type: ignore[union-attr]
    encoder = replace(encoder, side=PUBLISHED_SIDE // patch * patch)  # type: ignore[operator]
    settings = Settings(torch.device("cuda"), "fp32", tmp_path, 16, 8)
    assert benchmark.published is not None
    (score,) = benchmark.published(encoder, settings, [number])
    if number == RMSE.name:
        assert score.value == pytest.approx(published, abs=0.01)
    else:
        assert 100 * score.value == pytest.approx(published, abs=1.0)


def _numbers(device: torch.device) -> dict[str, float]:
    """Quick numbers of features that lie on a device."""
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 3, (2, 2)).repeat(16, 0).repeat(16, 1).astype(np.uint8) for _ in range(40)]
    images = ImageSet([""] * 40, lambda _: Image.new("RGB", (2, 2)), "x", stretched=True)
    dense = DenseSet(images, lambda number: labels[number], ("a", "b", "c"))
    classes = ClassSet(images, np.array([int(label[0, 0]) for label in labels]), ("a", "b", "c"))
    codes = torch.from_numpy(rng.normal(size=(3, 8))).float()
    truth = torch.from_numpy(np.stack([label[8::16, 8::16] for label in labels])).long()
    patches = codes[truth].permute(0, 3, 1, 2) + torch.from_numpy(rng.normal(size=(40, 8, 2, 2))).float()
    few = replace(QUICK, segmentation=replace(QUICK.segmentation, steps=60, warm_up=2, rate=0.02))
    features = {"patches": patches.to(device), "pooled": patches[:, :, 0, 0].to(device)}
    parts = {"train": features, "test": features}
    found = {}
    for benchmark in (segmentation("s", dense, dense, few), classification("c", classes, classes, few)):
        for score in benchmark.scores(parts, benchmark.names):
            assert score.retrained is not None
            found[f"{benchmark.label} {score.name}"] = score.value
    return found


def test_probes_on_a_gpu_say_what_they_say_on_a_cpu() -> None:
    """Neighbours, heads and logistic regression, of features that lie where VISFT_DEVICE says."""
    device = torch.device(os.environ.get("VISFT_DEVICE", "cuda"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    ours = _numbers(device)
    for name, value in _numbers(torch.device("cpu")).items():
        assert ours[name] == pytest.approx(value, abs=0.02) and value > 0.5, name

"""Parts of an exported graph beside what they have to equal, without an export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tvf

from visft_ds.cli import main
from visft_ds.data.transforms import Crop, Pad, Resize
from visft_ds.export.answers import Picture
from visft_ds.export.graph import Frame, resized
from visft_ds.export.verify import Difference
from visft_ds.ops.deform_attn import gathered
from visft_ds.predict.results import Prediction
from visft_ds.tasks.masks.interpolation import interpolated


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(48, 64, (32, 32)), (64, 43, (32, 32)), (10, 7, (32, 32)), (43, 64, (43, 64)), (128, 96, (32, 17))],
)
def test_pictures_are_scaled_exactly_as_training_scales_them(
    height: int, width: int, size: tuple[int, int]
) -> None:
    """Byte by byte, larger and smaller: boxes could not be equal to a thousandth of a pixel otherwise."""
    noise = torch.randint(0, 256, (2, height, width, 3), generator=torch.Generator().manual_seed(0))
    pictures = noise.to(torch.uint8).permute(0, 3, 1, 2)
    expected = tvf.resize(pictures, list(size), antialias=True)
    assert torch.equal(resized(pictures.float(), size).to(torch.uint8), expected)


@pytest.mark.parametrize(("size", "padded"), [((32, 32), (32, 32)), ((30, 41), (32, 48))])
def test_maps_are_interpolated_as_in_an_evaluation(size: tuple[int, int], padded: tuple[int, int]) -> None:
    maps = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    shares = [side / whole for side, whole in zip(size, padded, strict=True)]
    expected = interpolated(maps, shares, (61, 83))
    fine = Picture(61, 83, size, padded).fine(maps)
    torch.testing.assert_close(fine, expected, rtol=0, atol=2e-6)  # float32 beside float64 positions


def test_points_are_gathered_as_grid_sample_takes_them() -> None:
    """Inside, across the border and beyond it."""
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 2, 5, 7, generator=random)
    points = 2.6 * torch.rand(3, 11, 4, 2, generator=random) - 1.3
    expected = F.grid_sample(maps, points, mode="bilinear", padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(gathered(maps, points), expected, rtol=0, atol=2e-6)


def test_a_frame_is_what_evaluation_makes_of_a_picture() -> None:
    assert Frame.of([Resize(30, 41)], 14) == ((30, 41), (42, 42))
    assert Frame.of([Resize(30, 41), Pad(32, 64, 128, outside=True)], 16) == ((30, 41), (32, 64))
    with pytest.raises(ValueError, match="no export has"):
        Frame.of([Crop(0, 0, 4, 4)], 14)


def _prediction(*boxes: tuple[int, float, float]) -> Prediction:
    """Prediction of boxes of a category, a score and a left side."""
    results = [
        {"category_id": id_, "score": score, "bbox": [left, 2.0, 5.0, 5.0]} for id_, score, left in boxes
    ]
    return Prediction(np.zeros((20, 20, 3), np.uint8), None, {}, {"detection": results})


def test_what_differs_from_our_predictions_is_said() -> None:
    """Equal scores may stand in any order; a pixel, a score, a category and a number may not differ."""
    ours = _prediction((1, 0.9, 3.0), (2, 0.9, 4.0))
    for theirs, word in (
        (_prediction((2, 0.9, 4.0), (1, 0.9, 3.0)), ""),
        (_prediction((1, 0.9, 3.01), (2, 0.9, 4.0)), "pixels"),
        (_prediction((1, 0.9001, 3.0), (2, 0.9, 4.0)), "scores"),
        (_prediction((1, 0.9, 3.0), (1, 0.9, 4.0)), "categories"),
        (_prediction((1, 0.9, 3.0)), "1 objects, ours 2"),
    ):
        difference = Difference("detection")
        difference.add(ours, theirs)
        text = "; ".join(difference.problems())
        assert word in text and bool(word) == bool(text), text


@pytest.mark.parametrize("bits", ["--half", "--int8"])
def test_fewer_bits_need_a_task_whose_loss_is_measured(
    bits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing compares the maps of a backbone alone; refused before the run is read."""
    words = ["export", str(tmp_path), "--tasks", "none", bits, "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert f"{bits} needs a task" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

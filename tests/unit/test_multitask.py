"""The joint model's own part: pixels, padding and the valid region."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.integration.engine_case import as_batch, build, normaliser
from visft_ds.data.samples import DetectionTargets
from visft_ds.multitask import PIXEL_MEAN, normalise_pixels, valid_region


def test_padding_has_the_mean_colour_and_pixels_are_imagenet_normalised() -> None:
    images = torch.full((1, 3, 4, 6), 255, dtype=torch.uint8)
    pixels = normalise_pixels(images, torch.tensor([[2, 5]]))
    assert pixels[0, 0, 0, 0].item() == pytest.approx((1 - PIXEL_MEAN[0]) / 0.229, rel=1e-6)  # fp32
    assert pixels[0, :, 2:].abs().max() == 0 and pixels[0, :, :, 5:].abs().max() == 0


def test_valid_region_samples_the_pixel_mask_as_nearest_interpolation_does() -> None:
    sizes = torch.tensor([[40, 57], [61, 30]])
    height, width, grid = 61, 57, (4, 4)
    mask = torch.zeros(2, 1, height, width)
    for image, (h, w) in enumerate(sizes.tolist()):
        mask[image, :, :h, :w] = 1
    expected = F.interpolate(mask, size=grid, mode="nearest")[:, 0].bool()
    assert torch.equal(valid_region(sizes, (height, width), grid), expected)


def test_an_image_lower_than_a_patch_trains() -> None:
    module, _ = build(1)
    targets = DetectionTargets(torch.tensor([[0.5, 0.5, 0.2, 0.9]]), torch.tensor([3]), torch.tensor([1]))
    wide = as_batch(torch.randint(0, 256, (1, 3, 7, 7), dtype=torch.uint8), targets, "first")
    features, valid = module.features(wide)
    assert features.shape[-2:] == (1, 1) and valid.all()
    loss = module(wide, normaliser(module, wide, 1))["loss"]
    assert loss.isfinite()

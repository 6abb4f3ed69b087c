"""The joint model's own part: pixels, padding and the valid region."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.parallel.engine_case import build, global_batch, loss_denominators, samples
from visft_ds.data.samples import valid_region
from visft_ds.model import normalise_pixels
from visft_ds.models.eva_vit import EvaViT
from visft_ds.tasks.transform import collate_joint


def test_padding_has_the_mean_colour_and_pixels_are_imagenet_normalised() -> None:
    images = torch.full((1, 3, 4, 6), 255, dtype=torch.uint8)
    pixels = normalise_pixels(build(1)[0].backbone, images, torch.tensor([[2, 5]]))
    assert pixels[0, 0, 0, 0].item() == pytest.approx((1 - EvaViT.pixel_mean[0]) / 0.229, rel=1e-6)  # fp32
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
    low = torch.randint(0, 256, (3, 7, 7), dtype=torch.uint8)
    batch = collate_joint([replace(sample, size=(7, 7), image=low) for sample in samples(3)])
    (one,) = module.features(batch)
    assert one.features.shape[-2:] == (1, 1) and one.valid.all()
    losses = module(batch, loss_denominators(module, batch, 1))
    assert all(value.isfinite() for value in losses.values())


def test_tasks_of_one_forward_have_the_losses_and_gradients_of_their_own() -> None:
    """Shared images are a matter of cost only: each head learns what it would have learnt alone."""
    module, _ = build(1)
    whole = global_batch(3)
    assert set(whole.targets) == {"detection", "segmentation", "captioning"}
    divisors = loss_denominators(module, whole, 1)
    module(whole, divisors)["loss"].backward()
    together = {name: p.grad.clone() for name, p in module.heads.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    for task in whole.targets:
        alone = replace(whole, targets={task: whole.targets[task]})
        module(alone, divisors)["loss"].backward()
    apart = {name: p.grad for name, p in module.heads.named_parameters() if p.grad is not None}
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], value) for name, value in apart.items())


def test_only_the_heads_that_a_batch_is_for_predict() -> None:
    module, _ = build(2)
    module.eval()
    batch = global_batch(2)
    with torch.no_grad():
        assert set(module(batch)) == {"captioning"}
        assert set(module(replace(batch, targets={}))) == {"detection", "segmentation", "captioning"}

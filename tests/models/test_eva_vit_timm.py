"""The towers against timm's EVA-CLIP models on the same random weights (the same flags, small sizes)."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from tests.random_tower import build_backbone
from visft_ds.models.eva_vit import EvaViT, resized_positions

TIMM = {"eva_e": "eva02_enormous_patch14_clip_224", "eva_g": "eva_giant_patch14_clip_224"}
# 1e-5: fp32 sums in another order through a few blocks; seen below 1e-6.
TOLERANCE = 1e-5


def _pair(preset: str, *, class_token: bool, image_size: int = 224, **shape: Any) -> tuple[EvaViT, Any]:
    """Ours and timm's, same weights. Biases and norms are random too: at 0 and 1 they would hide a mix-up."""
    renamed = {"embed_dim" if key == "width" else key: value for key, value in shape.items()}
    theirs = timm.create_model(
        TIMM[preset], num_classes=0, global_pool="", class_token=class_token, img_size=image_size, **renamed
    ).eval()
    ours = build_backbone(preset, class_token=class_token, image_size=image_size, **shape)
    weights = ours.state_dict()
    for value in weights.values():
        value.add_(torch.randn_like(value), alpha=0.1)
    theirs_pos = weights["pos_embed"] if class_token else weights["pos_embed"][:, 1:]
    theirs.load_state_dict({**weights, "pos_embed": theirs_pos}, strict=True)
    return ours, theirs


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("preset", ["eva_e", "eva_g"])
def test_equal_to_timm_at_224(preset: str, class_token: bool) -> None:
    ours, theirs = _pair(preset, class_token=class_token, width=96, depth=3, num_heads=6)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        tokens, features = ours.tokens(images)[0], ours(images)[0]
        expected = theirs.forward_features(images)
    assert _difference(tokens, expected) < TOLERANCE
    patches = expected[:, int(class_token) :]
    assert _difference(features, patches.transpose(1, 2).reshape(2, 96, 16, 16)) < TOLERANCE


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("preset", ["eva_e", "eva_g"])
def test_equal_to_timm_at_another_size_with_the_same_position_embeddings(
    preset: str, class_token: bool
) -> None:
    ours, _ = _pair(preset, class_token=class_token, width=48, depth=2, num_heads=3)
    theirs = timm.create_model(
        TIMM[preset], num_classes=0, global_pool="", class_token=class_token, img_size=(168, 294), embed_dim=48,
        depth=2, num_heads=3,
    ).eval()  # fmt: skip
    weights = ours.state_dict()
    # timm would resize with antialiasing; it gets the embeddings already resized.
    grid = resized_positions(weights["pos_embed"][0, 1:], (12, 21))
    first = weights["pos_embed"][0, : int(class_token)]
    theirs.load_state_dict({**weights, "pos_embed": torch.cat([first, grid])[None]}, strict=True)
    images = torch.randn(1, 3, 168, 294)
    with torch.no_grad():
        assert _difference(ours.tokens(images)[0], theirs.forward_features(images)) < TOLERANCE


@pytest.mark.parametrize("preset", ["eva_e", "eva_g"])
def test_gradients_equal_timms(preset: str) -> None:
    ours, theirs = _pair(preset, class_token=False, image_size=56, width=48, depth=2, num_heads=3)
    images, gradient = torch.randn(2, 3, 56, 56), torch.randn(2, 16, 48)
    ours.tokens(images)[0].backward(gradient)
    theirs.forward_features(images).backward(gradient)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        actual = parameter.grad
        assert actual is not None, name
        if name == "pos_embed":
            assert not actual[:, 0].any()
            actual = actual[:, 1:]
        # Gradients pass two softmaxes and norms; 1e-4 still separates them from any wrong wiring.
        assert _difference(actual, expected[name]) < 1e-4, name


def test_resizing_is_bicubic_without_antialiasing() -> None:
    grid = torch.randn(16 * 16, 5)
    assert resized_positions(grid, (16, 16)) is grid

    # By hand from the Keys kernel with a = -0.75: row 3 of a doubled grid sits at input row 1.25, so the
    # weights of rows 0..3 are those at distances 1.25, 0.25, 0.75, 1.75.
    def keys(d: float) -> float:
        a = -0.75
        return (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a

    weights = torch.tensor([keys(1.25), keys(0.25), keys(0.75), keys(1.75)])
    doubled = resized_positions(grid, (32, 32)).view(32, 32, 5)
    expected = torch.einsum("r,s,rsd->d", weights, weights, grid.view(16, 16, 5)[:4, :4])
    torch.testing.assert_close(doubled[3, 3], expected, rtol=0, atol=1e-5)  # fp32, 16 terms of order 1
    # Shrinking: an antialiased result would average over more than four rows, this one must not.
    halved = resized_positions(grid, (8, 8)).view(8, 8, 5)
    weights = torch.tensor([keys(1.5), keys(0.5), keys(0.5), keys(1.5)])
    expected = torch.einsum("r,s,rsd->d", weights, weights, grid.view(16, 16, 5)[1:5, 1:5])
    torch.testing.assert_close(halved[1, 1], expected, rtol=0, atol=1e-5)

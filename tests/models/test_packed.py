"""Images of different sizes without padding: losses, gradients and predictions are those of each image alone.

Four images in one batch against the same four one after another, all three heads, adapters that train, in
float64. Sizes are powers of two times a patch, so that the shares of the padded masks, which are kept in
float32, are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.parallel import engine_case as case
from visft_ds.data.samples import Batch, Sample
from visft_ds.model import MultiTaskModel
from visft_ds.tasks import TASKS
from visft_ds.tasks.transform import collate_joint

SIZES = ((56, 112), (112, 56), (28, 112), (56, 112))


def mixed(step: int = 3) -> list[Sample]:
    """Four images of three sizes with labels of every task; one has no object, one no caption."""
    return [case.samples(step, sides=(size,))[index] for index, size in enumerate(SIZES)]


def model() -> MultiTaskModel:
    module, _ = case.build(2)
    return module.double().train()


def learnt(module: MultiTaskModel, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of all batches together, and the gradients of the adapters."""
    whole = collate_joint(mixed())
    counts = case.loss_denominators(module, whole, 1)
    module.zero_grad()
    sums: dict[str, Tensor] = {}
    for batch in batches:
        losses = module(batch, counts)
        losses["loss"].backward()
        sums = {name: value.detach() + sums.get(name, 0) for name, value in losses.items()}
    # Percentages for the log are float32, and one of them is no sum over images.
    sums = {name: value for name, value in sums.items() if value.dtype == torch.float64}
    return sums, {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "block", "mlp"])
def test_losses_and_gradients_are_those_of_each_image_alone(recompute: str) -> None:
    module = model()
    module.backbone.recompute = recompute
    together = learnt(module, [collate_joint(mixed())])
    alone = learnt(module, [collate_joint([sample]) for sample in mixed()])
    assert (
        len(together[0]) > 12
        and len(together[1]) == 4
        and all(gradient.abs().sum() > 0 for gradient in together[1].values())
    )
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("task", TASKS)
def test_predictions_are_those_of_each_image_alone(task: str) -> None:
    """Also where an image comes with padding of its own, as segmentation gives it in evaluation, and for a
    strip.
    """
    module = model()
    panoptic: dict[str, Any] = {
        "num_classes": 5,
        "hidden_dim": 16,
        "num_heads": 2,
        "blocks": 1,
        "num_queries": 6,
    }
    panoptic |= {"score": 0.1, "overlap": 0.1}  # of a head that has learnt nothing
    options = {"semantic": {"num_classes": 5}, "depth": {}, "panoptic": panoptic}
    if task in options:
        settings = TASKS[task].settings("head", options[task])
        head = TASKS[task].build_head(module.backbone.shapes, settings, None)
        module.heads[task], module.decoding[task] = head.double(), {}
    module.eval()
    samples = [replace(sample, targets={}, original_size=(40, 60)) for sample in mixed()]
    if task == "segmentation":
        sizes = [(50, 112), (112, 45), (28, 100), (56, 112)]
        samples = [
            replace(sample, size=size, frame=sample.size) for sample, size in zip(samples, sizes, strict=True)
        ]
    else:
        strip = torch.from_numpy(np.full((3, 7, 112), 200, dtype=np.uint8))
        samples[2] = replace(samples[2], size=(7, 112), image=strip)

    def results(parts: Sequence[Sequence[Sample]]) -> list[Any]:
        found = []
        for part in parts:
            batch = collate_joint(part)
            with torch.no_grad():
                found += TASKS[task].results(module(batch)[task], batch, *words)
        return found

    words: list[Any] = [_Words() if task == "captioning" else None]
    together, alone = results([samples]), results([[sample] for sample in samples])
    assert len(together) == len(alone) > 0
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value == (
                pytest.approx(theirs[name], rel=1e-9, abs=1e-9) if name in ("bbox", "score") else theirs[name]
            )


class _Words:
    """Stands for a vocabulary: the ids themselves."""

    def check_size(self, size: int) -> None:
        """Any will do."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(number) for number in ids)


def test_images_with_the_same_cells_need_no_packing() -> None:
    module, batch = model(), case.global_batch(3)
    assert module.frames(batch) is None and module.frames(replace(batch, frames=None)) is None
    assert module.frames(replace(batch, frames=torch.tensor([[55, 43], [56, 56]]))) is None


def test_frames_stay_on_the_host() -> None:
    """Packing reads them in every step: a copy on a device would have to be waited for."""
    batch = collate_joint(mixed()).to(torch.device("meta"))
    assert (
        batch.images.is_meta
        and batch.frames is not None
        and batch.frames.tolist() == [list(s) for s in SIZES]
    )


def test_the_last_stage_of_a_pipeline_knows_the_padding_without_pixels() -> None:
    """Segmentation comes with padding of its own in evaluation: 100 of 112 columns, of 8 patches instead of
    7.
    """
    samples = [replace(sample, size=(50, 100), frame=sample.size, targets={}) for sample in mixed()[:1]]
    batch = collate_joint(samples)
    blind = replace(batch, images=batch.images[..., :0, :0])
    assert model().padded_size(blind) == (56, 112) == tuple(batch.images.shape[2:])

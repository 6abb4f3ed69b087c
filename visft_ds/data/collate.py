"""Samples -> one batch. `stack_samples` is what all tasks share; a task adds the packing of its own targets.

Shape letters: B images, H W pixels, N objects packed over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visft_ds.data.samples import Batch, Sample


def stack_samples(samples: Sequence[Sample]) -> Batch:
    """A batch without targets: images padded right and bottom with 0 to the largest height and width of the batch."""
    assert samples, "a batch needs at least one sample"
    views = tuple(sample.view for sample in samples if sample.view is not None)
    assert len(views) in (0, len(samples)), "features are kept of some samples of a batch and of some not"
    return Batch(
        images=_pad(samples),
        sizes=torch.tensor([sample.size for sample in samples]),
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
        image_ids=torch.tensor([sample.image_id for sample in samples]),
        random_keys=torch.tensor([sample.random_key for sample in samples]),
        real=torch.ones(len(samples), dtype=torch.bool),
        views=views or None,
        frames=torch.tensor([sample.size for sample in samples]),
    )


def has_targets(samples: Sequence[Sample], task: str) -> bool:
    """Return True if these samples carry labels of `task`: all of them or none."""
    found = {task in sample.targets for sample in samples}
    assert len(found) == 1, f"some samples of a batch have {task} targets and some have not"
    return found.pop()


def _pad(samples: Sequence[Sample]) -> Tensor:
    images = {place: sample.image for place, sample in enumerate(samples) if sample.image is not None}
    if not images:
        return torch.zeros((len(samples), 3, 0, 0), dtype=torch.uint8)
    known = [place for place, sample in enumerate(samples) if sample.view is not None and sample.view.features]
    assert len(images) + len(known) == len(samples), "some samples of a batch have pixels and some have not"
    height, width = (max(sample.size[side] for sample in samples) for side in (0, 1))
    padded = torch.zeros((len(samples), 3, height, width), dtype=torch.uint8)
    for place, image in images.items():
        padded[place, :, : image.shape[1], : image.shape[2]] = image
    return padded

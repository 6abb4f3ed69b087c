"""When two adapters in fp32 mean the same change."""

from __future__ import annotations

from dataclasses import replace

import torch

from visft_ds.interop.adapter import Adapter


def same_change(first: Adapter, second: Adapter) -> bool:
    """Whether both change every weight alike, up to the rounding of their products.

    alpha may be part of the scale or of B, so each term of a sum is rounded up to three times more, and the sum once
    per term; terms may cancel, so that the error is bounded by the terms' sizes and not by their sum.
    """
    sizes = replace(second, tensors={name: value.abs() for name, value in second.tensors.items()})
    bound = (second.rank + 3) * torch.finfo(torch.float32).eps
    return set(first.weights()) == set(second.weights()) and all(
        bool(((first.delta(name) - second.delta(name)).abs() <= bound * sizes.delta(name)).all())
        for name in second.weights()
    )

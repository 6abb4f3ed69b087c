"""The losses of a task: what a criterion is, and the numbers that its losses are divided by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from visft_ds.data.samples import Batch
from visft_ds.tasks import Numbers

Losses = dict[str, Tensor]  #: by name, 0-d each
Denominators = Mapping[str, Tensor]  #: by the name of a count, 0-d each
LossDenominators = Mapping[str, Denominators]  #: by task


class Criterion(Protocol):
    """Losses of one task. Holds no parameters; build it anywhere."""

    weights: Numbers  #: factor of each loss; an entry that is not in here is for the log only

    def count(self, batch: Batch) -> Numbers:
        """Numbers, from the labels alone, whose sum over ranks and micro-batches normalises the losses."""
        ...

    def __call__(
        self,
        output: Any,
        targets: Any,
        loss_denominators: Denominators,
        image_ids: Tensor | None = None,
    ) -> Losses:
        """Unweighted losses by name, 0-d each: sums over the micro-batch divided by `loss_denominators`.

        A denominator is the sum of a `count` over the global batch, divided by ranks times micro-batches. So
        the mean of a loss over ranks and micro-batches is the loss of the global batch in one process.

        Args:
            output: what the head returned for the micro-batch.
            targets: of this task, as its `pack` made them.
            loss_denominators: 0-d tensors with the keys of `count`.
            image_ids: (B,) int64, for the messages of errors only.

        Raises:
            FloatingPointError: a loss cannot be computed, as a prediction is not finite.
        """
        ...


def counts_of(criteria: Mapping[str, Criterion], batches: Iterable[Batch]) -> Numbers:
    """Sums of the counts of some micro-batches by "<task>/<name>", from the labels alone."""
    sums: Numbers = {}
    for batch in batches:
        for task in batch.targets:
            for name, value in criteria[task].count(batch).items():
                key = f"{task}/{name}"
                sums[key] = sums.get(key, 0.0) + value
    return sums


def loss_denominators_of(counts: Mapping[str, float], parts: int, device: torch.device) -> LossDenominators:
    """Divisors of the losses such that their mean over ranks and micro-batches is the loss of the global
    batch.

    Args:
        counts: of `counts_of`, summed over ranks.
        parts: data-parallel ranks times micro-batches, over which the engine averages.
    """
    denominators: dict[str, dict[str, Tensor]] = {}
    for key, total in counts.items():
        task, _, name = key.partition("/")
        at_least_one = max(total, 1.0)  # a step may have no object at all
        denominator = torch.full((), at_least_one / parts, device=device)
        denominators.setdefault(task, {})[name] = denominator
    return denominators


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in the output of a module, or in targets: dataclasses, mappings and sequences of them."""
    if isinstance(value, Tensor):
        yield value
        return
    items: Iterable[Any] = ()
    if is_dataclass(value):
        items = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, tuple | list):
        items = value
    for item in items:
        yield from tensors_of(item)

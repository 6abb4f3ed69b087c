"""Values that a run begins with in place of drawn ones: those of another run, or of an adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from visft_ds.interop.weights import Weights, examples


@dataclass(frozen=True)
class Start:
    """Values to begin with, and what they belong to."""

    place: Path
    sha256: str  #: of what is read
    tensors: Weights  #: by qualified name of a parameter
    base: str | None  #: fingerprint of the base weights that they were trained on; None: nobody recorded it
    note: str
    step: int | None = None  #: of a run

    def check(self, module: nn.Module, trained: Iterable[str], base: str) -> None:
        """Raise ValueError for values that are not those of what a run trains, or were trained on another base.

        Args:
            trained: qualified names.
            base: fingerprint of the run's base weights.
        """
        if self.base not in (None, base):
            raise ValueError(f"{self.place} was trained on other base weights ({self.base}); these are {base}")
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
        parts = {_part(name) for name in self.tensors}
        here = {name: shapes[name] for name in trained if _part(name) in parts}
        there = {name: one.shape for name, one in self.tensors.items()}
        differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        if differing:
            wrong = [
                f"{name} is {there.get(name, 'absent')} there, {here.get(name, 'absent')} here" for name in differing
            ]
            raise ValueError(
                f"{self.place} does not fit what this run trains: {examples(wrong)}. Take visft.lora, param_groups and "
                "the settings of the heads from there, or --reset-heads"
            )


def _part(name: str) -> str:
    """The head, or the backbone, that a parameter is part of."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "heads" else first

"""Values that a run begins with in place of drawn ones: those of another run, or of an adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from visft_ds.interop.layouts import fitted
from visft_ds.interop.weights import Weights


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
        parts, named = {_part(name) for name in self.tensors}, dict(module.named_parameters())
        wanted = {name: named[name] for name in trained if _part(name) in parts}
        fitted(self.tensors, wanted, behind=(), what="what this run trains (--reset-heads draws the heads anew)")


def _part(name: str) -> str:
    """The head, or the backbone, that a parameter is part of."""
    return ".".join(name.split(".")[: 2 if name.startswith("heads.") else 1])

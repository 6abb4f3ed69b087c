"""Values that a run begins with in place of drawn ones: those of another run, or of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from visft_ds.interop.weights import examples


@dataclass(frozen=True)
class Start:
    """Values to begin with, and what they belong to."""

    place: Path
    sha256: str  #: of what is read
    shapes: Mapping[str, tuple[int, ...]]  #: qualified name of a parameter -> its shape there
    read: Callable[[str], Tensor]
    base: str | None  #: the base weights that they were trained on, as `BaseWeights.identity`; None: nobody recorded it
    step: int | None = None  #: of a run
    #: Parameter -> for each of its rows the row there, or None for one that is drawn; of all others the shapes agree.
    rows: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def value(self, name: str, drawn: Callable[[], Tensor]) -> Tensor:
        """The first value of a parameter; `drawn` gives the one that it has without a start."""
        if name not in self.shapes:
            return drawn()
        if name not in self.rows:
            return self.read(name)
        values, found = drawn().detach().clone(), self.read(name)
        for row, there in enumerate(self.rows[name]):
            if there is not None:
                values[row] = found[there]
        return values

    def check(self, module: nn.Module, trained: Iterable[str], base: str) -> None:
        """Refuse values that do not fit what a run trains.

        Args:
            trained: qualified names.
            base: fingerprint of the run's base weights.

        Raises:
            ValueError: parameters that are missing, frozen here or of another shape; other base weights.
        """
        if self.base not in (None, base):
            raise ValueError(f"{self.place} was trained on other base weights ({self.base}); these are {base}")
        wanted = set(trained)
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
        rooms = {_room(name) for name in self.shapes}
        wrong = [f"{name} is frozen in this run" for name in self.shapes if name in shapes and name not in wanted]
        wrong += [f"{name} is not in this run" for name in self.shapes if name not in shapes]
        wrong += [
            f"{name} is not there" for name in shapes if name in wanted - self.shapes.keys() and _room(name) in rooms
        ]
        wrong += [
            f"{name} is {shape} there, {shapes[name]} here"
            for name, shape in self.shapes.items()
            if name in wanted
            and (shape if name not in self.rows else (len(self.rows[name]), *shape[1:])) != shapes[name]
        ]
        if wrong:
            raise ValueError(
                f"{self.place} does not fit what this run trains: {examples(wrong)}. Take visft.lora, param_groups and "
                "the settings of the heads from there, or --reset-heads"
            )


def _room(name: str) -> str:
    """The head, or the backbone, that a parameter is part of."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "heads" else first

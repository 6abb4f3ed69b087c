"""Reading of a comparison of two models that `visft evaluate benchmarks` left: what was gained, and what was lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from visft_ds.config.records import read_record
from visft_ds.evals.benchmarks.command import PICTURES, RECORD
from visft_ds.evals.benchmarks.retention import KEPT
from visft_ds.evals.benchmarks.retrieval import ForeignRecord
from visft_ds.evals.benchmarks.run import Dose
from visft_ds.evals.benchmarks.table import Row, verdict
from visft_ds.evals.compare import read_picture
from visft_ds.tasks.pictures import Picture


class ComparisonFile(ForeignRecord):
    """Content of benchmarks.json, as far as two models, one of which is the other's base, are compared by it."""

    format: Literal["visft_ds benchmarks"]
    arms: Annotated[dict[str, list[str]], Field(min_length=2, max_length=2)]
    primary: str
    rows: list[Row]
    doses: dict[str, dict[str, Dose]]
    pictures: list[Annotated[str, StringConstraints(pattern=rf"^{PICTURES}/[^/\\\x00]+$")]]


@dataclass(frozen=True)
class Line:
    """Line of the table, in percent."""

    name: str
    before: str
    after: str
    change: str  #: with its interval, marked * where it is shown
    kind: Literal["up", "down", ""]  #: of a difference that is shown
    main: bool


@dataclass(frozen=True)
class Comparison:
    """A folder of `visft evaluate benchmarks --primary NUMBER` with two models."""

    folder: Path
    record: ComparisonFile

    @property
    def labels(self) -> tuple[str, str]:
        """Names of the first model and of the one that it became."""
        first, second = self.record.arms
        return first, second

    def lines(self) -> list[Line]:
        """The numbers that both models have; names without the benchmark where that leaves them apart."""
        before, after = self.labels
        rows = self._rows()
        short = len({row.name.partition(" ")[2] for row in rows}) == len(rows)
        found = []
        for row in rows:
            change, shown = row.differences[after], row.shown[after]
            found.append(
                Line(
                    row.name.partition(" ")[2] if short else row.name,
                    f"{100 * row.values[before].value:.2f}",
                    f"{100 * row.values[after].value:.2f}",
                    change.text(shown=shown),
                    ("up" if change.value > 0 else "down") if shown else "",
                    row.name == self.record.primary,
                )
            )
        return found

    def verdict(self) -> str:
        """Words on the number that was named before the run: `not shown: +0.40 [-1.90, +2.70]`."""
        row = next(row for row in self._rows() if row.name == self.record.primary)
        return verdict(row, self.labels[1])

    def outcome(self) -> list[tuple[str, str]]:
        """The verdict, what was gained and lost, and how far features moved for it; what -> words."""
        lines = self.lines()
        main = next(line.name for line in lines if line.main)
        changed = {kind: ", ".join(line.name for line in lines if line.kind == kind) for kind in ("up", "down")}
        said = [(f"{main}, named before the run", self.verdict())]
        said += [
            ("gained", changed["up"] or "nothing that is shown"),
            ("lost", changed["down"] or "nothing that is shown"),
        ]
        said += [
            ("price", f"{line.after} % of what the base's own classifier says about these images stays")
            for line in lines
            if line.name.endswith(KEPT)
        ]
        moved = self.record.doses.get(self.labels[1], {})
        return said + [
            (f"features of {name} moved", f"by {dose.change:.3f} of their spread, cosine {dose.cosine:.4f}")
            for name, dose in moved.items()
        ]

    @property
    def pictures(self) -> list[Picture]:
        """Sheets of answers before and after."""
        return [read_picture(self.folder / name) for name in self.record.pictures]

    def _rows(self) -> list[Row]:
        before, after = self.labels
        rows = [row for row in self.record.rows if {before, after} <= row.values.keys()]
        return [row for row in rows if after in row.differences and after in row.shown]


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison of two models.

    Raises:
        ValueError: there is none, it is of other models than two, or without the number that was to decide.
    """
    found = Comparison(folder, read_record(folder / RECORD, ComparisonFile))
    if not any(line.main for line in found.lines()):
        raise ValueError(f"{folder / RECORD} has no difference of {found.record.primary}, which was to decide")
    return found

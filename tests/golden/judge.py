"""Golden runs of visft judge: towers of three blocks that look at noisy pictures, and what is to be said of
them.

`python -m tests.golden.judge` writes the digits again after a deliberate change of maths.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from visft_ds.evals import pages
from visft_ds.evals.cli import judge
from visft_ds.evals.judge import command, dense_probes, models
from visft_ds.evals.judge.encoders import BackboneEncoder, Encoder, square_preprocess
from visft_ds.evals.judge.protocol import QUICK
from visft_ds.monitor import console

FILE = Path(__file__).parent / "judge.json"
SIDE, CELL = 64, 8
GREY = ((0.5,) * 3, (0.25,) * 3)
_drawn = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
TURN = torch.linalg.matrix_exp((_drawn - _drawn.T) / 3)  # a rotation
#: File -> what each block keeps of the picture beside noise, and what its map is multiplied by.
TOWERS = {
    "middle": ((0.0, 1.0, 0.0), torch.eye(4)),
    "copied": ((0.0, 1.0, 1.0), torch.eye(4)),
    "turned": ((0.0, 1.0, 0.0), TURN),
    "longer": ((0.0, 1.0, 0.0), 2 * torch.eye(4)),
    "short": ((0.0, 1.0), torch.eye(4)),
    "wide": ((0.0, 1.0, 0.0, 1.0), torch.eye(4)),
    "dim": ((0.0, 0.3, 0.0), torch.eye(4)),
    "rising": ((0.0, 0.3, 1.0), torch.eye(4)),
    "risen": ((0.0, 0.3), torch.eye(4)),
    "clear": ((0.0, 0.8, 0.0), torch.eye(4)),
    "early": ((0.55, 0.5, 0.0), torch.eye(4)),
    "late": ((0.0, 0.5, 0.55), torch.eye(4)),
}
_IN_CONTEXT = ("--numbers", "in-context mIoU")
#: Name -> models and words of a command line. All cases share a cache, in which none may find what is
#: another's.
CASES: dict[str, tuple[str, ...]] = {
    "same": ("base=middle", "tuned=middle", "--numbers", "in-context mIoU,linear mIoU"),
    "longer": ("base=middle", "tuned=longer", *_IN_CONTEXT),
    "turned": ("base=middle", "tuned=turned", *_IN_CONTEXT),
    "gained": ("base=dim", "tuned=middle", *_IN_CONTEXT),
    "gained, in bf16": ("base=dim", "tuned=middle", *_IN_CONTEXT, "--precision", "bf16"),
    "gained, other images": ("base=dim", "tuned=middle", "--on", "segmentation=other,name=two", *_IN_CONTEXT),
    "better placed": ("base=middle", "tuned=copied", *_IN_CONTEXT),
    "last layers": ("base=middle", "tuned=copied", *_IN_CONTEXT, "--layers", "last"),
    "cut": ("base=rising", "tuned=rising", "risen=risen", "short=short", *_IN_CONTEXT),
    "lost": ("base=middle", "tuned=dim", *_IN_CONTEXT),
    "control": (
        "base=dim",
        "tuned=clear",
        "--control",
        "other=middle",
        "--control",
        "idle=dim",
        *_IN_CONTEXT,
    ),
    "two": ("base=dim", "tuned=middle", "second=clear", "--control", "turned=turned", *_IN_CONTEXT),
    "seeds": ("base=dim", "tuned=early,late", "--control", "other=clear,turned", *_IN_CONTEXT),
    "other architecture": ("base=dim", "tuned=wide", *_IN_CONTEXT),
    "heads": (
        *("base=middle", "tuned=dim", "--on", "segmentation=two", "--on", "depth=two"),
        *("--primary", "segmentation/two linear mIoU"),
    ),
}


class _Block(nn.Module):
    def __init__(self, kept: float, turn: Tensor) -> None:
        super().__init__()
        self.kept = nn.Parameter(
            torch.full((3, 1, 1), kept)
        )  # of each colour: noise makes some better, some worse
        self.turn = nn.Parameter(turn.clone())

    def forward(self, images: Tensor) -> Tensor:
        clear = F.avg_pool2d(images, CELL)
        noise = 3 * torch.sin(1e4 * images[..., ::CELL, ::CELL])  # of one pixel
        found = torch.cat([self.kept * clear + (1 - self.kept) * noise, torch.ones_like(clear[:, :1])], dim=1)
        return torch.einsum("dc,bchw->bdhw", self.turn, found)


class _Toy(nn.Module):
    """A backbone each of whose blocks looks at the picture."""

    layers_read, patch, patch_size = (), CELL, CELL

    def __init__(self, kept: tuple[float, ...], turn: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(share, turn) for share in kept)
        self.norm = nn.Identity()

    def ends(self) -> list[str]:
        return [f"blocks.{number}" for number in range(len(self.blocks))]

    def feature_map(self, given: Tensor, size: tuple[int, int]) -> Tensor:
        return given

    def forward(self, images: Tensor, *, prefixes: bool) -> tuple[Tensor, ...]:
        return ([block(images) for block in self.blocks][-1],)


def draw(folder: Path) -> None:
    """Two data sets of noisy pictures of two greys whose border moves, with label maps and depths, and the
    towers' files."""
    for seed, name in enumerate(("two", "other")):
        rng = np.random.default_rng(seed)
        for part, count in (("train", 20), ("val", 12)):
            for number in range(count):
                labels = (np.arange(SIDE) >= rng.integers(16, 48)).astype(np.uint8)[None].repeat(SIDE, axis=0)
                noise = rng.integers(0, 120, (SIDE, SIDE, 3)) + 60 * labels[..., None]
                metres = labels.astype(np.uint16) * 3000 + 1000
                for place, pixels in (
                    ("images", noise.astype(np.uint8)),
                    ("labels", labels),
                    ("depth", metres),
                ):
                    path = folder / name / place / part / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(path)
    for name in TOWERS:
        (folder / f"{name}.pt").write_text(name)


@contextlib.contextmanager
def toy_towers() -> Iterator[None]:
    """Files of `draw` are towers, and heads learn for a few steps."""

    def load(spec: models.ModelSpec, precision: str) -> Encoder:
        module = BackboneEncoder(_Toy(*TOWERS[Path(spec.name).stem]))  # type: ignore[arg-type]
        module.requires_grad_(False).eval()
        return Encoder(module, module.kinds, square_preprocess(SIDE, *GREY), GREY, SIDE, None)

    short = {name: replace(getattr(QUICK, name), steps=8, warm_up=1) for name in ("segmentation", "depth")}
    brief = replace(QUICK, **short)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(models, "_load_backbone", load)
        patched.setattr(command, "bands_read", lambda spec: None)
        patched.setattr(command, "QUICK", brief)
        patched.setattr(command, "_SHOWN", 1)  # drawing takes half of the time
        patched.setattr(pages, "line_chart", lambda *_, **__: "")  # and the chart of a page a quarter
        patched.setattr(dense_probes, "BRIEF", brief)
        yield


def run(*words: object) -> tuple[int, str, str]:
    """(exit status, output, errors) of a command line of visft judge, without a slow machine's progress."""

    def never_due(*positional: Any, **named: Any) -> tqdm[Any]:
        return tqdm(*positional, **{**named, "delay": math.inf})

    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        with patch.object(console, "tqdm", never_due):
            status = judge([str(word) for word in words])
    return status, out.getvalue(), errors.getvalue()


def judged(case: str, data: Path, out: Path) -> dict[str, Any]:
    """The record of a case."""
    words = [_placed(word, data) for word in CASES[case]]
    if "--on" not in words:
        words += ["--on", f"segmentation={data}/two"]
    status, _, errors = run(*words, "--quick", "--out", out, "--cache", data / "cache")
    assert status == 0, errors
    return record_in(out)


def record_in(out: Path) -> dict[str, Any]:
    """The record that visft judge left in a folder."""
    record: dict[str, Any] = json.loads((out / "judge.json").read_text())
    return record


def _placed(word: str, data: Path) -> str:
    """A word of a command line with the places of towers and data."""
    label, equals, names = word.partition("=")
    if not equals:
        return word
    if label in ("segmentation", "depth"):
        return f"{label}={data}/{names}"
    return f"{label}={','.join(f'{data}/{name}.pt' for name in names.split(','))}"


def digits_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says: words, layers, shifts, scales and all numbers."""
    layers = {
        name: {arm: of["chosen"] for arm, of in arms.items()} for name, arms in record["layers"].items()
    }
    return {
        "words": [verdict["word"] for verdict in record["verdicts"]],
        "layers": layers,
        "shifts": _rounded(record["shifts"]),
        "scales": _rounded(record["scales"]),
        "rows": {row["name"]: _digits_of_row(row) for row in record["rows"]},
    }


def _digits_of_row(row: dict[str, Any]) -> dict[str, Any]:
    differences = {f"{arm} minus base": _interval(of) for arm, of in row["differences"].items()}
    for arm, controls in row["controls"].items():
        differences |= {f"{arm} minus {control}": _interval(of) for control, of in controls.items()}
    for name in ("last", "over_last", "over_cut"):
        differences |= {f"{arm}, {name}": _interval(of) for arm, of in row[name].items()}
    return {"values": _rounded(row["values"]), "differences": differences}


def _interval(of: dict[str, Any]) -> list[float]:
    return [round(value, 5) for value in (of["value"], of["low"], of["high"], *of["each"])]


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in values.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary, toy_towers():
        root = Path(temporary)
        draw(root)
        digits = {case: digits_of(judged(case, root, root / "out" / case)) for case in CASES}
        FILE.write_text(json.dumps(digits, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {FILE}")

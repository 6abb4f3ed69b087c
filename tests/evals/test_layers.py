"""The best block of each model, the verdicts that depend on it, and models that differ by nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tests.evals.test_judge import _record, _run
from visft_ds.evals.judge import command, layers, models, protocols
from visft_ds.evals.judge.encoders import BackboneEncoder, Encoder, square_preprocess
from visft_ds.evals.judge.protocols import QUICK

SIDE, CELL, NUMBER = 64, 8, "segmentation/two in-context mIoU"
GREY = ((0.5,) * 3, (0.25,) * 3)
#: File -> what each block keeps of the picture beside noise, and whether the map is turned.
TOWERS = {
    "middle": ((0.0, 1.0, 0.0), False),
    "copied": ((0.0, 1.0, 1.0), False),
    "turned": ((0.0, 1.0, 0.0), True),
    "short": ((0.0, 1.0), False),
    "wide": ((0.0, 1.0, 0.0, 1.0), False),
}


class _Block(nn.Module):
    def __init__(self, kept: float, turned: bool) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.tensor([kept]))
        turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
        self.turn = nn.Parameter(turn if turned else torch.eye(4))

    def forward(self, images: Tensor) -> Tensor:
        clear = F.avg_pool2d(images, CELL)
        noise = 3 * torch.sin(1e4 * images[..., ::CELL, ::CELL])  # of one pixel
        found = torch.cat([self.kept * clear + (1 - self.kept) * noise, torch.ones_like(clear[:, :1])], dim=1)
        return torch.einsum("dc,bchw->bdhw", self.turn, found)


class _Toy(nn.Module):
    """A backbone each of whose blocks looks at the picture."""

    layers_read, patch, patch_size = (), CELL, CELL

    def __init__(self, kept: tuple[float, ...], turned: bool) -> None:
        super().__init__()
        self.blocks, self.norm = nn.ModuleList(_Block(one, turned) for one in kept), nn.Identity()

    def ends(self) -> list[str]:
        return [f"blocks.{number}" for number in range(len(self.blocks))]

    def feature_map(self, given: Tensor, size: tuple[int, int]) -> Tensor:
        return given

    def forward(self, images: Tensor, *, prefixes: bool) -> tuple[Tensor, ...]:
        return ([block(images) for block in self.blocks][-1],)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Noisy pictures of two greys whose border moves, their label maps, and files in the place of toy towers."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 12)):
        for number in range(count):
            labels = (np.arange(SIDE) >= rng.integers(16, 48)).astype(np.uint8)[None].repeat(SIDE, axis=0)
            noise = rng.integers(0, 120, (SIDE, SIDE, 3)) + 60 * labels[..., None]
            metres = labels.astype(np.uint16) * 3000 + 1000
            for place, pixels in (("images", noise.astype(np.uint8)), ("labels", labels), ("depth", metres)):
                path = tmp_path / "two" / place / part / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)

    def load(spec: models.ModelSpec, precision: str) -> Encoder:
        module = BackboneEncoder(_Toy(*TOWERS[Path(spec.name).stem]))  # type: ignore[arg-type]
        module.requires_grad_(False).eval()
        return Encoder(module, module.kinds, square_preprocess(SIDE, *GREY), GREY, SIDE, None)

    monkeypatch.setattr(models, "_load_backbone", load)
    short = {name: replace(getattr(QUICK, name), steps=8, warm_up=1) for name in ("segmentation", "depth")}
    brief = replace(QUICK, **short)  # type: ignore[arg-type]
    monkeypatch.setattr(command, "QUICK", brief)
    monkeypatch.setattr(protocols, "BRIEF", brief)
    for name in TOWERS:
        (tmp_path / f"{name}.pt").write_text(name)
    return tmp_path


def _judged(data: Path, tuned: str, *words: str, base: str = "middle") -> dict[str, Any]:
    names = [f"base={data}/{base}.pt", f"tuned={data}/{tuned}.pt"]
    status, _, errors = _run(*names, "--quick", "--on", f"segmentation={data}/two", "--out", data / "out", *words)
    assert status == 0, errors
    return _record(data / "out")


def _row(record: dict[str, Any]) -> dict[str, Any]:
    (row,) = (row for row in record["rows"] if row["name"] == NUMBER)
    found: dict[str, Any] = row
    return found


def test_a_copy_of_the_best_block_at_the_end_is_better_placed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are read after the middle block, however many blocks are read at once."""
    record = _judged(data, "copied")
    (verdict,), row = record["verdicts"], _row(record)
    assert verdict["word"] == "better placed" and row["last"]["tuned"]["low"] > 0.1
    chosen = record["layers"][NUMBER]
    assert {arm: of["chosen"] for arm, of in chosen.items()} == {"base": "blocks.1", "tuned": "blocks.1"}
    assert row["differences"]["tuned"]["value"] == 0 and list(chosen["base"]["held_out"]) == [
        f"blocks.{n}" for n in range(3)
    ]
    assert "One fifth of the training images" in (data / "out/judge.html").read_text()
    monkeypatch.setattr(layers, "MOST", 1)
    again = _judged(data, "copied", "--cache", str(data / "other"))
    assert again["layers"] == record["layers"] and again["rows"] == record["rows"]


def test_heads_alone_choose_among_all_blocks(data: Path) -> None:
    names = [f"base={data}/middle.pt", f"tuned={data}/copied.pt", "--quick", "--out", data / "out"]
    status, _, errors = _run(*names, "--on", f"depth={data}/two", "--primary", "depth/two RMSE")
    assert status == 0, errors
    chosen = _record(data / "out")["layers"]["depth/two RMSE"]
    assert list(chosen["base"]["held_out"]) == [f"blocks.{n}" for n in range(3)]


def test_at_last_layers_nothing_is_called_a_gain(data: Path) -> None:
    record = _judged(data, "copied", "--layers", "last")
    assert record["verdicts"][0]["word"] == "better placed" and list(record["arms"]) == ["base", "tuned"]
    assert not record["best"] and record["layers"] == {}


def test_a_model_beside_itself_is_the_same(data: Path) -> None:
    """Every difference and every bound is 0, exactly."""
    record = _judged(data, "middle")
    assert record["verdicts"][0]["word"] == "the same" and record["shifts"] == {"tuned": 0.0}
    for row in record["rows"]:
        for of in (*row["differences"].values(), *row["last"].values()):
            assert of["value"] == of["low"] == of["high"] == 0.0


def test_features_that_are_turned_move_and_gain_nothing(data: Path) -> None:
    record = _judged(data, "turned")
    row, shifts = _row(record), record["shifts"]
    assert record["verdicts"][0]["word"] == "not shown" and shifts["tuned"] > 0.5
    assert row["differences"]["tuned"]["value"] == pytest.approx(0, abs=0.005)
    assert shifts["noise"] == pytest.approx(shifts["tuned"], rel=0.01) and set(row["controls"]["tuned"]) == {"noise"}


def test_a_base_is_compared_up_to_where_the_tuned_model_ends(data: Path) -> None:
    record = _judged(data, "short")
    assert "ends after blocks.1" in record["notes"][0]
    assert record["verdicts"][0]["word"] == "the same" and json.dumps(record["layers"]).count("blocks.2") == 0


def test_published_protocols_need_a_gpu_or_a_word(data: Path) -> None:
    """The hours that they would take are told before anything is encoded; a control has to be of the architecture."""
    names = [f"base={data}/middle.pt", f"tuned={data}/copied.pt", "--on", f"segmentation={data}/two"]
    status, _, errors = _run(*names, "--out", data / "out")
    assert status == 2 and "hours without a GPU" in errors and not (data / "out").exists()
    status, _, errors = _run(*names, "--quick", "--control", f"other={data}/wide.pt", "--out", data / "out")
    assert status == 2 and "not of one architecture" in errors

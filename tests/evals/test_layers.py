"""The best block of each model, the verdicts that depend on it, and models that differ by nothing."""

from __future__ import annotations

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
from visft_ds.evals.judge import command, layers, models, protocols, scoring
from visft_ds.evals.judge.encoders import BackboneEncoder, Encoder, square_preprocess
from visft_ds.evals.judge.protocols import QUICK

SIDE, CELL, NUMBER = 64, 8, "segmentation/two in-context mIoU"
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
}


class _Block(nn.Module):
    def __init__(self, kept: float, turn: Tensor) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.full((3, 1, 1), kept))  # of each colour: noise makes some better, some worse
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


def _judged(
    data: Path, tuned: str, *words: str, base: str = "middle", numbers: str = "in-context mIoU"
) -> dict[str, Any]:
    """The record of a comparison; names of further models are separated by spaces."""
    first, *others = tuned.split()
    names = [f"base={data}/{base}.pt", f"tuned={data}/{first}.pt", *(f"{name}={data}/{name}.pt" for name in others)]
    words = ("--quick", "--on", f"segmentation={data}/two", "--out", f"{data}/out", "--numbers", numbers, *words)
    status, _, errors = _run(*names, *words)
    assert status == 0, errors
    return _record(data / "out")


def _row(record: dict[str, Any]) -> dict[str, Any]:
    (row,) = (row for row in record["rows"] if row["name"] == NUMBER)
    found: dict[str, Any] = row
    return found


def test_a_copy_of_the_best_block_at_the_end_is_better_placed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many blocks are read at once."""
    record = _judged(data, "copied")
    (verdict,), row = record["verdicts"], _row(record)
    assert verdict["word"] == "better placed" and row["last"]["tuned"]["low"] > 0.1
    chosen = record["layers"][NUMBER]
    assert (chosen["base"]["chosen"], chosen["tuned"]["chosen"]) == ("blocks.1", "blocks.2")  # of equal ones the last
    assert row["differences"]["tuned"]["value"] == 0 and list(chosen["base"]["held_out"]) == [
        f"blocks.{n}" for n in range(3)
    ]
    assert "One fifth of the training images" in (data / "out/judge.html").read_text()
    monkeypatch.setattr(scoring, "MOST", 1)
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
    record = _judged(data, "middle", numbers="in-context mIoU,linear mIoU")
    assert len(record["rows"]) == 2
    assert record["verdicts"][0]["word"] == "the same" and record["shifts"] == {"tuned": 0.0}
    for row in record["rows"]:
        for of in (*row["differences"].values(), *row["last"].values()):
            assert of["value"] == of["low"] == of["high"] == 0.0


def test_features_that_are_turned_move_and_gain_nothing(data: Path) -> None:
    record = _judged(data, "turned")
    row, shifts = _row(record), record["shifts"]
    assert record["verdicts"][0]["word"] == "not shown" and shifts["tuned"] > 0.3
    assert row["differences"]["tuned"]["value"] == pytest.approx(0, abs=0.005)
    assert shifts["noise"] == pytest.approx(shifts["tuned"], rel=0.01) and set(row["controls"]["tuned"]) == {"noise"}


def test_features_that_are_only_longer_are_the_same(data: Path) -> None:
    """In-context and kNN go by directions: a tower that gives twice its features has not moved."""
    record = _judged(data, "longer")
    assert record["verdicts"][0]["word"] == "the same" and record["shifts"] == {"tuned": 0.0}
    assert _row(record)["differences"]["tuned"]["value"] == 0.0


def test_a_gain_at_the_best_block_is_gained(data: Path) -> None:
    """Above both bars of the base and above noise; a control that moves nothing is named and stops nobody."""
    record = _judged(data, "middle", "--control", f"idle={data}/dim.pt", base="dim")
    (verdict,), (trial,), row = record["verdicts"], record["trials"], _row(record)
    assert verdict["word"] == "gained"
    assert trial["controls"] == ["noise"] and trial["missed"] == {"idle": 0.0} and trial["compared"]
    assert "idle moves features by 0.000 at most" in verdict["sentences"][0]
    assert "idle" not in record["arms"] and "idle: no scale of it" in (data / "out/judge.html").read_text()
    assert row["differences"]["tuned"]["low"] > 0.05 and row["over_last"]["tuned"]["low"] > 0.05
    assert record["layers"][NUMBER]["noise"]["held_out"].keys() == {"blocks.0", "blocks.1", "blocks.2"}


def test_identical_weights_are_the_same_beside_a_model_that_ends_earlier(data: Path) -> None:
    """The bar of every model is the best block of the whole base."""
    record = _judged(data, "rising risen short", base="rising")
    words = {verdict["arm"]: verdict["word"] for verdict in record["verdicts"]}
    assert words == {"tuned": "the same", "risen": "the same", "short": "better placed"}
    assert record["layers"][NUMBER]["base"]["chosen"] == "blocks.2"
    same, cut, placed = (verdict["sentences"][0] for verdict in record["verdicts"])
    assert same == "No feature of tuned differs from those of base."
    row = _row(record)
    assert "ends after blocks.1" in cut and row["differences"]["risen"]["high"] < 0
    assert row["over_cut"]["risen"]["value"] == 0.0 and row["over_cut"]["short"]["low"] > 0.05
    assert "up to blocks.1" in placed and "not shown to be better than base at its best layer" in placed
    assert "base up to blocks.1" in (data / "out/judge.html").read_text()


def test_a_control_counts_for_every_tuned_model(data: Path) -> None:
    record = _judged(data, "middle copied", "--control", f"turned={data}/turned.pt", base="dim")
    controls = {trial["arm"]: trial["controls"] for trial in record["trials"]}
    assert controls == {
        "tuned": ["noise of tuned", "turned of tuned"],
        "copied": ["noise of copied", "turned of copied"],
    }
    for arm, names in controls.items():
        assert _row(record)["controls"][arm].keys() == set(names)
        wanted = [record["shifts"][arm]] * 2
        assert [record["shifts"][name] for name in names] == pytest.approx(wanted, rel=0.01)


def test_of_equal_blocks_the_last_is_chosen() -> None:
    seeds = [{"kNN": {"a": 0.5, "b": 0.25, "c": 0.25}}, {"kNN": {"a": 0.25, "b": 0.25, "c": 0.5}}]
    assert layers.chosen(seeds) == {"kNN": {"chosen": "c", "held_out": {"a": 0.375, "b": 0.25, "c": 0.375}}}
    assert layers.best_first({"a": 1.0, "b": 2.0, "c": 1.0}) == ["b", "c", "a"]


def test_published_protocols_need_a_gpu_or_a_word(data: Path) -> None:
    """The hours that they would take are told before anything is encoded; a control has to be of the architecture."""
    names = [f"base={data}/middle.pt", f"tuned={data}/copied.pt", "--on", f"segmentation={data}/two"]
    status, _, errors = _run(*names, "--out", data / "out")
    assert status == 2 and "hours without a GPU" in errors and not (data / "out").exists()
    status, _, errors = _run(*names, "--quick", "--control", f"other={data}/wide.pt", "--out", data / "out")
    assert status == 2 and "not of one architecture" in errors

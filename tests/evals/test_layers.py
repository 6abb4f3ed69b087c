"""Runs of visft judge on toy towers: their golden digits, the best block of each model, and the verdicts that
depend on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.golden.judge import CASES, FILE, digits_of, draw, judged, run, toy_towers
from visft_ds.evals.judge import encoding, layers

NUMBER = "segmentation/two in-context mIoU"
#: One machine gives equal digits; another one may see a patch of an image otherwise.
TOLERANCE = 1e-3

Judged = Callable[[str], dict[str, Any]]  #: name of a case -> its record


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Noisy pictures of two greys whose border moves, their label maps, and files in the place of toy
    towers.
    """
    folder = tmp_path_factory.mktemp("data")
    draw(folder)
    with toy_towers():
        yield folder


#: Cases that nothing else here looks at.
SLOW = ("longer", "gained, other images", "lost", "other architecture")


@pytest.fixture(scope="module")
def record(data: Path) -> Judged:
    return cache(lambda case: judged(case, data, data / "out" / case))


def _row(record: dict[str, Any]) -> dict[str, Any]:
    (row,) = (row for row in record["rows"] if row["name"] == NUMBER)
    found: dict[str, Any] = row
    return found


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES],
)
def test_a_run_says_what_it_said(case: str, record: Judged) -> None:
    actual, expected = digits_of(record(case)), json.loads(FILE.read_text())[case]
    assert (actual["words"], actual["layers"]) == (expected["words"], expected["layers"])
    for name in ("shifts", "scales"):
        assert actual[name] == pytest.approx(expected[name], rel=0.02, abs=TOLERANCE), name
    assert actual["rows"].keys() == expected["rows"].keys()
    for number, row in expected["rows"].items():
        assert actual["rows"][number]["values"] == pytest.approx(row["values"], abs=TOLERANCE)
        differences = actual["rows"][number]["differences"]
        assert differences.keys() == row["differences"].keys()
        for name, interval in row["differences"].items():
            assert differences[name] == pytest.approx(interval, abs=TOLERANCE), f"{number}: {name}"


def test_a_copy_of_the_best_block_at_the_end_is_better_placed(
    data: Path, record: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many blocks are read at once."""
    placed = record("better placed")
    row, choices = _row(placed), placed["layers"][NUMBER]
    assert placed["verdicts"][0]["word"] == "better placed" and row["last"]["tuned"]["low"] > 0.1
    # of equal blocks the last
    assert (choices["base"]["chosen"], choices["tuned"]["chosen"]) == ("blocks.1", "blocks.2")
    assert row["differences"]["tuned"]["value"] == 0
    assert list(choices["base"]["held_out"]) == [f"blocks.{number}" for number in range(3)]
    assert "One fifth of the training images" in (data / "out/better placed/judge.html").read_text()
    monkeypatch.setattr(encoding, "MOST", 1)
    (data / "cache").rename(data / "cache of all blocks")
    again = judged("better placed", data, data / "again")
    assert again["layers"] == placed["layers"] and again["rows"] == placed["rows"]


def test_heads_alone_choose_among_all_blocks(record: Judged) -> None:
    assert list(record("heads")["layers"]["depth/two RMSE"]["base"]["held_out"]) == [
        f"blocks.{n}" for n in range(3)
    ]


def test_at_last_layers_nothing_is_called_a_gain(record: Judged) -> None:
    last = record("last layers")
    assert last["verdicts"][0]["word"] == "better placed" and list(last["variants"]) == ["base", "tuned"]
    assert "at their last layers" in last["verdicts"][0]["sentences"][0]
    assert not last["best"] and last["layers"] == {}


@pytest.mark.parametrize("case", ["same", "longer"])
def test_what_has_not_moved_is_the_same(case: str, record: Judged) -> None:
    """A model beside itself, in every number, and a tower that gives twice its features: in-context goes by
    directions. Every difference and every bound is 0, exactly."""
    same = record(case)
    assert same["verdicts"][0]["word"] == "the same" and same["shifts"] == {"tuned": 0.0}
    for row in same["rows"]:
        for of in (*row["differences"].values(), *row["last"].values()):
            assert of["value"] == of["low"] == of["high"] == 0.0


def test_features_that_are_turned_move_and_gain_nothing(record: Judged) -> None:
    turned = record("turned")
    row, shifts = _row(turned), turned["shifts"]
    assert turned["verdicts"][0]["word"] == "not shown" and shifts["tuned"] > 0.3
    assert row["differences"]["tuned"]["value"] == pytest.approx(0, abs=0.005)
    assert shifts["noise"] == pytest.approx(shifts["tuned"], rel=0.01) and set(row["controls"]["tuned"]) == {
        "noise"
    }


def test_a_gain_at_the_best_block_is_gained(record: Judged) -> None:
    """Above both bars of the base and above noise, which is read at its own best block."""
    gained = record("gained")
    (verdict,), row = gained["verdicts"], _row(gained)
    assert verdict["word"] == "gained" and "better than noise" in verdict["sentences"][0]
    assert row["differences"]["tuned"]["low"] > 0.05 and row["over_last"]["tuned"]["low"] > 0.05
    assert gained["layers"][NUMBER]["noise"]["held_out"].keys() == {"blocks.0", "blocks.1", "blocks.2"}


def test_a_control_that_moves_nothing_is_named_and_stops_nobody(data: Path, record: Judged) -> None:
    of_control = record("control")
    (verdict,), (trial,) = of_control["verdicts"], of_control["trials"]
    assert trial["controls"] == ["noise", "other"] and trial["missed"] == {"idle": 0.0} and trial["compared"]
    assert (
        "idle moves features by 0.000 at most" in verdict["sentences"][0]
        and "idle" not in of_control["variants"]
    )
    assert "idle: no scale of it" in (data / "out/control/judge.html").read_text()


def test_identical_weights_are_the_same_beside_a_model_that_ends_earlier(data: Path, record: Judged) -> None:
    """The bar of every model is the best block of the whole base."""
    cut = record("cut")
    words = {verdict["variant"]: verdict["word"] for verdict in cut["verdicts"]}
    assert words == {"tuned": "the same", "risen": "the same", "short": "better placed"}
    assert cut["layers"][NUMBER]["base"]["chosen"] == "blocks.2"
    same, risen, placed = (verdict["sentences"][0] for verdict in cut["verdicts"])
    assert same == "No feature of tuned differs from those of base."
    row = _row(cut)
    assert "ends after blocks.1" in risen and row["differences"]["risen"]["high"] < 0
    assert row["over_cut"]["risen"]["value"] == 0.0 and row["over_cut"]["short"]["low"] > 0.05
    assert "up to blocks.1" in placed and "not shown to be better than base at its best layer" in placed
    assert "base up to blocks.1" in (data / "out/cut/judge.html").read_text()


def test_a_control_counts_for_every_tuned_model(record: Judged) -> None:
    two = record("two")
    controls = {trial["variant"]: trial["controls"] for trial in two["trials"]}
    assert controls == {
        "tuned": ["noise of tuned", "turned of tuned"],
        "second": ["noise of second", "turned of second"],
    }
    for arm, names in controls.items():
        assert _row(two)["controls"][arm].keys() == set(names)
        expected = [two["shifts"][arm]] * 2
        assert [two["shifts"][name] for name in names] == pytest.approx(expected, rel=0.01)


def test_seeds_choose_one_layer_and_have_their_own_controls(record: Judged) -> None:
    """Each seed alone is best elsewhere: `early` after the first block, `late` after the last."""
    seeds = record("seeds")
    assert seeds["layers"][NUMBER]["tuned"]["chosen"] == "blocks.1"
    row = _row(seeds)
    for name in ("noise", "other"):
        first, second = row["differences"][name]["each"]
        assert abs(first - second) > 0.01, name
    assert seeds["variants"]["other"] == ["other 1", "other 2"]


def test_of_equal_blocks_the_last_is_chosen() -> None:
    levels = [{"kNN": {"a": 0.5, "b": 0.25, "c": 0.25}}, {"kNN": {"a": 0.25, "b": 0.25, "c": 0.5}}]
    assert layers.chosen(levels) == {"kNN": {"chosen": "c", "held_out": {"a": 0.375, "b": 0.25, "c": 0.375}}}
    assert layers.best_first({"a": 1.0, "b": 2.0, "c": 1.0}) == ["b", "c", "a"]


def test_published_protocols_need_a_gpu_or_a_word(data: Path, tmp_path: Path) -> None:
    """It is told before anything is encoded; a control has to be of the architecture."""
    names = [f"base={data}/middle.pt", f"tuned={data}/copied.pt", "--on", f"segmentation={data}/two"]
    status, _, errors = run(*names, "--out", tmp_path / "out")
    assert status == 2 and "long without a GPU" in errors and not (tmp_path / "out").exists()
    status, _, errors = run(
        *names, "--quick", "--control", f"other={data}/wide.pt", "--out", tmp_path / "out"
    )
    assert status == 2 and "do not have the same architecture" in errors

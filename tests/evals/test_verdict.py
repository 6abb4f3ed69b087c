"""The verdict's words, its sentences, and the page they stand on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import numpy as np
import pytest

from visft_ds.evals.judge.benchmark import Number, Score
from visft_ds.evals.judge.table import Difference, Results, Row, Trial, rows_of
from visft_ds.evals.judge.verdict import Verdict, judged
from visft_ds.evals.pages import judge_page
from visft_ds.evals.records import Interval

PRIMARY = "segmentation/voc in-context mIoU"
NUMBERS = {
    "depth/nyu RMSE": Number("RMSE", "Metres.", source="<dinov3>", differs="flips", lower=True),
    "agreement/voc top-1": Number("top-1", "Answers that stay.", agreement=True),
}
UP, AROUND, DOWN = Interval(0.03, 0.01, 0.05), Interval(0.01, -0.01, 0.03), Interval(-0.03, -0.05, -0.01)


def _difference(of: Interval) -> Difference:
    better, worse = of.low > 0, of.high < 0
    parts = {"p": 0.5, "shown": better or worse, "alone": of, "detectable": 0.02, "each": ()}
    return Difference(of.value, of.low, of.high, better=better, worse=worse, **parts)  # type: ignore[arg-type]


def _said(
    gain: Interval,
    controls: Sequence[Interval] = (),
    *,
    last: Interval | None = None,
    over_last: Interval = UP,
    over_cut: Interval | None = None,
    shift: float | None = 0.2,
    missed: Mapping[str, float] | None = None,
    compared: bool = True,
) -> Verdict:
    """The verdict about a row of one number."""
    named = {f"control {number}": _difference(of) for number, of in enumerate(controls)}
    row = Row(
        PRIMARY,
        250,
        False,
        values={},
        differences={"tuned": _difference(gain)},
        controls={"tuned": named},
        last={} if last is None else {"tuned": _difference(last)},
        over_last={"tuned": _difference(over_last)} if compared else {},
        over_cut={} if over_cut is None else {"tuned": _difference(over_cut)},
        last_values={},
        cut_values={},
    )
    cut = None if over_cut is None else "blocks.5"
    trial = Trial("tuned", tuple(named), None, shift, missed or {}, compared, cut)
    (verdict,) = judged([row], [trial], PRIMARY, "base")
    return verdict


@pytest.mark.parametrize(
    ("word", "gain", "last", "controls"),
    [
        ("gained", UP, UP, [UP, UP]),
        ("gained", UP, DOWN, [UP]),
        ("moved, not gained", UP, UP, [UP, AROUND]),
        ("moved, not gained", UP, UP, [DOWN]),
        ("better placed", AROUND, UP, [UP]),
        ("not shown", AROUND, AROUND, [UP]),
        ("not shown", AROUND, None, [UP]),
        ("lost", DOWN, UP, [UP]),
    ],
)
def test_each_word_by_hand(
    word: str, gain: Interval, last: Interval | None, controls: list[Interval]
) -> None:
    assert _said(gain, controls, last=last).word == word


def test_words_of_other_architectures_last_layers_and_twins() -> None:
    assert _said(UP, last=UP, shift=None).word == "better, without control"
    assert _said(AROUND, last=AROUND, shift=None).word == "not shown"
    placed = _said(UP, [UP], compared=False)  # never "gained" where all are read at their last layers
    assert placed.word == "better placed" and "at their last layers" in placed.sentences[0]
    assert _said(UP, compared=False).word == "better placed"
    assert _said(UP, [AROUND], compared=False).word == "moved, not gained"
    none = Interval(0.0, 0.0, 0.0)
    assert _said(none, last=none, over_last=none, shift=0.0).word == "the same"
    assert _said(none, last=none, over_last=none).word == "not shown"
    for gain in (UP, DOWN):  # no shift is the same and nothing else
        assert _said(gain, [UP], shift=0.0).word == "the same"


def test_the_bar_is_the_best_block_of_the_whole_base_and_its_last() -> None:
    for gain, said in (
        (AROUND, "not shown to be better than base at its best layer"),
        (DOWN, "but worse than base"),
    ):
        verdict = _said(gain, [UP], over_cut=UP)
        assert verdict.word == "better placed"
        assert (
            "+3.00 [+1.00, +5.00] in" in verdict.sentences[0]
            and "up to blocks.5, where it ends" in verdict.sentences[0]
        )
        assert said in verdict.sentences[0]
    lost = _said(DOWN, [UP], over_cut=AROUND)
    assert lost.word == "lost" and "is worse than base: -" in lost.sentences[0]
    assert _said(UP, [UP], over_cut=UP).word == "gained"
    late = _said(UP, [UP], last=UP, over_last=AROUND)
    assert (
        late.word == "not shown" and "than base at its last layer (+1.00 [-1.00, +3.00])" in late.sentences[0]
    )


def test_gained_needs_a_control_that_has_the_shift() -> None:
    missed = {"noise": 0.1}
    verdict = _said(UP, missed=missed)
    assert verdict.word == "better, without control"
    assert (
        "no control is of the same feature shift (0.200; noise moves features by 0.100 at most)"
        in verdict.sentences[0]
    )
    verdict = _said(UP, [UP], missed=missed)
    assert verdict.word == "gained" and "noise moves features by 0.100 at most" in verdict.sentences[0]
    assert _said(UP).word == "better, without control"


def _results() -> Results:
    """A tuned arm that gains in its primary number and pays in others, with noise and half of it."""
    rng = np.random.default_rng(0)
    changes: dict[str, tuple[float, float, float]] = {
        PRIMARY: (0.03, 0.0, 0.02),
        "segmentation/voc linear mIoU": (0.02, -0.01, 0.01),
        "classification/<digits> kNN": (-0.04, -0.05, -0.02),
        "depth/nyu RMSE": (0.02, 0.03, 0.0),
        "agreement/voc top-1": (-0.25, -0.5, -0.125),
    }
    found: dict[str, dict[str, Score]] = {arm: {} for arm in ("base", "tuned", "noise", "half")}
    for name, of_arms in changes.items():
        base = np.ones(200) if name.startswith("agreement/") else rng.random(200)
        for arm, change in zip(found, (0.0, *of_arms), strict=True):
            values = base + change + (rng.normal(0, 0.03, 200) if change else 0)
            if name.startswith("agreement/"):
                values = (np.arange(200) >= -200 * change).astype(float)
            found[arm][name] = Score(name, values)
    return found


def _judged(best: bool = True) -> tuple[list[Row], list[Trial], list[Verdict]]:
    results = _results()
    trials = [Trial("tuned", ("noise",), "half", 0.25, {}, best)]
    arms = {arm: [arm] for arm in results}
    rows = rows_of(results, arms, trials, PRIMARY, results if best else None, numbers=NUMBERS)
    return rows, trials, judged(rows, trials, PRIMARY, "base")


def test_cost_and_half_follow_the_verdict() -> None:
    """An error that grows is a cost; what rose, or may not have fallen, is none. Of costs those among all
    numbers have a mark, but not those of half."""
    _, _, (verdict,) = _judged()
    first, cost, half = verdict.sentences
    assert (
        verdict.word == "gained"
        and first.startswith("tuned is better than base by +2.73")
        and "noise" in first
    )
    assert "kNN -4." in cost and "RMSE +0.018" in cost and "linear" not in cost and "75.00 %" in cost
    assert cost.count("] *") == 2 and "2 of 3 other numbers, each by its own interval; * is shown" in cost
    assert "kNN -2." in half and "RMSE" not in half and "87.50 %" in half and "*" not in half
    _, _, (verdict,) = _judged(best=False)
    assert verdict.word == "better placed"


def test_sentences_name_what_decided() -> None:
    results = dict(_results())
    arms = {arm: [arm] for arm in results}
    trials = [Trial("tuned", ("noise",), None, 0.25, compared=True)]

    def said(last: Results) -> tuple[str, str]:
        (verdict,) = judged(rows_of(results, arms, trials, PRIMARY, last), trials, PRIMARY, "base")
        return verdict.word, verdict.sentences[0]

    results["noise"] = results["tuned"]
    word, sentence = said(results)
    assert word == "moved, not gained" and sentence.endswith(
        "not shown to be better than noise of the same feature shift."
    )
    results["base"], last = results["tuned"], {"base": results["base"], "tuned": results["tuned"]}
    word, sentence = said(last)
    assert (
        word == "better placed" and "+2.73" in sentence and "at their best (+0.00 [+0.00, +0.00])" in sentence
    )


def _texts(page: str) -> Iterator[str]:
    yield from (text for text in page.replace("<", ">").split(">") if text.strip())


def test_the_page_tells_all_of_the_record() -> None:
    """Made of what JSON keeps; without network and with names escaped."""
    rows, trials, verdicts = _judged()
    held_out = {f"blocks.{block}": 0.1 * block for block in range(4)}
    arms = {arm: [arm] for arm in _results()}
    record = {
        "models": {arm: f"{arm}.safetensors" for arm in arms},
        "variants": arms,
        "trials": [asdict(trial) for trial in trials],
        "primary": PRIMARY,
        "protocol": "quick",
        "layers": {PRIMARY: {arm: {"chosen": "blocks.3", "held_out": held_out} for arm in ("base", "tuned")}},
        "shifts": {"tuned": 0.25, "noise": 0.248, "half": 0.13},
        "notes": ["tuned was trained on these images."],
        "numbers": [number.described(quick=True) for number in NUMBERS.values()],
        "rows": [asdict(row) for row in rows],
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "seconds": 61.2,
        "versions": {"torch": "2.15"},
        "command": ["visft", "judge", "base.safetensors", "a run"],
    }
    page = judge_page(json.loads(json.dumps(record)), [np.zeros((20, 30, 3), np.uint8)])
    texts = list(_texts(page))
    assert "tuned: gained" in texts and verdicts[0].sentences[0] in texts and record["notes"][0] in texts
    assert "base, blocks.3" in texts and "0.248" in texts and rows[0].level("noise") in texts
    assert rows[0].controls["tuned"]["noise"].text() + " *" in texts and "tuned, last layer" in texts
    assert (
        "classification/&lt;digits&gt; kNN" in texts and rows[2].differences["tuned"].text() + " *" in texts
    )
    assert "visft judge base.safetensors &#39;a run&#39;" in texts and page.count("data:image/png") == 1
    assert "Metres. " in texts and "&lt;dinov3&gt;" in texts and "flips" not in page
    assert any("not comparable with published numbers" in text for text in texts)
    assert page.count("<svg") == 1 and 'src="http' not in page and "<script" not in page

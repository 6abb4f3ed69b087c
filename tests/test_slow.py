"""The runner of slow tests: order by commit, one repetition, nothing left out in silence."""

from __future__ import annotations

import pytest

from tests.slow import in_order, run_for


def test_the_order_is_the_commits() -> None:
    names = [f"test_{number}" for number in range(40)]
    assert in_order(names, "a") == in_order(names[::-1], "a") != in_order(names, "b")
    assert sorted(in_order(names, "a")) == sorted(names)


def test_a_test_fails_when_it_fails_twice(capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"good": ["passed"], "flaky": ["failed", "passed"], "bad": ["failed", "failed"], "late": []}
    now = [0.0]

    def run(name: str, seconds: float) -> str:
        assert seconds == 50 - now[0]
        now[0] += 10
        return answers[name].pop(0)

    results = run_for(list(answers), 50, run, lambda: now[0])
    assert results == {"good": "passed", "flaky": "failed, then passed", "bad": "failed twice"}
    assert "failed twice" in capsys.readouterr().out


def test_the_second_try_needs_time() -> None:
    now = [0.0]

    def run(name: str, seconds: float) -> str:
        now[0] += seconds
        return "failed"

    assert run_for(["slow", "never"], 5, run, lambda: now[0]) == {"slow": "failed, then cut off"}

"""The list of claims names tests that exist and mistakes that can be made; a slow test makes those of fast tests."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.claims import ROOT, Claim, notices, read_claims

CLAIMS = read_claims()


@cache
def _tests_in(path: Path) -> dict[str, bool]:
    """The tests of a file, and whether each is slow with all parameters."""
    text = path.read_text()
    all_slow = "\npytestmark = pytest.mark.slow" in text
    functions = [one for one in ast.parse(text).body if isinstance(one, ast.FunctionDef)]
    return {
        one.name: all_slow or "pytest.mark.slow" in [ast.unparse(mark) for mark in one.decorator_list]
        for one in functions
    }


def test_every_claim_has_a_name_of_its_own() -> None:
    names = [claim.name for claim in CLAIMS]
    assert len(names) == len(set(names)) > 100


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claim_names_a_test_and_a_mistake_that_can_be_made(claim: Claim) -> None:
    file, _, name = claim.test.partition("::")
    slow = _tests_in(ROOT / file)[name.partition("[")[0]]
    assert claim.slow or not slow, f"{claim.name}: say (slow) behind the test"
    text = claim.mutated(ROOT)
    if claim.file.endswith(".py"):
        ast.parse(text)


@pytest.mark.slow
@pytest.mark.parametrize("claim", [claim for claim in CLAIMS if not claim.slow], ids=lambda claim: claim.name)
def test_the_mistake_is_noticed(claim: Claim) -> None:
    seen, printed = notices(claim)
    if seen is None:
        pytest.skip(next(line for line in printed.splitlines() if line.startswith("SKIPPED")))
    assert seen, printed

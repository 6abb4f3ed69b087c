"""The comparison of two commits: what counts as a difference, what the list excuses, what is left out of a file."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.freeze import entries, tier1, tier2
from tests.freeze.__main__ import REPOSITORY, differences, main, report


def _results(values: dict[str, Any], **failed: str) -> dict[str, Any]:
    return {"entries": values, "failed": failed, "skipped": {}}


def test_equal_results_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"train/a/step1/loss/loss": 0.1, "train/a/step2/loss/loss": float("nan")}
    assert report(_results(values), _results(dict(values)), {}, 6) == 0
    assert "equal but for the list: 2 entries, 0 of them" in capsys.readouterr().out


def test_the_last_digit_counts_except_where_a_tolerance_says_otherwise() -> None:
    old = {"train/a/step1/loss/loss": 0.1, "train/a-bf16/step1/loss/loss": 0.1}
    assert not dict(differences(old, dict(old)))
    assert list(dict(differences(old, {name: value + 1e-9 for name, value in old.items()}))) == [
        "train/a/step1/loss/loss"
    ]
    assert len(dict(differences(old, {name: value * (1 + 1e-5) for name, value in old.items()}))) == 2


def test_true_is_not_one_and_an_entry_of_one_side_is_a_difference() -> None:
    assert list(dict(differences({"a": True, "b": 1}, {"a": 1, "c": 1}))) == ["a", "b", "c"]


def test_the_list_excuses_by_name_and_glob_and_says_what_it_no_longer_needs(capsys: pytest.CaptureFixture[str]) -> None:
    old, new = _results({"help/a/text": "x", "help/b/text": "y", "c[0]": 1}), _results({"c[0]": 2})
    listed = {"help/*": "gone", "c[0]": "mended", "help/d": "of an earlier commit", "clip/*": "of tier 2"}
    assert report(old, new, listed, 6) == 0
    printed = capsys.readouterr().out
    assert "no longer different: help/d (of an earlier commit)" in printed and "tier 2" not in printed
    assert report(old, new, {"help/*": "gone"}, 6) == 1
    assert "differs  c[0]: 1 -> 2" in capsys.readouterr().out


def test_a_case_that_fails_in_both_commits_is_no_equality(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(_results({}, a="boom"), _results({}, a="boom"), {}, 6) == 1
    assert "boom" in capsys.readouterr().out


def test_releases_and_hashes_of_files_that_name_them_are_left_out(tmp_path: Path) -> None:
    def write(release: str, value: bytes) -> dict[str, Any]:
        about = {"visft_ds": release, "visft_adapter": json.dumps({"rank": 2, "base_sha256": release * 8})}
        header = {"__metadata__": about, "w": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}
        encoded = json.dumps(header).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + value)
        return entries.folder(tmp_path)

    assert write("0.1.0", b"ab") == write("0.2.0", b"ab") != write("0.1.0", b"ac")
    assert write("0.1.0", b"ab")["a.safetensors/metadata/visft_adapter/rank"] == 2


def test_names_of_cases_are_unique_and_their_needs_come_first() -> None:
    seen: set[str] = set()
    for case in [*tier1.cases(), *tier2.cases(Path("coco"))]:
        assert case.name not in seen and seen >= set(case.needs), case.name
        seen.add(case.name)


def test_every_line_of_the_list_has_a_reason() -> None:
    lines = (REPOSITORY / "tests/golden/removed.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line and not line.startswith("#") and not re.match(r"\S+\s+\S", line)] == []


def test_a_commit_that_is_none_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["no-such-commit"])
    assert "needed a single revision" in capsys.readouterr().err.lower()

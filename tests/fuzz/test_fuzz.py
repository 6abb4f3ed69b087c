"""Damaged files for every reader in the fast suite, and the mistakes that earlier ones found."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fuzz import mutations
from visft_ds.config.records import DEEPEST, as_record, parse_json, read_record
from visft_ds.interop.files import load_pickled
from visft_ds.monitor.metrics import RunFile

REPOSITORY = Path(__file__).parents[2]


def test_damaged_files_are_read_right_or_refused_clearly() -> None:
    """In a process of its own, whose memory can be bounded."""
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "2000"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory" not in done.stdout and int(done.stdout.split("all")[-1].split()[0]) >= 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": "2"}, "world_size is '2', must be a whole number"),
        ({"world_size": 0}, "world_size is 0, must be greater than or equal to 1"),
        ({"world_size": True}, "world_size is True, must be a whole number"),
        ({"config": []}, r"config is \[\], must be an object"),
        ({"notes": 1}, "notes is not known"),
        ({"config": {"a": json.loads("[" * 70 + "]" * 70)}}, f"nested deeper than {DEEPEST} levels"),
    ],
)
def test_a_record_of_another_form_names_file_field_and_value(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": 2, "config": {}, **change}))
    with pytest.raises(ValueError, match=rf"run\.json.*{message}"):
        read_record(tmp_path / "run.json", RunFile)
    with pytest.raises(ValueError, match=r"absent\.json cannot be read"):
        read_record(tmp_path / "absent.json", RunFile)


@pytest.mark.parametrize("text", ["", "NaN", "{", '{"a": 1}x', "[" * 100_000, '"\ud800"', "1" + "0" * 5000])
def test_what_is_no_record_is_a_clear_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"^file"):
        as_record(text.encode("utf-8", "surrogatepass"), dict[str, Any], "file")


def test_depth_is_bounded() -> None:
    assert parse_json("[" * DEEPEST + "]" * DEEPEST, "x")
    with pytest.raises(ValueError, match="nested deeper"):
        parse_json("[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), "x")


def test_an_older_torch_file_cannot_ask_for_more_memory_than_it_is_large(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(1000.0)}, path, _use_new_zipfile_serialization=False)
    assert load_pickled(path)["a"].sum() == 499_500
    data = path.read_bytes()
    count = (1000).to_bytes(2, "little")
    assert data.count(b"M" + count) >= 1
    path.write_bytes(data.replace(b"M" + count, b"J" + (2**31 - 1).to_bytes(4, "little"), 1))
    with pytest.raises(ValueError, match=r"a\.pt is damaged .*would take 2,147,483,647"):
        load_pickled(path)


def test_a_zip_that_unpacks_to_more_than_it_is_large_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(10_000_000))
    with pytest.raises(ValueError, match="its tensors would take"):
        load_pickled(path)


def test_damage_is_repeated_by_its_numbers() -> None:
    import random

    first, second = (mutations.damaged(random.Random("0 x 7"), bytes(100)) for _ in range(2))
    assert first == second != bytes(100)

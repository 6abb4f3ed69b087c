"""A save that ends anywhere, and files that are not what was written: the newest whole checkpoint is found,
loudly.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.checkpoint.faulty_disk import (
    SCENES,
    Died,
    FaultyDisk,
    check_after_crash,
    prepare,
    save,
    state,
    value_of,
)
from visft_ds.checkpoint.format import newest_checkpoint, open_checkpoint, save_checkpoint

FILES = ("parameters.safetensors", "moments.safetensors", "state.json")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def failed_saves(
    folder: Path, scene: str, kind: str | int, raised: type[BaseException]
) -> Iterator[tuple[set[str], str]]:
    """Files behind a save that fails, and its error, once for each operation; and whether all is well after
    it.
    """
    prepare(folder / "before", scene)
    for at in count():
        place = folder / str(at)
        shutil.copytree(folder / "before", place)
        with FaultyDisk(at, kind).installed() as disk:
            try:
                save(place, scene)
                failed = ""
            except raised as error:
                failed = f"{kind} at operation {at}: {disk.log[-1]}: {error}"
        names = {path.name for path in place.iterdir()}
        check_after_crash(place, scene, failed)
        shutil.rmtree(place)
        if not failed:
            return
        yield names, failed


@pytest.mark.parametrize("kind", ["killed", "power"])
@pytest.mark.parametrize("scene", SCENES)
def test_a_crash_at_every_operation(scene: str, kind: str, tmp_path: Path) -> None:
    # an operation that is not counted would be one that is not tested
    assert len(list(failed_saves(tmp_path, scene, kind, Died))) > 25


@pytest.mark.parametrize(
    ("scene", "error"), [("next", errno.ENOSPC), ("again", errno.ENOSPC), ("next", errno.EROFS)]
)
def test_a_full_or_read_only_disk(scene: str, error: int, tmp_path: Path) -> None:
    """From any operation on: one line, and every earlier checkpoint is still there."""
    found = list(failed_saves(tmp_path, scene, error, OSError))
    assert len(found) > 15
    for names, message in found:
        assert os.strerror(error) in message and "\n" not in message
        assert "step 8" in message or error == errno.EROFS
        if error == errno.ENOSPC:  # what was written is removed; on a read-only disk nothing can be
            assert not any(name.endswith(".tmp") and "8" in name for name in names), message


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "gone", "longer", "folder"])
def test_damaged_files_are_passed_over_loudly(name: str, damage: str, tmp_path: Path) -> None:
    for step in (2, 4, 8):
        save_checkpoint(tmp_path, step, state(step), {})
    for step in (4, 8):
        file = tmp_path / f"step_{step:08d}" / name
        content, place = bytearray(file.read_bytes()), random.Random(step).randrange(file.stat().st_size)
        content[place] ^= 1 << place % 8
        damaged = {"cut": content[:place], "empty": b"", "flipped": content, "longer": content + b"\0"}
        file.unlink()
        if damage == "folder":
            file.mkdir()
        elif damage != "gone":
            file.write_bytes(damaged[damage])
    found, skipped = newest_checkpoint(tmp_path)
    assert found is not None and found.step == 2
    assert [line.split("step_")[1][:8] for line in skipped] == ["00000008", "00000004"]
    assert all(name in line for line in skipped)


def test_any_flipped_bit_of_the_state_is_noticed_or_means_nothing(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 8, state(9), {"data": "x", "seed": "0"})
    file, record, harmless = path / "state.json", dict(open_checkpoint(path).record), 0
    whole = file.read_bytes()
    places = range(0, len(whole), 3)
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        try:
            assert open_checkpoint(path).record == record, (place, content)
            harmless += 1
        except ValueError:
            continue
    assert harmless < 0.15 * len(places)  # line ends and indentation


def test_a_state_of_the_right_checksum_is_no_code(tmp_path: Path) -> None:
    """Nothing in a checkpoint is unpickled, whatever its name and checksum."""
    path = save_checkpoint(tmp_path, 8, state(9), {})
    (path / "state.json").write_bytes(pickle.dumps({"version": 3}))
    with pytest.raises(ValueError, match="cannot be read"):
        open_checkpoint(path)
    (path / "state.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="state of a checkpoint"):
        open_checkpoint(path)
    (path / "state.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        open_checkpoint(path)


def test_what_was_replaced_counts_until_the_new_one_is_there(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 8, state(8), {})
    (tmp_path / "step_00000008").rename(tmp_path / "step_00000008.old")
    assert value_of(tmp_path) == (8, 8.0)
    save_checkpoint(tmp_path, 12, state(12), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000008", "step_00000012"]

"""What `--dry-run` prints: numbers from the data where it is there, and a word where they are assumed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from visft_ds.config import resolve
from visft_ds.launch import main
from visft_ds.prepare.model import PUBLISHED_VOCABULARY
from visft_ds.run import machine, report
from visft_ds.run.report import print_dry_run

#: Values of the debug model's caption head for each id: a row of the embedding and one of the output, with
#: its bias.
BY_ID = 64 + 128 + 1
DRY = ["--stage", "1", "--model", "debug", "--dry-run", "--data"]


def trains(out: str) -> tuple[str, int]:
    """Title of the table of what trains, and values of the caption head."""
    title, _, _, _, row, *_ = out[out.index("-- what trains") :].splitlines()
    assert "captioning" in row
    return title, int(row.split()[2].replace(",", ""))


def test_a_dry_run_shows_what_is_there_and_ends_with_what_is_missing(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    words = tmp_path / "words.json"
    assert main([*DRY, str(tmp_path), "--set", f"visft.tasks.captioning.vocabulary.file={words}"]) == 2
    out, printed = capsys.readouterr()
    assert (
        "this run cannot start: 2 of its inputs are missing" in printed and f"not found: {words}" in printed
    )
    title, assumed = trains(out)
    assert title == "-- what trains, with a vocabulary of 9,490 ids (ASSUMED)"
    assert main([*DRY, str(shards)]) == 0  # 12 images with captions of five words, and the special ones
    out = capsys.readouterr().out
    assert trains(out) == ("-- what trains", assumed - (PUBLISHED_VOCABULARY - 9) * BY_ID)
    assert "visft.shared.batch_size = 12  the data has 12 images, fewer than a batch of 24" in out


def test_only_the_first_rank_makes_a_dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one's error would end it before it has printed anything."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*DRY, "nowhere"]) == 0 and not capsys.readouterr().out


def test_the_dry_run_says_whether_a_process_fits_and_what_is_recomputed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        "visft.model.activation_checkpointing=auto",
        f"visft.data.root={tmp_path}",
        f"visft.run.out={tmp_path}/run",
    )
    config = resolve(stage=2, model="debug", settings=(*settings, "visft.tasks=detection"))
    for room, verdict in ((10**12, "fits into"), (10**6, "DOES NOT FIT into")):
        for module in (report, machine):
            monkeypatch.setattr(module, "memory_of", lambda device, room=room: room)
        print_dry_run(config, None, 1)
        text = capsys.readouterr().out
        assert "-- predicted peak memory of a process" in text and verdict in text
        assert re.search(
            rf"activation_checkpointing = {'none' if room > 10**6 else 'block'} +chosen: needs 0.. of \S+ GiB",
            text,
        ), text


def test_a_dry_run_opens_the_files_that_a_start_opens(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    """A page of a portal under the name of the weights is there, and no run can start with it."""
    weights, head = tmp_path / "weights.safetensors", tmp_path / "detection.safetensors"
    for path in (weights, head):
        path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    arguments = ["--stage", "2", "--model", "debug", "--data", str(shards), "--dry-run"]
    arguments += ["--set", "visft.tasks=detection", "--set", "visft.tasks.detection.batch_size=8"]
    arguments += ["--heads", str(tmp_path)]
    for wrong, more in ((weights, ["--set", f"visft.model.weights={weights}"]), (head, [])):
        assert main([*arguments, *more]) == 2
        assert str(wrong) in capsys.readouterr().err

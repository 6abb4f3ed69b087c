"""What `--dry-run` prints: numbers from the data where it is there, and a word where they are assumed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.coco_tree import write_tree
from visft_ds.config import resolve
from visft_ds.launch import main
from visft_ds.models.eva_vit import PRESETS
from visft_ds.prepare.model import PUBLISHED_VOCABULARY
from visft_ds.run import machine, report
from visft_ds.run.report import print_dry_run
from visft_ds.shards.build import Options, build

#: Values of the debug model's caption head for each id: a row of the embedding and one of the output, with its bias.
BY_ID = 64 + 128 + 1


def table(capsys: pytest.CaptureFixture[str], *settings: str, stage: int = 1) -> list[str]:
    """Title and rows of the table of what trains."""
    print_dry_run(resolve(stage=stage, model="debug", settings=settings), 1)
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("-- what trains"))
    end = next(number for number, line in enumerate(lines) if line.startswith("-- batches"))
    return lines[start:end]


def values(row: str) -> int:
    return int(row.split()[2].replace(",", ""))


def test_the_vocabulary_is_that_of_the_data_or_is_said_to_be_assumed(
    capsys: pytest.CaptureFixture[str], shards: Path, tmp_path: Path
) -> None:
    title, _, *rows = table(capsys, f"visft.data.root={tmp_path}")
    assert title == "-- what trains, with a vocabulary of 9,490 ids (ASSUMED)"
    assumed = values(rows[2])
    title, _, *rows = table(capsys, f"visft.data.root={shards}")
    assert title == "-- what trains"  # of five words and the special ones
    assert assumed - values(rows[2]) == (PUBLISHED_VOCABULARY - 9) * BY_ID


def test_the_dry_run_says_whether_a_process_fits_and_what_is_recomputed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("visft.model.recompute=auto", f"visft.data.root={tmp_path}", f"visft.run.out={tmp_path}/run")
    config = resolve(stage=2, model="debug", settings=(*settings, "visft.tasks=detection"))
    for room, verdict in ((10**12, "fits into"), (10**6, "DOES NOT FIT into")):
        for module in (report, machine):
            monkeypatch.setattr(module, "memory_of", lambda device, room=room: room)
        print_dry_run(config, 1)
        text = capsys.readouterr().out
        assert "-- memory of a process at its fullest, predicted" in text and verdict in text
        assert re.search(rf"recompute +{'none' if room > 10**6 else 'block'}, chosen: needs 0.. of \S+ GiB", text), text


def test_the_published_sizes_of_the_large_heads(capsys: pytest.CaptureFixture[str]) -> None:
    """Parameter counts of the code published with the paper, at 9,490 words."""
    assert PRESETS["eva_e"].width == 1792
    print_dry_run(resolve(stage=1, settings=["visft.data.root=nowhere"]), 8)
    out = capsys.readouterr().out
    for task, count in (("detection", "8,810,464"), ("segmentation", "13,847,441"), ("captioning", "14,136,723")):
        (row,) = [line.split() for line in out.splitlines() if re.match(rf"   {task} +\d+ +[\d,]+ ", line)]
        assert row[2] == count


def test_a_dry_run_ends_with_what_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = tmp_path / "words.json"
    arguments = ["--stage", "1", "--model", "debug", "--data", str(tmp_path), "--dry-run"]
    arguments += ["--set", f"visft.tasks.captioning.vocabulary.file={words}"]
    assert main(arguments) == 2
    out, told = capsys.readouterr()
    assert "this run cannot start: 2 of its inputs are missing" in told and f"not found: {words}" in told
    assert out.startswith("== ") and "-- what trains" in out
    assert [line for line in out.splitlines() if len(line) > 100 and str(tmp_path) not in line] == []


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


def test_a_dry_run_looks_into_the_shards(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tree = write_tree(tmp_path)
    build(Options(tree.images, tree.instances, None, tmp_path / "shards", "train"))
    arguments = ["--stage", "1", "--model", "debug", "--data", str(tmp_path / "shards"), "--dry-run"]
    assert main([*arguments, "--tasks", "detection,segmentation,captioning"]) == 2
    assert "no sample with captions, which captioning needs" in capsys.readouterr().err
    assert main(arguments) == 0  # 12 images, with labels of the other two tasks
    assert "visft.shared.batch_size: 24 -> 12, because of the number of images" in capsys.readouterr().out

"""Saving beside the training: what stays, what waits for what, where a failure comes up; the mean of
checkpoints.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.faulty_disk import state
from visft_ds.checkpoint import saver as saving
from visft_ds.checkpoint.format import newest_checkpoint, save_checkpoint, saved_steps
from visft_ds.checkpoint.saver import Retention, Saver, recorded_scores
from visft_ds.parallel.state import EngineState, ToHost


def never(step: int) -> bool:
    return False


def test_the_last_ones_stay() -> None:
    steps = [2, 4, 6, 8, 10, 12]
    assert Retention(last=2).obsolete(steps, 12, {}, never) == [2, 4, 6, 8]
    # Newer ones (damaged, passed over by a resume) push nothing out.
    assert Retention(last=2).obsolete(steps, 8, {}, never) == [2, 4]
    assert Retention(last=9).obsolete(steps, 12, {}, never) == []


@pytest.mark.parametrize(
    ("scores", "deleted"),
    [
        ({4: 0.3, 8: 0.2}, [2, 6, 8, 10]),
        ({4: 0.3, 8: 0.4}, [2, 4, 6, 10]),
        ({4: 0.3, 8: 0.3}, [2, 6, 8, 10]),  # equal ones: the earlier
        ({4: 0.3}, [2, 6, 10]),  # 8 is still being judged
        ({4: None, 8: None}, [2, 4, 6, 8, 10]),  # evaluations that failed hold nothing back
        ({8: 0.1}, [2, 4, 6, 10]),  # 4 was left out
    ],
)
def test_the_best_stays(scores: dict[int, float | None], deleted: list[int]) -> None:
    evaluated = {4, 8, 12}
    steps = [2, 4, 6, 8, 10, 12]
    assert Retention(last=1, best="box/AP").obsolete(steps, 12, scores, evaluated.__contains__) == deleted


def test_scores_of_an_earlier_process(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert recorded_scores(path, "box/AP") == {}
    records = [{"step": 4, "loss/loss": 1.0}, {"step": 4, "val/box/AP": 0.5}, {"step": 8, "val/mask/AP": 0.1}]
    records.append({"step": 12, "val/box/AP": "nan"})
    path.write_text("".join(json.dumps({"kind": "step", **record}) + "\n" for record in records))
    assert recorded_scores(path, "box/AP") == {4: 0.5, 8: None, 12: None}


class Gate:
    """Holds the writer until it is opened; raises in it what it is given."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.error: OSError | None = None
        self.writing = 0
        self.most = 0

    def save(self, folder: Path, step: int, snapshot: EngineState, identity: Any, header: Any = None) -> Path:
        self.writing += 1
        self.most = max(self.most, self.writing)
        assert self.open.wait(600)
        self.writing -= 1
        if self.error is not None:
            raise self.error
        return save_checkpoint(folder, step, snapshot, identity)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    held = Gate()
    monkeypatch.setattr(saving, "save_checkpoint", held.save)
    yield held
    held.open.set()  # or a failed test would leave the thread waiting


def gather(value: float) -> saving.Callable[[ToHost], EngineState]:
    """What an engine does, whose tensors change in place as soon as training goes on."""
    living = state(value)

    def snapshot(keep: ToHost) -> EngineState:
        taken = {name: keep(f"value/{name}", tensor) for name, tensor in living.parameters.items()}
        for tensor in living.parameters.values():
            tensor.fill_(float("nan"))
        return replace(living, parameters=taken)

    return snapshot


def test_training_goes_on_while_the_snapshot_is_written(tmp_path: Path, gate: Gate) -> None:
    with Saver(tmp_path, {}, Retention(last=3)) as saver:
        saver.save(2, gather(2.0))  # returns although nothing can be written yet
        assert saver.finished() == [] and saver.saved == 0
        threading.Timer(0.1, gate.open.set).start()
        saver.save(4, gather(4.0))  # waits for the one before: two at a time would tear its memory
        early = saver.finished()  # perhaps both: the second may be on disk already
        assert early[0].step == 2 and saver.saved >= 2
        _, second = [*early, *saver.finished(wait=True)]
        assert second.step == 4 and second.stall_seconds > 0.01
    assert gate.most == 1
    assert saved_steps(tmp_path) == [2, 4]
    found, _ = newest_checkpoint(tmp_path)
    assert found is not None and torch.equal(found.load().parameters["c"], torch.tensor(4.0))


def test_a_failed_save_is_raised_in_the_training_thread_once(tmp_path: Path, gate: Gate) -> None:
    gate.error = OSError("no room")
    gate.open.set()
    with Saver(tmp_path, {}, Retention(last=3)) as saver:
        saver.save(2, gather(2.0))
        with pytest.raises(OSError, match="no room"):
            saver.finished(wait=True)
        assert saver.finished(wait=True) == [] and saver.saved == 0
        saver.save(4, gather(4.0))
        with pytest.raises(OSError, match="no room"):
            saver.save(6, gather(6.0))
    with pytest.raises(OSError, match="no room"), Saver(tmp_path, {}, Retention(last=3)) as saver:
        saver.save(8, gather(8.0))


def test_a_failed_save_does_not_hide_why_the_run_ends(
    tmp_path: Path, gate: Gate, capsys: pytest.CaptureFixture[str]
) -> None:
    gate.error = OSError("no room")
    gate.open.set()

    def diverge() -> None:
        with Saver(tmp_path, {}, Retention(last=3)) as saver:
            saver.save(2, gather(2.0))
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        diverge()
    assert "warning: no room" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_deleted_is_tried_again_at_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On NFS a folder is not empty as long as another process reads a file that was in it."""
    real = shutil.rmtree

    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with Saver(tmp_path, {}, Retention(last=1)) as saver:
        saver.save(2, gather(2.0))
        saver.finished(wait=True)
        monkeypatch.setattr(shutil, "rmtree", busy)
        for step in (4, 6):
            saver.save(step, gather(float(step)))
            assert [report.step for report in saver.finished(wait=True)] == [step]
        assert saver.saved == 6 and saved_steps(tmp_path) == [6]
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == 3 and all(
            "cannot be deleted" in line and "tries again" in line for line in printed
        )
        monkeypatch.setattr(shutil, "rmtree", real)
        saver.save(8, gather(8.0))
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000008"]


def test_the_best_checkpoint_outlives_later_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    retention = Retention(last=1, best="box/AP")
    with Saver(tmp_path, {}, retention, lambda step: step % 4 == 0) as saver:
        for step in (2, 4, 6):
            saver.save(step, gather(float(step)))
        saver.finished(wait=True)
        assert saved_steps(tmp_path) == [4, 6]  # 4 is being judged
        assert saver.judged(4, {"box/AP": 0.5})
        saver.save(8, gather(8.0))
        saver.finished(wait=True)
        assert not saver.judged(8, {"box/AP": 0.5})
        saver.save(10, gather(10.0))
    assert saved_steps(tmp_path) == [4, 10]
    with Saver(tmp_path, {}, retention, lambda step: step % 4 == 0) as saver:  # the same run, resumed
        saver.resume(10, {4: 0.5, 8: 0.5, 12: 0.9})  # 12 belongs to a future that was lost
        saver.save(12, gather(12.0))
        saver.finished(wait=True)
        assert not saver.judged(12, {"mask/AP": 0.9})
        assert "gave no 'box/AP'; it gave mask/AP" in capsys.readouterr().err
        saver.save(14, gather(14.0))
        saver.finished(wait=True)
        saver.delete_obsolete()
    assert saved_steps(tmp_path) == [4, 14]

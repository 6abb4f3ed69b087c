"""Which rank is lost or hangs, judged by heartbeats and a clock that the tests turn."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import visft_ds
from visft_ds.data.shards import DamagedSample
from visft_ds.resilience.errors import LostRank, exit_code
from visft_ds.resilience.heartbeat import FOLDER, Beat, process_state, read_beats
from visft_ds.resilience.processes import machine, started
from visft_ds.resilience.watchdog import Peers, Watchdog

ELSEWHERE = "another machine"  # nothing is known of processes there
PATIENCE, STEP = 10.0, 60.0


def beat(rank: int, count: int, position: int = 0, **fields: str) -> Beat:
    return Beat("s", rank, ELSEWHERE, 100 + rank, "1", count, position, **{"doing": f"step {position}", **fields})


def peers(world: int = 3) -> Peers:
    return Peers(world, 0, PATIENCE, STEP, now=0.0)


def test_a_rank_without_a_sign_of_life_is_named_in_time() -> None:
    judge, now = peers(), 0.0
    while now < 30:
        now += 1
        alive = {rank: beat(rank, int(now), int(now)) for rank in range(3)}
        alive[2] = beat(2, min(int(now), 5), 5)  # as found in the last file it wrote
        problem, blamed = judge.look(alive, now, timed=True)
        if problem:
            break
    assert PATIENCE < now - 5 <= PATIENCE + 1
    assert "rank 2 (process 102 on another machine, last seen: step 5)" in problem
    assert [one.rank for one in blamed] == [2]


def test_a_rank_that_never_came_is_named() -> None:
    judge = peers()
    for now in range(1, 11):
        assert judge.look({0: beat(0, now), 1: beat(1, now)}, now, timed=False)[0] == ""
    assert "rank 2 has never given a sign of life" in judge.look({0: beat(0, 11), 1: beat(1, 11)}, 11.0, timed=False)[0]


def test_no_progress_blames_those_that_are_behind_and_spares_what_may_take_long() -> None:
    judge = peers()
    for now in range(1, 61):
        stuck = {0: beat(0, now, 7), 1: beat(1, now, 6), 2: beat(2, now, 7)}
        assert judge.look(stuck, now, timed=True) == ("", [])
    problem, blamed = judge.look({0: beat(0, 62, 7), 1: beat(1, 62, 6), 2: beat(2, 62, 7)}, 62.0, timed=True)
    assert "no progress for 61 s; behind the others: rank 1 (process 101" in problem
    assert [one.rank for one in blamed] == [1]
    judge = peers()
    for now in range(1, 62):
        beats = {rank: replace(beat(rank, now, 7), collectives=40 - (rank == 2)) for rank in range(3)}
        judge.look(beats, now, timed=True)
    problem, _ = judge.look({rank: replace(one, count=99) for rank, one in beats.items()}, 63.0, timed=True)
    assert "behind the others: rank 2" in problem and "39 collectives begun" in problem
    judge = Peers(3, 0, PATIENCE, STEP, now=0.0, alike=False)  # stages of a pipeline, which begin different ones
    for now in range(1, 62):
        judge.look({rank: replace(one, count=now) for rank, one in beats.items()}, now, timed=True)
    problem, blamed = judge.look({rank: replace(one, count=99) for rank, one in beats.items()}, 63.0, timed=True)
    assert "all ranks are at the same point: step 7" in problem and blamed == []
    judge = peers()
    for now in range(1, 200):
        assert judge.look({rank: beat(rank, now, 7) for rank in range(3)}, now, timed=False) == ("", [])
    for now in range(200, 260):  # the count begins with what is bound in time
        assert judge.look({rank: beat(rank, now, 7) for rank in range(3)}, now, timed=True) == ("", [])


def test_a_job_that_was_suspended_as_a_whole_goes_on() -> None:
    judge = peers()
    for now in range(1, 5):
        judge.look({rank: beat(rank, now, 1) for rank in range(3)}, now, timed=True)
    # Nobody looked for an hour; the first rank to run again sees everyone as they were.
    assert judge.look({rank: beat(rank, 4, 1) for rank in range(3)}, 3605.0, timed=True) == ("", [])
    assert judge.look({rank: beat(rank, 5, 2) for rank in range(3)}, 3606.0, timed=True) == ("", [])


def test_a_rank_that_ended_in_good_order_is_waited_for_no_longer_than_a_lost_one() -> None:
    judge, ended = peers(2), beat(1, 4, 1, ended="ValueError: no such file")
    for now in range(1, 11):
        assert judge.look({0: beat(0, now), 1: ended}, now, timed=True) == ("", [])
    problem, _ = judge.look({0: beat(0, 12), 1: ended}, 12.0, timed=True)
    assert "has ended: ValueError: no such file" in problem


def test_a_process_of_this_machine_that_is_gone_is_missed_at_the_second_look() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = Beat("s", 1, socket.gethostname(), process.pid, started(process.pid), machine=machine())
    assert process_state(here) in ("running", "waiting for a device")
    assert process_state(replace(here, born="1")) == "gone"  # its number was given to another process
    process.kill()
    process.communicate()
    judge = peers(2)
    assert judge.look({0: beat(0, 1), 1: here}, 1.0, timed=True) == ("", [])
    assert "is gone: killed, or out of memory" in judge.look({0: beat(0, 2), 1: here}, 2.0, timed=True)[0]


@pytest.mark.parametrize(("first", "code"), [(DamagedSample("crc32"), 2), (FloatingPointError("nan"), 4), (None, 3)])
def test_who_follows_ends_with_the_code_of_who_ended_first(first: Exception | None, code: int, tmp_path: Path) -> None:
    """A launcher reports the code that it finds first; by that of a mere follower a supervisor would start again what
    somebody has to mend."""

    def watchdog(rank: int) -> Watchdog:
        return Watchdog(tmp_path, rank=rank, world=2, start="s", heartbeat_timeout=1.0, step_timeout=0.0)

    if first is not None:
        with pytest.raises(type(first)), watchdog(1):
            raise first
    with pytest.raises(LostRank, match="another rank ended first") as caught, watchdog(0):
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4242")
    assert exit_code(caught.value) == code
    beats = [json.loads(path.read_text()) for path in sorted((tmp_path / "heartbeats").glob("rank_*.json"))]
    assert [one["code"] for one in beats] == [code] * (1 + (first is not None))


def test_a_rank_killed_on_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is not to be seen from here; its heartbeat stands still while those of the others go on."""
    own: list[int] = []

    def read(self: Watchdog) -> dict[int, Beat]:
        own.extend(one.count for one in read_beats(tmp_path / FOLDER))
        return {1: beat(1, 7, 12), 2: beat(2, len(own), 12), 3: beat(3, 7, 12, ended="another rank ended first")}

    monkeypatch.setattr(Watchdog, "_read", read)
    with pytest.raises(LostRank) as caught:
        with Watchdog(tmp_path, rank=0, world=4, start="s", heartbeat_timeout=10.0, step_timeout=0.0):
            raise RuntimeError("Connection closed by peer [127.0.0.1]:4242")
    told = str(caught.value).splitlines()[0]
    where = "rank 1 (process 101 on another machine, last seen: step 12)"
    assert told == f"another rank ended first: no sign of life since then from {where}"
    assert max(own) > min(own)  # by which the others know that it is not this rank


def test_a_heartbeat_that_a_kill_cut_off_is_not_left_for_good(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "heartbeats" / "rank_00000.tmp").write_text("{")
    with Watchdog(tmp_path, rank=0, world=1, start="s", heartbeat_timeout=60.0, step_timeout=0.0):
        pass
    assert [path.name for path in (tmp_path / "heartbeats").iterdir()] == ["rank_00000.json"]


def test_a_process_id_of_another_machine_of_the_same_name_tells_nothing() -> None:
    """Containers on the network of their machine share its name and not its process ids."""
    here = Beat("s", 1, socket.gethostname(), 4_000_000_000, "1", machine=machine())
    assert machine() and process_state(here) == "gone"
    assert process_state(replace(here, machine=machine() + "1")) == ""
    assert process_state(replace(here, machine="")) == ""


def test_a_full_disk_does_not_hide_why_a_rank_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be made then; the one that is there is written over."""

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def ending() -> None:
        with Watchdog(tmp_path, rank=0, world=1, start="s", heartbeat_timeout=60.0, step_timeout=0.0) as watchdog:
            watchdog.begin("a part of a step with a name that is longer than why it ends: " + "x" * 300)
            watchdog._write()
            monkeypatch.setattr(Path, "write_text", full)
            watchdog.begin("saving")
            full()

    with pytest.raises(OSError, match="No space left"):
        ending()
    (beat,) = read_beats(tmp_path / FOLDER)
    assert (beat.doing, beat.ended) == ("saving", "OSError: [Errno 28] No space left on device")


def test_a_stderr_without_a_descriptor_ends_no_run(tmp_path: Path) -> None:
    """As a notebook, a service or a test puts in its place; faulthandler wants to write to one."""
    with contextlib.redirect_stderr(io.StringIO()) as caught:
        with Watchdog(tmp_path, rank=0, world=1, start="s", heartbeat_timeout=60.0, step_timeout=0.0) as watchdog:
            watchdog._report("no progress", [])
    assert "no progress" in caught.getvalue()


def test_no_time_out_is_told_by_a_clock_that_can_be_set() -> None:
    """A clock that jumps, by hand or at the end of summer time, must not end a run or let one hang."""
    package = Path(visft_ds.__file__).parent
    files = [path for folder in ("resilience", "run", "parallel") for path in (package / folder).glob("*.py")]
    assert files and not [
        path for path in files if "time.time()" in path.read_text() or "datetime.now" in path.read_text()
    ]

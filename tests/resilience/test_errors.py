"""Who prints an error, and how its process ends."""

from __future__ import annotations

import pytest

from visft_ds import launch
from visft_ds.resilience.errors import Diverged, LostRank, RankError, RanksDiffer, StoreFailed, met_by_one_rank, tell

CODES = {
    ValueError("a typo"): 2,
    OSError(28, "No space left"): 2,
    StoreFailed("no answer"): 2,
    RankError("crc32"): 2,
    Diverged("nan"): 4,
    FloatingPointError("nan"): 4,
    RanksDiffer("seeds"): 2,
    LostRank("rank 1 was killed", 4): 4,
    RuntimeError("Connection closed by peer [127.0.0.1]:4242"): 3,
}
ALL = (ValueError, Diverged, RanksDiffer)


@pytest.mark.parametrize("error", CODES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("rank", "local"), [("0", "0"), ("3", "3"), ("8", "0")])
def test_an_error_is_printed_by_whoever_alone_meets_it_or_once_a_machine(
    error: Exception, rank: str, local: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert tell(error) == CODES[error]
    printed = capsys.readouterr().err
    met_by_all = isinstance(error, ALL) and not isinstance(error, RankError)
    assert bool(printed) == (not met_by_all or local == "0")
    assert not printed or printed.startswith(f"[rank {rank}] " if rank != "0" else ("error: ", "[rank 0] "))


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        tell(RuntimeError("shapes do not fit"))


def test_a_mistake_that_one_rank_meets_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process by itself is all ranks there are."""
    for world, kind in (("1", ValueError), ("2", RankError)):
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(ValueError, match="crc32") as caught, met_by_one_rank():
            raise ValueError("crc32")
        assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("program", "here", "world", "command"),
    [
        ("visft train", None, 1, "visft train --stage 1"),
        ("visft train", "2", 2, "visft train --num_gpus 2 --stage 1"),
        ("launchers/train.py", "2", 2, "deepspeed --num_gpus 2 launchers/train.py --stage 1"),
        ("visft train", "2", 4, "visft train --stage 1"),
    ],
)
def test_the_recorded_command_starts_the_same_processes(
    program: str, here: str | None, world: int, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "program", lambda name: program)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is None:
        monkeypatch.delenv("LOCAL_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_SIZE", here)
    assert " ".join(launch._again(["--local_rank=1", "--stage", "1"], world)) == command

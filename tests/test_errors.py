"""Who prints an error, and how its process ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from visft_ds.errors import LostRank, RankError, tell

CODES = {
    ValueError("a typo"): 2,
    OSError(28, "No space left"): 2,
    RankError("crc32"): 2,
    FloatingPointError("nan"): 4,
    LostRank("rank 1 was killed"): 3,
    RuntimeError("Connection closed by peer [127.0.0.1]:4242"): 3,
}


@pytest.mark.parametrize("error", CODES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("rank", "local"), [("0", "0"), ("3", "3"), ("8", "0")])
def test_an_error_is_printed_by_whoever_alone_meets_it_or_once_a_machine(
    error: Exception,
    rank: str,
    local: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert tell(error) == CODES[error]
    met_by_all = isinstance(error, ValueError | FloatingPointError) and not isinstance(error, RankError)
    assert bool(capsys.readouterr().err) == (not met_by_all or local == "0")


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        tell(RuntimeError("shapes do not fit"))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")]
)
def test_too_little_memory_is_no_bug(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert tell(error) == 2 and "smaller" in capsys.readouterr().err


def test_the_system_says_which_file_in_words_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, cause in (
        (tmp_path / "nosuch.json", "no such file or directory"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(OSError, match="Errno") as refused:
            path.read_bytes()
        assert tell(refused.value, "shards") == 2
        assert capsys.readouterr().err == f"shards: {path}: {cause}\n"


def test_a_message_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of tensors, values and files that others chose stand in messages."""
    assert tell(ValueError("two lines:\n  \x1b[2J\x07 \u202etxt.exe \x9b31m \ud800 caf\u00e9")) == 2
    assert capsys.readouterr().err == (
        "error: two lines:\n  \\x1b[2J\\x07 \\u202etxt.exe \\x9b31m \\ud800 caf\u00e9\n"
    )

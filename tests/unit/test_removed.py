"""What was removed answers with what serves instead, and records that hold it stay readable."""

from __future__ import annotations

import re

import pytest

from tools.profile import main as profile
from visft_ds.config import removed, resolve
from visft_ds.config.resolve import resolve_values
from visft_ds.config.validate import known_keys


@pytest.fixture
def gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(removed.KEYS, "visft.run.sparkle", "use --shine")
    monkeypatch.setitem(removed.IDLE, "visft.run.sparkle", 0)
    monkeypatch.setitem(removed.ARGUMENTS, "polish", {"wax": "oil", "--wax": "oil", "build --shine": "wax"})


@pytest.mark.usefixtures("gone")
def test_a_removed_key_says_what_serves_instead() -> None:
    with pytest.raises(ValueError, match=r"visft.run.sparkle = 3 \(--set\): removed in 0.2: use --shine$"):
        resolve(stage=1, model="debug", settings=("visft.run.sparkle=3",))


@pytest.mark.usefixtures("gone")
@pytest.mark.parametrize(("value", "said"), [(0, ""), (3, "record: visft.run.sparkle was removed in 0.2")])
def test_a_record_with_a_removed_key_is_read(value: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve(stage=1, model="debug")
    values = config.to_dict()
    values["visft"]["run"]["sparkle"] = value
    assert resolve_values(values, "record").to_dict() == config.to_dict()
    assert capsys.readouterr().err.startswith(said) and bool(said) == bool(value)


@pytest.mark.usefixtures("gone")
@pytest.mark.parametrize("words", [["wax"], ["build", "--wax"], ["build", "--wax=3"], ["build", "--shine"]])
def test_a_removed_argument_says_what_serves_instead(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"wax|--shine"):
        removed.refuse_removed("polish", words)


@pytest.mark.usefixtures("gone")
def test_other_arguments_pass() -> None:
    removed.refuse_removed("polish", ["build", "wax", "--shiny", "buff"])  # a value may be called like a command
    removed.refuse_removed("buff", ["wax"])
    removed.refuse_removed("polish", ["buff", "--shine"])


@pytest.mark.parametrize(
    "line",
    [
        "heads",
        "ap --masks",
        "build --workers=2",
        "--local_rank=0 save",
        "sharing --stage 1",
        "features",
        "data --start",
        "data --synthetic --shuffle",
        "data --samples=9",
    ],
)
def test_removed_measurements_say_where_they_stand(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(line.split()) == 2
    assert re.match(r"error: [\w -]+: removed in 0.2: .*what it measured stands in docs/LOG", capsys.readouterr().err)


def test_what_is_removed_is_not_known_any_more() -> None:
    assert removed.KEYS.keys() & set(known_keys()) == set() and removed.IDLE.keys() <= removed.KEYS.keys()

"""`--help` of every program answers without what takes seconds to import."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ranks import python
from visft_ds.cli import COMMANDS
from visft_ds.flags import Parser, parse_size

ROOT = Path(__file__).parents[1]
#: But gpu.py, a test of torch itself.
PROGRAMS = [
    path for folder in ("tools", "launchers") for path in (ROOT / folder).glob("*.py") if path.stem != "gpu"
]
SLOW = ("torch", "deepspeed", "timm", "transformers", "open_clip", "peft", "scipy", "jinja2", "matplotlib")
#: Runs command lines one after another, [[what is run, its arguments, ...], ...]; what each printed, and what
#: had been imported by then.
RUN = f"""
import contextlib, io, json, os, runpy, sys
ended, path = [], list(sys.path)
for program, *words in json.loads(sys.argv[1]):
    sys.argv, sys.path[:], stream = [program, *words], path, io.StringIO()
    run = runpy.run_module if program == "visft_ds" else runpy.run_path
    with contextlib.redirect_stdout(stream), contextlib.suppress(SystemExit):
        run(program, run_name="__main__")
    ended.append([stream.getvalue(), [name for name in {SLOW} if name in sys.modules]])
print(json.dumps(ended), flush=True)
os._exit(0)  # not with the status of the last command
"""


def test_help_imports_nothing_slow_and_names_the_command_as_it_was_typed() -> None:
    """One process for all of them: nothing slow may be imported by any."""
    lines = {f"visft {name}": ["visft_ds", name, "--help"] for name in COMMANDS}
    lines |= {f"{program.parent.name}/{program.name}": [str(program), "--help"] for program in PROGRAMS}
    printed = python("-c", RUN, json.dumps(list(lines.values())))
    for name, (said, slow) in zip(lines, json.loads(printed), strict=True):
        assert said.startswith(f"usage: {name} ") and slow == [], name


def test_wrong_arguments_are_refused_before_anything_slow_is_imported() -> None:
    lines = [
        ["predict", "nowhere", "nothing.jpg"],
        ["predict", "nothing.jpg", "--run", "nowhere"],
        ["predict", "runs"],
        ["predict", str(ROOT / "docs/images"), "--run", "nowhere", "--threshold", "7"],
        ["evaluate", "--run", "nowhere"],
        ["evaluate", "--run", "nowhere", "--limit", "0"],
        ["evaluate"],
        ["report", "nowhere"],
        ["merge", "--run", "nowhere", "--out", "merged.safetensors"],
        ["plan", "--cluster", "8xNothing"],
        ["profile", "--stage", "1", "--model", "nothing"],
        ["train", "--stage", "2", "--data", "nowhere"],
        ["ablate", "--seeds", "0"],
    ]
    printed = python("-c", RUN, json.dumps([["visft_ds", *words] for words in lines]))
    for words, (_, slow) in zip(lines, json.loads(printed.splitlines()[-1]), strict=True):
        assert slow == [], words


def test_a_misspelt_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the sub-command, too; what resembles nothing is only named."""
    parser = Parser(prog="visft shards")
    parser.add_argument("--local_rank")
    parser.add_subparsers().add_parser("build").add_argument("--shard-size")
    for words, told in (
        (
            ["build", "--shard-sise", "3"],
            "unrecognized arguments: --shard-sise; did you mean --shard-size?",
        ),
        (["--xyz"], "unrecognized arguments: --xyz"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert capsys.readouterr().err == f"visft shards: {told}; see visft shards --help\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--val", "abc"], "--val 'abc' is not allowed: give a number"),
        (["--limit", "2.5"], "--limit '2.5' is not allowed: give a whole number"),
        (["--stage", "3"], "--stage 3 is not allowed: give one of 1, 2"),
        (["--val"], "--val needs a value"),
        (["--val", "0.2", "--limit", "2"], "--limit and --val do not go together: give one of them"),
    ],
)
def test_a_wrong_value_is_answered_in_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = Parser(prog="visft")
    parser.add_argument("--stage", type=int, choices=(1, 2))
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--val", type=float)
    group.add_argument("--limit", type=int)
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    assert (ended.value.code, capsys.readouterr().err) == (2, f"visft: {told}; see visft --help\n")


def test_sizes_are_understood_or_refused() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 kb", "2GiB", "7")] == [5 * 10**9, 1500, 2 * 2**30, 7]
    for wrong in ("5 G", "GB", "0", "-1MB", "1e9"):
        with pytest.raises(ValueError, match="is not a size"):
            parse_size(wrong)

"""`--help` of every program answers without what takes seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from visft_ds.cli import COMMANDS
from visft_ds.flags import Parser, parse_size

ROOT = Path(__file__).parents[1]
#: But reach.py, which takes the flags of launchers/train.py and trains, and gpu.py, a test of torch itself.
PROGRAMS = sorted(
    path
    for folder in ("tools", "launchers")
    for path in (ROOT / folder).glob("*.py")
    if path.name not in ("reach.py", "gpu.py")
)
SLOW = ("torch", "deepspeed", "timm", "transformers", "open_clip", "peft", "scipy", "torchvision", "matplotlib")
PACKAGE = "visft_ds"
#: Runs command lines one after another, {name: [what is run, its arguments, ...]}; says of each how it ended, what it
#: printed to both streams, and what had been imported by then.
RUN = f"""
import contextlib, io, json, runpy, sys
ended, path = {{}}, list(sys.path)
for name, (program, *words) in json.loads(sys.argv[1]).items():
    sys.argv, sys.path[:], streams, code = [program, *words], path, [io.StringIO(), io.StringIO()], None
    run = runpy.run_module if program == {PACKAGE!r} else runpy.run_path
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            run(program, run_name="__main__")
        except SystemExit as end:
            code = end.code
    slow = [name for name in {SLOW} if name in sys.modules]
    ended[name] = code, *(stream.getvalue() for stream in streams), slow
print(json.dumps(ended))
"""
Ended = tuple[int, str, str, list[str]]


@pytest.fixture(scope="module")
def ended() -> dict[str, Ended]:
    """One process for all of them: nothing slow may be imported by any."""
    lines = {name: [PACKAGE, name, "--help"] for name in COMMANDS}
    lines |= {program.name: [str(program), "--help"] for program in PROGRAMS}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(lines)], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Ended] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands_imports_nothing_slow(ended: dict[str, Ended], command: str) -> None:
    """And the usage line names the command as it was typed."""
    code, out, errors, slow = ended[command]
    assert code == 0 and out.startswith(f"usage: visft {command} "), out + errors
    assert slow == []


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_help_imports_nothing_slow(ended: dict[str, Ended], program: Path) -> None:
    code, out, errors, slow = ended[program.name]
    assert code == 0 and out.startswith(f"usage: {program.parent.name}/{program.name} "), out + errors
    assert slow == []


def test_a_misspelt_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the sub-command, too; what resembles nothing is only named."""
    parser = Parser(prog="visft shards")
    parser.add_argument("--local_rank")
    parser.add_subparsers().add_parser("build").add_argument("--shard-size")
    for words, told in (
        (["build", "--shard-sise", "3"], "unrecognized arguments: --shard-sise; did you mean --shard-size?\n"),
        (["--xyz"], "unrecognized arguments: --xyz\n"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert capsys.readouterr().err.endswith(told)


def test_sizes_are_understood_or_refused() -> None:
    assert [parse_size(text) for text in ("5GB", "1.5 kb", "2GiB", "7")] == [5 * 10**9, 1500, 2 * 2**30, 7]
    for wrong in ("5 G", "GB", "0", "-1MB", "1e9"):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(wrong)

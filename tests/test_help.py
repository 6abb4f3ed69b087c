"""`--help` of every program answers without what takes seconds to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from visft_ds.cli import COMMANDS
from visft_ds.flags import Parser

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path for folder in ("tools", "launchers") for path in (ROOT / folder).glob("*.py"))
#: reach.py takes the flags of launchers/train.py, and trains; gpu.py is a test of torch itself.
WITHOUT_FLAGS = {"reach.py", "gpu.py"}
SLOW = ("torch", "deepspeed", "timm", "transformers", "open_clip", "peft", "scipy", "torchvision", "matplotlib")
RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("IMPORTED", *(name for name in {slow} if name in sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_commands_imports_nothing_slow(command: str) -> None:
    """And the usage line names the command as it was typed."""
    text = RUN.format(slow=SLOW).replace("run_path(sys.argv[0]", 'run_module("visft_ds"')
    words = [sys.executable, "-c", text, "visft", command, "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: visft {command} "), done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == "IMPORTED", done.stderr


def test_a_filled_folder_is_refused_before_anything_slow_is_imported(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    text = RUN.format(slow=SLOW).replace("run_path(sys.argv[0]", 'run_module("visft_ds"')
    flags = ["--backbone", "b", "--heads", "h", "--data", "d", "--out", str(tmp_path)]
    words = [sys.executable, "-c", text, "visft", "evaluate", *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 2 and "is not empty and nothing in it is overwritten" in done.stderr
    assert done.stderr.splitlines()[-1] == "IMPORTED", done.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_help_imports_nothing_slow(program: Path) -> None:
    if program.name in WITHOUT_FLAGS:
        pytest.skip("has no flags of its own, or needs torch for them")
    command = [sys.executable, "-c", RUN.format(slow=SLOW), str(program), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {program.parent.name}/{program.name} "), done.stderr
    assert done.stderr.splitlines()[-1] == "IMPORTED", done.stderr


def test_a_misspelt_flag_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the sub-command, too; what resembles nothing is only named."""
    parser = Parser(prog="visft shards")
    parser.add_argument("--local_rank")
    parser.add_subparsers().add_parser("build").add_argument("--shard-size")
    for words, told in (
        (["build", "--shard-sise", "3"], "unrecognized arguments: --shard-sise 3; did you mean --shard-size?\n"),
        (["--xyz"], "unrecognized arguments: --xyz\n"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert capsys.readouterr().err.endswith(told)

"""Programs outside of their environment: a line that says how to enter it, not a traceback."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Not gpu.py: it runs in whatever environment has torch.
PROGRAMS = sorted(
    path for folder in ("tools", "launchers") for path in (ROOT / folder).glob("*.py") if path.stem != "gpu"
)
#: Programs that answer --help without any package -> words with which they go on.
WORDS = {
    "ablate.py": ("heads", "--dry-run"),
    "contrast.py": ("pretrain", "--data", "shards", "--out", "clip"),
    "replay.py": ("run", "--step", "1"),
    "reach.py": ("--stage", "1"),
}
BARE = [sys.executable, "-S", "-E"]  # no site-packages: a Python in which nothing is installed


def _run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*BARE, *arguments], capture_output=True, text=True, cwd=cwd, timeout=600)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_a_program_names_the_missing_package_and_how_to_enter_the_environment(program: Path, tmp_path: Path) -> None:
    result = _run(str(program), *WORDS.get(program.name, ("--help",)), cwd=tmp_path)
    assert result.returncode == 1 and not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{program.name}: no package '") and f"in {sys.executable}" in line
    assert "`make install` once, then `. .venv/bin/activate`" in line


def test_other_errors_and_other_programs_keep_their_traceback(tmp_path: Path) -> None:
    """A package that is missed in the middle of a run is an error like others; so is one of somebody's own program."""
    (tmp_path / "tools").mkdir()
    own = tmp_path / "tools/own.py"
    own.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport visft_ds\nimport nowhere\n")
    assert "Traceback" in _run(str(own)).stderr
    late = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['__main__'].__file__ = {str(PROGRAMS[0])!r}\n"
        "import visft_ds\n"
        "def run():\n    import nowhere\n"
    )
    assert "Traceback" in _run("-c", late + "run()").stderr
    assert "Traceback" in _run("-c", late + "import visft_ds.nowhere").stderr
    assert "Traceback" in _run("-c", late + "raise ValueError").stderr
    assert "Traceback" not in _run("-c", late + "import nowhere").stderr, "the cases differ in nothing else"


@pytest.mark.parametrize("module", ["visft_ds", "visft_ds.launch"])
def test_the_remedy_without_a_checkout_asks_for_none(module: str, tmp_path: Path) -> None:
    words = ["-m", module, *(["train"] if module == "visft_ds" else []), "--help"]
    assert "`make install` once" in _run(*words, cwd=ROOT).stderr
    shutil.copytree(ROOT / "visft_ds", tmp_path / "visft_ds", ignore=shutil.ignore_patterns("__pycache__"))
    result = _run(*words, cwd=tmp_path)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 1 and "no package 'orjson'" in line
    assert "-m pip check" in line and "make install" not in line

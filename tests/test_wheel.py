"""The wheel, from the sdist, in an empty folder: every command is there without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import visft_ds
from visft_ds.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
DRY = ("--stage", "1", "--model", "debug", "--engine", "zero0", "--dry-run")


@dataclass(frozen=True)
class Installed:
    """An installation in a folder of its own, and an empty folder to work in."""

    site: Path
    empty: Path

    def run(self, words: Sequence[str], code: int = 0) -> str:
        """Run a command there; returns what it printed to both streams."""
        environment = {**os.environ, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(
            words, cwd=self.empty, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def visft(self, *words: str) -> str:
        """Run the command as pip has installed it."""
        return self.run([str(self.site / "bin/visft"), *words])


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of what git knows here, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("build")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    checkout = folder / "checkout"
    for name in filter(None, files.split("\0")):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    found = {"sdist": _built("sdist", checkout, folder / "sdist")}
    with tarfile.open(found["sdist"]) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    found["wheel"] = _built("wheel", unpacked, folder / "from-sdist")
    return found


def _built(kind: str, source: Path, out: Path) -> Path:
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*words, str(archives["wheel"])], check=True)
    found = Installed(site, empty)
    where = found.run([sys.executable, "-c", "import visft_ds; print(visft_ds.__file__, visft_ds.CHECKOUT)"]).split()
    assert where == [str(site / "visft_ds/__init__.py"), "None"]
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_configurations_and_the_licence(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert archives["wheel"].name == f"visft_ds-{visft_ds.__version__}-py3-none-any.whl"
    configurations = {f"visft_ds/{path.relative_to(ROOT)}" for path in (ROOT / "ds_configs").rglob("*.json")}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "visft_ds").rglob("*.j2")}
    assert {name for name in names if name.endswith((".json", ".j2"))} == configurations | templates
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "visft_ds").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == code
    assert any(name.endswith("/LICENSE") for name in names) and "visft_ds/py.typed" in names
    assert "License-Expression: Apache-2.0" in metadata and "arxiv.org/abs/2401.10222" in metadata
    with tarfile.open(archives["sdist"]) as archive:
        assert {"LICENSE", "CITATION.cff"} <= {name.partition("/")[2] for name in archive.getnames()}


@pytest.mark.slow
def test_every_command_answers_in_an_empty_folder(installed: Installed) -> None:
    assert "usage: visft" in installed.visft("--help")
    for name in COMMANDS:
        assert installed.visft(name, "--help").startswith(f"usage: visft {name} ")
    assert installed.run([sys.executable, "-m", "visft_ds", "--version"]) == f"visft {visft_ds.__version__}\n"
    assert "fits" in installed.visft("plan", "--cluster", "8xA100-80GB", "--model", "eva_e", "--stage", "2")
    assert list(installed.empty.iterdir()) == []


@pytest.mark.slow
def test_a_training_starts_by_every_way(installed: Installed) -> None:
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", "0"]
    for start, code in (  # of a run that has no shards; torchrun has a code of its own
        ([str(installed.site / "bin/visft"), "train"], 2),
        ([sys.executable, "-m", "visft_ds", "train"], 2),
        ([*deepspeed, "--module", "visft_ds.launch"], 2),
        ([*deepspeed, "--module", "visft_ds", "train"], 2),
        ([*torchrun, "-m", "visft_ds.launch"], 1),
    ):
        said = installed.run([*start, *DRY], code)
        assert "what trains" in said and "visft shards build" in said, start

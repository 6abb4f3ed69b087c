"""The wheel, from the sdist, in an empty folder: every command is there without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import visft_ds
from visft_ds.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"
DRY = ("--stage", "1", "--model", "debug", "--engine", "zero0", "--dry-run")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist of what git knows here, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("build")
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, files.split("\0")):
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "checkout" / name).write_bytes((ROOT / name).read_bytes())
    found = {"sdist": _built("sdist", folder / "checkout", folder / "sdist")}
    with tarfile.open(found["sdist"]) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return {**found, "wheel": _built("wheel", unpacked, folder / "wheel")}


def _built(kind: str, source: Path, out: Path) -> Path:
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def site(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip has installed, in a folder of its own."""
    site = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
    subprocess.run([*words, str(archives["wheel"])], check=True)
    return site


def _run(site: Path, empty: Path, *words: str, code: int = 0) -> str:
    """Run a command in an empty folder; returns what it printed to both streams."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(words, cwd=empty, env=environment, **pipes)
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_configurations_and_the_licence(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        (metadata,) = (wheel.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert archives["wheel"].name == f"visft_ds-{visft_ds.__version__}-py3-none-any.whl"
    configurations = {f"visft_ds/{path.relative_to(ROOT)}" for path in (ROOT / "ds_configs").rglob("*.json")}
    beside_code = [path for kind in ("*.j2", "*.csv") for path in (ROOT / "visft_ds").rglob(kind)]
    room_files = {str(path.relative_to(ROOT)) for path in beside_code}
    assert {name for name in names if name.endswith((".json", ".j2", ".csv"))} == configurations | room_files
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "visft_ds").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == code
    assert any(name.endswith("/LICENSE") for name in names) and "visft_ds/py.typed" in names
    assert "License-Expression: Apache-2.0" in metadata and "arxiv.org/abs/2401.10222" in metadata
    with tarfile.open(archives["sdist"]) as archive:
        assert {"LICENSE", "CITATION.cff"} <= {name.partition("/")[2] for name in archive.getnames()}


@pytest.mark.slow
def test_every_command_answers_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    run, visft = partial(_run, site, tmp_path), str(site / "bin/visft")
    where = run(sys.executable, "-c", "import visft_ds; print(visft_ds.__file__, visft_ds.CHECKOUT)").split()
    assert where == [str(site / "visft_ds/__init__.py"), "None"]
    assert "usage: visft" in run(visft, "--help")
    for name in COMMANDS:
        assert run(visft, name, "--help").startswith(f"usage: visft {name} ")
    assert run(sys.executable, "-m", "visft_ds", "--version") == f"visft {visft_ds.__version__}\n"
    assert "fits" in run(visft, "plan", "--cluster", "8xA100-80GB", "--model", "eva_e", "--stage", "2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_training_starts_by_every_way(site: Path, tmp_path: Path) -> None:
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", "0"]
    for start, code in (  # of a run that has no shards; torchrun has a code of its own
        ([str(site / "bin/visft"), "train"], 2),
        ([sys.executable, "-m", "visft_ds", "train"], 2),
        ([*deepspeed, "--module", "visft_ds.launch"], 2),
        ([*deepspeed, "--module", "visft_ds", "train"], 2),
        ([*torchrun, "-m", "visft_ds.launch"], 1),
    ):
        printed = _run(site, tmp_path, *start, *DRY, code=code)
        assert "what trains" in printed and "visft shards" in printed, start

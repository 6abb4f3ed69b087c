"""What the pages show is run as it stands there, at the scale of a toy; and the pages become HTML without a warning."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from tests.pages import GENERATED, PAGES, PLACEHOLDERS, ROOT, Block, blocks
from visft_ds.cli import main
from visft_ds.toy.annotations import write_toy_coco

pytestmark = pytest.mark.slow
GOLDEN = ROOT / "tests/golden/runs-0.1"
#: Run -> what stands for it here, small: a finished run of all tasks, and of a model of timm.
RUNS = {r"runs/stage1\S*dinov3\S*": "convnext1", r"runs/stage2\S*dinov3\S*": "convnext2"}
RUNS |= {r"runs/stage1\S*": "stage1", r"(?:runs/stage2\S*|RUN)": "qv"}
#: Commands that are read by their parsers only (tests/test_pages.py), and what runs them.
READ = {
    "ablate": "hours; tests/experiments",
    "benchmarks": "data sets that are not here; tests/evals/benchmarks",
    "contrast": "minutes; tests/experiments",
    "demo": "minutes; tests/test_demo.py",
    "layers": "data sets that are not here; tests/evals/benchmarks",
    "plan": "minutes; tests/planner",
    "profile": "minutes; tests/profiling",
    "replay": "a run that was refused; tests/resilience",
    "supervise": "starts a launcher; tests/resilience",
}
#: What a command names that is not here.
ELSEWHERE = re.compile(
    r"(^|=)(weights|base\.safetensors|s3:|hf:|https?:)|\.pt\b|EVA02|eva_e_lora|BASE|USER/NAME|FILE|ADAPTER"
)
#: How a snippet begins that is not run here -> what runs it.
SNIPPETS = {
    "from visft_ds import Callback, evaluate, fit": "tests/train/test_fit.py",
    "visft_ds.tasks.register(": "tests/tasks/test_fourth_task.py",
    "from visft_ds.parallel.state import": "tests/parallel/test_engines.py",
    "from transformers import AutoModel": "tests/interop/test_vision_models.py",
    "import onnxruntime": "tests/interop/test_vision_models.py",
    "import open_clip": "tests/interop/test_open_clip.py",
    "from peft import PeftModel": "tests/interop/test_peft.py",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO tree with as many images as the largest batch of the recipe, and its shards."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy_coco(folder / "coco", train=256, val=8, height=56, width=56)
    assert main(["shards", "build", str(folder / "coco"), "--out", str(folder / "shards"), "--quiet"]) == 0
    return folder


@pytest.fixture
def workspace(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a reader: a COCO tree under several names, shards, photos, dog.jpg; no runs yet."""
    for name in ("coco", "MYFOLDER"):
        shutil.copytree(toy / "coco", tmp_path / name)
    for part in ("train2017", "val2017", "annotations"):
        shutil.copytree(toy / "coco" / part, tmp_path if part == "annotations" else tmp_path / part, dirs_exist_ok=True)
    shutil.copytree(toy / "shards", tmp_path / "data/coco")
    for name in ("shards", "stage1", "convnext1"):  # the stored runs name their data and heads so
        shutil.copytree(GOLDEN / name, tmp_path / name)
    (tmp_path / "photos").mkdir()
    with tarfile.open(GOLDEN / "shards/val-000000.tar") as shard:
        for member in shard.getmembers():
            file = shard.extractfile(member)
            if member.name.endswith(".jpg") and file is not None:
                (tmp_path / "photos" / Path(member.name).name).write_bytes(file.read())
    shutil.copy(min((tmp_path / "photos").iterdir()), tmp_path / "dog.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_runs(text: str, *, of_timm: bool = False) -> None:
    """Copy stored runs to where a command or snippet expects runs.

    Args:
        of_timm: those of stage 2 are of a model of timm, whatever their names: timm loads no EVA of an unusual size.
    """
    for pattern, stored in RUNS.items():
        for found in re.findall(rf"(?<![\w/]){pattern}", text):
            run = re.match(r"RUN|runs/[\w.-]+", found)
            assert run is not None
            if not Path(run[0]).exists():
                shutil.copytree(GOLDEN / ("convnext2" if of_timm and stored == "qv" else stored), run[0])


def run_command(command: str, made: set[str]) -> str:
    """Run a command of `visft`; returns what was done with it."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command, comments=True)]
    if words[0] != "visft" or "..." in words:
        return "read: no command of visft alone"
    kind = next((word for word in ("benchmarks", "layers") if words[1] == "evaluate" and word in words), words[1])
    if kind in READ:
        return f"read: {READ[kind]}"
    if any(ELSEWHERE.search(word) for word in words):
        return "read: names files that are not here"
    make_runs(command, of_timm=kind == "merge")
    if "--num_gpus" in words:  # one process, without a launcher
        place = words.index("--num_gpus")
        del words[place : place + 2]
    if kind == "train":
        words = [word for word in words if word != "--download"]
        if not {"--from", "--deepspeed_config"} & set(words) and not re.search(r"--model \S*debug", " ".join(words)):
            # tests/test_pages.py has resolved the model that is named; to rehearse a large one takes a minute
            words = [word for place, word in enumerate(words) if "--model" not in (word, words[place - 1])]
            words += ["--model", "debug"]
        code, allowed = main([*words[1:], "--dry-run"]), (0, 3)
        assert code in allowed, f"{command}: exit status {code}"
        return f"dry run: {code}"
    if "--out" in words and (out := words[words.index("--out") + 1]) not in made:
        made.add(out)
        shutil.rmtree(out, ignore_errors=True)
    if kind in ("report", "predict", "evaluate"):
        shutil.rmtree("found", ignore_errors=True)
    code = main(words[1:])
    assert code == 0 or kind == "doctor", f"{command}: exit status {code}"
    return "run"


# webdataset leaves its files to the collector of garbage.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_shows_runs(page: Path, workspace: Path) -> None:
    """In its order, so that what a command makes is there for the next one and for snippets."""
    done: dict[str, str] = {}
    made: set[str] = set()
    names: dict[str, object] = {"__name__": "page", "images": torch.rand(2, 3, 56, 56)}
    for block in blocks(page):
        if block.kind == "python" and str(page.relative_to(ROOT)) not in GENERATED:
            done[f"{block.line}"] = run_snippet(block, names)
        elif "\nerror: " not in block.text:
            done |= {command.partition("  #")[0].rstrip(): run_command(command, made) for command in block.commands}
    print(*(f"{page.name}: {key}: {value}" for key, value in done.items()), sep="\n")


def run_snippet(block: Block, names: dict[str, object]) -> str:
    """Run Python code of a page; returns what was done with it."""
    if where := next((where for start, where in SNIPPETS.items() if block.text.startswith(start)), None):
        assert (ROOT / where).is_file()
        return where
    make_runs(block.text.replace('"', " "))
    exec(compile(block.text, f"{block.page.name}:{block.line}", "exec"), names)
    return "run"


def test_the_pages_become_html_and_every_link_is_checked(tmp_path: Path) -> None:
    """Warnings are errors, as in `make docs`. A heading that is not there must be one."""
    pytest.importorskip("sphinx", reason="sphinx is not installed: pip install '.[docs]'")
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    out = tmp_path / "html"
    done = subprocess.run([*sphinx, "-c", "docs", ".", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (out / "docs/README.html").is_file() and (out / "README.html").is_file()
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "docs/README.md").write_text("# A\n\n[a](data.md#no-such-heading)\n", encoding="utf-8")
    command = [*sphinx, "-c", str(ROOT / "docs"), str(tmp_path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "no-such-heading" in done.stderr

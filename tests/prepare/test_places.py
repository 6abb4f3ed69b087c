"""A run's own copies of what it was given, and the search for what it has no copy of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.coco_tree import write_tree
from visft_ds.config import ResolvedConfig, missing_inputs, resolve
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.shards import Category, Manifest
from visft_ds.evals.model import heads_in
from visft_ds.interop.heads import find_head
from visft_ds.interop.weights import sha256_file
from visft_ds.prepare.data import RunData
from visft_ds.prepare.datasets import TrainingSet
from visft_ds.prepare.places import DATA, HEADS, WEIGHTS, data_of_run, find, located, paths_of
from visft_ds.run.folder import recorded_config, recorded_inputs
from visft_ds.run.record import keep_inputs, write_record
from visft_ds.shards.build import Options, build
from visft_ds.tasks import TASKS

CATEGORIES = (Category(0, 3, "crack"), Category(1, 8, "rust"))

WORD_MAP = "visft.tasks.captioning.vocabulary.file"


def _config(*settings: str, **paths: Path | str) -> ResolvedConfig:
    """Stage 2 of the debug model with heads, words and base weights, all relative."""
    keys = {"weights": WEIGHTS, "heads": HEADS, "words": WORD_MAP, "data": DATA, "out": "visft.run.out"}
    places = {"weights": "base.pt", "heads": "stage1/export", "words": "words.json", "data": "shards", "out": "run"}
    given = (f"{keys[name]}={path}" for name, path in {**places, **paths}.items())
    return resolve(stage=2, model="debug", settings=[*given, *settings])


def _write(folder: Path, names: Mapping[str, str]) -> None:
    for name, text in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    for name, count in {"shards": 2, "others": 3}.items():
        tree = write_tree(folder / f"{name}-tree", count)
        build(Options(tree.images, tree.instances, tree.captions, folder / name, "train"))
    return folder


@pytest.fixture
def home(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, in which a run has recorded itself and saved something; its stage 1 is still there."""
    home = tmp_path / "home"
    _write(home, {f"stage1/export/{task}.safetensors": f"head of {task}" for task in TASKS})
    _write(home, {"words.json": "words", "base.pt": "base", "run/checkpoints/step_00000002/state.json": ""})
    (home / "shards").symlink_to(shards / "shards")
    monkeypatch.chdir(home)
    _record(_config())
    return home


def _record(config: ResolvedConfig) -> None:
    write_record(config, _data(config, paths_of(config.visft)), ["train.py"], None)


def _data(config: ResolvedConfig, given: Mapping[str, str]) -> RunData:
    """The data of a run, as far as its record needs it."""
    manifest = Manifest.load(config.visft.data.root, "train")
    plan = Plan({"detection": TaskPlan({"train": SetPlan(manifest.having("any"))}, 1)}, 0)
    return RunData(given, {"train": TrainingSet(manifest, ("detection",))}, {}, {}, plan, None, None)


def test_heads_and_words_are_copied_once(home: Path) -> None:
    folder = home / "run/inputs"
    copies = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert {path.name: text for path, text in copies.items() if path.suffix == ".safetensors"} == {
        f"{task}.safetensors": f"head of {task}" for task in TASKS
    }
    assert (folder / "vocabulary.json").read_text() == "words"
    keep_inputs(home / "run", _config().visft, CATEGORIES)
    assert json.loads((folder / "categories.json").read_text())[1] == {"id": 1, "coco_id": 8, "name": "rust"}


def test_a_head_given_as_a_file_is_one(home: Path) -> None:
    config = _config('visft.tasks=["detection"]', heads="mine.ckpt")
    _write(home, {"mine.ckpt": "trained elsewhere"})
    keep_inputs(home / "run", config.visft, CATEGORIES)
    (home / "mine.ckpt").unlink()
    assert find(home / "run", config.visft, HEADS) == home / "run/inputs/heads/mine.ckpt"


def test_a_run_comes_before_where_its_files_came_from(home: Path) -> None:
    """Unless the command says where they are: what it names is compared with the run's, not passed over."""
    run, config = home / "run", _config()
    assert find(run, config.visft, HEADS) == run / "inputs/heads"
    assert find(run, config.visft, WORD_MAP) == run / "inputs/vocabulary.json"
    assert located(config, run).to_dict() == config.to_dict()
    for task in TASKS:
        (home / f"stage1/export/{task}.safetensors").unlink()
    (home / "words.json").unlink()
    here = located(config, run)
    assert here.visft.heads.path == str(run / "inputs/heads") and here.fingerprint() == config.fingerprint()
    assert missing_inputs(here) == []
    _record(here)  # copies of copies are these
    assert (run / "inputs/vocabulary.json").read_text() == "words"
    missing = " ".join(one.what for one in missing_inputs(located(config, home / "another")))
    assert "vocabulary of the captions" in missing and "heads of stage 1" in missing


def test_weights_are_found_by_place_and_content(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As given from the current folder, where they were, beside the run as they were: never another file."""
    config, elsewhere = _config().visft, tmp_path / "elsewhere"
    _write(elsewhere, {"base.pt": "bass"})  # another file under the same name
    assert find(home / "run", config, WEIGHTS) == Path("base.pt")
    monkeypatch.chdir(elsewhere)
    assert find(home / "run", config, WEIGHTS) == home / "base.pt"
    home.rename(tmp_path / "moved")
    assert find(tmp_path / "moved/run", config, WEIGHTS) == tmp_path / "moved/base.pt"
    (tmp_path / "moved/base.pt").unlink()
    with pytest.raises(ValueError, match="is nowhere that it was") as caught:
        find(tmp_path / "moved/run", config, WEIGHTS)
    told, wanted = str(caught.value), recorded_inputs(tmp_path / "moved/run")[WEIGHTS]["sha256"]
    assert f"{WEIGHTS} of the run in {tmp_path}/moved/run (sha256 {wanted})" in told
    assert f"\n  base.pt: another file, sha256 {sha256_file('base.pt')}\n" in told
    assert f"\n  {home}/base.pt: no such file\n  {tmp_path}/moved/base.pt: no such file\n" in told
    assert f"--backbone FILE (evaluate), --base FILE (merge) or --set {WEIGHTS}=FILE" in told


def test_shards_of_the_same_name_are_not_those_of_the_run(
    home: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, elsewhere = _config().visft, tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "shards").symlink_to(shards / "others")
    monkeypatch.chdir(elsewhere)
    assert data_of_run(home / "run", config, "val") == str(home / "shards")
    (home / "shards").unlink()
    assert data_of_run(home / "run", config, "val") == str(shards / "shards")  # what the link led to
    remote = _config(data="s3://bucket/shards").visft
    assert data_of_run(home / "run", remote, "val") == "s3://bucket/shards"
    record = json.loads((home / "run/run.json").read_text())
    record["inputs"][DATA]["beside"] = "nowhere"
    (home / "run/run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"shards: other shards, fingerprint (?s:.*)--data FOLDER"):
        data_of_run(home / "run", config, "train")


def test_the_record_keeps_what_was_given(home: Path) -> None:
    config = _config()
    for path in (home / "stage1/export").iterdir():
        path.unlink()
    here = located(config, home / "run")
    write_record(here, _data(config, paths_of(config.visft)), ["train.py"], None)
    assert recorded_config(home / "run").visft.heads.path == "stage1/export"


def test_a_run_in_place_of_a_folder_of_heads_is_told_the_folder(home: Path) -> None:
    for run, inside in ((home / "stage1", "export"), (home / "run", "inputs/heads")):
        with pytest.raises(ValueError, match=f"they are in {run / inside}, give that"):
            heads_in(run)
        with pytest.raises(ValueError, match="holds no detection heads"):
            find_head(run, "detection")

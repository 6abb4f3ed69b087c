"""What was removed answers with what serves instead, and records that hold it stay readable."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from tools.profile import main as profile
from visft_ds.config import changed, going_on, identity_differences, removed, resolve
from visft_ds.config.resolve import resolve_values
from visft_ds.config.validate import known_keys
from visft_ds.run.folder import recorded_config
from visft_ds.tasks import registry

GOLDEN = Path(__file__).parents[1] / "golden"
TASKS = ("detection", "segmentation", "captioning")


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


def test_a_removed_key_leaves_the_fingerprint_of_older_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints hold it, and runs that did not use the key go on."""
    for key in list(removed.IDLE):
        monkeypatch.delitem(removed.IDLE, key)
    for key in list(removed.LATER):
        monkeypatch.delitem(removed.LATER, key)
    monkeypatch.setattr(registry, "removed_settings", dict)
    monkeypatch.setattr(registry, "earlier_settings", dict)
    for key, value in (("visft.model.sparkle", 0), ("visft.lora.sparkle", 1), ("visft.run.sparkle", 2)):
        monkeypatch.setitem(removed.IDLE, key, value)
    config = resolve(stage=1, model="debug")
    older = config.identity() | {"visft.model.sparkle": 0}  # stage 1 has no visft.lora, and visft.run never counted
    assert config.fingerprint() == hashlib.sha256(json.dumps(older, sort_keys=True).encode()).hexdigest()


#: Value of a removed key -> words of the answer, and the value with which an older record holds it.
GONE = {
    "visft.run.average_last=2": "visft merge",
    "visft.run.min_loss_scale=0": "bf16",
    "visft.run.skip_spikes=2": "visft.run.spike_threshold",
    "visft.tasks.segmentation.image.content_multiple=8": "multiples of 14",
    "visft.data.cache_mode=shards": "visft.data.cache",
    "visft.tasks.detection.ratio=1": "updates",
    "visft.tasks.segmentation.ratio=1": "updates",
    "visft.tasks.captioning.ratio=1": "updates",
    "visft.model.base=int8": "torchao",
    "visft.model.checkpoint_every=1": "visft.model.recompute alone decides",
    "visft.model.fit_memory=true": "visft.model.recompute=auto",
    "visft.model.memory_limit=1": "state visft.model.recompute",
}


@pytest.mark.parametrize(("setting", "instead"), GONE.items())
def test_every_removed_key_names_what_serves_instead(setting: str, instead: str) -> None:
    with pytest.raises(ValueError, match=rf"{setting.split('=')[0]} = .*: removed in 0.2: .*{instead}"):
        resolve(stage=2, model="debug", settings=(setting,))


def test_a_record_of_an_earlier_release_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    config = resolve(stage=2, model="debug")
    older = config.to_dict()
    older["visft"]["model"]["base"] = "full"
    older["visft"]["tasks"]["segmentation"]["image"]["content_multiple"] = 14
    older["visft"]["data"]["cache_mode"] = "ranges"
    older["visft"]["run"] |= {"average_last": 0, "min_loss_scale": 1.0, "skip_spikes": 0}
    assert resolve_values(older, "run.json").to_dict() == config.to_dict() and not capsys.readouterr().err
    config = changed(
        config, [f"visft.tasks.{task}.updates={count}" for task, count in zip(TASKS, (3, 3, 4), strict=True)]
    )
    for task, ratio in zip(TASKS, (0.3, 0.3, 0.4), strict=True):
        older["visft"]["tasks"][task] |= {"ratio": ratio, "updates": None}
    assert resolve_values(older, "run.json").to_dict() == config.to_dict() and not capsys.readouterr().err
    older["visft"]["model"]["base"] = "int8"
    assert resolve_values(older, "run.json").to_dict() == config.to_dict()
    assert "run.json: visft.model.base was removed" in capsys.readouterr().err


AVERAGES = ("visft.tasks.detection.loss.average", "visft.tasks.segmentation.loss.average")


def test_a_record_without_a_later_key_means_what_its_release_did() -> None:
    config = resolve(stage=2, model="debug", settings=[f"{key}=batch" for key in AVERAGES])
    older = resolve(stage=2, model="debug", settings=[f"{key}=image" for key in AVERAGES]).to_dict()
    for task in ("detection", "segmentation"):
        del older["visft"]["tasks"][task]["loss"]["average"]
    assert resolve_values(older, "run.json").to_dict() == config.to_dict()
    older["visft"]["tasks"]["segmentation"] = None
    assert resolve_values(older, "run.json").visft.tasks.enabled().keys() == {"detection", "captioning"}


def test_a_later_key_leaves_the_fingerprint_of_older_runs() -> None:
    """It stands in the checkpoints of release 0.1; another value than the one they trained with is another run."""
    run = GOLDEN / "runs-0.1/stage1"
    recorded = recorded_config(run)
    state = json.loads((run / "checkpoints/step_00000002/state.json").read_text(encoding="utf-8"))
    assert recorded.fingerprint() == state["identity"]["configuration"]
    assert changed(recorded, [f"{AVERAGES[0]}=image"]).fingerprint() != recorded.fingerprint()


@pytest.mark.parametrize("stated", [(), AVERAGES[:1]])
def test_an_older_run_goes_on_as_it_began_unless_another_value_is_stated(stated: tuple[str, ...]) -> None:
    settings = [f"{key}=image" for key in stated]
    now = resolve(stage=2, model="debug", settings=settings)
    older = now.to_dict()
    for task in ("detection", "segmentation"):
        del older["visft"]["tasks"][task]["loss"]["average"]
    recorded = resolve_values(older, "run.json")
    config = going_on(now, recorded)
    differences = identity_differences(recorded.identity(), config.identity())
    assert differences == [f'{key}: "batch" -> "image"' for key in stated]
    kept = {entry.key: (entry.old, entry.new) for entry in config.replaced[len(now.replaced) :]}
    assert kept == {key: ("image", "batch") for key in AVERAGES if key not in stated}
    newer = resolve_values(now.to_dict(), "run.json")
    assert going_on(now, newer) is now


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
        "ops --against=../before",
    ],
)
def test_removed_measurements_say_where_they_stand(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile(line.split()) == 2
    assert re.match(r"error: [\w -]+: removed in 0.2: .*what it measured stands in docs/LOG", capsys.readouterr().err)


def test_what_is_removed_is_not_known_any_more() -> None:
    assert (
        removed.removed_keys().keys() & set(known_keys()) == set()
        and removed.IDLE.keys() <= removed.removed_keys().keys()
    )

"""The tools themselves: what is measured is what trains, in every engine; the record's form; wrong usage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.coco_tree import write_tree
from tests.ranks import finish, start_ranks
from tests.tiny import TINY
from tools.profile import main
from visft_ds.config import resolve
from visft_ds.costs.ledger import KINDS
from visft_ds.planner import run_of
from visft_ds.prepare.model import plan_model
from visft_ds.profiling import timing
from visft_ds.profiling.timing import MATCHER, PARTS
from visft_ds.profiling.train import FORMAT, VERSION, make_record, measure_stream, tables
from visft_ds.resilience.out_of_memory import MemoryWatch, OutOfMemory
from visft_ds.shards.build import Options, build

#: One task: of the three heads detection alone has a formula for its operations.
ONE_TASK = {
    **{key: value for key, value in TINY.items() if "segmentation" not in key and "captioning" not in key},
    "visft.tasks.detection.head.dropout": 0.0,
    "visft.tasks": "detection",
    "visft.mode": "sampled",
    "scheduler.params.total_num_steps": 2,
    "scheduler.params.warmup_num_steps": 1,
}
SETTINGS = [f"--set={key}={json.dumps(value)}" for key, value in ONE_TASK.items()]
ALL_TASKS = [f"--set={key}={json.dumps(value)}" for key, value in TINY.items()]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A training run, its profile, and a profile of stage 2 under ZeRO-3 on two ranks without any file; at once."""
    folder = tmp_path_factory.mktemp("profile")
    tree = write_tree(folder)
    for split in ("train", "more"):
        build(Options(tree.images, tree.instances, tree.captions, folder / "shards", split))
    before = {path.name for path in folder.iterdir()}
    more = json.dumps([{"name": "more", "root": str(folder / "shards"), "split": "more"}])
    order = [f"--set=visft.data.sets={more}", "--set=visft.data.shuffle=windowed"]
    common = ["--model", "debug", "--data", str(folder / "shards"), *SETTINGS, *order]
    measured = ["tools/profile.py", "train", "--steps", "2", "--warmup", "1"]
    commands = {
        "train": (["launchers/train.py", "--stage", "1", "--out", str(folder / "run"), *common], 1),
        "one": ([*measured, "--stage", "1", "--json", str(folder / "one.json"), *common], 1),
        "two": (
            # The deepspeed launcher puts its own flag before all others.
            [
                *("tools/profile.py", "--local_rank=0", *measured[1:], "--stage", "2", "--engine", "zero3"),
                *("--synthetic", "--json", str(folder / "two.json"), "--model", "debug", *SETTINGS),
                "--set=visft.model.recompute=block",
            ],
            2,
        ),
        "all": (
            [
                *(*measured[:2], "--steps", "1", "--warmup", "1", "--stage", "1", "--synthetic", "--model", "debug"),
                *("--json", str(folder / "all.json"), *ALL_TASKS),
            ],
            1,
        ),
    }
    running = {name: start_ranks(arguments, world) for name, (arguments, world) in commands.items()}
    ended = {name: finish(processes) for name, processes in running.items()}
    for codes, texts in ended.values():
        assert set(codes) == {0}, "\n".join(texts)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [record["loss/loss"] for record in records if record["kind"] == "step"],
        "one": json.loads((folder / "one.json").read_text()),
        "two": json.loads((folder / "two.json").read_text()),
        "all": json.loads((folder / "all.json").read_text()),
        "printed": {name: texts for name, (_, texts) in ended.items()},
        "before": before,
        "files": {path.name for path in folder.iterdir()},
    }


def ranks_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    ranks: list[dict[str, Any]] = record["tasks"]["detection"]["ranks"]
    return ranks


def test_what_is_measured_is_what_trains(results: dict[str, Any]) -> None:
    """Bit for bit the losses of the first two steps of the training run: same sets and order of samples, model,
    optimizer, schedule."""
    (rank,) = ranks_of(results["one"])
    assert rank["losses"] == results["losses"] and len(results["losses"]) == 2


def test_the_record_has_its_form(results: dict[str, Any]) -> None:
    for name, world in (("one", 1), ("two", 2)):
        record = results[name]
        assert (record["format"], record["version"], record["world_size"]) == (FORMAT, VERSION, world)
        assert {"measured", "command", "versions", "git", "hardware", "config", "mix", "precision"} <= record.keys()
        assert record["config"]["visft"]["tasks"]["detection"]["batch_size"] == 4
        for rank in ranks_of(record):
            spreads = ("images_per_second", "step_seconds", "hooked_step_seconds", "overhead")
            assert all(set(rank[key]) == {"median", "low", "high", "least", "most", "count"} for key in spreads)
            assert set(rank["parts_seconds"]) == {*PARTS, MATCHER}
            assert set(rank["memory_bytes"]["at_peak"]) == set(rank["memory_bytes"]["highest"]) == set(KINDS)
            assert rank["batch"]["images"] == 4 and rank["batch"]["accumulation"] == 4 // world
            assert rank["batch"]["shapes"] == [[1, 3, 56, 56]] * (4 // world)
        assert record["mix"]["images_per_second"] > 0


def test_the_attention_of_a_record_is_that_of_its_model() -> None:
    config = resolve(stage=1, model="debug_convnext", settings=["visft.mode=sampled", "visft.tasks=detection"])
    module, _ = plan_model(config.visft, config.optimizer.params, 100)
    engine = SimpleNamespace(device=torch.device("cpu"), module=module, stage=1)
    session: Any = SimpleNamespace(config=config, engine=engine, precision="fp32", precision_reason="", notes=())
    measured = {"step_seconds": {"median": 1.0}, "memory_bytes": {"at_peak": {}}, "batch": {"images": 1}}
    assert make_record(session, [{"detection": measured}])["attention"].startswith("timm's own")


def test_copies_of_host_ranges_are_no_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def event(name: str, end: float, annotation: bool) -> Any:
        place, span = SimpleNamespace(name="CUDA"), SimpleNamespace(start=0.0, end=end)
        return SimpleNamespace(name=name, device_type=place, time_range=span, is_user_annotation=annotation)

    events = [event("ncclDevKernel_AllReduce_Sum_f32(args)", 1e6, False), event("nccl:all_reduce", 3e6, True)]
    monkeypatch.setattr(timing, "profile", lambda **_: nullcontext(SimpleNamespace(events=lambda: events)))
    monkeypatch.setattr(timing, "synchronize", lambda device: None)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    found = timing.measure_communication(lambda: None, torch.device("cuda"))
    assert (found.seconds, found.calls) == (1.0, {"AllReduce_Sum_f32": 1})


def test_parts_are_positive_and_the_matcher_lies_inside_the_criterion(results: dict[str, Any]) -> None:
    for record in (results["one"], results["two"]):
        for rank in ranks_of(record):
            parts = rank["parts_seconds"]
            assert all(parts[part] > 0 for part in PARTS), parts
            assert 0 < parts[MATCHER] < parts["criterion"]


def test_the_count_is_the_formula(results: dict[str, Any]) -> None:
    """Under ZeRO-3 and with recomputation too; to the last operation."""
    for record in (results["one"], results["two"]):
        for rank in ranks_of(record):
            counted, formula = rank["flops"]["counted"], rank["flops"]["formula"]
            for part in ("backbone forward", "head forward", "backward", "total"):
                assert counted[part] == formula[part], part
            assert rank["flops"]["ratio"] == 1.0
            more = rank["flops"]["hardware_per_second"] > rank["flops"]["model_per_second"]
            assert more == bool(formula["recomputed"]) == (record is results["two"])


def test_memory_by_kind_is_what_the_shapes_say(results: dict[str, Any]) -> None:
    width, hidden = 32, 128
    block = 4 * width + 3 * width * width + 2 * width + width * width + width + 2 * width * hidden + hidden + width
    tower = 2 * block + 2 * width + (1 + 16) * width + 3 * 14 * 14 * width + width
    (rank,) = ranks_of(results["one"])
    highest = rank["memory_bytes"]["highest"]
    assert highest["weights, frozen"] == 4 * tower
    # Two moments and a master copy of every trained value, each in one tensor; Adam counts its steps, once a group.
    padding = 64  # bytes that DeepSpeed may add to make flat tensors even
    trained = highest["weights, trained"]
    assert 3 * trained <= highest["optimizer state"] <= 3 * trained + padding
    assert trained <= highest["gradients"] <= 2 * trained
    assert highest["reduce buckets"] == 4 * 30_000_000  # reduce_bucket_size of the engine file
    assert highest["activations"] > 0


def test_zero3_divides_and_checkpointing_drops_activations(results: dict[str, Any]) -> None:
    for rank in ranks_of(results["two"]):
        highest = rank["memory_bytes"]["highest"]
        assert 0 < highest["optimizer state"] < 3 * highest["weights, trained"]
        calls = rank["communication"]["calls"]
        assert calls["all_gather"] > 10 and calls["all_reduce"] >= 3 and rank["communication"]["seconds"] > 0
    (alone,) = ranks_of(results["one"])
    assert alone["communication"] is None


def test_three_heads_of_one_forward_are_one_measurement(results: dict[str, Any]) -> None:
    record = results["all"]
    assert list(record["tasks"]) == ["shared"]
    (rank,) = record["tasks"]["shared"]["ranks"]
    assert rank["batch"]["images"] == 4
    # Without formulas for two of the heads, what was counted stands for all.
    assert rank["flops"]["ratio"] is None and rank["flops"]["hardware_per_second"] > 0


def test_generated_pictures_have_as_many_objects_as_photographs(results: dict[str, Any]) -> None:
    """The toy's own have three at most; at least one of four pictures has more."""
    assert max(rank["batch"]["content"]["objects"] for rank in ranks_of(results["two"])) > 3


def test_a_step_that_does_not_fit_is_explained_as_in_training() -> None:
    """Also where no exception of torch's says so; and less than one image at once is no advice."""
    alone = [f"{key}={json.dumps(value)}" for key, value in ONE_TASK.items()]
    config, device = (
        resolve(stage=2, model="debug", settings=[*alone, "visft.model.recompute=none"]),
        torch.device("cpu"),
    )
    run = run_of(config, 1, "fp32", None, device)

    def steps(*_: int) -> Iterator[Any]:
        raise RuntimeError("std::bad_alloc")
        yield

    loader, engine = SimpleNamespace(steps=steps), SimpleNamespace(device=device)
    found = {
        "config": config,
        "engine": engine,
        "batches": run.batches,
        "precision": "fp32",
        "memory": MemoryWatch(run),
    }
    session: Any = SimpleNamespace(**found, loader_of=lambda name: loader)
    with pytest.raises(OutOfMemory, match="out of memory in a step of detection: micro-batches of 1\n") as caught:
        measure_stream(session, "detection", 1, 1)
    assert "activations" in str(caught.value) and "micro_batch=" not in str(caught.value)


def test_one_process_prints_and_nothing_else_is_written(results: dict[str, Any]) -> None:
    main_rank, other = results["printed"]["two"]
    assert "profile: stage 2 (lora), debug, ZeRO-3, 2 processes" in main_rank and "communication" in main_rank
    assert other.strip() == ""
    assert results["files"] - results["before"] == {
        "run",
        "one.json",
        "two.json",
        "all.json",
    }  # the run is the training's


def test_a_record_can_be_printed_again(results: dict[str, Any]) -> None:
    title, sections = tables(results["one"])
    assert title == "profile: stage 1 (heads), debug, ZeRO-1, 1 process"
    text = "\n".join("  ".join(row) for section in sections for row in section.rows)
    assert "images/s" in text and "1.0000" in text and "% of the measured rate" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stage", "1", "--stpes", "3"], "did you mean --steps?"),
        (["--stage", "1", "--moddel=debug"], "did you mean --model?"),
        (["--stage", "3"], "--stage 3: must be 1"),
        (["--steps", "many"], "--steps"),
        (["--stage", "1", "--model", "debug", "--synthetic", "--steps", "0"], "--steps 0 and --warmup 3"),
        (["--stage", "2", "--model", "debug"], "or measure without files: --synthetic"),
        (["--stage", "1", "--set", "visft.sed=1"], "visft.sed"),
    ],
)
def test_wrong_usage_is_one_message(
    arguments: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and named in printed.err and printed.out == ""


def test_a_dry_run_shows_the_configuration_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--stage", "1", "--model", "debug", "--dry-run", *SETTINGS]) == 3  # there are no shards
    assert "(dry run: nothing is started)" in capsys.readouterr().out

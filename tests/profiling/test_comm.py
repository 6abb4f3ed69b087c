"""What processes send each other: predictions are what engines really send, and the command measures it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.ranks import finish, run_ranks, start_ranks
from tests.tiny import TINY
from tools.profile import main
from visft_ds.config import resolve
from visft_ds.planner.messages import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, SEND, Message, broadcasts_of, messages_of
from visft_ds.planner.step import run_of
from visft_ds.profiling import comm
from visft_ds.profiling.comm import bus_factor, seconds_of

_TINY = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_predicted_messages_are_those_of_real_steps(world: int, tmp_path: Path) -> None:
    """To the byte on every rank; under ZeRO-3 but for padding and the small parameters that stay whole."""
    run_ranks(["-m", "tests.profiling.comm_case", str(tmp_path / "found")], world)
    for rank in range(world):
        found = json.loads((tmp_path / f"found.{rank}").read_text(encoding="utf-8"))
        assert found
        for name, case in found.items():
            assert case["predicted"].keys() == case["recorded"].keys(), (rank, name, case)
            for call, size in case["predicted"].items():
                close = pytest.approx(case["recorded"][call], rel=0.02) if "zero3" in name else case["recorded"][call]
                assert size == close, (rank, name, call)


@pytest.mark.slow
def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    flags = [f"--set={setting}" for setting in _TINY]
    own = ["--sizes", "1024", "65536", "--repeats", "2", "--json", str(tmp_path / "c.json")]
    command = ["tools/profile.py", "comm", "--stage", "2", "--model", "debug", "--engine", "zero2", *own, *flags]
    codes, texts = finish(start_ranks(command))
    assert codes == [0, 0], texts
    record = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert record["ranks"] == 2 and record["backend"] == "gloo" and record["hardware"]["cores"]
    assert {call["call"] for call in record["calls"]} == {
        *("all_reduce", "reduce_scatter", "all_gather", "broadcast", "send", "copy in memory")
    }
    for call in record["calls"]:
        assert call["seconds"]["count"] == 2 and call["algbw"] == call["bytes"] / call["seconds"]["median"]
        assert call["busbw"] == call["algbw"] * bus_factor(call["call"], 2)
    assert all(0 < share["share"] <= share["share_nothing_hidden"] < 1 for share in record["share"].values())
    assert "share of the step" in texts[0] and "share" not in texts[1]


def test_one_process_alone_is_told_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["comm", "--stage", "2", "--model", "debug", "--synthetic"]) == 2
    assert main(["comm", "--stage", "2", "--model", "debug"]) == 2
    assert "two processes or more: deepspeed --num_gpus 2 --module visft_ds profile comm" in capsys.readouterr().err
    assert main(["comm", "--stage", "2", "--model", "debug", "--repeats", "0"]) == 2


def test_bandwidths_are_those_of_nccl_tests_and_times_lie_between_measured_ones() -> None:
    assert [bus_factor(name, 4) for name in (ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, SEND)] == [1.5, 0.75, 0.75, 1.0]
    known = {1000: 1.0, 3000: 2.0}
    assert [seconds_of(size, known) for size in (10, 1000, 2000, 3000, 6000)] == [1.0, 1.0, 1.5, 2.0, 4.0]


@pytest.mark.parametrize(
    ("name", "gigabytes", "source"),
    [
        ("NVIDIA A100-SXM4-80GB", 79, "planned for A100-80GB"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 5, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, None),
        ("NVIDIA H100 PCIe", 80, None),
        ("Tesla V100-PCIE-32GB", 32, None),
    ],
)
def test_a_share_is_worked_out_for_the_gpu_that_is_there_or_not_at_all(
    name: str, gigabytes: int, source: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=gigabytes * 2**30))
    rates, found = comm._rates(torch.device("cuda"))
    assert (rates is None, found) == (source is None, source or f"{name} is in no table")


def test_messages_follow_the_engine() -> None:
    """LoRA of rank 16 on q and v of two blocks, width 32: 4 x 1024 values; two ranks, two micro-batches."""
    trained = 4 * 2 * 2 * 2 * 16 * 32

    def messages(engine: str, *settings: str) -> tuple[list[Message], list[Message]]:
        config = resolve(stage=2, model="debug", engine=engine, settings=[*_TINY, *settings])
        run = run_of(config, 2, "fp32", 12, torch.device("cpu"))
        return messages_of(run, config.visft.streams()["detection"]), broadcasts_of(run)

    found, once = messages("zero0")
    assert [(m.collective, m.bytes, m.calls) for m in found] == [(ALL_REDUCE, trained, 1), (ALL_REDUCE, 120, 1)]
    assert sum(m.bytes * m.calls for m in once) > trained
    found, _ = messages("zero2", "zero_optimization.reduce_bucket_size=1500")
    sums = [(m.bytes, m.calls) for m in found if m.collective == ALL_REDUCE and m.bytes > 120]
    assert sums == [(6000, 4), (trained - 12000, 2)]
    assert [(m.bytes, m.calls) for m in found if m.collective == ALL_GATHER] == [(trained, 1)]
    whole = "zero_optimization.stage3_param_persistence_threshold=3000"
    near, once = messages("zero3", whole)
    far, _ = messages("zero3", whole, "zero_optimization.stage3_max_reuse_distance=0")
    gathered = [sum(m.calls for m in some if m.collective == ALL_GATHER) for some in (near, far)]
    assert gathered[1] == 2 * gathered[0] and all(m.hidden for m in far if m.collective == ALL_GATHER) and not once
    found, _ = messages("pipeline")
    tokens, shapes = (4 * 16 * 32, 4), (1024, 4)
    assert [(m.bytes, m.calls) for m in found if m.collective == SEND] == [tokens, shapes, tokens]

"""`tools/profile.py ops`: what it prints and counts, whether the ways it compares are the same, and wrong usage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools.profile import main
from visft_ds.ops.lora import lora_linear
from visft_ds.profiling.blocks import AFTERWARDS, DENSE, FROZEN_LAYERS, OURS, added_afterwards, dense_update

#: Blocks of 64 channels, 16 tokens of 4 heads; hidden width 256.
SMALL = ["ops", "--small", "--repeats", "1", "--pixels", "56", "--rank", "2"]


@pytest.mark.parametrize("slices", [((0, 8), (16, 24)), ((3, 5), (5, 9)), ((0, 24),)])
def test_all_ways_to_adapt_compute_the_same(slices: tuple[tuple[int, int], ...]) -> None:
    height, rank = sum(hi - lo for lo, hi in slices), 2
    shapes = ((2, 5, 6), (24, 6), (24,), (len(slices) * rank, 6), (height, rank))
    tensors = [torch.randn(*shape, dtype=torch.float64) for shape in shapes]
    wanted = lora_linear(*tensors, 0.5, slices)
    for other in (dense_update, added_afterwards):
        torch.testing.assert_close(other(*tensors, 0.5, slices), wanted, rtol=0, atol=1e-12)


def test_record_and_what_blocks_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ops.json"
    assert main([*SMALL, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert [(result["pixels"], result["dtype"]) for result in record["results"]] == [(56, "fp32"), (56, "bf16")]
    for result in record["results"]:
        for part in ("blocks", "projection"):
            assert next(iter(result[part])) == FROZEN_LAYERS and {OURS, DENSE, AFTERWARDS} <= set(result[part])
            assert result[part][FROZEN_LAYERS]["ratio"]["median"] == 1
        assert f"blocks: 56 px (16 tokens), {result['dtype']}" in printed
    assert "goal" not in printed  # a target of ours at full width says nothing of other widths
    kept = record["results"][0]["kept"]
    # In D of a token: input, q k v, attention and two inputs of norms; the GELU's input is 4 D, u 2 x 2 of 64 numbers.
    # Each norm keeps two numbers of a row, attention one for each of 4 heads.
    assert kept["none"] == pytest.approx(7 + 4 + (4 + 4 + 4) / 64)
    assert kept["mlp"] == pytest.approx(6 + (4 + 4 + 2) / 64)  # projection and first norm are computed again too
    assert kept["gelu_8bit"] == pytest.approx(7 + 4 / 4 + (4 + 4 + 4) / 64)
    assert kept["block"] == 1


def test_every_size_is_measured_on_the_adapted_layers_whichever_came_last(tmp_path: Path) -> None:
    """With two rounds after one to warm up the last case at a size is another way to adapt."""
    file = tmp_path / "ops.json"
    sizes = ["--pixels", "28", "56", "--dtypes", "fp32", "--parts", "blocks", "kept", "--repeats", "2"]
    assert main([*SMALL, *sizes, "--json", str(file)]) == 0
    first, second = json.loads(file.read_text())["results"]
    assert first["kept"]["none"] == second["kept"]["none"]


def test_threads_are_those_of_the_measurement_alone(tmp_path: Path) -> None:
    file, before = tmp_path / "ops.json", torch.get_num_threads()
    flags = ["--parts", "kept", "--dtypes", "fp32", "--depth", "1", "--threads", str(before + 1)]
    assert main([*SMALL, *flags, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["hardware"]["threads"] == before + 1 and torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtypes", "fp64"], "give some of fp32, bf16, fp16"),
        (["--pixels", "13"], "at least one patch"),
        (["--repeats", "0"], "must be at least 1"),
        (["--repeat", "3"], "did you mean --repeats"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--json", "nowhere/at/all.json"], "there is no folder"),
        (["--targets", "proj"], "invalid choice: 'proj'"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err

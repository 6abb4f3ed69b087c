"""Replaying a step names the first module and the image, and which steps it can be done with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.faulty_disk import state
from tests.parallel.engine_case import build, global_batch, loss_denominators
from visft_ds.checkpoint.format import save_checkpoint
from visft_ds.config import resolve
from visft_ds.model import MultiTaskModel
from visft_ds.monitor.metrics import RunRecord
from visft_ds.resilience.nan_debug import NonFinite, examine_batch, open_state
from visft_ds.resilience.replay import main
from visft_ds.run.folder import REFUSED_FOLDER

STEP_OF_ALL = 3  #: in which all three tasks learn
IMAGE = 2  #: the id of the image that goes wrong, also its place in the batch


@pytest.fixture(name="case")
def _case() -> tuple[MultiTaskModel, Any, Any]:
    module, _ = build(1)
    batch = global_batch(STEP_OF_ALL)
    return module.train(), batch, loss_denominators(module, batch, 1)


def examine(case: tuple[MultiTaskModel, Any, Any]) -> list[NonFinite]:
    return examine_batch(*case, "fp32")


def test_a_healthy_step_gives_no_findings(case: tuple[MultiTaskModel, Any, Any]) -> None:
    assert examine(case) == []


def test_the_first_module_and_the_image_are_named(case: tuple[MultiTaskModel, Any, Any]) -> None:
    def overflow(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        worse = output.clone()
        worse[IMAGE, 0] = torch.inf
        return worse

    case[0].backbone.blocks[1].attn.register_forward_hook(overflow)
    found = examine(case)
    assert found[0].what == "output of backbone.blocks.1.attn"
    assert found[0].images == (IMAGE,)
    assert any(one.what.startswith("criterion: detection: the matching cost") for one in found)


def test_a_parameter_comes_before_what_it_spoils(case: tuple[MultiTaskModel, Any, Any]) -> None:
    with torch.no_grad():
        case[0].heads["captioning"].get_parameter("embedding.weight")[1] = torch.nan
    assert examine(case)[0].what == "parameter heads.captioning.embedding.weight"


def test_a_gradient_is_found_where_it_begins(case: tuple[MultiTaskModel, Any, Any]) -> None:
    """All values are finite: the root of 0 has no finite gradient."""
    module, batch, divisors = case
    criterion = module.criteria["captioning"]

    class Rooted:
        weights, count = criterion.weights, criterion.count

        def __call__(self, output: Any, *rest: Any) -> dict[str, Tensor]:
            parts = criterion(output, *rest)
            name = next(iter(parts))
            return {**parts, name: parts[name] + (output.scores[IMAGE] * 0).sum().sqrt()}

    module.criteria["captioning"] = Rooted()  # type: ignore[assignment]
    found = examine((module, batch, divisors))
    assert found[0].what == "gradient of the output of heads.captioning"
    assert found[0].images == (IMAGE,)


def test_a_gradient_that_overflows_in_fp16_is_found_at_the_loss_scale_of_the_run() -> None:
    """Adapters of a backbone that computes in fp16, whose largest number is 65,504; the heads compute in fp32."""
    module, _ = build(2, storage=torch.float16)
    batch = global_batch(0)
    module.train()
    divisors = loss_denominators(module, batch, 1)
    assert examine_batch(module, batch, divisors, "fp16", 1.0) == []
    found = examine_batch(module, batch, divisors, "fp16", 2.0**40)
    assert found[0].what.startswith("gradient of the output of backbone.blocks.1.")
    assert any(one.what.startswith("gradient of parameter backbone.blocks.0.attn.qkv.lora_") for one in found)


@pytest.fixture(name="run")
def _run(tmp_path: Path) -> Path:
    """A run of ten steps with checkpoints after steps 2 and 10; its step 5 was refused."""
    config = resolve(
        stage=1, model="debug", settings=("scheduler.params.total_num_steps=10", "scheduler.params.warmup_num_steps=0")
    )
    RunRecord(config.to_dict(), 1, ["train.py"]).write(tmp_path)
    for folder, step in (("checkpoints", 2), ("checkpoints", 10), (REFUSED_FOLDER, 4)):
        save_checkpoint(tmp_path / folder, step, state(float(step)), {})
    return tmp_path


def test_the_state_before_a_step_is_found_wherever_it_was_kept(run: Path) -> None:
    assert open_state(run, 3, 10).path == run / "checkpoints" / "step_00000002"
    assert open_state(run, 5, 10).path == run / REFUSED_FOLDER / "step_00000004"
    (run / REFUSED_FOLDER / "step_00000004" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step_00000004: format None None"):
        open_state(run, 5, 10)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--step", "4"], "--step 4: the state before that step was not kept; steps that can be replayed: 3, 5"),
        (["--step", "11"], "--step 11: the state before that step was not kept; steps that can be replayed: 3, 5"),
        ([], "--step N is missing; steps that can be replayed: 3, 5"),
        (["--step", "5", "--set", "visft.seed=1"], "--set visft.seed=1: only where files lie can be set"),
    ],
)
def test_steps_that_can_be_replayed_are_named(
    arguments: list[str], problem: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run), *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--step", "1"]) == 2
    assert "there is no run in" in capsys.readouterr().err

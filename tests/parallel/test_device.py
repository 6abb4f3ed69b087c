"""A whole step of every task on a GPU that is not there: all on one device, and nothing that a GPU waits for
but `WAITS`.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime import utils
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero import utils as zero_utils

from tests.ranks import REPOSITORY, run_ranks

#: Part of a line of ours -> why a GPU may wait there, once a step and task.
WAITS = {
    "stops, tokens, squares, *sums = vector.cpu().tolist()": "the agreement on the step",
    "together = torch.cat([counts.to(cost.dtype), cost.flatten()]).cpu()": "costs of boxes, which scipy matches",
    "return cost.cpu().numpy(), counts.numpy()": "costs of masks, whose counts the host has",
    "means = dict(zip(keys, (vector / count).cpu().tolist()": "all losses, which may forbid the update",
    "norm = float(self.deepspeed.get_global_grad_norm())": "the norm of the gradient, which may refuse the step",
}
#: Part of a line of DeepSpeed -> why.
WAITS_OF_DEEPSPEED = {
    "return bool((~torch.isfinite(norm) | (norm < 0)).any())": "the norm of each group of parameters",
    "self.torch_autocast_gradscaler.step(self.optimizer)": "fp16: if a group of parameters has an overflow",
    "rank0_list_length = rank0_len_tensor.cpu().item()": "ZeRO-3: if all ranks gather alike, in a new order",
    "return [t.item() for t in lst_tensor.cpu()]": "the same",
}


def check(out: Path, *words: str) -> list[Any]:
    """Make the steps; returns what was run."""
    run_ranks(["-m", "tests.parallel.device_case", str(out), *words], world=1)
    results = json.loads(out.read_text())
    for run, loss, findings in results:
        assert math.isfinite(loss), run
        for kind, file, code, operator, times in findings:
            of_deepspeed = file.startswith("deepspeed/")
            allowed = WAITS_OF_DEEPSPEED if of_deepspeed else WAITS
            assert any(line in code for line in allowed), (run, kind, file, code, operator)
            assert of_deepspeed or times == 1, (run, code, times)
    return [run for run, _, _ in results]


def test_a_step_has_one_device_and_waits_where_it_is_said(tmp_path: Path) -> None:
    assert len(check(tmp_path / "out.json")) == 5 + 1 + 1 + 4


@pytest.mark.slow
def test_a_step_of_each_task_under_every_engine(tmp_path: Path) -> None:
    assert len(check(tmp_path / "out.json", "each")) == 3 * (5 + 4)


def test_each_line_that_may_make_a_gpu_wait_is_still_there() -> None:
    code = "".join(path.read_text() for path in (REPOSITORY / "visft_ds").rglob("*.py"))
    assert all(line in code for line in WAITS)
    of_deepspeed = "".join(inspect.getsource(module) for module in (utils, zero_utils, stage_1_and_2))
    assert all(line in of_deepspeed for line in WAITS_OF_DEEPSPEED)

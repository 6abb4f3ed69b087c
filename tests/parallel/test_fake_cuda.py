"""A step of each task on a fake GPU: nothing of another device, and nothing that a GPU waits for but `WAITS`.

It needs a build of torch for CPUs, a fake `torch.cuda` (`fake_cuda`) and a compiler; the workflow has them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel import fake_cuda
from tests.parallel.fake_cuda import MIXED, ROOT

#: Part of a line of ours -> why a GPU may wait there, once a step.
WAITS = {
    "stops, tokens, squares, *sums = vector.cpu().tolist()": "the agreement on the step, 15 numbers",
    "host = torch.cat([*together, cost.flatten()]).cpu()": "costs of the matching, which scipy makes on the host",
    "means = dict(zip(keys, (vector / count).cpu().tolist()": "all losses, before the update, which they may forbid",
    "norm = float(self.deepspeed.get_global_grad_norm())": "the norm of the gradient, which may refuse the step",
}
#: Times that DeepSpeed waits: once, and twice for each of the two parameter groups of the tiny model.
DEEPSPEED_WAITS = 1 + 2 * 2


def test_a_step_has_one_device_and_waits_where_it_is_said(tmp_path: Path) -> None:
    if (reason := fake_cuda.why_not()) is not None:
        pytest.skip(reason)
    environment = {**os.environ, **fake_cuda.environment(tmp_path)}
    command = [sys.executable, "-m", "tests.parallel.fake_cuda"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = dict(json.loads(line) for line in done.stdout.splitlines())
    assert len(steps) == 3
    for task, found in steps.items():
        waits = [(file, code, times) for (kind, file, code, what), times in found if kind != MIXED]
        assert len(waits) == len(found), (task, found)
        ours = [(code, times) for file, code, times in waits if not file.startswith("deepspeed/")]
        assert all(times == 1 and any(line in code for line in WAITS) for code, times in ours), (task, ours)
        assert len(ours) == len(WAITS) - (task == "captioning"), (task, ours)
        assert sum(times for *_, times in waits) - len(ours) <= DEEPSPEED_WAITS, (task, waits)


def test_each_line_that_may_make_a_gpu_wait_is_still_there() -> None:
    code = "".join(path.read_text() for path in (ROOT / "visft_ds").rglob("*.py"))
    assert all(line in code for line in WAITS)

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
from tests.parallel.fake_cuda import BLOCKING, MIXED, ROOT, Found

#: Part of a line of ours -> why a GPU may wait there, once a step.
WAITS = {
    "stops, tokens, squares, *sums = vector.cpu().tolist()": "the agreement on the step, 15 numbers",
    "host = torch.cat([tensor.to(tensors[-1].dtype)": "costs of the matching, which scipy makes on the host",
    "means = dict(zip(keys, (vector / count).cpu().tolist()": "all losses, before the update, which they may forbid",
    "norm = float(self.deepspeed.get_global_grad_norm())": "the norm of the gradient, which may refuse the step",
}
#: Times that DeepSpeed waits: once, and twice for each of the two parameter groups of the tiny model.
DEEPSPEED_WAITS = 1 + 2 * 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Found]]:
    """Task -> what its step shows, or a skip that says what is missing."""
    if (reason := fake_cuda.why_not()) is not None:
        pytest.skip(reason)
    library = fake_cuda.build(tmp_path_factory.mktemp("fake_cuda"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **fake_cuda.environment(library)}
    command = [sys.executable, "-m", "tests.parallel.fake_cuda_case"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = [json.loads(line) for line in done.stdout.splitlines()]
    return {task: [Found(**one) for one in found] for step in steps for task, found in step.items()}


@pytest.mark.parametrize("task", ["detection", "segmentation", "captioning"])
def test_a_step_has_one_device_and_waits_where_it_is_said(found: dict[str, list[Found]], task: str) -> None:
    assert not [one for one in found[task] if one.kind == MIXED]
    waits = [one for one in found[task] if one.kind in BLOCKING]
    ours = [one for one in waits if not one.file.startswith("deepspeed/")]
    assert all(one.times == 1 and any(code in one.code for code in WAITS) for one in ours), ours
    assert len(ours) == len(WAITS) - (task == "captioning")
    assert sum(one.times for one in waits) - len(ours) <= DEEPSPEED_WAITS


def test_each_line_that_may_make_a_gpu_wait_is_still_there() -> None:
    code = "".join(Path(path).read_text() for path in (ROOT / "visft_ds").rglob("*.py"))
    assert all(line in code for line in WAITS)

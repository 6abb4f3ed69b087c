"""Steps on a fake GPU: nothing of another device or dtype, and nothing that a GPU waits for but what `ALLOWED` names.

All cases run in one process, which has a fake `torch.cuda` (`fake_cuda`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from tests.parallel import fake_cuda
from tests.parallel.fake_cuda import BLOCKING, DOUBLE, MADE, ROOT, TO_GPU, TO_HOST, VALUE, WAIT, Found
from tests.parallel.fake_cuda_case import CASES, TRIO

#: Heads train in the joint step; a pipeline recomputes blocks.
FAST = (
    *(f"stage2-{task}-bf16" for task in TRIO),
    *(name for name in CASES if name.startswith("predict-")),
    *("joint-stage1", "upload", "stage2-captioning-fp32", "recompute-mlp"),
    *("packed-segmentation", "packed-captioning", "pipeline-segmentation", "pipeline-packed"),
)
#: Of one task each, by an engine.
STEPS = {f"zero1-{task}": task for task in TRIO}


@dataclass(frozen=True)
class Allowed:
    """A line where things of these kinds may happen; `code` is a part of it, or empty for every line of the file."""

    file: str
    code: str
    kinds: tuple[str, ...]
    reason: str


#: All that a GPU waits for in a step of one task under ZeRO-1, apart from what DeepSpeed adds. Four lines at most.
WAITS = (
    Allowed(
        "visft_ds/parallel/distributed.py",
        "stops, tokens, squares, *sums = vector.cpu().tolist()",
        (TO_HOST, DOUBLE),
        "the agreement on the step, 15 numbers: nobody may begin one that others do not make",
    ),
    Allowed(
        "visft_ds/tasks/matching.py",
        "host = torch.cat([tensor.to(tensors[-1].dtype)",
        (TO_HOST,),
        "costs of the matching, which scipy makes on the host; not in captioning",
    ),
    Allowed(
        "visft_ds/parallel/distributed.py",
        "means = dict(zip(keys, (vector / count).cpu().tolist()",
        (TO_HOST,),
        "all losses, before the update, which a loss that is not finite forbids",
    ),
    Allowed(
        "visft_ds/parallel/engine.py",
        "norm = float(self.deepspeed.get_global_grad_norm())",
        (VALUE,),
        "the norm of the gradient: one that is not finite refuses the step",
    ),
)
#: Times that DeepSpeed waits in such a step: once, and twice for each of the two parameter groups of the tiny model.
DEEPSPEED_WAITS = 1 + 2 * 2

_LABELS = "sizes of the labels: what is read on the host stays there"
_SETTING = "a number of Python in a fill of a slice: torch reads it on the host, nothing is copied"
_FINISHED = "results of an evaluation go to the host: nothing is computed after them"
_EXACT = "one row of numbers for each image, exact as on a CPU"
ALLOWED = (
    # the step
    *WAITS,
    Allowed(
        "visft_ds/parallel/distributed.py",
        "vector = to_device(torch.tensor([float(stop), token",
        (MADE,),
        "15 numbers a step, copied without waiting",
    ),
    Allowed("visft_ds/ops/copies.py", "return values.to(device", (DOUBLE,), "the same 15: sums of squares are exact"),
    Allowed("visft_ds/parallel/distributed.py", "dist.all_reduce(vector)", (DOUBLE,), "the same 15 numbers"),
    Allowed(
        "visft_ds/parallel/engine.py",
        "return float(torch.nn.utils.get_total_norm(gradients))",
        (VALUE,),
        "the same under ZeRO-0",
    ),
    Allowed(
        "visft_ds/parallel/pipeline_layers.py",
        "grids = [(height, width) for height, width in label[1:]",
        (VALUE,),
        "packed in a pipeline: once a stage and micro-batch, since lengths travel with the tokens",
    ),
    # the forward pass
    Allowed("visft_ds/model.py", "to_device(torch.tensor(values), device)", (MADE,), "six numbers, in the first step"),
    Allowed(
        "visft_ds/model.py",
        "grids, pixels = (torch.tensor(sizes_of_all",
        (MADE,),
        "a few numbers of packed images, copied without waiting",
    ),
    Allowed(
        "visft_ds/ops/attention.py",
        "return cls(tuple(lengths), to_device(torch.tensor(ends",
        (MADE,),
        "a few numbers of packed images, copied without waiting",
    ),
    # the losses
    Allowed(
        "visft_ds/tasks/matching.py",
        "return Matches(*to_device(torch.from_numpy(assign(",
        (MADE,),
        "the pairs that scipy finds, copied without waiting",
    ),
    Allowed(
        "visft_ds/tasks/segmentation/mask_points.py",
        "numbers = torch.empty(len(keys)",
        (MADE,),
        "pinned random numbers, the same on every device, copied without waiting",
    ),
    Allowed("visft_ds/tasks/segmentation/loss.py", "points = draw_points(targets.keys[with_objects]", (MADE,), _LABELS),
    # predictions
    Allowed("visft_ds/tasks/captioning/head.py", "banned[: _PAD + 1] = True", (MADE,), _SETTING),
    Allowed("visft_ds/tasks/captioning/head.py", "banned[_UNKNOWN:_END] = True", (MADE,), _SETTING),
    Allowed("visft_ds/tasks/detection/head.py", "numbers = torch.cat((corners, scores", (TO_HOST,), _FINISHED),
    Allowed("visft_ds/tasks/detection/head.py", "sizes = batch.original_sizes.cpu()", (TO_HOST,), _FINISHED),
    Allowed("visft_ds/tasks/detection/head.py", "image_ids, real = batch.image_ids.tolist()", (VALUE,), _FINISHED),
    Allowed("visft_ds/tasks/segmentation/loss.py", "scores_host, best_host = scores.tolist()", (VALUE,), _FINISHED),
    Allowed(
        "visft_ds/tasks/segmentation/loss.py", "extents = batch.sizes.double().cpu()", (TO_HOST, DOUBLE, MADE), _EXACT
    ),
    Allowed("visft_ds/tasks/segmentation/loss.py", "in enumerate(zip(batch.image_ids.tolist()", (VALUE,), _FINISHED),
    Allowed(
        "visft_ds/tasks/segmentation/loss.py",
        "masks = at_least_float32(output.masks[image, kept])",
        (MADE, TO_GPU),
        "once an image of an evaluation, whose run-length code takes 100 times as long",
    ),
    Allowed("visft_ds/tasks/segmentation/loss.py", "shares, stored = extents[image].tolist()", (VALUE,), _FINISHED),
    Allowed("visft_ds/tasks/segmentation/loss.py", "codes += coco_mask.encode(inside", (TO_HOST,), _FINISHED),
    Allowed("visft_ds/tasks/segmentation/loss.py", "place = (torch.arange(pixels", (DOUBLE,), _EXACT),
    Allowed("visft_ds/tasks/segmentation/loss.py", "place = place.clamp(0, cells - 1)", (DOUBLE,), _EXACT),
    Allowed("visft_ds/tasks/segmentation/loss.py", "return (1 - (place - torch.arange(cells", (DOUBLE,), _EXACT),
    # DeepSpeed's own
    Allowed(
        "deepspeed/runtime/engine.py",
        "",
        (VALUE,),
        "fp16 under ZeRO-0: the scaler asks once a step whether there was an overflow",
    ),
    Allowed("deepspeed/runtime/utils.py", "", (TO_GPU, VALUE), "clipping: two numbers and one question a step"),
    Allowed(
        "deepspeed/runtime/zero/stage_1_and_2.py",
        "",
        (VALUE,),
        "fp16: the scaler asks once a step and group whether there was an overflow",
    ),
    Allowed(
        "deepspeed/runtime/zero/stage3.py",
        "",
        (TO_GPU, TO_HOST, VALUE),
        "the norm of the gradient, on the host where the optimizer is offloaded",
    ),
    Allowed(
        "deepspeed/runtime/zero/partition_parameters.py",
        "",
        (TO_GPU,),
        "offloaded weights: one copy for each in each pass, which DeepSpeed makes blocking, from pinned memory too",
    ),
    Allowed("deepspeed/accelerator/cuda_accelerator.py", "", (WAIT,), "ZeRO-3 waits for the weights it has gathered"),
)


class FakeGpu:
    """A process that runs cases; one that ended with an error is started again for the next case."""

    def __init__(self, folder: Path) -> None:
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), **fake_cuda.environment(fake_cuda.build(folder))}
        self._log = folder / "log.txt"
        self._process: subprocess.Popen[str] | None = None
        self._start()

    def _start(self) -> None:
        command = [sys.executable, "-m", "tests.parallel.fake_cuda_case"]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._read() == "ready\n", self._log.read_text()

    def _pipe(self, name: str) -> IO[str]:
        return getattr(self._process, name)

    def _read(self) -> str:
        return self._pipe("stdout").readline()

    def run(self, name: str) -> list[Found]:
        """What a case of `fake_cuda_case` finds."""
        if self._process is None:
            self._start()
        self._pipe("stdin").write(f"{name}\n")
        self._pipe("stdin").flush()
        answer = self._read()
        if not answer:
            self.close()
            pytest.fail(f"{name} breaks on a fake GPU:\n{self._log.read_text()[-4000:]}")
        return [Found(**found) for found in json.loads(answer)]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeGpu]:
    """The process, or a skip that says what is missing."""
    if (reason := fake_cuda.why_not()) is not None:
        pytest.skip(reason)
    gpu = FakeGpu(tmp_path_factory.mktemp("fake_cuda"))
    yield gpu
    gpu.close()


def is_(one: Allowed, found: Found) -> bool:
    return found.file == one.file and one.code in found.code and found.kind in one.kinds


def is_allowed(found: Found) -> bool:
    return any(is_(one, found) for one in ALLOWED)


def check(gpu: FakeGpu, name: str) -> list[Found]:
    found = gpu.run(name)
    wrong = [f"{f.kind}: {f.file}:{f.line}  {f.code}  ({f.what})" for f in found if not is_allowed(f)]
    assert not wrong, "\n".join(["a GPU waits here, or sees what it should not:", *wrong])
    return found


@pytest.mark.parametrize("name", FAST)
def test_a_step_has_one_device_and_waits_only_where_it_is_said(gpu: FakeGpu, name: str) -> None:
    check(gpu, name)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_four_times_at_most(gpu: FakeGpu, name: str) -> None:
    waits = [found for found in check(gpu, name) if found.kind in BLOCKING]
    ours = [found for found in waits if not found.file.startswith("deepspeed/")]
    assert all(any(is_(one, found) for one in WAITS) and found.times == 1 for found in ours), ours
    assert len(ours) == (3 if STEPS[name] == "captioning" else 4) and len(WAITS) <= 4
    assert sum(found.times for found in waits) - len(ours) <= DEEPSPEED_WAITS


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in (*FAST, *STEPS)])
def test_other_precisions_engines_and_backbones_do_so_too(gpu: FakeGpu, name: str) -> None:
    check(gpu, name)


@pytest.mark.parametrize("one", [one for one in ALLOWED if one.code], ids=lambda one: f"{one.file}: {one.code}")
def test_each_line_that_may_make_a_gpu_wait_is_still_there(one: Allowed) -> None:
    assert one.code in (ROOT / one.file).read_text()

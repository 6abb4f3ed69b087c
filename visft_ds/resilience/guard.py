"""Guard of the loss: NaN and infinity are counted; too many end the run on every rank, which names where they
begin.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from visft_ds import distributed
from visft_ds.data.plan import StepPlan
from visft_ds.data.samples import Batch
from visft_ds.parallel.engine import Engine, StepReport
from visft_ds.tasks.criterion import LossDenominators, tensors_of

#: Findings that are shown of a rank, and ranks.
_SHOWN = 3
#: An overflow at this loss scale of fp16 or a lower one stops the run: every further step would be skipped.
LEAST_SCALE = 1.0


@dataclass
class LossGuard:
    """Judges every step of a run by its loss and gradient."""

    allowed: int  #: steps in a row without an update that are skipped
    bad: int = 0  #: steps in a row without an update because loss or gradient was not finite
    collapsed: bool = False  #: no loss scale that is allowed keeps the gradient of the last step finite

    @property
    def ends(self) -> bool:
        """Return True if the run has to stop after the last step."""
        return self.bad > self.allowed or self.collapsed

    def observe(self, step_plan: StepPlan, report: StepReport) -> str:
        """Judge a finished step. Returns the message for the log, "" for none."""
        where = f"step {step_plan.step + 1} ({step_plan.task})"
        self.bad = self.bad + 1 if report.refused and not is_finite(report) else 0
        scale = report.loss_scale or LEAST_SCALE
        if report.skipped and scale <= LEAST_SCALE:
            self.collapsed = True
            smallest = f"the smallest loss scale, {scale:g}"
            return f"{where}: the gradient overflows in fp16 at {smallest}: use bf16 or fp32"
        if not report.refused:
            return ""
        what = f"the loss is {report.losses['loss']}"
        if report.refused == "gradient":
            what = "the gradient is not finite"
        faults = []
        for rank, texts in report.faults.items():
            faults += [f"\n  rank {rank}: {text}" for text in texts[:_SHOWN]]
        return f"{where}: {what}, no update was made on any rank{''.join(faults)}"

    def stop(self, message: str, saved: int) -> None:
        """End the run on every rank: raise FloatingPointError. `saved`: step of the newest checkpoint, 0 for
        none.
        """
        after = ""
        if self.bad > 1:
            after = f" after {self.allowed} skipped steps in a row (visft.run.skip_bad_steps)"
        good = f"the last good checkpoint is that of step {saved}" if saved else "nothing was saved yet"
        raise FloatingPointError(
            f"{message}\nstopped{after}; {good}. A smaller learning rate or a longer warm-up usually helps"
        )


def is_finite(report: StepReport) -> bool:
    """Return True if loss and gradient of a step were finite; overflows of fp16 do not count."""
    return math.isfinite(report.losses["loss"]) and report.refused != "gradient"


def first_non_finite(
    engine: Engine,
    step: int,
    batches: Sequence[Batch],
    loss_denominators: LossDenominators,
    report: StepReport,
) -> str:
    """Make a refused step once more, without an update, and name what is not finite first. Collective.

    It runs through the engine, at the loss scale of that step, so that every rank and pipeline stage sees
    what it saw. The run has to stop afterwards: the engine's counters are not right any more. Returns the
    first modules, parameters and images of each rank, the same on every rank.
    """
    findings: list[str] = []
    engine.should_update = lambda loss: False
    if engine.loss_scale and report.loss_scale is not None:
        engine.loss_scale.restore({**engine.loss_scale.state(), "scale": report.loss_scale})
    with watched(engine.module, findings):
        engine.train_step(step, batches, loss_denominators)
    # The rows inside of a tower's block are of no one image: the block's own output names it.
    images = [text for text in findings if ", images [" in text][:1]
    everyone: list[list[str]] = distributed.from_all_ranks(list(dict.fromkeys(findings[:_SHOWN] + images)))
    lines = []
    for rank, texts in enumerate(everyone):
        if texts:
            lines.append(f"\n  rank {rank}: it begins with the {'; '.join(texts)}")
    return "".join(lines[:_SHOWN]) or "\n  repeated, the step is finite: the hardware may be faulty"


@contextlib.contextmanager
def watched(module: nn.Module, findings: list[str]) -> Iterator[None]:
    """Append to `findings` what is not finite in passes through a module: targets, outputs and gradients, in
    the order in which they come.
    """
    seen = set[str]()
    batch = list[Batch]()

    def note(what: str, tensor: Tensor) -> None:
        if what in seen or tensor.is_meta or not tensor.is_floating_point() or bool(tensor.isfinite().all()):
            return
        seen.add(what)
        bad = ~tensor.detach().isfinite()
        where = ""
        if batch and tensor.ndim > 1 and tensor.shape[0] == len(batch[0].image_ids):
            where = f", images {batch[0].image_ids[bad.flatten(1).any(1).cpu()].tolist()}"
        findings.append(f"{what}: {int(bad.sum())} of {bad.numel()} values are not finite{where}")

    def begin(_: nn.Module, inputs: Any) -> None:
        batch[:] = [value for value in inputs if isinstance(value, Batch)]
        for task, targets in (batch[0].targets if batch else {}).items():
            for tensor in tensors_of(targets):
                note(f"targets of {task}", tensor)

    def look_at_output(name: str, _: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tensors_of(output):
            note(f"output of {name}", tensor)
            if tensor.requires_grad:
                tensor.register_hook(partial(note, f"gradient of the output of {name}"))

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(module.register_forward_pre_hook(begin))
        for name, child in module.named_modules():
            if name and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                hooks.enter_context(child.register_forward_hook(partial(look_at_output, name)))
        for name, parameter in module.named_parameters():
            note(f"parameter {name}", parameter)
            if parameter.requires_grad:
                hook = partial(note, f"gradient of parameter {name}")
                hooks.enter_context(parameter.register_hook(hook))
        yield

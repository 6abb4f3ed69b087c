"""Heads in bf16 against the same ones in float32: outputs, matchings and gradients, at the published sizes.

On a GPU autocast rounds other functions than on a CPU. Its lists are imitated here (ATen/autocast_mode.h).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import visft_ds.tasks.detection.loss
import visft_ds.tasks.masks.loss
from tests.options import criterion_of, head_of
from tests.parallel.engine_case import build
from tests.tasks.cases import batch_of, boxes_of, denominators, map_of, masks_of
from visft_ds.model import MultiTaskModel, TaskModule
from visft_ds.tasks.captioning.data import CaptionTargets
from visft_ds.tasks.criterion import tensors_of
from visft_ds.tasks.matching import Matches, solve

WIDTH, SIDE, WORDS, COUNTS = 96, 16, 500, [5, 3]
IN_16_BIT = {
    "linear",
    "conv2d",
    "matmul",
    "__matmul__",
    "mm",
    "bmm",
    "einsum",
    "scaled_dot_product_attention",
}
IN_FLOAT32 = {
    "layer_norm",
    "softmax",
    "log_softmax",
    "sum",
    "cumsum",
    "prod",
    "exp",
    "rsqrt",
    "softplus",
    "pow",
}
#: Largest relative errors of outputs and gradients, and largest regret: what the matching costs in float32,
#: over the cheapest. Seen: 6e-3, .0133, 5e-5; 9e-3, .0178, 1e-5; 4e-3, .0038. Norms and sampling points in 16
#: bit: .026.
BOUNDS = {
    "detection": (8e-3, 1.7e-2, 2e-4),
    "segmentation": (1.1e-2, 2.2e-2, 3e-4),
    "captioning": (5e-3, 5e-3, 0.0),
}


class LikeCuda(TorchFunctionMode):
    """Autocast of a CPU, where it is on, rounds what that of CUDA does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        dtype = torch.bfloat16 if name in IN_16_BIT else torch.float32 if name in IN_FLOAT32 else None
        if dtype is not None:
            cast = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        with torch.autocast("cpu", enabled=False):
            return func(*args, **kwargs)


@dataclass
class Found:
    """What heads and criterion of a task made of a batch."""

    outputs: list[Tensor]
    gradients: list[Tensor]
    costs: list[Tensor] = field(default_factory=list)
    matches: list[Matches] = field(default_factory=list)


@pytest.fixture(scope="module")
def module() -> MultiTaskModel:
    torch.manual_seed(0)
    tasks = {
        task: TaskModule(head_of(task, WIDTH, WORDS, dropout=0.0), criterion_of(task)) for task in BOUNDS
    }
    return MultiTaskModel(build(1)[0].backbone, tasks, train_backbone=False, heads_active=True)


@pytest.fixture(scope="module")
def targets() -> Mapping[str, Any]:
    torch.manual_seed(1)
    captions = torch.randint(1, WORDS - 3, (len(COUNTS), 9))
    captions[:, 0], captions[:, -1] = WORDS - 2, WORDS - 1
    captioning = CaptionTargets(captions, torch.full((len(COUNTS),), 9), ((),) * len(COUNTS))
    return {"detection": boxes_of(COUNTS), "segmentation": masks_of(COUNTS), "captioning": captioning}


def learn(
    module: MultiTaskModel, task: str, targets: Any, *modes: Any, forced: list[Matches] | None = None
) -> Found:
    """Outputs, and the gradients of the head and of its features, with the matching of another run if
    given.
    """
    criterion, found = module.criteria[task], Found([], [])

    def criterion_without_autocast(output: Any, *rest: Any) -> Any:
        assert not torch.is_autocast_enabled("cpu")
        found.outputs += [tensor.detach() for tensor in tensors_of(output) if tensor.is_floating_point()]
        return criterion(output, *rest)

    def recorded(cost: Tensor, *rest: Any) -> Matches:
        found.costs.append(cost)
        found.matches.append(solve(cost, *rest))
        return forced[0] if forced else found.matches[-1]

    features = torch.randn(
        len(COUNTS), WIDTH, SIDE, SIDE, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()
    valid = torch.ones(len(COUNTS), SIDE, SIDE, dtype=torch.bool)
    valid[1, :, SIDE // 2 :] = False
    criterion_without_autocast.weights = criterion.weights  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setitem(module.criteria, task, criterion_without_autocast)
        for where in (visft_ds.tasks.detection.loss, visft_ds.tasks.masks.loss):
            patch.setattr(where, "solve", recorded)
        for mode in modes:
            stack.enter_context(mode)
        batch, divisors = (
            batch_of(len(COUNTS), {task: targets}),
            {task: denominators(task, criterion, targets)},
        )
        loss = module.outputs([map_of(features, valid)], batch, divisors)["loss"]
    found.gradients += torch.autograd.grad(
        loss, [features, *module.heads[task].parameters()], allow_unused=True
    )
    return found


@pytest.fixture(scope="module")
def exact(module: MultiTaskModel, targets: Mapping[str, Any]) -> Callable[[str], Found]:
    """What the heads of a task learn in float32."""
    return cache(lambda task: learn(module, task, targets[task]))


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Relative difference of all as one vector."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    a, b = (torch.cat([each.double().flatten() for each in side]) for side in zip(*pairs, strict=True))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("lists", ["cuda", pytest.param("cpu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", BOUNDS)
def test_heads_in_bf16_learn_what_those_in_float32_do(
    module: MultiTaskModel,
    targets: Mapping[str, Any],
    exact: Callable[[str], Found],
    task: str,
    lists: str,
) -> None:
    modes = [torch.autocast("cpu", torch.bfloat16), *([LikeCuda()] if lists == "cuda" else [])]
    plain = exact(task)
    ours = learn(module, task, targets[task], *modes, forced=plain.matches)
    outputs, gradients, regret = BOUNDS[task]
    errors = [apart([a], [b]) for a, b in zip(ours.outputs, plain.outputs, strict=True)]
    assert all(output.dtype == torch.float32 for output in ours.outputs)
    assert 0 < max(errors) <= outputs and apart(ours.gradients, plain.gradients) <= gradients
    for cost, best, theirs in zip(plain.costs, plain.matches, ours.matches, strict=True):
        paid, least = (float(cost[m.layers, m.objects, m.queries].sum()) for m in (theirs, best))
        assert paid - least <= regret * abs(least)


@pytest.mark.parametrize(("dtype", "stated"), [(torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("task", BOUNDS)
def test_heads_compute_in_float32_where_stated_and_in_fp16_runs(
    module: MultiTaskModel,
    targets: Mapping[str, Any],
    exact: Callable[[str], Found],
    task: str,
    dtype: torch.dtype,
    stated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "heads_in_fp32", stated)
    plain = exact(task)
    ours = learn(module, task, targets[task], torch.autocast("cpu", dtype))
    assert apart(ours.outputs, plain.outputs) == 0 == apart(ours.gradients, plain.gradients)


def test_cells_of_captions_are_pooled_in_float32(module: MultiTaskModel) -> None:
    given = torch.randn(1, WIDTH, SIDE, SIDE), torch.ones(1, SIDE, SIDE, dtype=torch.bool)
    head: Any = module.heads["captioning"]
    pooled: list[Tensor] = []
    with head.encoder_att.register_forward_pre_hook(lambda _, inputs: pooled.append(inputs[0])):
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                head([map_of(*given)], max_length=1)
    assert torch.equal(*pooled)

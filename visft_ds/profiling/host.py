"""Host time of a step: what Python, autograd and dispatch cost for the blocks of a tower, whatever the GPU.

A tower as deep as EVA-ViT-E and otherwise so small that its arithmetic is nothing; forward and backward with LoRA on q
and v, 16-bit matrices, and the products that a GPU takes. A GPU waits for this time where its own work is shorter.
One patch an image: from a few thousand multiplications on, oneDNN sets up each product of a CPU for 30 us, which a
GPU does not know.

Run as a script this file measures the package that `PYTHONPATH` leads to, so that another checkout, also one without
this file, takes turns with this one: `visft profile ops --parts host --against CHECKOUT`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEPTH = 64  #: blocks of EVA-ViT-E
#: What is recomputed in the backward pass.
POLICIES = ("none", "block", "mlp")
THIS, OTHER = "this", "other"
#: Steps of which a round keeps the fastest: a process that was interrupted says nothing about the code.
_STEPS = 3
#: Operators that launch nothing and yet are no views to torch.
_FREE = ("empty", "empty_strided", "empty_like", "new_empty", "detach", "_unsafe_view", "_reshape_alias", "alias")


class Launches(TorchDispatchMode):
    """Counts operators that would launch a kernel, or more than one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not (func.is_view or func._overloadpacket.__name__ in _FREE)
        return func(*args, **(kwargs or {}))


def build(depth: int) -> Any:
    """Tower of `depth` tiny blocks, with adapters that alone train, in training mode."""
    import visft_ds.ops.lora
    from visft_ds.models.eva_vit import build_backbone
    from visft_ds.models.lora import inject_lora

    visft_ds.ops.lora.choose_backend = lambda device, dtype: ("augmented", "as on a GPU in 16 bit")
    backbone = build_backbone("eva_e", width=32, depth=depth, num_heads=2, mlp_ratio=2.0)
    inject_lora(backbone, rank=4)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora" in name)
        if name.startswith("blocks") and parameter.ndim >= 2 and "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    return backbone.train()


def step(backbone: Any, policy: str) -> None:
    """Forward and backward of one image of one patch."""
    if hasattr(backbone, "checkpoint_every"):  # how checkouts before 0.2 say it
        backbone.checkpoint_every, backbone.recompute = int(policy != "none"), "block" if policy == "none" else policy
    else:
        backbone.recompute = policy
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = backbone(torch.zeros(1, 3, 14, 14))
    features.sum().backward()


def serve() -> None:
    """Answer each line "seconds POLICY" or "operators POLICY" with a number."""
    torch.set_num_threads(1)
    backbone = build(int(sys.argv[1]))
    for policy in POLICIES * 2:  # the first steps make what is kept
        step(backbone, policy)
    print("ready", flush=True)
    for line in sys.stdin:
        what, policy = line.split()
        if what == "operators":
            with Launches() as launches:
                step(backbone, policy)
            print(launches.count, flush=True)
            continue
        taken = []
        for _ in range(_STEPS):
            began = time.process_time()
            step(backbone, policy)
            taken.append(time.process_time() - began)
        print(min(taken), flush=True)


class _Process:
    """This file at work in another process, on the package of a checkout."""

    def __init__(self, checkout: Path, depth: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(depth)],
            env={**os.environ, "PYTHONPATH": str(checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._read().strip() != "ready":
            raise RuntimeError(f"the host time of {checkout} could not be measured: its output says why")

    def ask(self, what: str, policy: str) -> float:
        assert self._process.stdin is not None
        print(what, policy, file=self._process.stdin, flush=True)
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def end(self) -> None:
        self._process.communicate()


def measure_host(against: Path | None, repeats: int, depth: int = DEPTH) -> dict[str, Any]:
    """Measure all policies in every round, this checkout and the other in turn; returns a record of JSON values.

    Raises:
        ValueError: `against` is no checkout of this project.
    """
    from visft_ds.profiling.harness import in_turn, ratio, spread

    trees = {THIS: Path(__file__).resolve().parents[2]}
    if against is not None:
        if not (against / "visft_ds" / "models" / "lora.py").is_file():
            raise ValueError(f"--against {against}: there is no visft_ds in it; give a checkout (git worktree add)")
        trees[OTHER] = against.resolve()
    processes = {tree: _Process(path, depth) for tree, path in trees.items()}
    try:
        operators = {(t, p): int(processes[t].ask("operators", p)) for p in POLICIES for t in trees}
        seconds = in_turn(operators, lambda case: processes[case[0]].ask("seconds", case[1]), repeats)
    finally:
        for process in processes.values():
            process.end()
    policies: dict[str, Any] = {}
    for policy in POLICIES:
        found = {t: {**spread(seconds[t, policy]), "operators": operators[t, policy]} for t in trees}
        policies[policy] = found
        if against is not None:
            found["ratio"] = ratio(seconds[THIS, policy], seconds[OTHER, policy])
    return {"depth": depth, "against": None if against is None else str(against), "policies": policies}


def host_rows(record: dict[str, Any]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Rows and head of a table: one row for each policy and checkout."""
    from visft_ds.profiling.harness import quartiles, with_quartiles

    rows: list[tuple[str, ...]] = []
    for policy, found in record["policies"].items():
        for tree in (tree for tree in (THIS, OTHER) if tree in found):
            own = found[tree]
            compared = ""
            if tree == THIS and "ratio" in found:
                minima = own["least"] / found[OTHER]["least"]
                compared = f"{minima:.2f} of the minima, {with_quartiles(found['ratio'], 2)}"
            times = f"{1000 * own['least']:.1f}", f"{1000 * own['median']:.1f} ({quartiles(own, 1, 1000)})"
            rows.append((f"{policy}, {tree}", str(own["operators"]), *times, compared))
    head = ("recomputed, checkout", "operators", "least ms", "median ms (quartiles)", "this over other (quartiles)")
    return rows, head


if __name__ == "__main__":
    serve()

"""All of EVA-ViT-E on a CPU, from random weights to a merged tower that is verified: `make full-size`, by hand.

    python -m tests.full_size                # 64 blocks: 17 GiB of memory, 40 GB of disk, and half an hour or more
    python -m tests.full_size --depth 2      # the same commands in a few minutes

Three steps of stage 1 and of stage 2, one of each task, in bf16 with one image at a time, then export, merge, verify.
Prints the time and the peak memory of each command, beside the planner's. The peak is what the process has for itself:
libraries count (about 0.8 GiB), pages of the weight file that it has mapped do not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from visft_ds.config import resolve
from visft_ds.monitor.console import Section, print_plan
from visft_ds.planner import plan_largest, run_of
from visft_ds.resilience.host_memory import host_memory_available

REPOSITORY = Path(__file__).resolve().parents[1]
GIB = 2**30
TASKS = ("detection", "segmentation", "captioning")
#: Of weights in 16 bit a block has 0.13 GiB; verifying holds it twice at full depth, where stages need less.
NEEDED_GIB, OF_A_BLOCK_GIB = 3.0, 0.23
SETTINGS = (
    *("visft.mode=sampled", "visft.model.precision=bf16", "scheduler.params.total_num_steps=3"),
    *("scheduler.params.warmup_num_steps=1", "visft.run.save_every=3", "visft.run.log_every=1"),
    *("visft.run.rehearsal=false", "visft.run.eval_every=0", "visft.data.workers=threads", "visft.data.num_workers=1"),
    *("visft.data.prefetch_steps=0", "visft.tasks.captioning.vocabulary.min_count=1"),
    # 1,024 pixels would take minutes a step; the published sizes of the others.
    "visft.tasks.segmentation.image.size=448",
    *(f"visft.tasks.{task}.{size}=1" for task in TASKS for size in ("micro_batch", "batch_size")),
)


def run(words: Sequence[str | Path]) -> tuple[float, float]:
    """Run a command of the project to its end. Returns (seconds, GiB at its peak); raises where it fails."""
    print("$", *words, flush=True)
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=REPOSITORY)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        own = re.search(r"^RssAnon:\s+(\d+) kB", status.read_text(encoding="utf-8"), re.M)
        peak = max(peak, int(own[1]) if own else 0)  # a process that has just ended has none
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"exit status {process.returncode}: {' '.join(map(str, words))}")
    return time.perf_counter() - began, peak / 2**20


def measure(folder: Path, depth: int) -> list[tuple[str, ...]]:
    """Rows for the commands: what, seconds, seconds of each step, GiB at the peak, GiB as planned."""
    rows = list[tuple[str, ...]]()
    coco, shards = folder / "coco", folder / "shards"
    run(["tools/make_toy_coco.py", "--out", coco, "--train", "6", "--val", "2", "--size", "640x480"])
    labels = coco / "annotations"
    build = ["tools/make_shards.py", "build", "--images", coco / "train2017", "--out", shards, "--split", "train"]
    build += ["--instances", labels / "instances_train2017.json", "--captions", labels / "captions_train2017.json"]
    run([*build, "--quiet"])
    base = folder / "stage1/export/backbone.safetensors"
    # What stage 2 recomputes is stated: a machine with more memory would do without, and take it all.
    stages = {
        1: ["visft.model.weights=null"],
        2: [f"visft.model.weights={base}", f"visft.heads.path={folder}/stage1/export", "visft.model.recompute=block"],
    }
    for stage, more in stages.items():
        settings = [*SETTINGS, f'visft.model.overrides={{"depth": {depth}}}', *more]
        out = folder / f"stage{stage}"
        words = ["launchers/train.py", "--stage", str(stage), "--model", "eva_e", "--data", shards, "--out", out]
        seconds, peak = run([*words, *(f"--set={setting}" for setting in settings)])
        planned = plan_largest(
            run_of(resolve(stage=stage, settings=settings), 1, "bf16", None, torch.device("cpu"))
        ).total
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rates = [line["images_per_second"] for line in map(json.loads, lines) if "images_per_second" in line]
        each = ", ".join(f"{1 / rate:.0f}" for rate in rates)  # a step has one image
        rows.append((f"stage {stage}", f"{seconds:.0f}", each, f"{peak:.1f}", f"{planned / GIB:.1f}"))
    merged = folder / "merged.safetensors"
    words = ["tools/merge_lora.py", "--adapter", folder / "stage2", "--base", base, "--out", merged]
    seconds, peak = run([*words, "--dtype", "fp16", "--verify"])
    rows.append((f"merge and verify ({merged.stat().st_size / 1e9:.1f} GB)", f"{seconds:.0f}", "", f"{peak:.1f}", ""))
    return rows


def main() -> None:
    """Parse, check that there is room, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.full_size", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--depth", type=int, default=64, help="number of blocks (64)")
    depth = parser.parse_args().depth
    free, needed = host_memory_available() / GIB, NEEDED_GIB + OF_A_BLOCK_GIB * depth
    if free < needed:
        parser.error(f"{free:.1f} GiB of memory are free, {needed:.1f} are needed")
    with tempfile.TemporaryDirectory(prefix="full-size-") as name:
        rows = measure(Path(name), depth)
    head = ("command", "seconds", "of each step", "GiB at the peak", "GiB as planned")
    print_plan(f"EVA-ViT-E, {depth} blocks, bf16, one image, {os.cpu_count()} cores", [Section("took", rows, head)])


if __name__ == "__main__":
    main()

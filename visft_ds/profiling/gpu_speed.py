"""Speed of a GPU: what `make gpu` measures behind its proofs, most important first; see docs/memory-and-speed.md.

Each part is a process of its own with a time limit and prints a row as soon as it has it, so a part that is cut off has
still told something. On a CPU the same parts run with the debug model: they show that the parts work, no speed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_CODE = Path(__file__).resolve().parents[2]  # where this package is imported from

Row = dict[str, Any]  #: case, value, unit, goal ("at least 0.45", "at most 1.05" or ""), verdict
COLUMNS = ("part", "case", "value", "unit", "goal", "verdict")
REACHED, MISSED, FAILED, SKIPPED = "reached", "missed", "failed", "skipped"
WIDE = {"cuda": (1036, 224), "cpu": (56,)}  #: pixels; 1,036 are 74 x 74 patches, 5,476 tokens
TASKS = ("captioning", "detection", "segmentation")


def row(case: str, value: float, unit: str, *, least: float | None = None, most: float | None = None) -> Row:
    """A measured number, with its goal where it has one."""
    goal = f"at least {least:g}" if least is not None else f"at most {most:g}" if most is not None else ""
    reached = (least is None or value >= least) and (most is None or value <= most)
    return dict(case=case, value=value, unit=unit, goal=goal, verdict=(REACHED if reached else MISSED) if goal else "")


def command(device: str, folder: Path, name: str, *words: str, gpus: int = 1) -> dict[str, Any]:
    """The record of `visft NAME --json`; an error of its own ends the part."""
    out = folder / f"{name.replace(' ', '-')}-{gpus}.json"
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    start = [sys.executable, "-m", "visft_ds"]
    if gpus > 1:
        start = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={gpus}", "--module", "visft_ds"]
    environment = os.environ | hidden | {"PYTHONPATH": str(_CODE)}
    done = subprocess.run([*start, *name.split(), *words, "--json", str(out)], env=environment, stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def step_settings(device: str) -> list[str]:
    """Stage 2 as published, without recomputation; on a CPU the debug model."""
    return ["--stage", "2", *(["--model", "eva_e", "--set", "visft.model.recompute=none"] if device == "cuda" else [
        "--model", "debug", "--set", "visft.mode=sampled"
    ])]  # fmt: skip


def wide_blocks(device: str, folder: Path, gpus: int) -> Iterator[Row]:
    """Two blocks of EVA-ViT-E's width with LoRA: beside frozen ones, of the peak, and each way to adapt them."""
    import torch

    from visft_ds.costs.flops import tower_flops, tower_from
    from visft_ds.costs.hardware import reference_rate
    from visft_ds.models.eva_vit import build_backbone
    from visft_ds.models.lora import inject_lora, lora_parameters
    from visft_ds.profiling.blocks import BACKWARD, FORWARD, SMALL, OperationOptions, measure_operations

    small: dict[str, Any] = SMALL if device == "cpu" else {}
    tower = build_backbone("eva_e", device="meta", depth=2, **small).requires_grad_(False)
    inject_lora(tower)
    rate = reference_rate(torch.device(device), "bf16").flops_per_second
    for side in WIDE[device]:
        options = OperationOptions((side,), ("bf16",), repeats=10, device=device, small=device == "cpu")
        (found,) = measure_operations(options)["results"]
        tokens, cases = found["tokens"], found["blocks"]
        of = f"at {tokens} tokens"
        yield row(f"blocks with LoRA / frozen, {of}", cases["adapted"]["ratio"]["median"], "times", most=1.05)
        shape = tower_from(tower, options, lora_parameters(tower))
        work = tower_flops(shape, 1, tokens, 0)
        seconds = cases["adapted"][FORWARD]["median"] + cases["adapted"][BACKWARD]["median"]
        share = (work.forward + work.backward) / seconds / rate
        yield row(f"blocks with LoRA, of the peak, {of}", share, "", least=0.55 if tokens > 5000 else None)
        for part in ("blocks", "projection"):
            for name, case in found[part].items():
                if name not in ("frozen", "adapted"):
                    yield row(f"{part}, {name} / frozen, {of}", case["ratio"]["median"], "times")


def kernels(device: str, folder: Path, gpus: int) -> Iterator[Row]:
    """Attention as the table has it, beside every kernel that can run; forward and backward, heads of 112."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from visft_ds.ops.attention import attention, attention_backend, use_fixed_lengths
    from visft_ds.profiling.harness import clock, in_turn, spread

    ways = ("flash", "cudnn", "efficient") if device == "cuda" else ("math",)
    place, dtype = torch.device(device), torch.bfloat16

    def timed(way: str, shape: tuple[int, ...]) -> float:
        q, k, v = (torch.randn(shape, device=place, dtype=dtype, requires_grad=True) for _ in range(3))
        began = clock(place)
        if way == "the table":
            out = attention(q, k, v)
        else:
            with sdpa_kernel(getattr(SDPBackend, way.upper() if way == "math" else f"{way.upper()}_ATTENTION")):
                out = scaled_dot_product_attention(q, k, v)
        out.backward(torch.ones_like(out))
        return clock(place) - began

    lengths = (256, 1620, 5329) if device == "cuda" else (64,)
    use_fixed_lengths(lengths)  # cuDNN is taken for named ones alone, as in a run whose images have one size
    for tokens in lengths:
        shape = (1, 16, tokens, 112)
        able = ["the table"]
        for way in ways:
            try:
                timed(way, shape)
                able.append(way)
            except RuntimeError as error:
                if not re.search("No (available kernel|viable backend)", str(error)):
                    raise
        seconds = {
            way: spread(values)["median"] for way, values in in_turn(able, partial(timed, shape=shape), 10).items()
        }
        best = min(seconds[way] for way in able[1:])
        chosen, _ = attention_backend(place, dtype, 112, tokens)
        yield row(
            f"attention, {chosen} / the fastest, {tokens} tokens", seconds["the table"] / best, "times", most=1.05
        )
        for way in able[1:]:
            yield row(f"attention, {way}, {tokens} tokens", 1e3 * seconds[way], "ms")


def full_steps(device: str, folder: Path, gpus: int) -> Iterator[Row]:
    """Stage 2 at full depth: images a second, of the peak, memory; and what the planner says of it."""
    settings = step_settings(device)
    found = command(device, folder, "profile train", *settings, "--synthetic", "--steps", "3", "--warmup", "2")
    measured = {task: found["tasks"][task]["ranks"][0] for task in TASKS}
    for task, numbers in measured.items():
        # Nothing is computed again, so that all that is computed is the model's.
        share, peak = numbers["flops"]["hardware_utilisation"], numbers["memory_bytes"]["process_peak"]
        yield row(f"{task}, stage 2", numbers["images_per_second"]["median"], "images/s")
        yield row(f"{task}, of the peak", share, "", least=0.45 if task == "captioning" else None)
        yield row(f"{task}, peak of memory", peak / 2**30, "GiB")
    if device == "cuda":
        yield from _planned(folder, settings, measured)


def _planned(folder: Path, settings: Sequence[str], measured: Mapping[str, Any]) -> Iterator[Row]:
    """Memory and time of these steps as planned, over what was measured; a row that says so where there is no plan."""
    import torch

    from visft_ds.planner.cluster import gpu_here

    gpu = gpu_here(torch.device("cuda"))
    if gpu is None:
        name = torch.cuda.get_device_name()
        yield dict(case=f"no plan: the planner knows no {name}", value=None, unit="", goal="", verdict=SKIPPED)
        return
    planned = command("cuda", folder, "plan", "--cluster", f"1x{gpu.name}", *settings, "--engine", "zero1")
    for task, plan in planned["plans"][0]["arms"][0]["streams"].items():
        peak, seconds = measured[task]["memory_bytes"]["process_peak"], measured[task]["step_seconds"]["median"]
        yield row(f"{task}, planned / measured memory", plan["memory"]["total"] / peak, "times")
        yield row(f"{task}, planned / measured time", plan["seconds"]["total"] / seconds, "times")


def trace(device: str, folder: Path, gpus: int) -> Iterator[Row]:
    """Host and GPU time of one step of each task, by torch.profiler, whose trace is kept."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from visft_ds.config import resolve
    from visft_ds.profiling.session import make_step, open_session

    words = step_settings(device)
    config = resolve(stage=2, engine="zero1", model=words[words.index("--model") + 1], settings=[
        words[place + 1] for place, word in enumerate(words) if word == "--set"
    ])  # fmt: skip
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    waits = re.compile("Synchronize|cudaMemcpy$|cudaMemcpyAsync")
    with open_session(config, synthetic=True) as session:
        for task in TASKS:
            made = session.loader_of(task).steps(0, 4)
            for _ in range(3):
                step, batches = next(made)
                make_step(session, step.step, batches)
            step, batches = next(made)
            with profile(activities=activities, acc_events=True) as profiler, record_function("the step"):
                make_step(session, step.step, batches)
                if device == "cuda":
                    torch.cuda.synchronize()
            made.close()  # type: ignore[attr-defined]
            profiler.export_chrome_trace(str(folder / f"trace-{task}.json"))
            events = profiler.events() or []
            whole = next(e for e in events if e.name == "the step" and e.device_type.name == "CPU")
            waited = sum(
                e.time_range.elapsed_us() for e in events if e.device_type.name == "CPU" and waits.search(e.name)
            )
            busy = sum(  # a range like "the step" is there on the GPU as well
                e.time_range.elapsed_us() for e in events if e.device_type.name == "CUDA" and not e.is_user_annotation
            )
            yield row(f"{task}, host works", (whole.time_range.elapsed_us() - waited) / 1e3, "ms a step")
            if device == "cuda":
                yield row(f"{task}, GPU works", busy / 1e3, "ms a step")


def peft(device: str, folder: Path, gpus: int) -> Iterator[Row]:
    """The tower's step beside timm + PEFT, as it is and compiled, in one run."""
    if lacking := [name for name in ("timm", "peft") if find_spec(name) is None]:
        yield dict(case=f"not installed: {', '.join(lacking)}", value=None, unit="", goal="", verdict=SKIPPED)
        return
    small = ["--small", "--pixels", "28", "--dtypes", "fp32", "--repeats", "2"] if device == "cpu" else ["--compile"]
    wide = [] if device == "cpu" else ["--pixels", "224", "448", "--dtypes", "bf16", "--depth", "8", "--batch", "8"]
    found = command(device, folder, "profile peft", "--device", device, *small, *wide)
    for result in found["results"]:
        for name, case in result["cases"].items():
            speed = found["options"]["batch"] / case["seconds"]["median"]
            yield row(f"tower, {name}, {result['pixels']} px", speed, "images/s")


def link(device: str, folder: Path, gpus: int) -> Iterator[Row]:
    """Several GPUs: the bandwidth of their link, and the speed of a step beside one GPU's."""
    settings = step_settings(device)
    images, steps, repeats = (8, ("3", "--warmup", "2"), "5") if device == "cuda" else (1, ("2", "--warmup", "1"), "2")
    found = command(device, folder, "profile comm", *settings, "--repeats", repeats, gpus=gpus)
    calls = [call for call in found["calls"] if not call["call"].startswith("copy")]  # in one GPU's own memory
    best = max(calls, key=lambda call: float(call["busbw"]))
    yield row(f"{gpus} GPUs, {best['call']} of {best['bytes'] / 2**20:.3g} MiB", best["busbw"] / 1e9, "GB/s of the bus")
    # The same images at once on each GPU: what more GPUs are worth.
    speeds = []
    for count in (1, gpus):
        batches = [f"--set=visft.tasks.{task}.batch_size={images * count}" for task in TASKS]
        batches += [f"--set=visft.tasks.{task}.micro_batch=1" for task in TASKS]
        words = (*settings, *batches, "--synthetic", "--steps", *steps)
        tasks = command(device, folder, "profile train", *words, gpus=count)["tasks"]
        slowest = {task: of["ranks"][of["slowest_rank"]] for task, of in tasks.items()}
        speeds.append({task: of["images_per_second"]["median"] for task, of in slowest.items()})
    for task in TASKS:
        yield row(f"{task}, {gpus} GPUs / one", speeds[1][task] / speeds[0][task], "times")


#: Part -> (what measures it, seconds on a GPU). Eight minutes with the proofs before them.
PARTS: dict[str, tuple[Callable[[str, Path, int], Iterator[Row]], float]] = {
    "width": (wide_blocks, 60),
    "speed": (full_steps, 150),
    "trace": (trace, 90),
    "kernels": (kernels, 30),
    "peft": (peft, 90),
    "link": (link, 240),
}


def run_part(part: str, device: str, folder: Path, gpus: int, limit: float) -> list[Row]:
    """The rows of a part, as far as it came within its limit, and one that says why no more came."""
    log = folder / f"speed-{part}.log"
    words = [sys.executable, "-m", "visft_ds.profiling.gpu_speed", part, device, str(folder), str(gpus)]
    with log.open("w") as out:
        process = subprocess.Popen(words, cwd=_CODE, stdout=out, stderr=out, start_new_session=True)
    ended: int | None = None
    try:
        with suppress(subprocess.TimeoutExpired):
            ended = process.wait(limit)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        process.wait()
    said = log.read_text(errors="replace")
    rows: list[Row] = [json.loads(line) for line in re.findall(r'^{"case".*', said, re.MULTILINE)]
    if ended != 0:
        last = (re.findall(r"^(?![{\s]).*\S", said, re.MULTILINE) or [""])[-1]
        why = f"cut off after {limit:.0f} s" if ended is None else f"exit code {ended}: {last[:300]}"
        rows.append(dict(case=why, value=None, unit="", goal="", verdict=FAILED))
    return [{"part": part} | one for one in rows]


def main(arguments: Sequence[str]) -> None:
    """Run one part in this process; its rows go to standard output."""
    parser = argparse.ArgumentParser(description="One part of the speed of `make gpu`.")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("device")
    parser.add_argument("folder", type=Path)
    parser.add_argument("gpus", type=int)
    given = parser.parse_args(arguments)
    for found in PARTS[given.part][0](given.device, given.folder, given.gpus):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

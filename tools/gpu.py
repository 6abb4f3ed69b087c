import sys, os.path as o; sys.path[:] = [o.dirname(o.dirname(o.realpath(__file__)))] + [p for p in sys.path if o.realpath(p) != o.dirname(o.realpath(__file__))]  # noqa: E401, E501, E702, I001  # fmt: skip
"""Does a GPU compute what a CPU computes? Kernels, attention, whole steps, engines, checkpoints, in five minutes.

    python tools/gpu.py --out gpu.json
    python tools/gpu.py --device cpu --parts ops attention lora

Errors are relative, those of tensors by Frobenius norms. Exit status: 0 all passed, or skipped for a reason; 1 a case
failed; 2 wrong usage.
"""

import argparse
import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from visft_ds.costs.hardware import DTYPES
from visft_ds.models.compiled import check_compiler, compile_blocks
from visft_ds.models.eva_vit import build_backbone
from visft_ds.models.lora import inject_lora, lora_parameters
from visft_ds.monitor.console import Section, print_plan
from visft_ds.ops import KERNELS, use_kernels
from visft_ds.ops import attention as table
from visft_ds.ops.dora import dora_linear
from visft_ds.ops.gelu import STEPS, gelu
from visft_ds.ops.lora import BACKENDS, lora_linear
from visft_ds.ops.norm import layer_norm
from visft_ds.prepare.materialize import is_small
from visft_ds.profiling.record import circumstances
from visft_ds.shards.build import Options, build
from visft_ds.toy.annotations import write_toy_coco

Values = Sequence[dict[str, Any]]  #: numbers, tensors and lists of tensors under the first bound, and under the second
Cases = Iterator[tuple[str, Callable[[], Values], Callable[[], Values], Sequence[float]]]  #: name, found, exact, bounds
Kernel = Callable[..., Tensor]

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
COLUMNS = ("part", "case", "error", "bound", "seconds", "device", "verdict", "reason")
#: What an error says that tells of no mistake, but of what cannot be had here.
UNAVAILABLE = (
    "cannot run here|No available kernel|No viable backend|from the 'CPU' backend|'flash_attn'|model.compile ="
)
#: One operation against float64 on the same inputs. fp32: sums of up to 5,000 terms; TF32 makes 3e-4. 16 bit: factors
#: and result are rounded once or twice, by 3e-4 and 2e-3 in the mean. A scale off by 3 % is far above all three.
BOUND = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
CODED = 0.5 / STEPS / 0.7  #: more for gradients: half a step of an 8-bit slope beside slopes of 0.7 in the mean square
SCORES = 4  #: times as much for plain products in 16 bit: they round every score, and a share is off by as much
#: Losses and gradients of a step against fp32 on a CPU, where only the order of sums differs in fp32; TF32 in one
#: convolution makes 3e-4. A CPU makes 8e-4 and 6e-3 in bf16, 1e-5 and 5e-4 in fp16.
STEP = {"fp32": (1e-5, 1e-4), "bf16": (4e-3, 2e-2), "fp16": (2e-4, 3e-3)}
#: Times as much for gradients of segmentation in 16 bit (a CPU makes 4e-2 and 6e-3): its attention is cut off where a
#: predicted mask crosses zero, and rounding moves that line.
MASKED = 5
#: Losses and norms of a run against a CPU's: first step, later ones, where Adam has made steps of full size out of the
#: rounding of gradients next to zero. A CPU makes 4e-3, 6e-3 in bf16. Without an update the loss is off by 5 to 15 %.
RUN = {"fp32": (1e-4, 1e-2), "bf16": (2e-2, 3e-2), "fp16": (2e-2, 3e-2)}
ENGINE = (1e-5, 1e-3)  #: two engines on one device, where only atomic sums differ; between CPUs it is 1e-6
WIDE = (2e-2, 3e-2)  #: features and gradients of four wide blocks in bf16; a CPU makes 6e-3 and 1e-2
#: The gradients of each task: of its head, and of the adapters, which all tasks train.
TASKS = {
    "detection": "heads.detection",
    "segmentation": "heads.segmentation|.*lora_B",
    "captioning": "heads.captioning",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print their table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/gpu.py", description="Compare what a GPU computes with a CPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is examined (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows there as JSON")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=5.0, metavar="N", help="for all parts (%(default)s)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # folder, number of the first case, seconds
    options = parser.parse_args(arguments)
    if options.child:
        return run_cases(options.parts[0], torch.device(options.device), *options.child)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no GPU here; use --device cpu, or see tools/doctor.py", file=sys.stderr)
        return 2
    load, rows, end = os.getloadavg(), [], time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="visft-gpu-") as name:
        write_toy_coco(coco := Path(name, "coco"), train=24, val=0, height=96, width=128)
        labels = (coco / "annotations" / f"{kind}_train2017.json" for kind in ("instances", "captions"))
        build(Options(coco / "train2017", *labels, Path(name, "shards"), "train"))
        for part in options.parts:
            limit = min(PARTS[part][1] * 60 * options.minutes, end - time.monotonic())
            rows += run_part(part, options.device, Path(name), limit)
    if options.out:
        record = {"format": "visft_ds gpu", "version": 1, **circumstances(load, torch.device(options.device))}
        options.out.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    verdicts = [row["verdict"] for row in rows]
    cells = [["" if v is None else f"{v:.2g}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    title = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (FAILED, PASSED, SKIPPED))
    print_plan(title, [Section("cases", cells, COLUMNS)])
    return int(FAILED in verdicts)


def run_part(part: str, device: str, folder: Path, limit: float) -> list[dict[str, Any]]:
    """The rows of a part. A case that ends its process has failed, and another process goes on behind it."""
    names = [name for name, *_ in PARTS[part][0](torch.device(device), folder)]
    interpreted = {"TRITON_INTERPRET": "1"} if device == "cpu" and part in ("ops", "lora") else {}
    rows: list[dict[str, Any]] = []
    end = time.monotonic() + limit
    while len(rows) < len(names):
        command = [
            sys.executable,
            __file__,
            "--device",
            device,
            "--parts",
            part,
            "--child",
            str(folder),
            str(len(rows)),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        command.append(str(max(end - time.monotonic(), 1e-3)))
        process = subprocess.Popen(command, env=os.environ | interpreted, **pipes)
        try:
            out, log = process.communicate()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        rows += [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        if len(rows) < len(names):
            said = re.findall(r"^(?!Thread|Current)\S.*", log, re.MULTILINE)
            rows.append({"verdict": FAILED, "reason": f"exit code {process.returncode}: {said[-1] if said else ''}"})
        if time.monotonic() > end:
            break
    known = dict.fromkeys(COLUMNS) | {"part": part, "device": device}
    return [known | {"case": name} | row for name, row in zip(names, rows, strict=False)]


def run_cases(part: str, device: torch.device, folder: str, first: str, seconds: str) -> int:
    """The process of a part, which goes on at a case, prints rows, and ends itself when its time is over."""
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    for _, find, compute, bounds in islice(PARTS[part][0](device, Path(folder)), int(first), None):
        began = time.perf_counter()
        try:
            found, exact = find(), compute()
            errors = [(_error(f[k], e[k]), b, k) for f, e, b in zip(found, exact, bounds, strict=True) for k in e]
            error, bound, worst = max(errors, key=lambda one: one[0] / one[1])
            row = {"error": error, "bound": bound, "reason": f"worst: {worst}"}
            row["verdict"] = PASSED if error <= bound else FAILED
        except (ValueError, RuntimeError, ModuleNotFoundError) as error:
            if not re.search(UNAVAILABLE, str(error)):
                raise
            row = {"verdict": SKIPPED, "reason": str(error).splitlines()[0]}
        print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 3)}), flush=True)
    return 0


def _error(found: Any, exact: Any) -> float:
    """Of tensors as one vector, wherever they are; nothing is worse than what is no number."""
    lists = [part if isinstance(part, list) else [part] for part in (found, exact)]
    one, other = (torch.cat([torch.as_tensor(t).detach().double().cpu().flatten() for t in part]) for part in lists)
    error = float((one - other).norm() / other.norm())
    return error if error == error else float("inf")


def against(
    name: str, kernel: Kernel, exact: Kernel, draw: Callable[[], Any], more: float = 0, **bounds: float
) -> Cases:
    """Result and gradients of all inputs against those in float64 of the same numbers, in each dtype."""

    def run(function: Kernel, rounded: torch.dtype, used: torch.dtype) -> Values:
        torch.manual_seed(0)
        # Copies: a GELU writes over its input and over the gradient of its result.
        leaves = [tensor.to(rounded).to(used, copy=True).requires_grad_() for tensor in draw()]
        out = function(*(leaf * 1 for leaf in leaves))
        up = torch.randn(out.shape, device=out.device).to(rounded).to(used)
        gradients = torch.autograd.grad(out, leaves, up)
        return {"result": out}, {f"gradient {at}": gradient for at, gradient in enumerate(gradients, 1)}

    for name_of, bound in (bounds or BOUND).items():
        dtype = DTYPES[name_of]
        ways = partial(run, kernel, dtype, dtype), partial(run, exact, dtype, torch.float64)
        yield f"{name}, {name_of}", *ways, (bound, bound + more)


def ops(device: torch.device, folder: Path) -> Cases:
    """GELU and norm, each by the library and by Triton."""
    rows, width = (1030, 1792) if device.type == "cuda" else (7, 100)
    scale = torch.linspace(0.5, 1.5, width)

    def norm(x: Tensor, branch: Tensor) -> Tensor:
        return layer_norm(branch, scale.to(device), scale.to(device) - 1, 1e-6, x)

    def exact_norm(x: Tensor, branch: Tensor) -> Tensor:
        return x + F.layer_norm(branch, (width,), scale.to(x), scale.to(x) - 1, 1e-6)

    def by(kernels: str, function: Kernel, *inputs: Tensor) -> Tensor:
        use_kernels(kernels, device)
        return function(*inputs)

    def draw(*means: float) -> list[Tensor]:
        return [mean + 2 * torch.randn(rows, width, device=device) for mean in means]

    for kernels in KERNELS:
        coded = partial(by, kernels, partial(gelu, coded=True))
        yield from against(f"gelu, {kernels}", partial(by, kernels, gelu), F.gelu, partial(draw, 0))
        yield from against(f"gelu in 8 bits, {kernels}", coded, F.gelu, partial(draw, 0), CODED)
        yield from against(f"norm, added, {kernels}", partial(by, kernels, norm), exact_norm, partial(draw, 0, 3))


def attention(device: torch.device, folder: Path) -> Cases:
    """What the table takes, and each kernel by itself, padded and packed, against plain products."""
    on_gpu = device.type == "cuda"
    long = 1030 if on_gpu else 33  # ragged tiles; cuDNN is taken from 1,025 tokens on

    def padded(kernel: Kernel, *qkv: Tensor) -> Tensor:
        return kernel(*(t.unflatten(0, (2, -1)).transpose(1, 2) for t in qkv)).transpose(1, 2).flatten(0, 1)

    def fused(name: str, *qkv: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.__members__[f"{name.upper()}_ATTENTION"]):  # and no other
            return F.scaled_dot_product_attention(*qkv)

    def packed(kernel: Kernel, *qkv: Tensor) -> Tensor:
        return kernel(*qkv, table.Packing.of((long, len(qkv[0]) - long), device))

    def exactly(*qkv: Tensor) -> Tensor:
        images = zip(*(t.transpose(0, 1).split([long, len(t) - long], dim=1) for t in qkv), strict=True)
        parts = [(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v for q, k, v in images]
        return torch.cat(parts, dim=1).transpose(0, 1)

    def draw(tokens: int, dim: int) -> tuple[Tensor, ...]:
        # Numbers so large that shares are uneven: with even ones a wrong scale would not show.
        return (torch.randn(tokens, 3, 4, dim, device=device) * 1.5).unbind(1)

    kernels = {"the table": table.attention, "reference": table.attention_reference}
    kernels |= {name: partial(fused, name) for name in ("flash", "cudnn", "efficient")}
    ways = {name: (partial(padded, kernel), 2 * long) for name, kernel in kernels.items()}
    for name, kernel in {"the table": table.attention_packed, **table.PACKED}.items():
        ways[f"packed, {name}"] = partial(packed, kernel), 2 * long - 5
    for dim, (name, (way, tokens)) in product((112, 88, 64), ways.items()):
        plain = 1 if on_gpu and name != "reference" else SCORES
        bounds = {dtype: bound * plain for dtype, bound in BOUND.items() if dtype != "fp32"}
        if not re.search("flash|cudnn|varlen", name):
            bounds["fp32"] = BOUND["fp32"]
        yield from against(f"{name}, heads of {dim}", way, exactly, partial(draw, tokens, dim), **bounds)


def lora(device: torch.device, folder: Path) -> Cases:
    """Each backend of the adapted projection against the eager one."""
    rows, width, rank = (1030, 1792, 64) if device.type == "cuda" else (9, 32, 8)
    slices, lengths = ((0, width), (2 * width, 3 * width)), torch.linspace(0.5, 1.5, 2 * width)  # of DoRA's rows

    def project(backend: str, *inputs: Tensor) -> Tensor:
        if backend == "DoRA":
            return dora_linear(*inputs, lengths.to(inputs[0]), 0.5, slices)
        return lora_linear(*inputs, 0.5, slices, backend=backend)

    def draw() -> list[Tensor]:  # x, weight, bias, A and B
        sizes = {(2, rows, width): 1, (3 * width, width): width, (3 * width,): 1, (2 * rank, width): width}
        sizes[2 * width, rank] = rank
        return [torch.randn(size, device=device) * fan_in**-0.5 for size, fan_in in sizes.items()]

    for backend in (*BACKENDS, "DoRA"):
        exact = partial(project, "DoRA" if backend == "DoRA" else "eager")
        yield from against(backend, partial(project, backend), exact, draw)


def train(folder: Path, kind: str, engine: str = "zero1", precision: str = "fp32", out: str = "") -> Path:
    """The folder of six steps of launchers/train.py in one process; a run that has ended is not made again."""
    place = folder / (out or f"{kind}-{engine}-{precision}")
    if not (place / "export" / "adapter").exists():
        # Adapters and heads train. No dropout: other devices draw other numbers.
        given = ["model.precision=" + precision, "heads.path=null", "heads.start=random", "run.save_every=1"]
        given += [f"tasks.{task}.{size}" for task in TASKS for size in ("batch_size=4", "micro_batch=2")]
        given += [
            'param_groups=[{"name": "lora", "params": "backbone.*.lora_*"}, {"name": "heads", "params": "heads.*"}]'
        ]
        given += ["run.keep_last=6", "tasks.captioning.head.dropout=0.0"]
        command = [sys.executable, str(Path(__file__).parents[1] / "launchers" / "train.py"), "--engine", engine]
        command += ["--stage=2", "--model=debug", f"--data={folder / 'shards'}", f"--out={place}"]
        command += ["--set=scheduler.params.total_num_steps=6", "--set=scheduler.params.warmup_num_steps=2"]
        # Where DeepSpeed would see a GPU, it has to be hidden.
        hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if kind == "cpu" else {}
        command += [f"--set=visft.{setting}" for setting in given]
        done = subprocess.run(command, env=os.environ | hidden, capture_output=True, text=True)
        if done.returncode:
            said = " ".join((done.stdout + done.stderr).split())[-300:]
            raise RuntimeError(f"launchers/train.py --engine {engine} ended with {done.returncode}: {said}")
    return place


def told(folder: Path, run: Sequence[str], others: Sequence[Sequence[str]], task: str = "", saved: int = 0) -> Values:
    """Losses and norms of gradients of the first step and of later ones; of a task its losses and gradients at first.

    Args:
        others: runs that are made beside this one if they are not there yet: most of one is its start.
        saved: steps that were made before this run.
    """
    with ThreadPoolExecutor(4) as pool:
        runs = {one: pool.submit(train, folder, *one) for one in dict.fromkeys((run, *others))}
    place = runs[run].result()
    lines = map(json.loads, (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = {line["step"]: line for line in lines if "loss/loss" in line}
    if not task:
        names = ("loss/loss", "gradient_norm")
        parts = ([saved + 1], range(saved + 2, 7))
        return [{f"{name} of step {step}": steps[step][name] for step in part for name in names} for part in parts]
    moments = load_file(place / "checkpoints" / "step_00000001" / "moments.safetensors")  # a tenth of the gradients
    gradients = [moments[name] for name in sorted(moments) if re.match(f"exp_avg/({TASKS[task]})", name)]
    # Without shares of right answers, which leap.
    return {k: v for k, v in steps[1].items() if re.match(f"loss/{task}(?!.*(error|accuracy))", k)}, {
        "gradients": gradients
    }


def steps(device: torch.device, folder: Path) -> Cases:
    """A step of each task, and six of all, in each precision against fp32 on a CPU."""
    exact, *runs = ("cpu", "zero1", "fp32"), *((device.type, "zero1", precision) for precision in DTYPES)
    for run, (precision, bounds) in zip(runs, STEP.items(), strict=True):
        for task in TASKS:
            masked = MASKED if task == "segmentation" and precision != "fp32" else 1
            both = (partial(told, folder, one, runs, task) for one in (run, exact))
            yield f"{task}, {precision}", *both, (bounds[0], bounds[1] * masked)
        yield f"six steps, {precision}", *(partial(told, folder, one, runs) for one in (run, exact)), RUN[precision]


def engines(device: torch.device, folder: Path) -> Cases:
    """Six steps under each engine against ZeRO 1."""
    runs = [(device.type, engine, "fp32") for engine in ("zero1", "zero0", "zero2", "zero3", "zero3_offload")]
    for run in runs[1:]:
        yield run[1], *(partial(told, folder, one, runs) for one in (run, runs[0])), ENGINE


def checkpoint(device: torch.device, folder: Path) -> Cases:
    """A run of six steps, taken over by a CPU behind the second and by the device again behind the fourth."""
    whole = (device.type, "zero1", "fp32")

    def take_over(source: str, saved: int, out: str, kind: str) -> Values:
        later = [f"step_{step:08d}" for step in range(saved + 1, 7)]
        shutil.copytree(
            train(folder, *whole, out=source), folder / out, ignore=shutil.ignore_patterns("export", "*.lock", *later)
        )
        return told(folder, (kind, "zero1", "fp32", out), [], saved=saved)

    for name, *arguments in ("resumed on a CPU", "", 2, "there", "cpu"), ("and back", "there", 4, "back", device.type):
        yield name, partial(take_over, *arguments), partial(told, folder, whole, [], saved=arguments[1]), RUN["fp32"]


def backbone(device: torch.device, folder: Path) -> Cases:
    """Compiled blocks and CUDA graphs against eager ones; four blocks of EVA-ViT-E in bf16 against fp32."""

    def run(preset: str, how: str, dtype: str, images: Sequence[int], **sizes: Any) -> Values:
        check_compiler(how, device)
        tower = build_backbone(preset, device=device, dtype=DTYPES[dtype], **sizes).requires_grad_(False).train()
        inject_lora(tower)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in tower.named_parameters():
            if is_small(name, parameter.shape) or parameter.requires_grad:
                parameter.data = parameter.data.float()
            if name.endswith("lora_B"):  # where it is zero, a wrong gradient of A would not show
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        compile_blocks(tower, how)
        pixels = torch.randn(*images, generator=generator).to(device)
        for _ in range(1 if how == "none" else 6):  # a graph is recorded when a shape comes for the third time
            with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
                out = tower(pixels)
            up = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
            gradients = torch.autograd.grad(out, [*lora_parameters(tower).values()], up)
        return {"features": out}, {"gradients": [*gradients]}

    for how, dtype in product(("blocks", "cuda_graphs"), ("fp32", "bf16")):
        both = (partial(run, "debug", way, dtype, (2, 3, 112, 112), width=128, num_heads=4) for way in (how, "none"))
        yield f"{how}, {dtype}", *both, (BOUND[dtype], BOUND[dtype])
    for side in (224, 448) if device.type == "cuda" else (112,):
        both = (partial(run, "eva_e", "none", dtype, (1, 3, side, side), depth=4) for dtype in ("bf16", "fp32"))
        yield f"EVA-ViT-E's width, {side} px", *both, WIDE


#: Part -> its cases, and the share of the time after which it ends: few need theirs, and a hang leaves some to others.
PARTS: dict[str, tuple[Callable[[torch.device, Path], Cases], float]] = {
    **{"ops": (ops, 0.2), "attention": (attention, 0.2), "lora": (lora, 0.2), "steps": (steps, 0.4)},
    **{"engines": (engines, 0.5), "checkpoint": (checkpoint, 0.3), "backbone": (backbone, 0.4)},
}

if __name__ == "__main__":
    sys.exit(main())

"""Does a GPU compute what a CPU computes? Errors are relative.

Exit status: 0 fine, 1 a case failed, 2 wrong usage.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent  # leaves the path: its profile.py would hide the standard library's
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path).resolve() != HERE)]
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
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice, product
from typing import Any

PART_NAMES = ("attention", "lora", "steps", "checkpoint", "blocks", "ranks")


def build_flags() -> argparse.ArgumentParser:
    """The parser."""
    parser = argparse.ArgumentParser(prog="tools/gpu.py", description="Compare what a GPU computes with a CPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is examined (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows there as JSON")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="also: are N of them equal (1)")
    parser.add_argument(
        "--parts", nargs="+", choices=PART_NAMES, default=PART_NAMES, metavar="PART", help=", ".join(PART_NAMES)
    )
    return parser


if __name__ == "__main__" and "--child" not in sys.argv[1:2]:
    build_flags().parse_args()  # help and wrong usage end before torch is imported

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from visft_ds.models import eva_vit
from visft_ds.models.lora import inject_lora, lora_parameters
from visft_ds.monitor.console import Section, print_plan
from visft_ds.ops import DTYPES, attention, lora
from visft_ds.shards.build import Options, build
from visft_ds.toy.coco import write_toy_coco

Values = Sequence[dict[str, Sequence[Any]]]  #: tensors and numbers under the first bound, and under the second
Cases = Iterator[tuple[str, Callable[[], Values], Callable[[], Values], Sequence[float]]]  #: name, found, exact, bounds
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
COLUMNS = ("part", "case", "error", "bound", "seconds", "device", "verdict", "reason")
UNAVAILABLE = "cannot run here|No (available kernel|viable backend)|from the 'CPU' backend|'flash_attn'|model.compile ="
#: One operation against float64 on the same inputs. fp32: sums of up to 5,000 terms; TF32 makes 3e-4. 16 bit: factors
#: and result are rounded once or twice, by 3e-4 and 2e-3 in the mean. A scale off by 3 % is far above all three.
BOUND = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
SCORES = 4  #: times as much for 16 bit on a CPU, which rounds every score, and a share is off by as much
#: Losses and gradients of a step against fp32 on a CPU: in fp32 only the order of sums differs (TF32 in one convolution
#: makes 3e-4), a CPU itself makes 8e-4 and 6e-3 in bf16, 1e-5 and 5e-4 in fp16.
STEP = {"fp32": (1e-5, 1e-4), "bf16": (4e-3, 2e-2), "fp16": (2e-4, 3e-3)}
MASKED = 5  #: times as much with masks in 16 bit: rounding moves their borders; a CPU makes 2e-4, 2e-2 and 1e-4, 5e-3
#: Losses and norms of six steps, of which Adam makes some of full size out of the rounding of gradients next to zero. A
#: CPU makes 2e-3, 4e-2 in bf16 and 6e-4, 3e-3 in fp16. Without one of the updates the loss is off by 1.5 to 7 %.
RUN = {"fp32": (1e-3, 1e-2), "bf16": (1e-2, 1e-1), "fp16": (5e-3, 3e-2)}
#: Starts the same on several.
RUNNER = "-m deepspeed.launcher.runner --num_gpus={}"
ENGINE = (1e-3, 1e-3)  #: two engines on one device, where only atomic sums differ; between CPUs it is 1e-7
WIDE = (2e-2, 3e-2)  #: features and gradients of four wide blocks in bf16; a CPU makes 6e-3 and 1e-2
FUSED = {name: getattr(SDPBackend, f"{name.upper()}_ATTENTION") for name in ("flash", "cudnn", "efficient")}
TASKS = ("detection", "segmentation", "captioning", "loss")  #: and the sum of their losses, from which adapters learn
#: The debug model: all tasks train adapters and heads in every step. No dropout: other devices draw other numbers.
SETTINGS = [
    *("scheduler.params.total_num_steps=6", "scheduler.params.warmup_num_steps=2", "visft.heads.path=null"),
    *("visft.run.save_every=1", "visft.run.keep_last=6", "visft.heads.start=random", "visft.mode=shared"),
    *("visft.shared.batch_size=4", "visft.shared.micro_batch=2", "visft.tasks.captioning.head.dropout=0.0"),
    'visft.param_groups=[{"name": "lora", "params": "backbone.*.lora_*"}, {"name": "heads", "params": "heads.*"}]',
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print their table; returns the exit status."""
    parser = build_flags()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; use --device cpu, or run visft doctor")
    limit = 180 if options.device == "cuda" else 1800  # seconds of a part
    with tempfile.TemporaryDirectory(prefix="visft-gpu-") as name:
        write_toy_coco(coco := Path(name, "coco"), train=24, val=0, height=96, width=128)
        labels = (coco / "annotations" / f"{kind}_train2017.json" for kind in ("instances", "captions"))
        build(Options(coco / "train2017", *labels, Path(name, "shards"), "train"))
        proofs = [part for part in PARTS if part in options.parts and (part != "ranks" or options.gpus > 1)]
        rows = [r for part in proofs for r in run_part(part, options.device, Path(name), limit, options.gpus)]
    if options.out:
        options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    verdicts = [row["verdict"] for row in rows]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (FAILED, PASSED, SKIPPED))
    print_plan(f"{options.device}: {counts}", [Section("is it right?", _cells(rows, 2), COLUMNS)])
    return int(FAILED in verdicts)


def _cells(rows: Sequence[dict[str, Any]], digits: int) -> list[list[str]]:
    """Values of rows for a table."""
    return [
        ["" if v is None else f"{v:.{digits}g}" if isinstance(v, float) else str(v) for v in row.values()]
        for row in rows
    ]


def run_part(part: str, device: str, folder: Path, limit: float, gpus: int = 1) -> list[dict[str, Any]]:
    """The rows of a part. A case that ends its process has failed, and another process goes on behind it."""
    environment = os.environ | {"VISFT_GPUS": str(gpus)}
    os.environ.update(environment)  # the cases of a part are named here, and made there
    names = [name for name, *_ in PARTS[part](torch.device(device), folder)]
    environment |= {"TRITON_INTERPRET": "1"} if device == "cpu" and part == "lora" else {}
    rows, log, end = [], folder / f"{part}.log", time.monotonic() + limit
    while len(rows) < len(names) and (left := end - time.monotonic()) > 0:
        state = map(str, (folder, len(rows), left))
        command = [sys.executable, __file__, "--child", part, device, *state]
        with log.open("w") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
        said = log.read_text(errors="replace")
        rows += map(json.loads, re.findall(r'^{"(?:error|verdict)".*', said, re.MULTILINE))
        if len(rows) < len(names):
            last = (re.findall(r"^(?!{|Thread|Current)\S.*", said, re.MULTILINE) or [""])[-1]
            rows.append({"verdict": FAILED, "reason": f"exit code {process.returncode}: {last[:300]}"})
    known = dict.fromkeys(COLUMNS) | {"part": part, "device": device}
    return [known | {"case": names[number]} | row for number, row in enumerate(rows)]


def run_cases(part: str, device: str, folder: str, first: str, seconds: str) -> None:
    """The process of a part, which goes on at a case, prints rows, and ends itself when its time is over."""
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    for _, find, compute, bounds in islice(PARTS[part](torch.device(device), Path(folder)), int(first), None):
        began = time.perf_counter()
        try:
            exact, found = compute(), find()
            errors = [(measure(f[k], e[k]), b, k) for f, e, b in zip(found, exact, bounds, strict=True) for k in e]
            error, bound, worst = max(errors, key=lambda one: one[0] / one[1])
            row = dict(error=error, bound=bound, verdict=PASSED if error <= bound else FAILED, reason=f"worst: {worst}")
        except (ValueError, RuntimeError, ModuleNotFoundError) as error:
            if not re.search(UNAVAILABLE, str(error)):
                raise  # others only say what cannot be had here
            row = {"verdict": SKIPPED, "reason": str(error).splitlines()[0]}
        print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 3)}), flush=True)


def measure(found: Sequence[Any], exact: Sequence[Any]) -> float:
    """The error of tensors as one vector, wherever they are; nothing is worse than what is no number."""
    one, other = (torch.cat([torch.as_tensor(t).detach().cpu().double().ravel() for t in p]) for p in (found, exact))
    return float(((one - other).norm() / other.norm()).nan_to_num(nan=torch.inf))


def against(name: str, device: torch.device, kernel: Callable, exact: Callable, inputs: Any, **more: Any) -> Cases:
    """Result and gradients of random inputs (deviation, mean, size) against float64 on the same numbers, by dtype."""

    def run(function: Callable, rounded: torch.dtype, used: torch.dtype) -> Values:
        torch.manual_seed(0)
        drawn = [mean + deviation * torch.randn(size, device=device) for deviation, mean, *size in inputs]
        leaves = [tensor.to(rounded).to(used, copy=True).requires_grad_() for tensor in drawn]
        out = function(*(leaf * 1 for leaf in leaves))
        gradients = torch.autograd.grad(out, leaves, torch.randn(out.shape, device=device).to(rounded).to(used))
        return {"result": [out]}, {f"gradient {at}": [gradient] for at, gradient in enumerate(gradients, 1)}

    for dtype, bound in more.get("bounds", BOUND).items():
        ways = (kernel, DTYPES[dtype]), (exact, torch.float64)
        found, wanted = (partial(run, function, DTYPES[dtype], used) for function, used in ways)
        yield f"{name}, {dtype}", found, wanted, (bound, bound)


def attend(device: torch.device, folder: Path) -> Cases:
    """What torch takes, and each kernel by itself, padded and packed, against plain products."""
    long = 1030 if device.type == "cuda" else 33  # ragged tiles
    ways = ("chosen", *FUSED, "packed")

    def compute(name: str, *qkv: Tensor) -> Tensor:
        if name == "packed":
            return attention.attention_packed(*qkv, attention.Packing.of((long, len(qkv[0]) - long), device))
        with sdpa_kernel(FUSED[name]) if name in FUSED else nullcontext():  # by this kernel and no other
            out = attention.attention(*(tensor.unflatten(0, (2, -1)).transpose(1, 2) for tensor in qkv))
        return out.transpose(1, 2).flatten(0, 1)

    def exactly(*qkv: Tensor) -> Tensor:
        images = zip(*(t.transpose(0, 1).split([long, len(t) - long], dim=1) for t in qkv), strict=True)
        parts = [(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v for q, k, v in images]
        return torch.cat(parts, dim=1).transpose(0, 1)

    for dim, name in product((112, 88, 64), ways):
        dtypes = ("bf16", "fp16") if name in ("flash", "cudnn") else BOUND
        # Kernels of CPUs round the shares to 16 bit.
        bounds = {d: BOUND[d] * (SCORES if device.type == "cpu" and d != "fp32" else 1) for d in dtypes}
        inputs = [(1.5, 0, 2 * long - 5 * (name == "packed"), 4, dim)] * 3  # with even shares a wrong scale would hide
        yield from against(f"{name}, heads of {dim}", device, partial(compute, name), exactly, inputs, bounds=bounds)


def adapt(device: torch.device, folder: Path) -> Cases:
    """Each backend of the adapted projection against the eager one."""
    rows, width, rank = (1030, 1792, 64) if device.type == "cuda" else (9, 32, 8)
    slices = (0, width), (2 * width, 3 * width)
    inputs = [(1, 0, 2, rows, width), (width**-0.5, 0, 3 * width, width), (1, 0, 3 * width)]  # x, weight, bias, A, B
    inputs += [(width**-0.5, 0, 2 * rank, width), (rank**-0.5, 0, 2 * width, rank)]

    def project(backend: str, *given: Tensor) -> Tensor:
        return lora.lora_linear(*given, 0.5, slices, backend=backend)

    for backend in lora.BACKENDS:
        exact = partial(project, "eager")
        # On a GPU, Triton's tiles are for 16 bit.
        dtypes = ("bf16", "fp16") if backend == "triton" and device.type == "cuda" else BOUND
        bounds = {dtype: BOUND[dtype] for dtype in dtypes}
        yield from against(backend, device, partial(project, backend), exact, inputs, bounds=bounds)


def train(folder: Path, kind: str, engine: str = "zero1", precision: str = "fp32", out: str = "", **more: Any) -> Path:
    """The folder of six steps of launchers/train.py in one process; a run that has ended is not made again."""
    place = folder / (out or f"{kind}-{engine}-{precision}")
    if "source" in more:  # goes on behind a checkpoint of another run
        later = (f"step_{step:08d}" for step in range(more["saved"] + 1, 7))
        shutil.copytree(folder / more["source"], place, ignore=shutil.ignore_patterns("export", "*.lock", *later))
    if not (place / "export" / "adapter").exists():
        command = [sys.executable, *(RUNNER.format(more["ranks"]).split() if "ranks" in more else ())]
        command += [str(HERE.parent / "launchers" / "train.py"), "--engine", engine]
        command += ["--stage=2", "--model=debug", f"--data={folder / 'shards'}", f"--out={place}"]
        command += [f"--set={setting}" for setting in (*SETTINGS, f"visft.model.precision={precision}")]
        hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if kind == "cpu" else {}  # from DeepSpeed
        if code := subprocess.run(command, env=os.environ | hidden, stdout=sys.stderr).returncode:
            sys.exit(code)  # it has said why
    return place


def told(*run: Any, task: str = "", saved: int = 0, **more: str) -> Values:
    """Losses, and norms of gradients, of the steps behind a saved one; or loss and gradients of a task in the first."""
    place = train(*run, saved=saved, **more)
    lines = map(json.loads, (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = {line["step"]: line for line in lines if "loss/loss" in line}
    if not task:
        names, numbers = ("loss/loss", "grad_norm"), range(saved + 1, 7)
        return [{f"{name} of step {step}": [steps[step][name]] for step in numbers} for name in names]
    moments = load_file(place / "checkpoints" / "step_00000001" / "moments.safetensors")  # a tenth of the gradients
    part = ".*lora_B" if task == "loss" else f"heads.{task}"  # those of A are 0
    gradients = [moments[name] for name in sorted(moments) if re.match(f"exp_avg/{part}", name)]
    return {"loss": [steps[1][f"loss/{task}"]]}, {"gradients": gradients}


def steps(device: torch.device, folder: Path) -> Cases:
    """In each precision one step by task and six, against fp32 on a CPU; six under each engine, against ZeRO 1."""
    for precision, bounds in STEP.items():
        both = partial(told, folder, device.type, "zero1", precision), partial(told, folder, "cpu")
        for task in TASKS:
            times = MASKED if task in ("segmentation", "loss") and precision != "fp32" else 1
            found, exact = (partial(one, task=task) for one in both)
            yield f"{task}, {precision}", found, exact, [times * bound for bound in bounds]
        yield f"six steps, {precision}", *both, RUN[precision]
    for engine in ("zero0", "zero2", "zero3", "zero3_offload"):
        yield engine, *(partial(told, folder, device.type, one) for one in (engine, "zero1")), ENGINE


def ranks(device: torch.device, folder: Path) -> Cases:
    """Six steps under each engine on several GPUs, against ZeRO 1 on one."""
    count = int(os.environ["VISFT_GPUS"])
    engines = ("zero1", "zero2", "zero3", *(["pipeline"] if count == 2 else []))  # the debug model has two blocks
    for engine in engines:
        several = partial(told, folder, device.type, engine, out=f"{engine}-{count}", ranks=count)
        yield f"{engine} on {count}", several, partial(told, folder, device.type), RUN["fp32"]


def checkpoint(device: torch.device, folder: Path) -> Cases:
    """A run of six steps, taken over by a CPU behind the second and by the device again behind the fourth."""
    for on, saved, source, out in (("cpu", 2, f"{device.type}-zero1-fp32", "there"), (device.type, 4, "there", "back")):
        found = partial(told, folder, on, saved=saved, source=source, out=out)
        yield f"{out}, on {on}", found, partial(told, folder, device.type, saved=saved), RUN["fp32"]


def blocks(device: torch.device, folder: Path) -> Cases:
    """Compiled blocks against eager ones; four blocks of EVA-ViT-E in bf16 against fp32."""

    def run(preset: str, how: str, dtype: str, images: Sequence[int], **sizes: Any) -> Values:
        tower = eva_vit.build_backbone(preset, device=device, dtype=DTYPES[dtype], **sizes).train()
        inject_lora(tower.requires_grad_(False))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in tower.named_parameters():
            if parameter.requires_grad or parameter.ndim < 2 or name == "pos_embed":
                parameter.data = parameter.data.float()
            if name.endswith("lora_B"):  # where it is zero, a wrong gradient of A would not show
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        if how == "blocks":
            tower.compile_blocks()
        pixels = torch.randn(*images, generator=generator).to(device)
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            out = tower(pixels)
        up = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        gradients = torch.autograd.grad(out, [*lora_parameters(tower).values()], up)
        return {"features": [out]}, {"gradients": gradients}

    for dtype in ("fp32", "bf16"):
        shape: dict[str, Any] = {"images": (2, 3, 112, 112), "width": 128, "num_heads": 4}
        both = (partial(run, "debug", way, dtype, **shape) for way in ("blocks", "none"))
        yield f"compiled, {dtype}", *both, (BOUND[dtype], BOUND[dtype])
    both = (partial(run, "eva_e", "none", dtype, (1, 3, 224, 224), depth=4) for dtype in ("bf16", "fp32"))
    yield "EVA-ViT-E's width", *both, WIDE


PARTS = dict(attention=attend, lora=adapt, steps=steps, checkpoint=checkpoint, blocks=blocks, ranks=ranks)

if __name__ == "__main__":
    sys.exit(run_cases(*sys.argv[2:]) if "--child" in sys.argv[1:2] else main())

import sys, os.path as o; sys.path[:] = [o.dirname(o.dirname(o.realpath(__file__)))] + [p for p in sys.path if o.realpath(p) != o.dirname(o.realpath(__file__))]  # noqa: E401, E501, E702, I001  # fmt: skip
"""Does a GPU compute what a CPU computes? Kernels, attention, whole steps, engines, checkpoints, in five minutes.

    python tools/gpu.py --out gpu.json
    python tools/gpu.py --device cpu --parts ops attention lora

Each part runs in a process of its own, which is started again behind a case that ended it. Errors are relative, those
of tensors by Frobenius norms. Exit status: 0 all passed, or skipped for a reason; 1 a case failed; 2 wrong usage.
"""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from visft_ds.config import resolve_arguments
from visft_ds.data.dataset import read_raw
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader
from visft_ds.model import counts_of, loss_denominators_of
from visft_ds.models.compiled import compile_blocks
from visft_ds.models.compiled import why_not as why_not_compiled
from visft_ds.models.eva_vit import build_backbone
from visft_ds.models.lora import inject_lora, lora_parameters
from visft_ds.monitor.console import Section, print_plan
from visft_ds.ops import KERNELS, use_kernels
from visft_ds.ops import attention as table
from visft_ds.ops.deform_attn import deform_attn, deform_attn_reference
from visft_ds.ops.dora import dora_linear
from visft_ds.ops.gelu import STEPS, gelu
from visft_ds.ops.lora import BACKENDS, lora_linear
from visft_ds.ops.low_bit import FORMATS, LowBit, low_bit_linear
from visft_ds.ops.norm import layer_norm
from visft_ds.ops.triton import why_not
from visft_ds.prepare.materialize import is_small
from visft_ds.prepare.model import prepare_model
from visft_ds.prepare.streams import pipeline_of, vocabulary_of
from visft_ds.profiling.record import circumstances
from visft_ds.shards.build import Options, build
from visft_ds.toy.annotations import write_toy_coco

Found = Mapping[str, tuple[float, float]] | str  #: of each result its error and bound; or why nothing can run here
Cases = Iterator[tuple[str, Callable[[], Found]]]
Told = Mapping[int, Mapping[str, float]]  #: step -> its loss and the norm of its gradient

FORMAT, VERSION = "visft_ds gpu", 1
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
COLUMNS = ("part", "case", "error", "bound", "seconds", "device", "verdict", "reason")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCRIPT = Path(__file__).resolve()
CPU = torch.device("cpu")
AT_ONCE = 4  #: runs of the command that trains: most of one is its start
#: One operation against float64 on the same inputs. fp32: sums of up to 5,000 terms; TF32 makes 3e-4. 16 bit: factors
#: and result are rounded once or twice, by 3e-4 and 2e-3 in the mean. A scale off by 3 %, a missing term or tile is far
#: above all three.
BOUND = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 2e-3}
#: Times as much for plain products in 16 bit, which round every score, and a share is off by as much as its score.
SCORES = 4
#: Losses and gradients of a step against fp32 on a CPU; a CPU itself makes 8e-4 and 6e-3 in bf16, 1e-5 and 5e-4 in
#: fp16. In fp32 only the order of sums differs; TF32 in one convolution makes 3e-4.
STEP_BOUND = {"fp32": (1e-5, 1e-4), "bf16": (4e-3, 2e-2), "fp16": (2e-4, 3e-3)}
#: Times as much for the gradients of segmentation in 16 bit (a CPU makes 4e-2 and 6e-3): its attention is cut off where
#: a predicted mask crosses zero, and rounding moves that line.
MASKED = 5
#: Losses and norms of gradients of a run against a CPU's: in the first step, and in later ones, where Adam has made
#: steps of full size out of the rounding of gradients next to zero. A CPU makes 4e-3 and 6e-3 in bf16. Without one of
#: the updates the loss would be off by 5 to 15 %.
RUN_BOUND = {"fp32": (1e-4, 1e-2), "bf16": (2e-2, 3e-2), "fp16": (2e-2, 3e-2)}
#: The same of two engines on one device, where only atomic sums differ from run to run; between CPUs it is 1e-6.
ENGINE_BOUND = (1e-5, 1e-3)
#: Features and gradients of four wide blocks in bf16; a CPU makes 6e-3 and 1e-2.
WIDE_BOUND = {"features": 2e-2, "gradients": 3e-2}
#: Of a small update that a 16-bit result should still hold; the eager way loses more than a quarter.
LOST = 0.15
FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TASKS = ("detection", "segmentation", "captioning")
TRAINED = {"lora": "backbone.*.lora_*", "heads": "heads.*"}
COUNTS = ("class_error", "cardinality_error", "top5_accuracy")  #: shares of right answers, which leap
#: The debug model with adapters and heads that train. No dropout: other devices draw other numbers.
SETTINGS: dict[str, Any] = {
    **{"visft.heads.path": None, "visft.heads.start": "random", "visft.tasks.captioning.head.dropout": 0.0},
    **{f"visft.tasks.{task}.{key}": size for task in TASKS for key, size in (("batch_size", 4), ("micro_batch", 2))},
    "visft.param_groups": [{"name": name, "params": glob} for name, glob in TRAINED.items()],
    **{"scheduler.params.total_num_steps": 6, "scheduler.params.warmup_num_steps": 2, "visft.run.save_every": 2},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print their table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/gpu.py", description="Compare what a GPU computes with a CPU.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what is examined (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows there as JSON")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=5.0, metavar="N", help="for all parts (%(default)s)")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)  # folder, and file of the rows
    options = parser.parse_args(arguments)
    if options.child:
        return run_cases(options.parts[0], torch.device(options.device), *options.child)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: torch sees no GPU here; use --device cpu, or see tools/doctor.py", file=sys.stderr)
        return 2
    load, rows, end = os.getloadavg(), [], time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="visft-gpu-") as name:
        draw_pictures(Path(name))
        for part in options.parts:
            began = time.monotonic()
            # Twice its share: few parts need theirs, and one that hangs leaves something to the others.
            limit = min(2 * PARTS[part][1] * 60 * options.minutes, end - began)
            rows += run_part(part, options.device, Path(name), limit)
            print(f"{part}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    record = {"format": FORMAT, "version": VERSION, **circumstances(load, torch.device(options.device)), "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    count = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in (FAILED, PASSED, SKIPPED)}
    title = f"{record['hardware']['device']}: " + ", ".join(f"{number} {verdict}" for verdict, number in count.items())
    print_plan(title, [Section("cases", [[_cell(row[name]) for name in COLUMNS] for row in rows], COLUMNS)])
    return int(count[FAILED] > 0)


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.2g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------------------------- processes of the parts


def run_part(part: str, device: str, folder: Path, limit: float) -> list[dict[str, Any]]:
    """The rows of a part. A case that ends its process has failed, and another process goes on behind it."""
    file, end = folder / f"{part}.jsonl", time.monotonic() + limit
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if device == "cpu" and part in ("ops", "lora"):
        environment["TRITON_INTERPRET"] = "1"  # Triton's kernels on a CPU
    while True:
        command = [sys.executable, str(SCRIPT), "--device", device, "--parts", part, "--child", str(folder), str(file)]
        with (folder / f"{part}.log").open("w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            try:
                code = process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                process.wait()
                code = None
            log.seek(0)
            said = [line.strip() for line in log if line.strip()] or [""]
        if code == 0:
            return _rows(file)
        rows = {row["case"]: row for row in _rows(file)}
        begun = [row for row in rows.values() if not row["verdict"]]
        failed = begun[0] if begun else _row(part, "the start" if not rows else "the end", device)
        why = f"exit code {code}: {said[-1][:300]}" if code is not None else f"the part took more than {limit:.0f} s"
        rows[failed["case"]] = failed | {"verdict": FAILED, "reason": why}
        file.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
        if code is None or not begun:
            return [*rows.values()]


def run_cases(part: str, device: torch.device, folder: Path, file: Path) -> int:
    """The process of a part: every case that has no row yet."""
    known = [row["case"] for row in _rows(file)]
    for case, run in PARTS[part][0](device, folder):
        if case in known:
            continue
        row = _row(part, case, device.type)
        _append(file, row)
        torch.manual_seed(0)
        began = time.perf_counter()
        found = run()
        row["seconds"] = round(time.perf_counter() - began, 3)
        if isinstance(found, str):
            row |= {"verdict": SKIPPED, "reason": found}
        else:
            worst = max(found, key=lambda name: _excess(*found[name]))
            error, bound = found[worst]
            verdict = PASSED if _excess(error, bound) <= 1 else FAILED
            row |= {"error": error, "bound": bound, "verdict": verdict, "reason": f"worst: {worst}"}
        _append(file, row)
    return 0


def _row(part: str, case: str, device: str) -> dict[str, Any]:
    return {**dict.fromkeys(COLUMNS), "part": part, "case": case, "device": device}


def _append(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")


def _rows(file: Path) -> list[dict[str, Any]]:
    """The newest row of each case."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [*{row["case"]: row for row in map(json.loads, lines)}.values()]


def _excess(error: float, bound: float) -> float:
    return error / bound if error == error else float("inf")  # nothing is worse than what is no number


# ------------------------------------------------------------------------------------------------------- comparisons


def _error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Of tensors as one vector, wherever they are."""
    one, other = (torch.cat([tensor.detach().double().cpu().flatten() for tensor in part]) for part in (found, exact))
    return float((one - other).norm() / other.norm())


def _compare(
    function: Callable[..., Tensor], exact: Callable[..., Tensor], inputs: Sequence[Tensor], up: Tensor, dtype: str
) -> dict[str, tuple[float, float]]:
    """Result and gradients of all inputs, in a dtype, against those in float64 of the same numbers."""
    rounded = [tensor.to(DTYPES[dtype]) for tensor in (*inputs, up)]
    results = []
    for chosen, used in ((function, rounded), (exact, [tensor.double() for tensor in rounded])):
        # Copies: a GELU writes over its input and over the gradient of its result.
        leaves = [tensor.detach().clone().requires_grad_() for tensor in used[:-1]]
        out = chosen(*(leaf * 1 for leaf in leaves))
        results.append((out.detach().clone(), *torch.autograd.grad(out, leaves, used[-1].clone())))
    names = ("result", *(f"gradient {number}" for number in range(1, len(inputs) + 1)))
    return {
        f"{name}, {dtype}": (_error([found], [wanted]), BOUND[dtype])
        for name, found, wanted in zip(names, *results, strict=True)
    }


def ops(device: torch.device, folder: Path) -> Cases:
    """GELU, norm and deformable attention, each by the library and by Triton; matrices in few bits."""
    rows, width, shapes = (1030, 1792, [(64, 48), (32, 24)]) if device.type == "cuda" else (7, 100, [(4, 6), (2, 3)])
    random = partial(torch.randn, device=device)
    weight, bias, x, inner, up = (random(*size) for size in ((width,), (width,), *[(rows, width)] * 3))
    places, shares = (torch.rand(2, 5, 2, 2, 3, *more, device=device) for more in ((2,), ()))
    cells = random(2, sum(height * width for height, width in shapes), 2, 5)
    cases: dict[str, Any] = {
        "gelu": (gelu, F.gelu, [2 * x], up),
        "gelu in 8 bits": (partial(gelu, coded=True), F.gelu, [2 * x], torch.ones_like(x)),
        "norm, added": (
            lambda x, branch: layer_norm(branch, weight, bias, 1e-6, x),
            lambda x, branch: x + F.layer_norm(branch, (width,), weight.double(), bias.double(), 1e-6),
            *([x, 3 + inner / 2], up),
        ),
        "deformable attention": (  # samples in and around the maps
            lambda value, *rest: deform_attn(value, shapes, *rest),
            lambda value, *rest: deform_attn_reference(value, shapes, *rest),
            *([cells, places * 1.3 - 0.15, shares], random(2, 5, 10)),
        ),
    }

    # Codes that no quantiser has made will do: scales of 1, and bytes of which none is fp8's NaN.
    codes = torch.randint(0, 127, (96, 128), dtype=torch.uint8)
    for form in FORMATS:
        scales = torch.ones(96, 2 if form == "nf4" else 1).view(torch.uint8)
        stored = torch.cat([scales, codes], dim=1)[:, : LowBit(form, 128, torch.float32).row_bytes]
        exact = LowBit(form, 128, torch.float32).unpack(stored, torch.float32).to(device)
        way = partial(lambda form, stored, x: low_bit_linear(x, stored, None, LowBit(form, 128, x.dtype)), form)
        exactly = partial(lambda weight, x: F.linear(x, weight), exact.double())
        cases[f"matrix in {form}"] = partial(way, stored.to(device)), exactly, [random(rows, 128)], random(rows, 96)

    def run(kernels: str, name: str, dtypes: Sequence[str]) -> Found:
        if kernels == "triton" and (reason := why_not(device)):
            return reason
        use_kernels(kernels, device)
        found: dict[str, tuple[float, float]] = {}
        for dtype in dtypes:
            errors = _compare(*cases[name], dtype)
            if name == "gelu in 8 bits":
                # Half a step of the code beside slopes of 0.7 in the mean square; much less by the mean, 0.0014.
                errors[f"gradient 1, {dtype}"] = errors[f"gradient 1, {dtype}"][0], 0.5 / STEPS / 0.7 + BOUND[dtype]
            found |= errors
        return found

    for kernels in KERNELS:
        for name in cases:
            if kernels == "triton" and name.startswith("matrix"):
                continue  # there is one way
            # Heads compute in float32 whatever the backbone computes in.
            yield f"{name}, {kernels}", partial(run, kernels, name, ["fp32"] if name.startswith("def") else [*DTYPES])


def attention(device: torch.device, folder: Path) -> Cases:
    """Every kernel of attention, and what the table takes, against plain products."""
    on_gpu, half = device.type == "cuda", ("bf16", "fp16")
    lengths = (257, 1030) if on_gpu else (9, 33)  # ragged tiles; cuDNN is taken from 1,025 tokens on

    def padded(name: str, *qkv: Tensor) -> Tensor:
        if name == "the table":
            name, _ = table.attention_backend(device, qkv[0].dtype, *qkv[0].shape[:1:-1])
        if name == "reference":
            return table.attention_reference(*qkv)
        with sdpa_kernel(FUSED[name]) if name in FUSED else sdpa_kernel([*FUSED.values(), SDPBackend.MATH]):
            return F.scaled_dot_product_attention(*qkv)  # by this kernel and no other

    def exactly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v

    def packed_exactly(length: int, *qkv: Tensor) -> Tensor:
        images = zip(
            *(tensor.transpose(0, 1).split([length, len(tensor) - length], dim=1) for tensor in qkv), strict=True
        )
        return torch.cat([exactly(*image).transpose(0, 1) for image in images])

    def packed(name: str, length: int, *qkv: Tensor) -> Tensor:
        packing = table.Packing.of((length, len(qkv[0]) - length), device)
        return table.attention_packed(*qkv, packing) if name == "the table" else table.PACKED[name](*qkv, packing)

    def run(name: str, dim: int, *, is_packed: bool) -> Found:
        if not on_gpu and name in (*FUSED, "varlen", "flash_attn"):
            return "a kernel for GPUs"
        if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
            return "the package flash-attn is not installed"
        found: dict[str, tuple[float, float]] = {}
        for dtype in half if name in ("flash", "cudnn", "varlen", "flash_attn") else DTYPES:
            for length in lengths:
                # Numbers so large that shares are uneven: with even ones a wrong scale would not show.
                if is_packed:
                    qkv = (torch.randn(2 * length - 5, 3, 4, dim, device=device) * 1.5).unbind(1)
                    ways = [partial(packed, name, length), partial(packed_exactly, length)]
                else:
                    qkv = (torch.randn(2, length, 3, 4, dim, device=device) * 1.5).permute(2, 0, 3, 1, 4).unbind(0)
                    ways = [partial(padded, name), exactly]
                try:
                    errors = _compare(*ways, qkv, torch.randn_like(qkv[0]), dtype)
                except RuntimeError as error:
                    if name == "the table" or "No available kernel" not in str(error):
                        raise
                    return f"torch has no such kernel here: {dtype}, heads of {dim}"
                plain = dtype != "fp32" and (name == "reference" or not on_gpu)
                for what, (error, bound) in errors.items():
                    found[f"{what}, {length} tokens"] = error, bound * (SCORES if plain else 1)
        return found

    for dim in (112, 88, 64):
        for name in ("the table", "reference", *FUSED):
            yield f"{name}, heads of {dim}", partial(run, name, dim, is_packed=False)
        for name in ("the table", *table.PACKED):
            yield f"packed, {name}, heads of {dim}", partial(run, name, dim, is_packed=True)


def lora(device: torch.device, folder: Path) -> Cases:
    """Each backend of the adapted projection against the eager one."""
    rows, width, rank = (1030, 1792, 64) if device.type == "cuda" else (9, 32, 8)
    slices, random = ((0, width), (2 * width, 3 * width)), partial(torch.randn, device=device)
    x, bias, a, b = random(2, rows, width), random(3 * width), random(2 * rank, width), random(2 * width, rank)
    weight, a, b = random(3 * width, width) * width**-0.5, a * width**-0.5, b * rank**-0.5
    lengths = torch.linspace(0.5, 1.5, 2 * width, device=device)  # of DoRA's rows

    def project(backend: str, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if backend == "DoRA":
            return dora_linear(x, weight, bias, a, b, lengths.to(x.dtype), 0.5, slices)
        return lora_linear(x, weight, bias, a, b, 0.5, slices, backend=backend)

    def run(backend: str) -> Found:
        if backend == "triton" and (reason := why_not(device)):
            return reason
        found: dict[str, tuple[float, float]] = {}
        for dtype in DTYPES:
            exact = partial(project, "DoRA" if backend == "DoRA" else "eager")
            found |= _compare(
                partial(project, backend), exact, (x, weight, bias, a, b), random(2, rows, 3 * width), dtype
            )
        return found

    def survival(backend: str) -> Found:
        """|B| is 1e-2, as some steps after the start: how much of its update is left in a bf16 result?"""
        if backend == "triton" and (reason := why_not(device)):
            return reason
        used = [tensor.bfloat16() for tensor in (x, weight, bias, a, b * rank**0.5 * 1e-2)]
        none = torch.zeros_like(used[-1])
        left = (project(backend, *used).double() - project(backend, *used[:-1], none).double()).flatten()
        wide = [tensor.double() for tensor in used]
        update = (project("eager", *wide) - project("eager", *wide[:-1], none.double())).flatten()
        return {"a small update in bf16": (abs(1 - float(left @ update / (update @ update))), LOST)}

    for backend in (*BACKENDS, "DoRA"):
        yield backend, partial(run, backend)
    for backend in ("augmented", "triton"):
        yield f"{backend}, a small update", partial(survival, backend)


# ---------------------------------------------------------------------------------------------------- the debug model


def draw_pictures(folder: Path) -> None:
    """Shards of toy pictures, for all parts."""
    write_toy_coco(folder / "coco", train=24, val=0, height=96, width=128)
    labels = (folder / "coco" / "annotations" / f"{kind}_train2017.json" for kind in ("instances", "captions"))
    build(Options(folder / "coco" / "train2017", *labels, folder / "shards", "train"))


def training(folder: Path, **more: Any) -> list[str]:
    """Arguments of launchers/train.py."""
    settings = [f"--set={key}={json.dumps(value)}" for key, value in (SETTINGS | more).items()]
    return ["--stage", "2", "--model", "debug", "--data", str(folder / "shards"), *settings]


def steps(device: torch.device, folder: Path) -> Cases:
    """Losses and gradients of a step of each task against fp32 on a CPU."""
    _, config = resolve_arguments(training(folder))
    settings, manifest = config.visft, Manifest.load(folder / "shards", "train")
    vocabulary, reader = vocabulary_of(settings, manifest), ShardReader(manifest)

    def compute(task: str, precision: Any, where: torch.device) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
        module = prepare_model(settings, config.optimizer.params, precision=precision, vocabulary=vocabulary).module
        _fill(module.backbone)
        pipeline = pipeline_of(settings.streams()[task], vocabulary, train=True)
        raws = [read_raw(reader, index) for index in range(4)]
        batch = pipeline.collate([pipeline.transform(raw, np.random.default_rng(0)) for raw in raws]).to(where)
        module.to(where).train()
        with torch.autocast(where.type, DTYPES[precision], enabled=precision != "fp32"):
            losses = module(batch, loss_denominators_of(counts_of(module, [batch]), 1, where))
        scale = 1024 if precision == "fp16" else 1  # or small gradients would be 0
        (losses["loss"] * scale).backward()
        got = [(name, p.grad / scale) for name, p in module.named_parameters() if p.grad is not None]
        gradients = {kind: [grad for name, grad in got if fnmatch(name, glob)] for kind, glob in TRAINED.items()}
        return {n: loss.item() for n, loss in losses.items() if n.rpartition("/")[2] not in COUNTS}, gradients

    exactly = cache(lambda task: compute(task, "fp32", CPU))

    def run(task: str, precision: str) -> Found:
        (losses, gradients), (wanted, exact) = compute(task, precision, device), exactly(task)
        of_loss, of_gradient = STEP_BOUND[precision]
        of_gradient *= MASKED if task == "segmentation" and precision != "fp32" else 1
        found = {name: (abs(value / wanted[name] - 1), of_loss) for name, value in losses.items()}
        return found | {f"gradients of {kind}": (_error(gradients[kind], exact[kind]), of_gradient) for kind in TRAINED}

    for task in TASKS:
        for precision in DTYPES:
            yield f"{task}, {precision}", partial(run, task, precision)


def train(folder: Path, out: str, device: torch.device, engine: str, precision: str) -> Told:
    """What launchers/train.py tells of each step, as one process; a run that has ended is not made again."""
    place = folder / out
    if not (place / "export" / "adapter").exists():
        command = [str(SCRIPT.parents[1] / "launchers" / "train.py"), "--engine", engine, "--out", str(place)]
        command += training(folder, **{"visft.model.precision": precision})
        # Where DeepSpeed would see a GPU, it has to be hidden.
        hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device.type == "cpu" else {}
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // AT_ONCE)), **os.environ, **hidden}
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or [""]
            raise RuntimeError(f"launchers/train.py --engine {engine} ended with {done.returncode}: {said[-1]}")
    lines = map(json.loads, (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    reports = [line for line in lines if "loss/loss" in line]
    return {line["step"]: {"loss": line["loss/loss"], "norm": line["gradient_norm"]} for line in reports}


def _follow(found: Told, wanted: Told, first: float, later: float, saved: int = 0) -> Found:
    """Errors of the steps after the one that both runs have in common."""
    return {
        f"{name} of step {step}": (abs(value / wanted[step][name] - 1), later if step > saved + 1 else first)
        for step in range(saved + 1, len(wanted) + 1)
        for name, value in found[step].items()
    }


def engines(device: torch.device, folder: Path) -> Cases:
    """Six steps under each engine through the command that trains."""
    pool = ThreadPoolExecutor(AT_ONCE)

    @cache
    def start(engine: str, kind: str, precision: str) -> Any:
        return pool.submit(train, folder, f"{engine}-{kind}-{precision}", torch.device(kind), engine, precision)

    def told(engine: str, kind: str = device.type, precision: str = "fp32") -> Told:
        told: Told = start(engine, kind, precision).result()
        return told

    ours, half = ("zero1", "zero2", "zero3", "zero3_offload"), ("bf16", "fp16")
    for kind, engine in (("cpu", "zero0"), *((device.type, engine) for engine in ("zero0", *ours))):
        start(engine, kind, "fp32")
    for precision in half:
        start("zero1", device.type, precision)
    yield "zero0 and a CPU", lambda: _follow(told("zero0"), told("zero0", "cpu"), *RUN_BOUND["fp32"])
    for one in ours:
        yield f"{one} and zero0", partial(lambda one: _follow(told(one), told("zero0"), *ENGINE_BOUND), one)
    for one in half:
        yield (
            f"zero1 in {one} and a CPU in fp32",
            partial(lambda p: _follow(told("zero1", precision=p), told("zero0", "cpu"), *RUN_BOUND[p]), one),
        )


def checkpoint(device: torch.device, folder: Path) -> Cases:
    """A run of six steps, taken over by a CPU behind the second and by the device again behind the fourth."""

    def take_over(out: str, source: str, saved: int, where: torch.device) -> Told:
        if not (folder / out).exists():
            shutil.copytree(folder / source, folder / out, ignore=shutil.ignore_patterns("export", "*.lock"))
            for later in range(saved + 2, 7, 2):
                shutil.rmtree(folder / out / "checkpoints" / f"step_{later:08d}")
        return train(folder, out, where, "zero1", "fp32")

    def run(home: bool) -> Found:
        straight = train(folder, whole := f"zero1-{device.type}-fp32", device, "zero1", "fp32")
        there = take_over("there", whole, 2, CPU)
        if not home:
            return _follow(there, straight, *RUN_BOUND["fp32"], saved=2)
        return _follow(take_over("back", "there", 4, device), straight, *RUN_BOUND["fp32"], saved=4)

    yield "written there, resumed on a CPU", partial(run, False)
    yield "and back", partial(run, True)


# ------------------------------------------------------------------------------------------------------- the backbone


def _fill(backbone: torch.nn.Module) -> None:
    """B of all adapters: where it is zero, a wrong gradient of A would not show."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora_parameters(backbone).items():
        if name.endswith("lora_B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def _pass(preset: str, how: str, device: torch.device, dtype: str, side: int, **sizes: Any) -> tuple[Any, ...]:
    """Features of two images, or of a single wide one, and the gradients of adapters."""
    backbone = build_backbone(preset, device=device, dtype=DTYPES[dtype], **sizes).requires_grad_(False).train()
    for name, parameter in backbone.named_parameters():
        if is_small(name, parameter.shape):
            parameter.data = parameter.data.float()
    inject_lora(backbone)
    for parameter in lora_parameters(backbone).values():
        parameter.data = parameter.data.float()
    _fill(backbone)
    compile_blocks(backbone, how)
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(1 if preset == "eva_e" else 2, 3, side, side, generator=generator).to(device)
    for _ in range(1 if how == "none" else 6):  # a graph is recorded when a shape comes for the third time
        with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            out = backbone(pixels)
        up = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(device, out.dtype)
        gradients = torch.autograd.grad(out, [*lora_parameters(backbone).values()], up)
    return [out.detach().cpu()], [gradient.cpu() for gradient in gradients]


def compiled(device: torch.device, folder: Path) -> Cases:
    """Compiled blocks, and those recorded as CUDA graphs, against eager ones."""

    def run(how: str, dtype: str) -> Found:
        if reason := why_not_compiled(how, device):
            return reason
        found, exact = (_pass("debug", one, device, dtype, 112, width=128, num_heads=4) for one in (how, "none"))
        return {name: (_error(found[at], exact[at]), BOUND[dtype]) for at, name in enumerate(("features", "gradients"))}

    for how in ("blocks", "cuda_graphs"):
        for dtype in ("fp32", "bf16"):
            yield f"{how}, {dtype}", partial(run, how, dtype)


def wide(device: torch.device, folder: Path) -> Cases:
    """Four blocks of EVA-ViT-E with adapters in bf16, one image, against fp32 on the device."""

    def run(side: int) -> Found:
        found, exact = (_pass("eva_e", "none", device, dtype, side, depth=4) for dtype in ("bf16", "fp32"))
        return {name: (_error(found[at], exact[at]), WIDE_BOUND[name]) for at, name in enumerate(WIDE_BOUND)}

    for side in (224, 448) if device.type == "cuda" else (112,):
        yield f"{side} px", partial(run, side)


#: Part -> its cases, and its share of the time.
PARTS: dict[str, tuple[Callable[[torch.device, Path], Cases], float]] = {
    **{"ops": (ops, 0.1), "attention": (attention, 0.1), "lora": (lora, 0.1), "steps": (steps, 0.1)},
    **{"engines": (engines, 0.25), "checkpoint": (checkpoint, 0.1)},
    **{"compiled": (compiled, 0.15), "wide": (wide, 0.1)},
}

if __name__ == "__main__":
    sys.exit(main())

"""Check whether this machine is ready to train: packages, GPUs, memory, disk, and two connected processes.

    visft doctor
    visft doctor --model dinov3_b --folder /data/runs

Exit status: 0 ready (warnings included), 1 there is a problem, 2 wrong usage.
"""
# Nothing that may be missing is imported at the top.

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from visft_ds.errors import tell
from visft_ds.flags import command_parser, install_command

PROBLEM = "problem"
WARNING = "warning"
OK = "ok"
_ORDER = (PROBLEM, WARNING, OK)
_GB = 10**9
_GIB = 2**30
_HEAD_WIDTH = 64  #: of most ViTs


class Finding(NamedTuple):
    """Result of a check."""

    status: str
    subject: str
    message: str  #: and what to do about it


def judged(good: bool, subject: str, message: str, helps: str) -> Finding:
    """A finding: good, or a problem with what helps."""
    return Finding(OK, subject, message) if good else Finding(PROBLEM, subject, f"{message}. {helps}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check; returns the exit status."""
    parser = command_parser("doctor", __doc__)
    parser.add_argument("--model", metavar="NAME|FILE", help="model to train, as for visft train")
    parser.add_argument("--folder", type=Path, default=Path("."), metavar="DIR", help="folder for runs (.)")
    options = parser.parse_args(arguments)
    try:
        findings = list(examine(options.folder, options.model))
    except ValueError as error:
        return tell(error)
    from visft_ds.monitor.console import Section, print_plan

    count = Counter(finding.status for finding in findings)
    outcome = f"{count[OK]} checks passed"
    if count[WARNING]:
        outcome = f"{count[WARNING]} warning(s), {outcome}"
    if count[PROBLEM]:
        outcome = f"{count[PROBLEM]} problem(s), {outcome}"
    state = "not ready" if count[PROBLEM] else "ready"
    rows = sorted(findings, key=lambda finding: _ORDER.index(finding.status))
    print_plan(f"this machine is {state}: {outcome}", [Section("checks", rows)])
    return 1 if count[PROBLEM] else 0


def examine(folder: Path, model: str | None) -> Iterator[Finding]:
    """Run every check, for runs in a folder. Raises ValueError for an unknown model and a folder that is not
    there.
    """
    if not folder.is_dir():
        raise ValueError(f"--folder {folder} is not a folder: make it, or name another one")
    checks = (check_packages(), check_device(), check_memory(model), check_disk(folder), check_processes())
    for findings in checks:
        try:
            yield from findings
        except (ImportError, OSError, RuntimeError) as error:
            yield Finding(PROBLEM, "check failed", f"{type(error).__name__}: {error}")


def check_packages() -> Iterator[Finding]:
    """Compare the requirements of pyproject.toml with the installed packages."""
    from packaging.requirements import Requirement

    if _version("visft_ds") is None:
        yield Finding(WARNING, "packages", f"visft_ds itself is not installed: {install_command()}")
        return
    needed = 0
    wrong = []
    for text in importlib.metadata.requires("visft_ds") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        needed += 1
        version = _version(requirement.name)
        if not requirement.specifier.contains(version or "0", prereleases=True):
            wrong.append(f"{requirement} (here: {version or 'not installed'})")
    right = f"all {needed} required ones; torch {_version('torch')}, deepspeed {_version('deepspeed')}"
    message = "; ".join(wrong) or right
    yield judged(not wrong, "packages", message, f"{install_command()} installs the right ones")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_device() -> Iterator[Finding]:
    """Look for GPUs, and for the precision and attention that a run would choose on them."""
    import torch

    from visft_ds.ops import DTYPES
    from visft_ds.ops.attention import packed_kernel
    from visft_ds.prepare.model import choose_precision

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and (Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi")):
        message = f"a driver is installed, but torch {torch.__version__} sees no GPU. Install torch with CUDA"
        yield Finding(PROBLEM, "GPU", f"{message} (https://pytorch.org), or unset CUDA_VISIBLE_DEVICES")
    elif not count:
        message = "none; large models need GPUs, the debug model and few images train on this CPU"
        yield Finding(OK, "GPU", f"{message}: visft train --data FOLDER")
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / _GIB:.1f} GiB"
        message = f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        runs = any(re.fullmatch(rf"sm_{properties.major}\d", arch) for arch in torch.cuda.get_arch_list())
        yield judged(runs, f"GPU {index}", message, f"torch {torch.__version__} has no code for it")
    device = torch.device("cuda", 0) if count else torch.device("cpu")
    precision, why = choose_precision("auto", device)
    yield Finding(OK, "precision", f"{precision} ({why})")
    kernel, why = packed_kernel(device, DTYPES[precision], _HEAD_WIDTH)
    yield Finding(OK, "attention", f"packed images: {kernel} ({why})")


def check_memory(model: str | None) -> Iterator[Finding]:
    """Compare the memory of a process with what both stages of a model are predicted to need."""
    from visft_ds.config import resolve
    from visft_ds.distributed import local_device
    from visft_ds.planner.memory import plan_largest, planned_run
    from visft_ds.prepare.model import choose_precision
    from visft_ds.run.machine import memory_of

    device = local_device()
    room = memory_of(device)
    yield Finding(OK, "memory", f"{room / _GIB:.1f} GiB for a process on the {device.type}")
    if model is None:
        return
    for stage, policy in ((1, "none"), (2, "block")):
        settings = [f"visft.model.activation_checkpointing={policy}"]
        config = resolve(stage=stage, model=model, settings=settings)
        precision, _ = choose_precision(config.visft.model.precision, device)
        needed = plan_largest(planned_run(config, 1, precision, None, device)).total
        message = f"a process needs {needed / _GIB:.2f} of {room / _GIB:.2f} GiB, as predicted"
        helps = f"See what helps: visft plan --cluster {_cluster()} --stage {stage} --model {model}"
        yield judged(needed <= room, f"{model}, stage {stage}", message, helps)


def _cluster() -> str:
    """The GPUs of this machine, in words of visft plan; eight of a usual kind where it has none that is
    known.
    """
    import torch

    from visft_ds.planner.hardware import find_gpu

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpu = find_gpu(torch.cuda.get_device_name(0)) if count else None
    return "8xA100-80GB" if gpu is None else f"{count}x{gpu.name}"


def check_disk(folder: Path) -> Iterator[Finding]:
    """Look at the room for weights, shards and checkpoints."""
    free = shutil.disk_usage(folder).free
    message = f"{free / _GB:.0f} GB free in {folder.resolve()}"
    if 2 * _GB <= free < 60 * _GB:
        message += ". COCO's shards take 20 GB, EVA-E's weights 9 to 18 GB a file"
        yield Finding(WARNING, "disk", message)
    else:
        helps = "Free some space for checkpoints, or use another --folder"
        yield judged(free >= 2 * _GB, "disk", message, helps)


_MEMBER = """
import datetime, deepspeed, torch, torch.distributed as dist
dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
value = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(value)
dist.destroy_process_group()
assert value.item() == 3.0, value
"""


def check_processes() -> Iterator[Finding]:
    """Let two processes import DeepSpeed, meet over gloo and add their numbers, within two minutes."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    words = [sys.executable, "-m", *launcher, sys.executable, "-c", _MEMBER]
    failure = None
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "Error: " in line]
            failure = errors[0] if errors else f"exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        failure = "no answer within two minutes"
    if failure is None:
        yield Finding(OK, "two processes", "imported DeepSpeed and agreed over gloo")
        return
    helps = "If a name or interface is at fault: export GLOO_SOCKET_IFNAME=lo, and check /etc/hosts"
    yield Finding(PROBLEM, "two processes", f"cannot add two numbers over gloo: {failure}. {helps}")

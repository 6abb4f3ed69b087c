"""Check whether this machine is ready to train: packages, GPUs, memory, disk, and two processes that meet.

    visft doctor
    visft doctor --model dinov3_b --folder /data/runs

Exit status: 0 ready (warnings included), 1 there is a problem, 2 wrong usage. Nothing that may be missing is imported
at the top.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from visft_ds import program
from visft_ds.flags import Parser, install_command
from visft_ds.resilience.errors import tell

PROBLEM, WARNING, OK = STATUSES = ("problem", "warning", "ok")
_GB, _GIB = 10**9, 2**30


class Finding(NamedTuple):
    """Result of a check."""

    status: str
    subject: str
    found: str  #: and what to do about it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check; returns the exit status."""
    parser = Parser(prog=program("doctor"), description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME|FILE", help="model to be trained, as for visft train")
    parser.add_argument("--folder", type=Path, default=Path("."), metavar="DIR", help="where runs will be written (.)")
    options = parser.parse_args(arguments)
    try:
        findings = list(examine(options.folder, options.model))
    except ValueError as error:
        return tell(error)
    from visft_ds.monitor.console import Section, print_plan

    counts = {status: sum(finding.status == status for finding in findings) for status in STATUSES}
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    rows = sorted(findings, key=lambda finding: STATUSES.index(finding.status))
    print_plan(f"this machine is {'not ready' if counts[PROBLEM] else 'ready'}: {told}", [Section("checks", rows)])
    return 1 if counts[PROBLEM] else 0


def examine(folder: Path, model: str | None) -> Iterator[Finding]:
    """Run every check in the order in which a person reads it.

    Args:
        folder: where runs will be written.
        model: as for visft train; None: nothing in particular.

    Raises:
        ValueError: an unknown model, or a folder that does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"--folder {folder} is no folder; make it, or name another one")
    for check in (check_packages(), check_device(), check_memory(model), check_disk(folder), check_processes()):
        try:
            yield from check
        except (ImportError, OSError, RuntimeError) as error:
            yield Finding(PROBLEM, "check failed", f"{type(error).__name__}: {error}")


def check_packages() -> Iterator[Finding]:
    """Compare the requirements of setup.py with the installed packages."""
    from packaging.requirements import Requirement

    if _version("visft_ds") is None:
        yield Finding(WARNING, "packages", f"visft_ds itself is not installed: {install_command()}")
        return
    needed = [Requirement(text) for text in importlib.metadata.requires("visft_ds") or []]
    needed = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = {str(one): _version(one.name) for one in needed}
    wrong = [one for one in needed if not one.specifier.contains(found[str(one)] or "0", prereleases=True)]
    if wrong:
        told = "; ".join(f"{one} (here: {found[str(one)] or 'not installed'})" for one in wrong)
        yield Finding(PROBLEM, "packages", f"{told}. {install_command()} brings the right ones")
    else:
        told = f"torch {_version('torch')}, deepspeed {_version('deepspeed')}"
        yield Finding(OK, "packages", f"all {len(needed)} that visft_ds asks for; {told}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_device() -> Iterator[Finding]:
    """Look for GPUs, and for the precision that a run would choose on them."""
    import torch

    from visft_ds.prepare.model import choose_precision

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count and (Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi")):
        found = f"a driver is installed, but torch {torch.__version__} sees no GPU. Install torch with CUDA"
        yield Finding(PROBLEM, "GPU", f"{found} (https://pytorch.org), or unset CUDA_VISIBLE_DEVICES")
    elif not count:
        yield Finding(OK, "GPU", "none: the debug model trains on this CPU, the large ones need GPUs")
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        found = f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / _GIB:.1f} GiB"
        if any(re.fullmatch(rf"sm_{properties.major}\d", arch) for arch in torch.cuda.get_arch_list()):
            yield Finding(OK, f"GPU {index}", found)
        else:
            yield Finding(PROBLEM, f"GPU {index}", f"{found}. torch {torch.__version__} has no code for it")
    precision, why = choose_precision("auto", torch.device("cuda", 0) if count else torch.device("cpu"))
    yield Finding(OK, "precision", f"{precision} ({why})")


def check_memory(model: str | None) -> Iterator[Finding]:
    """Compare the memory of a process with what both stages of a model are predicted to need."""
    import torch

    from visft_ds.config import resolve
    from visft_ds.planner.memory import plan_largest, run_of
    from visft_ds.prepare.model import choose_precision
    from visft_ds.run.machine import memory_of

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    room = memory_of(device)
    yield Finding(OK, "memory", f"{room / _GIB:.1f} GiB for a process on the {device.type}")
    for stage in (1, 2) if model is not None else ():
        settings = [f"visft.model.recompute={'block' if stage == 2 else 'none'}"]
        config = resolve(stage=stage, model=model or "", settings=settings)
        precision, _ = choose_precision(config.visft.model.precision, device)
        needed = plan_largest(run_of(config, 1, precision, None, device)).total
        found = f"a process needs {needed / _GIB:.2f} of {room / _GIB:.2f} GiB, as predicted"
        if needed <= room:
            yield Finding(OK, f"{model}, stage {stage}", found)
        else:
            helps = f"See what helps: visft plan --stage {stage} --model {model}"
            yield Finding(PROBLEM, f"{model}, stage {stage}", f"{found}. {helps}")


def check_disk(folder: Path) -> Iterator[Finding]:
    """Look at the room for weights, shards and checkpoints."""
    free = shutil.disk_usage(folder).free
    found = f"{free / _GB:.0f} GB free in {folder.resolve()}"
    if free < 2 * _GB:
        yield Finding(PROBLEM, "disk", f"{found}. A checkpoint may not fit: free some, or use another --folder")
    elif free < 60 * _GB:
        yield Finding(WARNING, "disk", f"{found}. COCO's shards take 20 GB, EVA-E's weights 9 to 18 GB a file")
    else:
        yield Finding(OK, "disk", found)


_MEMBER = """
import datetime, sys
import deepspeed, torch, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, sys.argv[1] == "0", datetime.timedelta(seconds=30))
dist.init_process_group("gloo", store=store, rank=int(sys.argv[1]), world_size=2)
value = torch.tensor([float(sys.argv[1]) + 1])
dist.all_reduce(value)
dist.barrier()
dist.destroy_process_group()
assert value.item() == 3.0, value
"""


def check_processes() -> Iterator[Finding]:
    """Let two processes import DeepSpeed, meet over gloo and add their numbers, within a minute."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    commands = [[sys.executable, "-c", _MEMBER, str(rank), port] for rank in range(2)]
    members = [
        subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        said = [member.communicate(timeout=60)[1].strip() for member in members]
        failed = ["".join(text.splitlines()[-1:]) for text, one in zip(said, members, strict=True) if one.returncode]
    except subprocess.TimeoutExpired:
        failed = ["no answer within a minute"]
    finally:
        for member in members:
            member.kill()
    if failed:
        helps = "If a name or interface is at fault: export GLOO_SOCKET_IFNAME=lo, and check /etc/hosts"
        yield Finding(PROBLEM, "two processes", f"cannot add two numbers over gloo: {failed[0]}. {helps}")
    else:
        yield Finding(OK, "two processes", "imported DeepSpeed and agreed over gloo")

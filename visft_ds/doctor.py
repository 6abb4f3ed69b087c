"""Is this machine ready? Each check gives one or more findings: ok, warning or problem, and what to do about it.

    visft doctor
    visft doctor --model dinov3_b --folder /data/runs

Exit status: 0 ready (warnings included), 1 there is a problem, 2 wrong usage. Nothing that may be missing is imported
at the top: a doctor who cannot start helps nobody.
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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visft_ds import program
from visft_ds.flags import Parser, install_command
from visft_ds.resilience.errors import tell

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_GB, _GIB = 10**9, 2**30


@dataclass(frozen=True)
class Finding:
    """Result of a check."""

    status: str  #: OK | WARNING | PROBLEM
    subject: str
    found: str
    remedy: str = ""

    def row(self) -> tuple[str, str, str]:
        """As a row of a table."""
        return self.status, self.subject, self.found + (f". {self.remedy}" if self.remedy else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        findings = list(examine(options.folder, options.model))
    except ValueError as error:
        return tell(error)
    from visft_ds.monitor.console import Section, print_plan

    order = (PROBLEM, WARNING, OK)
    rows = [finding.row() for status in order for finding in findings if finding.status == status]
    counts = {status: sum(finding.status == status for finding in findings) for status in order}
    verdict = "not ready" if counts[PROBLEM] else "ready"
    title = f"this machine is {verdict}: {counts[PROBLEM]} problems, {counts[WARNING]} warnings, {counts[OK]} ok"
    print_plan(title, [Section("checks", rows)])
    return 1 if counts[PROBLEM] else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("doctor"), description="Is this machine ready to train?")
    parser.add_argument("--model", metavar="NAME|FILE", help="what is to be trained, as for visft train")
    parser.add_argument("--folder", type=Path, default=Path("."), metavar="DIR", help="where runs will be written (.)")
    return parser


def examine(folder: Path, model: str | None) -> Iterator[Finding]:
    """Every check in the order in which a person reads it; the two processes of the last one start first.

    Args:
        folder: where runs will be written.
        model: as for visft train; None: nothing in particular.

    Raises:
        ValueError: an unknown model, or a folder that does not exist.
    """
    if not folder.is_dir():
        raise ValueError(f"--folder {folder} is no folder; make it, or name another one")
    with _Pair() as pair:
        for check in (check_packages(), check_device(), check_memory(model), check_disk(folder), pair.check()):
            try:
                yield from check
            except ImportError as error:
                yield Finding(PROBLEM, "import", str(error), f"Install the project: {install_command()}")
            except (OSError, RuntimeError) as error:
                yield Finding(PROBLEM, "check failed", f"{type(error).__name__}: {error}")


def check_packages() -> Iterator[Finding]:
    """Compare the requirements of setup.py with the installed packages."""
    from packaging.requirements import Requirement

    try:
        texts = importlib.metadata.requires("visft_ds") or []
    except importlib.metadata.PackageNotFoundError:
        remedy = f"{install_command()} brings all it needs"
        yield Finding(WARNING, "packages", "visft_ds itself is not installed", remedy)
        texts = []
    needed = [r for r in map(Requirement, texts) if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in needed:
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} (here: {version or 'not installed'})")
    if wrong:
        yield Finding(PROBLEM, "packages", "; ".join(wrong), f"{install_command()} brings the right ones")
    elif needed:
        yield Finding(OK, "packages", f"all {len(needed)} that visft_ds asks for")
    for name in ("torch", "deepspeed"):
        version = _version(name)
        if version is None:
            yield Finding(PROBLEM, name, "not installed", install_command())
        else:
            yield Finding(OK, name, version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_device() -> Iterator[Finding]:
    """GPUs, and the precision a run would choose on them."""
    import torch

    from visft_ds.prepare.model import choose_precision

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield from _no_gpu(torch.__version__)
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        text = f"{properties.name}, {capability}, {properties.total_memory / _GIB:.1f} GiB"
        majors = {arch.split("_")[1][:-1] for arch in torch.cuda.get_arch_list() if re.fullmatch(r"sm_\d+", arch)}
        if str(properties.major) in majors:
            yield Finding(OK, f"GPU {index}", text)
        else:
            remedy = f"torch {torch.__version__} has no code for it; install a build that has"
            yield Finding(PROBLEM, f"GPU {index}", text, remedy)
    precision, why = choose_precision("auto", torch.device("cuda", 0) if count else torch.device("cpu"))
    yield Finding(OK, "precision", f"{precision} ({why})")


def _no_gpu(torch_version: str) -> Iterator[Finding]:
    driver = Path("/proc/driver/nvidia/version").is_file() or shutil.which("nvidia-smi") is not None
    if driver:
        remedy = (
            "Install torch with CUDA (https://pytorch.org/get-started), or a newer driver if it is there; "
            "CUDA_VISIBLE_DEVICES may hide the GPU too"
        )
        yield Finding(PROBLEM, "GPU", f"a driver is installed, but torch {torch_version} sees no GPU", remedy)
    else:
        yield Finding(OK, "GPU", "none: the debug model trains on this CPU, the large ones need GPUs")


def check_memory(model: str | None) -> Iterator[Finding]:
    """Memory of the host, and whether both stages of a model are predicted to fit into a process."""
    import torch

    from visft_ds.config import resolve
    from visft_ds.planner.memory import plan_largest, run_of
    from visft_ds.prepare.model import choose_precision
    from visft_ds.resilience.host_memory import host_memory_available
    from visft_ds.run.machine import memory_of

    yield Finding(OK, "host memory", f"{host_memory_available() / _GIB:.1f} GiB available")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for stage in (1, 2) if model is not None else ():
        settings = ["visft.model.recompute=block"] if stage == 2 else ["visft.model.recompute=none"]
        config = resolve(stage=stage, model=model or "", settings=settings)
        precision, _ = choose_precision(config.visft.model.precision, device)
        needed, room = plan_largest(run_of(config, 1, precision, None, device)).total, memory_of(device)
        text = f"a process needs {needed / _GIB:.2f} of {room / _GIB:.2f} GiB, as predicted"
        if needed <= room:
            yield Finding(OK, f"{model}, stage {stage}", text)
        else:
            remedy = f"See what helps: visft plan --stage {stage} --model {model}"
            yield Finding(PROBLEM, f"{model}, stage {stage}", text, remedy)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Room for weights, shards and checkpoints."""
    free = shutil.disk_usage(folder).free
    text = f"{free / _GB:.0f} GB free in {folder.resolve()}"
    if free < 2 * _GB:
        yield Finding(PROBLEM, "disk", text, "A checkpoint may not fit: free some, or use another --folder")
    elif free < 60 * _GB:
        remedy = "COCO's shards take 20 GB, EVA-E's weights 9 to 18 GB a file"
        yield Finding(WARNING, "disk", text, remedy)
    else:
        yield Finding(OK, "disk", text)


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


class _Pair:
    """Two processes that import DeepSpeed, meet over gloo and add their numbers."""

    def __enter__(self) -> _Pair:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        environment: Mapping[str, str] = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._began = time.perf_counter()
        self._members = [
            subprocess.Popen(
                [sys.executable, "-c", _MEMBER, str(rank), port],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for member in self._members:
            member.kill()
            member.wait()

    def check(self) -> Iterator[Finding]:
        """Wait for both, at most a minute."""
        errors = []
        for member in self._members:
            left = max(0.1, 60 - (time.perf_counter() - self._began))
            try:
                _, text = member.communicate(timeout=left)
            except subprocess.TimeoutExpired:
                errors.append("no answer within a minute")
                continue
            if member.returncode:
                errors.append((text.strip().splitlines() or [f"exit code {member.returncode}"])[-1])
        seconds = time.perf_counter() - self._began
        if errors:
            remedy = "Where a name or interface is at fault: export GLOO_SOCKET_IFNAME=lo, and check /etc/hosts"
            yield Finding(PROBLEM, "two processes", f"cannot add two numbers over gloo: {errors[0]}", remedy)
        else:
            yield Finding(OK, "two processes", f"imported DeepSpeed and agreed over gloo within {seconds:.0f} s")

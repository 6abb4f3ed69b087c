"""Is this machine ready? Each check gives one or more findings: ok, warning or problem, and what to do about it.

    visft doctor
    visft doctor --model eva_e --folder /data/runs

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
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visft_ds import program
from visft_ds.flags import Parser, install_command
from visft_ds.resilience.errors import tell

OK, WARNING, PROBLEM = "ok", "warning", "problem"
MODELS = ("debug", "eva_g", "eva_e")
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
    from visft_ds.monitor.console import Section, print_plan

    options = _parser().parse_args(arguments)
    try:
        findings = list(examine(options.folder, options.model, options.port))
    except ValueError as error:
        return tell(error)
    order = (PROBLEM, WARNING, OK)
    rows = [finding.row() for status in order for finding in findings if finding.status == status]
    counts = {status: sum(finding.status == status for finding in findings) for status in order}
    verdict = "not ready" if counts[PROBLEM] else "ready"
    title = f"this machine is {verdict}: {counts[PROBLEM]} problems, {counts[WARNING]} warnings, {counts[OK]} ok"
    print_plan(title, [Section("checks", rows)])
    return 1 if counts[PROBLEM] else 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("doctor"), description="Is this machine ready to train?")
    parser.add_argument(
        "--model", metavar="NAME", help=f"what is to be trained: {', '.join(MODELS)} (default: anything)"
    )
    parser.add_argument("--folder", type=Path, default=Path("."), metavar="DIR", help="where runs will be written (.)")
    parser.add_argument("--port", type=int, default=29500, metavar="N", help="where processes meet (%(default)s)")
    return parser


def examine(folder: Path, model: str | None, port: int) -> Iterator[Finding]:
    """Every check in the order in which a person reads it; the two processes of the last one start first.

    Args:
        folder: where runs will be written.
        model: one of MODELS; None: nothing in particular, so that a model that does not fit is no problem.
        port: on which the processes of a run meet.

    Raises:
        ValueError: an unknown model, a folder that does not exist, or a port out of range.
    """
    if model not in (None, *MODELS):
        raise ValueError(f"--model {model}: known models are {', '.join(MODELS)}")
    if not folder.is_dir():
        raise ValueError(f"--folder {folder} is no folder; make it, or name another one")
    if not 1 <= port < 1 << 16:
        raise ValueError(f"--port {port}: ports go from 1 to 65535")
    with _Pair() as pair:
        for check in (
            check_python(),
            check_packages(),
            check_configurations(),
            check_optional(),
            check_numactl(),
            check_device(),
            check_lora(),
            check_memory(model),
            check_shared_memory(),
            check_disk(folder),
            check_write_speed(folder),
            check_port(port),
            check_locks(),
            pair.check(),
        ):
            yield from _guarded(check)


def _guarded(check: Iterator[Finding]) -> Iterator[Finding]:
    """A check that itself fails is a finding too; the others still run."""
    try:
        yield from check
    except ImportError as error:
        yield Finding(PROBLEM, "import", str(error), f"Install the project: {install_command()}")
    except (OSError, RuntimeError) as error:
        yield Finding(PROBLEM, "check failed", f"{type(error).__name__}: {error}")


# ------------------------------------------------------------------------------------------------ software


def check_python() -> Iterator[Finding]:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding(OK, "python", version)


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
    yield Finding(OK, "compiler", "none needed: nothing is compiled when a run starts")


def check_configurations() -> Iterator[Finding]:
    """Files of ds_configs that a run of any stage and model begins with."""
    from visft_ds.config.layers import CONFIG_ROOT

    names = ["stage1.json", "stage2.json", "engines/zero1.json", *(f"models/{model}.json" for model in MODELS)]
    missing = [name for name in names if not (CONFIG_ROOT / name).is_file()]
    if missing:
        text = f"not found: {CONFIG_ROOT}/{', '.join(missing)}"
        yield Finding(PROBLEM, "ds_configs", text, f"No run can start. Install again: {install_command()}")
    else:
        yield Finding(OK, "ds_configs", str(CONFIG_ROOT))


def check_optional() -> Iterator[Finding]:
    """Packages that only some commands use; none of them is a must."""
    for name, absent in (
        ("open_clip_torch", f"optional (benchmarks, contrastive training): {install_command('eval')}"),
        # ops/attention.py takes torch's own kernel for packed images where this one is missing.
        ("flash-attn", f"torch's own kernels do the same ({install_command('gpu')} --no-build-isolation)"),
    ):
        yield Finding(OK, name, _version(name) or f"not installed, {absent}")


def check_numactl() -> Iterator[Finding]:
    """The tool with which DeepSpeed's launcher binds processes to cores, if it is asked to."""
    where = shutil.which("numactl")
    absent = "not installed, optional (deepspeed --bind_cores_to_rank): apt install numactl"
    yield Finding(OK, "numactl", where or absent)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------- devices


def check_device() -> Iterator[Finding]:
    """GPUs, the precision a run would choose on them, and its attention."""
    import torch

    from visft_ds.ops import DTYPES
    from visft_ds.ops.attention import attention_backend
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
    device = torch.device("cuda", 0) if count else torch.device("cpu")
    precision, why = choose_precision("auto", device)
    name, reason = attention_backend(device, DTYPES[precision])
    yield Finding(OK, "precision", f"{precision} ({why})")
    yield Finding(OK, "attention", f"{name} ({reason})")


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


def check_lora() -> Iterator[Finding]:
    """Adapters change the features, and get a gradient, on a tower of one block."""
    import torch

    from visft_ds.models.eva_vit import build_backbone
    from visft_ds.models.lora import has_effect, inject_lora, lora_parameters

    backbone = build_backbone("debug", width=16, depth=1, num_heads=2, image_size=28).requires_grad_(False)
    inject_lora(backbone, rank=2, alpha=2.0)
    images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    effect = has_effect(backbone, images)
    backbone(images).square().sum().backward()
    gradients = [p.grad for name, p in lora_parameters(backbone).items() if name.endswith("lora_B")]
    learns = all(gradient is not None and bool(gradient.any()) for gradient in gradients)
    if effect > 1e-6 and learns:
        yield Finding(OK, "LoRA", f"changes the features (by {effect:.0e} when disturbed) and gets a gradient")
    else:
        remedy = f"This installation would train nothing in stage 2; install it again: {install_command()}"
        yield Finding(PROBLEM, "LoRA", f"effect {effect:.1e}, gradient {'there' if learns else 'missing'}", remedy)


# ------------------------------------------------------------------------------------------------ resources


def check_memory(wanted: str | None = None) -> Iterator[Finding]:
    """Weights of the models in 16 bit against the memory of the host and of the GPUs.

    With GPUs, the host has one tensor of the model at a time.
    """
    import torch

    from visft_ds.models.eva_vit import build_backbone
    from visft_ds.resilience.host_memory import host_memory_available

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    smallest = min((torch.cuda.get_device_properties(i).total_memory for i in range(gpus)), default=0)
    available = host_memory_available()
    hint = "" if gpus else "; fp32, the default on a CPU, takes twice what 16 bit takes below"
    yield Finding(OK, "host memory", f"{available / _GIB:.1f} GiB available{hint}")
    for name in MODELS:
        weights = 2 * sum(p.numel() for p in build_backbone(name, device="meta", seed=None).parameters())
        size = f"{weights / _GIB:.1f} GiB" if weights > _GIB else f"{weights / 2**20:.1f} MiB"
        text = f"weights of {size} in 16 bit"
        status = PROBLEM if wanted == name else WARNING
        if not gpus and weights > available:
            yield Finding(status, name, f"{text}: more than the host has", "More memory, or more hosts")
        elif gpus and weights > smallest:
            yield Finding(status, name, f"{text}: more than a GPU has", "--engine zero3 divides them over GPUs")
        else:
            yield Finding(OK, name, text)


def check_shared_memory() -> Iterator[Finding]:
    """/dev/shm, through which NCCL's processes on one machine talk."""
    import torch

    if not Path("/dev/shm").is_dir():
        yield Finding(WARNING, "/dev/shm", "not there", "NCCL needs it with several GPUs")
        return
    size = shutil.disk_usage("/dev/shm").total
    several = torch.cuda.is_available() and torch.cuda.device_count() > 1
    text = f"{size / _GIB:.2f} GiB"
    if several and size < _GIB:
        yield Finding(
            WARNING, "/dev/shm", f"{text}, small for several GPUs", "In a container: docker run --shm-size=8g"
        )
    else:
        yield Finding(OK, "/dev/shm", text)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Room for weights, shards and checkpoints."""
    free = shutil.disk_usage(folder).free
    text = f"{free / _GB:.0f} GB free in {folder.resolve()}"
    if free < 2 * _GB:
        yield Finding(PROBLEM, "disk", text, "A checkpoint may not fit: free some, or use another --folder")
    elif free < 60 * _GB:
        remedy = "Enough for the debug model; COCO's shards (20 GB) and EVA-E's weights (9 to 18 GB a file) need more"
        yield Finding(WARNING, "disk", text, remedy)
    else:
        yield Finding(OK, "disk", text)


def check_write_speed(folder: Path) -> Iterator[Finding]:
    """Measure the write speed to the run folder, fsync included."""
    size = 32 * 2**20
    block = os.urandom(2**20)  # a file system that compresses would flatter zeros
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".visft-doctor-") as file:
        began = time.perf_counter()
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        rate = size / (time.perf_counter() - began)
    text = f"{rate / 1e6:.0f} MB/s into {folder.resolve()}"
    if rate < 20e6:
        yield Finding(WARNING, "write speed", text, "Saving will hold up the run: raise visft.run.save_every")
    else:
        yield Finding(OK, "write speed", text)


def check_port(port: int) -> Iterator[Finding]:
    """The port on which DeepSpeed's launcher lets processes meet."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            remedy = f"Give the launcher another one: deepspeed --master_port {port + 1} ..."
            yield Finding(WARNING, f"port {port}", f"taken ({error.strerror})", remedy)
            return
    yield Finding(OK, f"port {port}", "free")


def check_locks() -> Iterator[Finding]:
    """Lock files of builds that were killed: torch waits for them for ever, and says nothing."""
    stated = os.environ.get("TORCH_EXTENSIONS_DIR")
    folder = Path(stated) if stated else Path.home() / ".cache" / "torch_extensions"
    locks = [lock for pattern in ("*/lock", "*/*/lock") for lock in folder.glob(pattern)]
    for lock in locks:
        minutes = (time.time() - lock.stat().st_mtime) / 60
        text = f"{lock}, {minutes:.0f} minutes old"
        remedy = f"If no build is going on, whatever needs this extension waits for ever: rm '{lock}'"
        yield Finding(WARNING, "lock", text, remedy)
    if not locks:
        yield Finding(OK, "locks", "no build of an extension was left behind")


# ----------------------------------------------------------------------------------------- two processes

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

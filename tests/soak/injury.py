"""Disturbing a run from outside, and mending what has to be mended before it can go on."""

from __future__ import annotations

import contextlib
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.soak.schedule import Fault
from tests.soak.trial import SoakFailed, Trial
from visft_ds.checkpoint.format import saved_steps
from visft_ds.data.shards import Manifest, ShardReader

_DISK = 64 << 20  #: bytes of the small disk, many times what the run needs


@dataclass
class Injury:
    """What was done to a trial."""

    trial: Trial
    fault: Fault
    shards: Path  #: folder of the data of the run
    disk: Path | None  #: a small disk that holds the run folder; None where none could be mounted
    says: list[str] = field(
        default_factory=list
    )  #: texts, besides those of the kind, that the output must contain
    note: str = ""  #: for the report
    restarts: int = 1  #: that the command makes for it, where it makes any
    mend: Callable[[], object] = lambda: None  #: before the run is started again

    def do(self) -> None:
        """Disturb the run."""
        getattr(self, self.fault.kind.action)()

    def send(self) -> None:
        """A signal to one process."""
        target = self.trial.find(self.fault.kind.target, self.fault.rank)
        self.note = f"rank {self.fault.rank}" if self.fault.kind.target == "rank" else ""
        target.send_signal(self.fault.kind.number)

    def hang(self) -> None:
        """A rank that is stopped, and let go on by its peers when they have found out."""
        self.note = f"rank {self.fault.rank}"
        self.trial.find("rank", self.fault.rank).send_signal(signal.SIGSTOP)

    def kill_in_save(self) -> None:
        """SIGKILL to the rank that writes, while the folder of a checkpoint has its temporary name."""
        writer, folder = self.trial.find("rank", 0), self.trial.out / "checkpoints"
        until = time.monotonic() + 300
        while not any(folder.glob("*.tmp")):
            if time.monotonic() > until:
                raise SoakFailed("no save was ever seen")
            time.sleep(0.0005)
        writer.kill()
        writer.wait()
        self.note = "in the save" if any(folder.glob("*.tmp")) else "the save was done"

    def kill_twice(self) -> None:
        """SIGKILL to a rank; then to one of the attempt that follows, within the ten seconds that a start
        takes.
        """
        first = self.trial.find("rank", self.fault.rank)
        restarts = self.trial.restarts
        first.kill()
        self.trial.wait_for(lambda: self.trial.restarts > restarts, "a restart")
        self.trial.wait_for(lambda: self._starting() is not None, "a rank that starts")
        time.sleep(10 * self.fault.draw)
        second = self._starting()
        assert second is not None
        self.note = (
            f"after {10 * self.fault.draw:.1f} s, {'before' if not self.trial.step else 'in'} its steps"
        )
        second.kill()
        self.restarts = 2

    def _starting(self) -> psutil.Process | None:
        try:
            return self.trial.find("rank", self.fault.rank)
        except SoakFailed:
            return None

    def power_off(self) -> None:
        """SIGKILL to everything."""
        self.trial.kill_all()

    def damage_checkpoint(self) -> None:
        """Everything is killed; a bit of the newest checkpoint flips before it is started again."""
        folder = self.trial.out / "checkpoints"
        self.trial.wait_for(lambda: len(saved_steps(folder)) > 1, "a second checkpoint")
        self.trial.kill_all()
        step = saved_steps(folder)[-1]
        files = sorted((folder / f"step_{step:08d}").iterdir())
        file = files[int(self.fault.draw * len(files))]
        offset = int(self.fault.draw * 1e6) % file.stat().st_size
        _flip(file, offset)
        self.note = f"{file.parent.name}/{file.name}, byte {offset}"
        self.says = [f"warning: not used: {file.parent}", file.name]

    def damage_shard(self) -> None:
        """A bit of an image or label flips; it flips back when the run has said where."""
        with ShardReader(Manifest.load(self.shards, "train")) as reader:
            index = int(self.fault.draw * len(reader))
            row = reader.manifest.index[index]
            part = ("image", "label")[int(self.fault.draw * 1e6) % 2]
            offset = row[f"{part}_offset"] + row[f"{part}_size"] // 2
            shard = self.shards / reader.manifest.shards[row["shard"]].name
        _flip(shard, offset)
        self.note = f"{shard.name}, byte {offset} ({part} of {row['image_id']:012d})"
        self.says = [shard.name, f"sample {row['image_id']:012d}", f"offset {row[f'{part}_offset']}"]
        self.mend = lambda: _flip(shard, offset)

    def fill_disk(self) -> None:
        """No room for the next checkpoint; made again when the run has ended."""
        if self.disk is None:
            writer = self.trial.find("rank", 0)
            # The nearest to it without a disk of its own: no file may grow.
            resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (1, 1))
            self.note = "by RLIMIT_FSIZE"
            return
        filler = self.disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1 << 16)):
                pass
        self.note = f"{filler.stat().st_size / 1e6:.0f} MB of something else"
        self.mend = filler.unlink


def _flip(path: Path, offset: int) -> None:
    """One bit; again, and it is as it was. In place: the run has the file open."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 16]))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of its own in memory; None where mounting is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(
                ["umount", "--lazy", str(folder)], check=True
            )  # a rank may still be there after a failure

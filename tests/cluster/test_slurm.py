"""launchers/slurm.sbatch under a real SLURM: what its stand-ins in `tests/train/test_slurm.py` stand for."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import HOSTS, PATIENCE, Cluster, cluster, until
from tests.cluster.runs import LAST, Job, held, submit, training
from tests.tiny import equal, steps_recorded
from visft_ds.resilience.heartbeat import FOLDER, read_beats

pytestmark = pytest.mark.slow
TERM, USR1, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL


def job_of(hosts: Cluster, shards: Path, folder: Path, *options: str, **variables: str) -> Job:
    """A training in folder/run with its log in folder/log."""
    return submit(hosts, folder / "log", training(shards, folder / "run")[1:], *options, **variables)


def test_a_run_over_two_hosts_is_that_of_one(hosts: Cluster, shards: Path, straight: Path, tmp_path: Path) -> None:
    job = job_of(hosts, shards, tmp_path)
    facts = job.until("COMPLETED", "FAILED")
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), job.said()
    assert {beat.rank: beat.host for beat in read_beats(tmp_path / "run" / FOLDER)} == dict(enumerate(HOSTS))
    assert equal(tmp_path / "run", straight, LAST)


@pytest.mark.parametrize(
    ("words", "number", "state"),
    [
        ([], TERM, "CANCELLED"),
        (["--signal=TERM", "--batch"], TERM, "COMPLETED"),
        (["--signal=USR1"], USR1, "again"),
        (["--signal=USR1", "--batch"], USR1, "again"),
    ],
    ids=["scancel", "TERM to the script", "USR1", "USR1 to the script"],
)
def test_a_signal_saves_the_run_and_the_same_command_goes_on(
    words: list[str], number: signal.Signals, state: str, hosts: Cluster, shards: Path, straight: Path, tmp_path: Path
) -> None:
    """To all tasks, or to the script alone, whose srun would kill them; after SIGUSR1 the same job has another turn."""
    job = job_of(hosts, shards, tmp_path)
    job.until_said("step 2/")
    (rank,) = hosts.pythons("host-2")
    if words:
        with held(rank, number):
            hosts.run("scancel", *words, job.name)
    else:
        hosts.run("scancel", job.name)  # which would let a stopped task go on
    job.until_said("stopped after step")
    if state != "again":
        assert job.until("COMPLETED", "CANCELLED", "FAILED")["JobState"] == state, job.said()
        assert steps_recorded(tmp_path / "run")[-1] < LAST
        until(lambda: not hosts.pythons("host-1") + hosts.pythons("host-2"), job.said)
        job = job_of(hosts, shards, tmp_path)
    facts = job.until("COMPLETED", "CANCELLED", "FAILED")
    assert (facts["JobState"], facts["ExitCode"]) == ("COMPLETED", "0:0"), job.said()
    assert facts["Restarts"] == ("1" if state == "again" else "0")
    assert "from step" in job.said() and equal(tmp_path / "run", straight, LAST)


#: In place of python. The first rank is one as always; the second one has not got as far as Python in its first turn.
LATE = f"""#!/bin/bash
[ "$RANK" = 0 ] || [ -n "$SLURM_RESTART_COUNT" ] || exec sleep infinity
exec {sys.executable} "$@"
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_sigusr1_during_the_start_queues_the_job_again(
    hosts: Cluster, shards: Path, straight: Path, tmp_path: Path
) -> None:
    """Also where a rank waits for others in a call, and where there is no Python yet."""
    job = job_of(hosts, shards, tmp_path, PYTHON=str(program(tmp_path / "late", LATE)))
    port = 10000 + int(job.name) % 20000

    until(lambda: f":{port} " in hosts.run("ss", "-lnt", place="host-1"), job.said)
    hosts.run("scancel", "--signal=USR1", job.name)
    facts = job.until("COMPLETED", "CANCELLED", "FAILED")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.said()
    assert "stopped before the first step: signal SIGUSR1" in job.said()
    assert equal(tmp_path / "run", straight, LAST)


#: In place of python: the second element of an array asks for another turn once; the first one waits until it may end.
ELEMENT = """#!/bin/bash
[ "$SLURM_ARRAY_TASK_ID" = 0 ] || exit $([ -n "$SLURM_RESTART_COUNT" ] || echo 85)
trap 'exit 85' USR1
echo ready
until [ -e "$1" ]; do read -t 0.1 <> <(:); done
exit 0
"""


def test_one_element_of_an_array_has_another_turn_alone(hosts: Cluster, tmp_path: Path) -> None:
    """The number of the last one's job is that of the whole array."""
    stand_in = program(tmp_path / "element", ELEMENT.replace("$1", str(tmp_path / "may end")))
    array = submit(hosts, tmp_path / "%a", [], "--array=0-1", PYTHON=str(stand_in))
    first, last = (Job(hosts, f"{array.name}_{number}", tmp_path / f"{number}") for number in range(2))
    first.until_said("ready\nready")
    facts = last.until("COMPLETED", "FAILED")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), last.said()
    (tmp_path / "may end").touch()
    facts = first.until("COMPLETED", "FAILED")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), first.said()


@pytest.mark.parametrize("export", ["NONE", "NAME=value"])
def test_tasks_find_their_programs_whatever_is_exported(export: str, hosts: Cluster, tmp_path: Path) -> None:
    """In a folder like the repository, since what names another python is not exported either."""
    (tmp_path / "launchers").mkdir()
    (tmp_path / "launchers/train.py").touch()
    program(tmp_path / ".venv/bin/python", '#!/bin/bash\necho "$RANK of $WORLD_SIZE: $*"\n')
    job = submit(hosts, tmp_path / "log", ["--stage", "2"], f"--export={export}", f"--chdir={tmp_path}")
    assert job.until("COMPLETED", "FAILED")["JobState"] == "COMPLETED", job.said()
    assert sorted(job.said().splitlines()) == [f"{rank} of 2: launchers/train.py --stage 2" for rank in range(2)]


def test_tasks_that_are_not_as_many_on_each_host_are_refused(hosts: Cluster, tmp_path: Path) -> None:
    """SLURM would place one on each, and each would think that there are two."""
    job = submit(hosts, tmp_path / "log", [], "--ntasks=2", "--ntasks-per-node=2")
    facts = job.until("COMPLETED", "FAILED")
    assert facts["ExitCode"] == "2:0" and "leave out --ntasks" in job.said(), job.said()


def test_a_rank_killed_on_another_host_is_named(hosts: Cluster, shards: Path, tmp_path: Path) -> None:
    words = training(shards, tmp_path / "run", **{"visft.run.heartbeat_timeout": 60.0})[1:]
    job = submit(hosts, tmp_path / "log", words)
    job.until_said("step 2/")
    (rank,) = hosts.pythons("host-2")
    rank.kill()
    facts = job.until("COMPLETED", "FAILED")
    assert facts["ExitCode"] == f"{128 + KILL}:0" and facts["Restarts"] == "0", job.said()
    told = "[rank 0] stopped: another rank ended first: no sign of life since then from rank 1 (process"
    assert told in job.said() and " on host-2, last seen: " in job.said()
    assert "Traceback" not in job.said()


def test_a_job_whose_task_is_never_heard_of_again_ends(hosts: Cluster, shards: Path, tmp_path: Path) -> None:
    """SLURM's daemon beside the task was killed. The ranks miss it and save; srun alone would wait for ever."""
    (tmp_path / "cluster").mkdir()
    with cluster(tmp_path / "cluster", kill_wait=5) as damaged:
        job = job_of(damaged, shards, tmp_path, SLURM_WAIT="5")
        job.until_said("step 2/")
        family = psutil.Process(damaged.places["host-2"]).children(recursive=True)
        (daemon,) = [process for process in family if process.name() == "slurmstepd"]
        daemon.kill()
        job.until("COMPLETED", "FAILED")
        assert "stopped after step" in job.said() and "srun: First task exited 5s ago" in job.said(), job.said()
        _, alive = psutil.wait_procs(damaged.pythons("host-1") + damaged.pythons("host-2"), PATIENCE)
        assert not alive

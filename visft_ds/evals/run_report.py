"""Report of any runs, out of their folders: the command `visft report`.

evaluation-SPLIT/    numbers, predictions and pictures of visft evaluate
validation/step_N/   where that is missing: predictions of the newest evaluation during training
tensorboard/         pictures that were drawn at the start and at each evaluation
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from visft_ds.config.preflight import is_url
from visft_ds.config.schema import VisftConfig
from visft_ds.data.decode import MOST_PIXELS, decode_image
from visft_ds.data.shards import Manifest
from visft_ds.evals.compare import METRICS, Evaluation, read_evaluation
from visft_ds.evals.curves import History, read_history
from visft_ds.evals.jackknife import changes
from visft_ds.evals.report import Drawn, Report, write_report
from visft_ds.prepare.places import data_of_run
from visft_ds.redaction import redacted
from visft_ds.run.folder import newest_step, recorded_config
from visft_ds.tasks.pictures import Picture

#: Events of TensorBoard with fewer bytes hold numbers, and no picture.
_SMALL = 2048


@dataclass(frozen=True)
class ReportedRun:
    """A run, and what its folder tells of it."""

    label: str
    folder: Path
    visft: VisftConfig
    steps: int  #: of its schedule
    history: History


def report_runs(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page; returns its path.

    Raises:
        ValueError: a folder without a run, the same run twice, a file that is no page, records that cannot be read.
    """
    labels = _labels(folders)
    if out is None and len(folders) > 1:
        raise ValueError(f"--out is needed for {len(folders)} runs: name the page, as in --out report.html")
    path = out or folders[0] / "report.html"
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {path} would be overwritten with a page: name a file that ends in .html")
    runs = []
    for label, folder in zip(labels, folders, strict=True):
        config = recorded_config(folder)
        runs.append(ReportedRun(label, folder, config.visft, config.total_steps, read_history(folder)))
    lines = [_state(run) for run in runs]
    manifest, why = _validation_split(runs[-1])
    evaluations = _evaluations(runs)
    found = {}
    if manifest is not None and len(evaluations) > 1:
        try:
            found = changes(evaluations[0], evaluations[-1], manifest)
        except (ValueError, OSError) as error:
            why = _in_a_line(error)
    try:
        drawn = _pictures(runs, evaluations)
    except (ValueError, OSError) as error:
        drawn = {}
        lines.append(f"There are no pictures: {_in_a_line(error)}.")
    report = Report(
        title=f"{'Runs' if len(runs) > 1 else 'Run'} {', '.join(labels)}",
        introduction=lines,
        runs={run.label: run.folder for run in runs},
        evaluations=evaluations,
        files={name: path for run in runs for name, path in _files(run)},
        histories={run.label: run.history for run in runs},
        changes=found,
        without=why,
        drawn=drawn,
    )
    return write_report(path, report)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Names of folders, or their paths where names are the same."""
    resolved = [folder.resolve() for folder in folders]
    for folder, place in zip(folders, resolved, strict=True):
        if resolved.count(place) > 1:
            raise ValueError(f"{folder} is given twice: name each run once")
    names = [place.name for place in resolved]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)]


def _state(run: ReportedRun) -> str:
    last = run.history.last
    done = f"finished: {run.steps} steps" if last >= run.steps else f"{last} of {run.steps} steps"
    return f"{run.label}: stage {run.visft.stage} of {run.visft.model.name}, {done}."


def _validation_split(run: ReportedRun) -> tuple[Manifest | None, str]:
    """The images a run is judged on, or why they cannot be read; a server is not asked."""
    split = run.visft.data.val
    try:
        root = data_of_run(run.folder, run.visft, split)
        if is_url(root):
            return None, f"its images are on a server, {redacted(root)}"
        return Manifest.load(root, split), ""
    except (ValueError, OSError) as error:
        return None, _in_a_line(error)


def _evaluations(runs: Sequence[ReportedRun]) -> list[Evaluation]:
    """The last evaluation of each run that has one; of a single run without `visft evaluate` also its first."""
    found = []
    for run in runs:
        data, settings = run.visft.data, run.visft.run
        made = run.folder / f"evaluation-{data.val}"
        if (made / METRICS).is_file():
            found.append(read_evaluation(run.label, made))
            continue
        entries = [entry for entry in run.history.others if any(name.startswith("val/") for name in entry)]
        judged, _ = _validation_split(run)
        limits = [limit for limit in (settings.eval_limit, judged and len(judged)) if limit]
        facts = {"where": f"{data.root}/{data.val}", "images": min(limits, default="all")}
        facts |= {"fingerprint": judged.fingerprint} if judged else {}
        for entry in entries[:1] + entries[1:][-1:] if len(runs) == 1 else entries[-1:]:
            label = run.label if len(runs) > 1 else f"step {entry['step']}"
            metrics = {name[4:]: float(value) for name, value in entry.items() if name.startswith("val/")}
            folder = run.folder / f"validation/step_{entry['step']:08d}"
            found.append(Evaluation(label, folder, {"metrics": metrics, "data": facts}))
    return found


def _pictures(runs: Sequence[ReportedRun], evaluations: Sequence[Evaluation]) -> dict[str, Drawn]:
    """Label -> pictures: of a single run those of its first and last step, else the newest of each run.

    Raises:
        ValueError: a damaged picture.
    """
    if len(runs) == 1 and len(steps := pictures_in_training(runs[0])) > 1:
        return {f"step {step}": drawn for step, drawn in steps.items()}
    if len(evaluations) == len(runs) and all(one.record.get("pictures") for one in evaluations):
        return {one.label: {task: one.pictures(task) for task in one.tasks} for one in evaluations}
    newest = {run.label: pictures_in_training(run) for run in runs}
    return {label: steps[max(steps)] for label, steps in newest.items() if steps}


def pictures_in_training(run: ReportedRun) -> dict[int, Drawn]:
    """First and last step -> pictures in the run's TensorBoard files; not those of steps that were done anew."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto import event_pb2

    steps: dict[int, dict[str, dict[int, bytes]]] = {}
    place = run.folder / "tensorboard"
    for path in sorted(place.glob("events.out.tfevents.*")):
        for data in _large_events(path):
            try:
                event = event_pb2.Event.FromString(data)
            except DecodeError as error:
                raise ValueError(f"{path} is damaged: {error}") from error
            for value in event.summary.value:
                task, _, number = value.tag.rpartition("/")
                if value.HasField("image") and number.isdecimal() and event.step <= run.history.last:
                    of_task = steps.setdefault(event.step, {}).setdefault(task, {})
                    of_task[int(number)] = value.image.encoded_image_string
        for step in sorted(steps)[1:-1]:
            del steps[step]
    return {step: {task: _decoded(place, of_task) for task, of_task in steps[step].items()} for step in sorted(steps)}


def _large_events(path: Path) -> Iterator[bytes]:
    """Events that may hold a picture, up to where a file was cut off.

    TensorBoard's own reader computes a checksum of every byte in Python, which takes a second for a megabyte.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        while len(head := file.read(12)) == 12:  # length and checksum of it, data, checksum of them
            length = int.from_bytes(head[:8], "little")
            if file.tell() + length > size:
                return
            if length < _SMALL:
                file.seek(length, 1)
            else:
                yield file.read(length)
            file.seek(4, 1)


def _decoded(place: Path, pictures: Mapping[int, bytes]) -> dict[int, Picture]:
    try:
        return {image_id: decode_image(data, max_pixels=MOST_PIXELS) for image_id, data in pictures.items()}
    except ValueError as error:
        raise ValueError(f"a picture in {place} is damaged: {error}") from error


def _files(run: ReportedRun) -> Iterator[tuple[str, Path]]:
    """Newest checkpoint and exported weights of a run."""
    if newest_step(run.folder):
        yield f"{run.label}: newest checkpoint", run.folder / f"checkpoints/step_{newest_step(run.folder):08d}"
    if (run.folder / "export").is_dir():
        yield f"{run.label}: exported weights", run.folder / "export"


def _in_a_line(error: Exception) -> str:
    return redacted(" ".join(str(error).split()).rstrip("."))

"""`visft profile data`: its flags, and which of the two measurements of the data path they ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visft_ds.profiling.command import _check_all_known, _check_folder, _command, _resolve, _show, _threads

if TYPE_CHECKING:
    from visft_ds.config import ResolvedConfig
    from visft_ds.profiling.data import StreamData
    from visft_ds.profiling.data_source import MeasuredSet

_EPILOG = """with --stage (and --model, --engine, --set, --deepspeed_config of visft train), every stream of that
configuration is measured; without, a plain sample of three tasks at 224 pixels: boxes, masks of 56x56 cells, a caption.
--data is a folder of shards, or a COCO tree (annotations/ beside train2017/), which is packed into a temporary folder
and repeated until there are --images samples; --synthetic draws pictures instead.

examples:
  visft profile data --data shards
  visft profile data --stage 2 --model debug --synthetic
  visft profile data --data coco --compare
"""


def add_data_parser(commands: Any) -> None:
    """Add the sub-command that measures the data path."""
    parser = _command(
        commands,
        "data",
        help="where the time of a sample goes; --compare: beside plain webdataset",
        description="Measure the data path: time by part, threads, the interpreter lock; or a comparison.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--compare", action="store_true", help="beside plain webdataset pipelines, in one run")
    add("--data", type=Path, metavar="FOLDER", help="shards, or a COCO tree")
    add("--split", metavar="NAME", help="of the shards or the tree (train)")
    add("--synthetic", action="store_true", help="generated pictures of 640 x 480 instead of --data")
    add("--reencode", metavar="Q[:SIDE]", help="with --compare: store pictures so first, as make_shards.py build does")
    add("--images", type=int, metavar="N", help="samples of one measurement (512)")
    add("--batch", type=int, default=32, metavar="N", help="samples of a step of the plain sample (%(default)s)")
    add("--threads", type=int, nargs="+", metavar="N", help="numbers of threads that are measured (0 1 2)")
    add("--processes", type=int, nargs="*", metavar="N", help="numbers of worker processes that are measured (1 2)")
    add("--role", default="both", metavar="{both,images,labels}", help="what is read (%(default)s)")
    add("--step-ms", type=float, default=0.0, metavar="MS", help="time in which the consumer is busy with a step (0)")
    add("--repeats", type=int, default=5, metavar="N", help="measurements of each after one to warm up (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.set_defaults(run=profile_data, parser=parser)


def profile_data(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write; arguments and errors as `profile_train`. Returns the exit status."""
    configured = any(text.partition("=")[0] in ("--stage", "--deepspeed_config") for text in rest)
    if not configured or options.compare:
        _check_all_known(rest, options)
    _check_folder(options.json)
    if options.reencode is not None and not options.compare:
        raise ValueError("--reencode belongs to --compare")
    if options.compare:
        _profile_compare(options, command)
    else:
        return _profile_parts(options, rest if configured else None, command)
    return 0


def _profile_compare(options: argparse.Namespace, command: Sequence[str]) -> None:
    from visft_ds.profiling.data_compare import CompareOptions, compare, make_sections, make_title

    images = {} if options.images is None else {"images": options.images}
    chosen = CompareOptions(
        _folder(options),
        options.split or "train",
        batch=options.batch,
        rounds=options.repeats,
        reencode=options.reencode,
        **images,
    )
    with _one_thread():
        record = _headed(command, lambda: compare(chosen))
    _show(record, make_title, make_sections, options.json)


def _profile_parts(options: argparse.Namespace, rest: Sequence[str] | None, command: Sequence[str]) -> int:
    config: ResolvedConfig | None = None
    if rest is not None:
        given = [*rest, *([] if options.data is None else ["--data", str(options.data)])]
        resolved = _resolve(options.parser, given, synthetic=True)  # weights and heads are not needed
        if isinstance(resolved, int):
            return resolved
        config = resolved
    from visft_ds.profiling.data import DataOptions, make_sections, make_title, measure_data

    chosen: dict[str, Any] = {name: getattr(options, name) for name in ("role", "repeats", "step_ms")}
    for name in ("threads", "processes"):
        if getattr(options, name) is not None:
            chosen[name] = tuple(getattr(options, name))
    chosen |= {} if options.images is None else {"images": options.images}
    how = DataOptions(**chosen)
    opened = _plain(options, how.images) if config is None else _configured(options, config, how.images)
    with _one_thread(), opened as (data, streams):
        record = _headed(command, lambda: measure_data(data, streams, how))
    _show(record, make_title, make_sections, options.json)
    return 0


@contextmanager
def _plain(options: argparse.Namespace, images: int) -> Iterator[tuple[MeasuredSet, Sequence[StreamData]]]:
    """The set, and the plain sample of three tasks as its only stream."""
    from visft_ds.profiling.data import StreamData
    from visft_ds.profiling.data_source import TASK, joint_pipeline, open_set

    if options.batch < 1:
        raise ValueError(f"--batch {options.batch} must be at least 1")
    with open_set(_folder(options), options.split or "train", max(images, options.batch)) as data:
        yield data, [StreamData(TASK, joint_pipeline(data.vocabulary), min(options.batch, len(data)))]


@contextmanager
def _configured(
    options: argparse.Namespace, config: ResolvedConfig, images: int
) -> Iterator[tuple[MeasuredSet, Sequence[StreamData]]]:
    """The set and the streams of a configuration, with its transforms and batches."""
    from visft_ds.data.manifest import Manifest
    from visft_ds.prepare.datasets import cache_of, settle_classes
    from visft_ds.prepare.streams import pipeline_of, streams_of, vocabulary_of
    from visft_ds.profiling.data import StreamData
    from visft_ds.profiling.data_source import MeasuredSet, open_set
    from visft_ds.profiling.session import _every_word

    settings = _every_word(config.visft) if options.synthetic else config.visft
    wanted = max([images, *(stream.batch_size for stream in settings.streams().values())])
    with ExitStack() as stack:
        if options.synthetic:
            data = stack.enter_context(open_set(None, "train", wanted))
        else:
            where, split = settings.data.root, options.split or settings.data.train
            manifest = Manifest.load(where, split, cache=cache_of(settings.data))
            data = MeasuredSet.of(f"{where}/{split}", manifest, wanted)
        words = vocabulary_of(settings, data.manifest)
        own = streams_of(settle_classes(config, data.manifest).visft, data.manifest)
        yield (
            data,
            [
                StreamData(stream.name, pipeline_of(stream, words, train=True), min(stream.batch_size, len(data)))
                for stream in own.values()
            ],
        )


def _folder(options: argparse.Namespace) -> Path | None:
    """The folder of the set; None for generated images. Raises ValueError unless one of both is asked for."""
    if (options.data is None) != options.synthetic:
        both = "both are given" if options.synthetic else "neither is given"
        raise ValueError(f"--data FOLDER or --synthetic: {both}; one of them says what is read")
    folder: Path | None = options.data
    return folder


def _one_thread() -> Any:
    """Torch's own threads would be busy waiting beside the loader's."""
    return _threads(1)


def _headed(command: Sequence[str], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Measure; returns the record headed by circumstances and command. The load average is that from before."""
    from visft_ds.profiling.record import circumstances

    head = {**circumstances(os.getloadavg()), "command": list(command)}
    return head | dict(measure())

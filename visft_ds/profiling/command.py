"""The sub-commands of `visft profile`: their flags, the order of things, and who prints."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from visft_ds.config import ResolvedConfig, build_parser, missing_inputs, render_missing, resolve_arguments

_EPILOG = """every other flag is one of visft train and means what it means there:
  --stage --model --engine --data --set --deepspeed_config --dry-run; --out and --resume have no effect, since nothing
  is written but the file of --json.

examples:
  visft profile train --stage 2 --model debug --data shards
  deepspeed --num_gpus 8 --module visft_ds profile train --stage 2 --synthetic --json profile.json
"""


def _command(commands: Any, name: str, *, help: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """A sub-command in the manner of all."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    return parser


def add_train_parser(commands: Any) -> None:
    """Add the sub-command; it leaves the flags of visft train alone."""
    parser = _command(
        commands,
        "train",
        help="speed, time by part, memory by kind and FLOPs of a training configuration",
        description="Measure a training configuration through the code that trains: same model, engine and loader.",
        epilog=_EPILOG,
    )
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps of each task (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before these (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured there")
    parser.add_argument(
        "--synthetic",
        action="store_true",
        help="generated pictures instead of shards; weights and heads that are missing start at random",
    )
    parser.set_defaults(run=profile_train, parser=parser)


def profile_train(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write. Collective; rank 0 prints and writes.

    Args:
        options: what `add_train_parser` added.
        rest: all other flags.
        command: the command line, for the record.

    Raises:
        ValueError: what a user can mend.
    """
    config = _resolve(options.parser, rest, synthetic=options.synthetic)
    if isinstance(config, int):
        return config
    from visft_ds.profiling.measure import Lengths

    lengths = Lengths(options.steps, options.warmup)
    _check_folder(options.json)
    record = measure_configuration(config, lengths, synthetic=options.synthetic, command=command)
    if record is None:
        return 0
    from visft_ds.profiling.report import make_sections, make_title

    _show(record, make_title, make_sections, options.json)
    return 0


def measure_configuration(
    config: ResolvedConfig, lengths: Any, *, synthetic: bool, command: Sequence[str]
) -> dict[str, Any] | None:
    """Every stream of a configuration on every rank; the record on the main process, None on the others."""
    from visft_ds.parallel import distributed
    from visft_ds.profiling.measure import measure_stream
    from visft_ds.profiling.report import make_record
    from visft_ds.profiling.session import open_session

    with open_session(config, synthetic=synthetic) as session:
        own = {name: measure_stream(session, name, lengths) for name in session.config.visft.streams()}
        ranks = distributed.gather_objects(own)
        record = make_record(session, ranks, command) if ranks is not None else None
    distributed.close()
    return record


def _check_all_known(rest: Sequence[str], options: argparse.Namespace) -> None:
    """Raise ValueError for arguments that the sub-command does not know."""
    if rest:
        flags = [f"--{name}" for name in vars(options) if name not in ("run", "local_rank")]
        near = difflib.get_close_matches(rest[0].partition("=")[0], flags, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
        raise ValueError(f"{rest[0]}: unknown argument; {hint}")


def _check_folder(file: Path | None) -> None:
    if file is not None and not file.resolve().parent.is_dir():
        raise ValueError(f"--json {file}: there is no folder {file.resolve().parent}; make it first")


def _show(
    record: Mapping[str, Any],
    make_title: Callable[[Mapping[str, Any]], str],
    make_sections: Callable[[Mapping[str, Any]], Sequence[Any]],
    file: Path | None,
) -> None:
    """Print the tables of a record, and write it to a file where one is given."""
    from visft_ds.monitor.console import print_plan

    print_plan(make_title(record), make_sections(record))
    if file is not None:
        file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {file}", flush=True)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Compute with this many threads inside; None: as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _resolve(parser: argparse.ArgumentParser, rest: Sequence[str], *, synthetic: bool) -> ResolvedConfig | int:
    """The configuration that a training would run; after a --dry-run, which prints its plan, the exit status.

    Torch is not loaded before it is clear that there is something to measure.
    """
    theirs = build_parser()
    _, unknown = theirs.parse_known_args(list(rest))
    ours = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    for text in unknown:
        near = difflib.get_close_matches(text.partition("=")[0], ours, n=1, cutoff=0.7)
        if near:
            raise ValueError(f"{text}: unknown flag; did you mean {near[0]}?")
    arguments, config = resolve_arguments(rest)
    missing = [] if synthetic else missing_inputs(config)
    if missing and not arguments.dry_run:
        raise ValueError(f"{render_missing(missing)}\nor measure without files: --synthetic")
    if not arguments.dry_run:
        return config
    from visft_ds.parallel import distributed
    from visft_ds.run.start_report import print_dry_run

    told = render_missing(missing) if missing else ""
    return print_dry_run(config, distributed.world_size(), told) if distributed.is_main() else 0

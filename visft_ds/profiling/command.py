"""`tools/profile.py train`: the flags, the order of things, and who prints."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft_ds.config import ResolvedConfig, build_parser, missing_inputs, render_missing, resolve_arguments

_EPILOG = """every other flag is one of launchers/train.py and means what it means there:
  --stage --model --engine --data --set --deepspeed_config --dry-run; --out and --resume have no effect, since nothing
  is written but the file of --json.

examples:
  python tools/profile.py train --stage 2 --model debug --data shards
  deepspeed --num_gpus 8 tools/profile.py train --stage 2 --synthetic --json profile.json
"""


def add_train_parser(commands: Any) -> None:
    """Add the sub-command; it leaves the flags of launchers/train.py alone."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="speed, time by part, memory by kind and FLOPs of a training configuration",
        description="Measure a training configuration through the code that trains: same model, engine and loader.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
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
    if config is None:
        return 0
    from visft_ds.profiling.measure import Lengths

    lengths = Lengths(options.steps, options.warmup)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        raise ValueError(f"--json {options.json}: there is no folder {options.json.resolve().parent}; make it first")
    record = measure_configuration(config, lengths, synthetic=options.synthetic, command=command)
    if record is None:
        return 0
    from visft_ds.monitor.console import print_plan
    from visft_ds.profiling.report import make_sections, make_title

    print_plan(make_title(record), make_sections(record))
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {options.json}", flush=True)
    return 0


def measure_configuration(
    config: ResolvedConfig, lengths: Any, *, synthetic: bool, command: Sequence[str]
) -> dict[str, Any] | None:
    """Every task of a configuration on every rank; the record on the main process, None on the others."""
    from visft_ds.parallel import distributed
    from visft_ds.profiling.measure import measure_task
    from visft_ds.profiling.report import make_record
    from visft_ds.profiling.session import open_session

    with open_session(config, synthetic=synthetic) as session:
        own = {task: measure_task(session, task, lengths) for task in session.config.visft.tasks.enabled()}
        ranks = distributed.gather_objects(own)
        record = make_record(session, ranks, command) if ranks is not None else None
    distributed.close()
    return record


def _resolve(parser: argparse.ArgumentParser, rest: Sequence[str], *, synthetic: bool) -> ResolvedConfig | None:
    """The configuration that launchers/train.py would run; None after a --dry-run, which prints it.

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
    from visft_ds.start_report import print_dry_run

    if distributed.is_main():
        print_dry_run(config, distributed.world_size(), render_missing(missing) if missing else "")
    return None

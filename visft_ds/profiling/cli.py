"""Measure: how fast, where the time goes, what fills the memory, how far from the hardware's limit.

    visft profile train --stage 2 --model debug --data shards
    deepspeed --num_gpus 8 --module visft_ds profile train --stage 2 --synthetic --json profile.json
    visft profile data --data shards
    visft plan --cluster 8xA100-80GB
    deepspeed --num_gpus 2 --module visft_ds profile comm --stage 2 --model debug
    visft profile ops
    visft profile peft

Exit status: 0 measured, 1 memory is not as planned, 2 wrong usage or something missing, 3 another rank ended first.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from visft_ds import program
from visft_ds.config import ResolvedConfig, build_parser, missing_inputs, render_missing, resolve_arguments
from visft_ds.config.backbones import model_of, named
from visft_ds.redaction import redacted_words
from visft_ds.resilience.errors import tell

TOOL = "tools/profile.py"
_PARTS = ("blocks", "projection", "kept")
_RECORD = "write everything that was measured there"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    return _run(sys.argv[1:] if arguments is None else arguments, program("profile"))


def plan(arguments: Sequence[str]) -> int:
    """Run the command `plan`, which `visft` also has by itself; returns the exit status."""
    return _run(["plan", *arguments], "visft")


def _run(given: Sequence[str], name: str) -> int:
    try:
        parser = argparse.ArgumentParser(
            prog=name, description="Measure what a configuration costs.", allow_abbrev=False, exit_on_error=False
        )
        parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher may add it
        commands = parser.add_subparsers(required=True, metavar="COMMAND")
        for add_flags in (_train_flags, _data_flags, _plan_flags, _ops_flags, _peft_flags, _comm_flags):
            add_flags(commands)
        options, rest = parser.parse_known_args(given)
        return int(options.run(options, rest, [*name.split(), *given]))
    except argparse.ArgumentError as error:
        return tell(ValueError(str(error)))
    except (ValueError, OSError, RuntimeError) as error:
        return tell(error)


def _command(commands: Any, name: str, run: Any, *, help: str, description: str, epilog: str) -> Any:
    """Add a sub-command in the manner of all; returns its `add_argument`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser.add_argument


def _check_all_known(rest: Sequence[str], options: argparse.Namespace) -> None:
    """Raise ValueError for arguments that the sub-command does not know."""
    if rest:
        flags = [f"--{name}" for name in vars(options) if name not in ("run", "parser", "local_rank")]
        near = difflib.get_close_matches(rest[0].partition("=")[0], flags, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
        raise ValueError(f"{rest[0]}: unknown argument; {hint}")


def _check_folder(file: Path | None) -> None:
    if file is not None and not file.resolve().parent.is_dir():
        raise ValueError(f"--json {file}: there is no folder {file.resolve().parent}; make it first")


def _show(record: Mapping[str, Any] | None, kind: ModuleType, command: Sequence[str], file: Path | None) -> int:
    """Print the `tables` that a module makes of its record, and write it where a file is given. Returns exit status 0.

    Args:
        record: None on all ranks but the main one.
    """
    from visft_ds.monitor.console import print_plan

    if record is not None:
        print_plan(*kind.tables(record))
        if file is not None:
            file.write_text(
                json.dumps({**record, "command": redacted_words(command)}, indent=2) + "\n", encoding="utf-8"
            )
            print(f"wrote {file}", flush=True)
    return 0


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
    _, unknown = build_parser().parse_known_args(list(rest))
    ours = [flag for flag in parser._option_string_actions if flag.startswith("--")]
    for text in unknown:
        near = difflib.get_close_matches(text.partition("=")[0], ours, n=1, cutoff=0.7)
        if near:
            raise ValueError(f"{text}: unknown flag; did you mean {near[0]}?")
    arguments, config = resolve_arguments(rest)
    missing = [] if synthetic else missing_inputs(config)
    if not arguments.dry_run:
        if missing:
            raise ValueError(f"{render_missing(missing)}\nor measure without files: --synthetic")
        return config
    from visft_ds.parallel import distributed
    from visft_ds.run.start_report import print_dry_run

    text = render_missing(missing) if missing else ""
    return print_dry_run(config, distributed.world_size(), text) if distributed.is_main() else 0


# ------------------------------------------------------------------------------------------------------- train


def _train_flags(commands: Any) -> None:
    add = _command(
        commands,
        "train",
        profile_train,
        help="speed, time by part, memory by kind and FLOPs of a training configuration",
        description="Measure a training configuration through the code that trains: same model, engine and loader.",
        epilog="""every other flag is one of visft train and means what it means there:
  --stage --model --engine --data --set --deepspeed_config --dry-run; --out and --resume have no effect, since nothing
  is written but the file of --json.

examples:
  visft profile train --stage 2 --model debug --data shards
  deepspeed --num_gpus 8 --module visft_ds profile train --stage 2 --synthetic --json profile.json
""",
    )
    add("--steps", type=int, default=10, metavar="N", help="timed steps of each task (%(default)s)")
    add("--warmup", type=int, default=3, metavar="N", help="steps before these (%(default)s)")
    add("--json", type=Path, metavar="FILE", help=_RECORD)
    text = "generated pictures instead of shards; weights and heads that are missing start at random"
    add("--synthetic", action="store_true", help=text)


def profile_train(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure, print, write. Collective; rank 0 prints and writes. Returns the exit status, as all commands do.

    Args:
        options: flags of the command.
        rest: all other flags.
        command: the command line, for the record.

    Raises:
        ValueError: what a user can mend.
    """
    config = _resolve(options.parser, rest, synthetic=options.synthetic)
    if isinstance(config, int):
        return config
    from visft_ds.profiling import train

    _check_folder(options.json)
    record = train.measure_train(config, options.steps, options.warmup, synthetic=options.synthetic)
    return _show(record, train, command, options.json)


# -------------------------------------------------------------------------------------------------------- data


def _data_flags(commands: Any) -> None:
    add = _command(
        commands,
        "data",
        profile_data,
        help="where the time of a sample goes; --compare: beside plain webdataset",
        description="Measure the data path: time by part, threads, the interpreter lock; or a comparison.",
        epilog="""with --stage (and --model, --engine, --set, --deepspeed_config of visft train), every stream of that
configuration is measured; without, a plain sample of three tasks at 224 pixels: boxes, masks of 56x56 cells, a caption.
--data is a folder of shards, or a COCO tree (annotations/ beside train2017/), which is packed into a temporary folder
and repeated until there are --images samples; --synthetic draws pictures instead.

examples:
  visft profile data --data shards
  visft profile data --stage 2 --model debug --synthetic
  visft profile data --data coco --compare
""",
    )
    add("--compare", action="store_true", help="beside plain webdataset pipelines, in one run")
    add("--data", metavar="FOLDER", help="shards (with --stage also by a URL), or a COCO tree")
    add("--split", metavar="NAME", help="of the shards or the tree (train)")
    add("--synthetic", action="store_true", help="generated pictures of 640 x 480 instead of --data")
    add("--reencode", metavar="Q[:SIDE]", help="with --compare: store pictures so first, as visft shards build does")
    add("--images", type=int, metavar="N", help="samples of one measurement (512)")
    add("--batch", type=int, default=32, metavar="N", help="samples of a step of the plain sample (%(default)s)")
    add("--threads", type=int, nargs="+", metavar="N", help="numbers of threads that are measured (0 1 2)")
    add("--processes", type=int, nargs="*", metavar="N", help="numbers of worker processes that are measured (1 2)")
    add("--role", default="both", metavar="{both,images,labels}", help="what is read (%(default)s)")
    add("--step-ms", type=float, default=0.0, metavar="MS", help="time in which the consumer is busy with a step (0)")
    add("--repeats", type=int, default=5, metavar="N", help="measurements of each after one to warm up (%(default)s)")
    add("--json", type=Path, metavar="FILE", help=_RECORD)


def profile_data(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure the data path by itself or beside plain webdataset; arguments and errors as `profile_train`."""
    configured = any(text.partition("=")[0] in ("--stage", "--deepspeed_config") for text in rest)
    if not configured or options.compare:
        _check_all_known(rest, options)
    _check_folder(options.json)
    if options.data is not None and options.synthetic:
        raise ValueError("--data FOLDER or --synthetic: both are given; one of them says what is read")
    if options.reencode is not None and not options.compare:
        raise ValueError("--reencode belongs to --compare")
    split, images = options.split or "train", {} if options.images is None else {"images": options.images}
    if options.compare:
        from visft_ds.profiling import data_compare

        with _threads(1):  # torch's own would be busy waiting beside the loader's
            comparison = data_compare.CompareOptions(
                _folder(options),
                split,
                batch=options.batch,
                rounds=options.repeats,
                reencode=options.reencode,
                **images,
            )
            return _show(data_compare.compare(comparison), data_compare, command, options.json)
    config: ResolvedConfig | None = None
    if configured:
        given = [*rest, *([] if options.data is None else ["--data", options.data])]
        resolved = _resolve(options.parser, given, synthetic=True)  # weights and heads are not needed
        if isinstance(resolved, int):
            return resolved
        config = resolved
    from visft_ds.profiling import data

    chosen: dict[str, Any] = {name: getattr(options, name) for name in ("role", "repeats", "step_ms")}
    for name in ("threads", "processes"):
        if getattr(options, name) is not None:
            chosen[name] = tuple(getattr(options, name))
    how = data.DataOptions(**chosen, **images)
    if config is None:
        opened = data.plain(_folder(options), split, how.images, options.batch)
    else:
        opened = data.configured(config, how.images, split=options.split, synthetic=options.synthetic)
    with _threads(1), opened as (found, streams):
        return _show(data.measure_data(found, streams, how), data, command, options.json)


def _folder(options: argparse.Namespace) -> Path | None:
    """The folder of the set; None for generated images. Raises ValueError where neither is asked for."""
    if options.data is None and not options.synthetic:
        raise ValueError("--data FOLDER or --synthetic: neither is given; one of them says what is read")
    return None if options.data is None else Path(options.data)


# -------------------------------------------------------------------------------------------------------- plan


def _plan_flags(commands: Any) -> None:
    add = _command(
        commands,
        "plan",
        profile_plan,
        help="memory and time on a cluster one does not have: what fits, with which settings, how long it takes",
        description="Predict memory by part and time of both stages, and find the fastest settings that fit.",
        epilog="""--cluster takes COUNTxNAME[-MEMORY] (machines of 8) or MACHINESxGPUSxNAME[-MEMORY] of the GPUs that
are known, or a JSON file; --network GB/s one way, or dgx-h100, dgx-a100, 200gbit, 100gbit (docs/memory-and-speed.md).

examples:
  visft plan --cluster 8xV100-32GB
  visft plan --cluster 8x4090 --model eva_g --stage 2
  visft plan --cluster 8xA100-80GB --stage 2 --engine zero1 --set visft.model.recompute=block
  visft plan --cluster 8x8xH100 --network 25
  visft plan --cluster 256xH100 --model eva_e --stage 2 --scaling
  visft plan --validate
  deepspeed --num_gpus 2 --module visft_ds plan --validate
""",
    )
    add("--cluster", metavar="SPEC", help="such as 8xA100-80GB, 8x8xH100 (machines x GPUs), 8x4090, or FILE.json")
    add("--network", metavar="SPEED", help="of a machine: GB/s or a name (as machines with such GPUs are sold)")
    add("--scaling", action="store_true", help="table: 1, 2, 4, ... GPUs by up to 256 times the images a step")
    add("--model", metavar="NAME|FILE", help="as in visft train (eva_e and eva_g)")
    add("--backbone", metavar="NAME|FILE", help="as in visft train; of its files only config.json is needed")
    add("--download", action="store_true", help="fetch that from the hub")
    add("--stage", type=int, choices=(1, 2), help="(both)")
    add("--engine", metavar="NAME|FILE", help="plan this one as configured, search nothing")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as in visft train")
    add("--validate", action="store_true", help="compare predictions with measurements on this machine")
    add("--json", type=Path, metavar="FILE", help="write everything there")


def profile_plan(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Plan or validate, print, write. Returns 1 where a prediction of memory is off by more than 10 %, else 0.

    Raises:
        ValueError: what a user can mend.
    """
    _check_all_known(rest, options)
    _check_folder(options.json)
    if options.validate == bool(options.cluster):
        raise ValueError("plan: give --cluster SPEC, or --validate")
    others = ("network", "scaling", "model", "backbone", "download", "stage", "engine", "set")
    unused = [f"--{name}" for name in others if getattr(options, name)]
    if options.validate and unused:
        raise ValueError(f"plan: leave out {', '.join(unused)}: --validate has models and settings of its own")
    if options.scaling and options.engine:
        raise ValueError("plan: --scaling plans ZeRO-1 and pipelines; leave out --engine")
    if options.validate:
        from visft_ds.parallel import distributed
        from visft_ds.profiling import plan_validation

        found = plan_validation.validate()
        distributed.close()
        _show(found, plan_validation, command, options.json)
        return int(found is not None and found["largest_error"] > plan_validation.TOLERANCE)
    from visft_ds.profiling import plan

    flags = dict[str, tuple[str, Any]]()
    if options.backbone is not None:
        options.model, flags = model_of(named(options.backbone, download=options.download), options.model)
    models = [options.model] if options.model else ["eva_e", "eva_g"]
    stages = [options.stage] if options.stage else [1, 2]
    record = plan.make_plans(
        options.cluster,
        models,
        stages,
        options.engine,
        options.set,
        options.network,
        scales=options.scaling,
        backbone=flags,
    )
    return _show(record, plan, command, options.json)


# ----------------------------------------------------------------------------------------------- ops and peft


def _ops_flags(commands: Any) -> None:
    add = _command(
        commands,
        "ops",
        profile_ops,
        help="adapted blocks over frozen ones: time by way of adapting, and what they keep for the backward pass",
        description="Measure blocks with adapters beside the same blocks without, and beside other ways to adapt them.",
        epilog="""examples:
  visft profile ops
  visft profile ops --pixels 224 --dtypes fp32 --repeats 3
  visft profile ops --device cuda --dtypes bf16 --pixels 224 448 1022 --repeats 30
""",
    )
    _block_flags(add, rank="of the adapters")
    add("--targets", nargs="+", choices=("q", "k", "v"), default=("q", "v"), help="of the projection (q v)")
    add("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="what to measure (all)")


def _peft_flags(commands: Any) -> None:
    add = _command(
        commands,
        "peft",
        profile_peft,
        help="the backbone's part of a stage-2 step against the same tower in timm under PEFT: time, peak memory",
        description="Measure forward, backward and update of a tower with adapters beside timm + PEFT (needs timm).",
        epilog="""examples:
  visft profile peft
  visft profile peft --pixels 224 --dtypes fp32 --depth 4 --repeats 3
  visft profile peft --device cuda --dtypes bf16 --batch 8 --repeats 30
""",
    )
    _block_flags(add, rank="of the adapters on q and v")
    add("--batch", type=int, default=1, metavar="N", help="images (%(default)s)")
    add("--stream", default="16bit", metavar="TYPE", help="timm's in 16 bit: (%(default)s), or fp32")
    add("--compile", action="store_true", help="timm + PEFT by torch.compile, too")


def _block_flags(add: Any, *, rank: str) -> None:
    """Add the flags of both; `rank` says which adapters have it."""
    add("--pixels", type=int, nargs="+", default=(224, 448), metavar="N", help="sides (224 448)")
    add("--dtypes", nargs="+", default=("fp32", "bf16"), metavar="TYPE", help="(fp32 bf16), or fp16")
    add("--depth", type=int, default=2, metavar="N", help="blocks (%(default)s)")
    add("--rank", type=int, default=64, metavar="N", help=f"{rank} (%(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="rounds after one (%(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads (as it is)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    add("--small", action="store_true", help="debug width instead of EVA-ViT-E's")
    add("--json", type=Path, metavar="FILE", help=_RECORD)


def profile_ops(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure blocks beside other ways to adapt them; errors as `profile_train`."""
    _check_block_flags(rest, options)
    from visft_ds.profiling import blocks

    with _threads(options.threads):
        record = blocks.measure_operations(blocks.OperationOptions(**_chosen(options, blocks.OperationOptions)))
    return _show(record, blocks, command, options.json)


def profile_peft(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure the tower beside timm + PEFT; errors as `profile_train`, and where there is no timm."""
    _check_block_flags(rest, options)
    from visft_ds.profiling import peft

    with _threads(options.threads):
        record = peft.measure_peft(peft.PeftOptions(**_chosen(options, peft.PeftOptions)))
    return _show(record, peft, command, options.json)


def _check_block_flags(rest: Sequence[str], options: argparse.Namespace) -> None:
    _check_all_known(rest, options)
    _check_folder(options.json)
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads {options.threads} must be at least 1")


def _chosen(options: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Flags that are fields of a dataclass of options."""
    return {field.name: getattr(options, field.name) for field in fields(kind)}


# -------------------------------------------------------------------------------------------------------- comm


def _comm_flags(commands: Any) -> None:
    add = _command(
        commands,
        "comm",
        profile_comm,
        help="bandwidth and latency of the calls that engines use, at the sizes of a configuration; share of a step",
        description="Measure the collectives and sends of a configuration's engine on two processes or more.",
        epilog="""every other flag is one of visft train and means what it means there:
  --stage --model --engine --set --deepspeed_config; no data, weights or heads are needed.

examples:
  deepspeed --num_gpus 2 --module visft_ds profile comm --stage 2 --model debug
  deepspeed --num_gpus 8 --module visft_ds profile comm --stage 2 --engine zero3 --json comm.json
  deepspeed --num_gpus 2 --module visft_ds profile comm --stage 2 --model debug --engine pipeline
""",
    )
    add("--sizes", type=int, nargs="+", metavar="BYTES", help="of the sweep (1 KiB to 32 MiB)")
    add("--max-bytes", type=int, metavar="N", help="of one message (32 MiB; 1 GiB on GPUs)")
    add("--repeats", type=int, default=10, metavar="N", help="rounds after one (%(default)s)")
    add("--json", type=Path, metavar="FILE", help=_RECORD)


def profile_comm(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Measure what processes send each other; arguments and errors as `profile_train`."""
    config = _resolve(options.parser, rest, synthetic=True)
    if isinstance(config, int):
        return config
    _check_folder(options.json)
    from visft_ds.profiling import comm

    record = comm.measure_comm(config, comm.CommOptions(options.sizes, options.max_bytes, options.repeats))
    return _show(record, comm, command, options.json)

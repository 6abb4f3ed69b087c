"""A training run without a run folder: the same model, engine and loader, ready to make steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from visft_ds.config import Batches, ResolvedConfig
from visft_ds.config.preflight import head_files
from visft_ds.config.schema import Precision
from visft_ds.costs.hardware import DTYPES
from visft_ds.data.dataset import DataSet
from visft_ds.data.loader import StepLoader
from visft_ds.data.plan import Plan
from visft_ds.data.samples import Batch
from visft_ds.data.shards import ShardReader
from visft_ds.model import counts_of, loss_denominators_of
from visft_ds.models.backbone import build_empty
from visft_ds.parallel import distributed
from visft_ds.parallel.build import build_engine
from visft_ds.parallel.engine import Schedule, StepReport, ZeroEngine, start_process_group
from visft_ds.prepare.datasets import (
    TrainingSet,
    captioned,
    data_identity,
    first_of,
    open_training_data,
    settle_classes,
    workers_of,
)
from visft_ds.prepare.model import plan_groups, prepare_model
from visft_ds.prepare.streams import pipelines_of, plan_of, vocabulary_of
from visft_ds.pretrained import local
from visft_ds.profiling.data import GENERATED_SIZE, every_word, open_set
from visft_ds.resilience.host_memory import host_memory_available, memory_bounded
from visft_ds.resilience.out_of_memory import MemoryWatch
from visft_ds.run.machine import check_machine, choose_recompute
from visft_ds.tasks.vocabulary import Vocabulary

#: Part of the memory that weights and optimizer may fill. The rest of a CPU's has to do for all activations, and where
#: it ends the kernel kills the process without a word; a GPU's allocator says what is the matter.
FILLED = {"cpu": 0.7, "cuda": 0.95}


@dataclass(frozen=True)
class Session:
    """Configuration, engine and data of a measurement."""

    config: ResolvedConfig
    batches: Batches
    engine: ZeroEngine
    sets: Mapping[str, TrainingSet]
    vocabulary: Vocabulary | None
    precision: Precision
    precision_reason: str
    memory: MemoryWatch  #: explains a step that does not fit
    notes: tuple[str, ...]  #: differences from the run of the same command

    def loader_of(self, name: str) -> StepLoader:
        """The loader of a run that has this stream only: its batches in the order in which training meets them."""
        settings, batches = self.config.visft, self.batches
        kind, number, _ = workers_of(settings.data)
        plan = plan_of(settings, self.sets)
        return StepLoader(
            {one: DataSet(ShardReader(part.manifest), part.categories) for one, part in self.sets.items()},
            Plan({name: plan.tasks[name]}, plan.seed, plan.shuffle, plan.views),
            pipelines_of(settings, self.sets, self.vocabulary),
            dp_rank=distributed.rank(),
            dp_size=batches.dp,
            accumulation=batches.accumulation,
            workers=kind,
            num_workers=number,
            prefetch_steps=settings.data.prefetch_steps,
            device=self.engine.device,
        )


@contextmanager
def open_session(config: ResolvedConfig, *, synthetic: bool) -> Iterator[Session]:
    """Build what `visft_ds.train.train` builds, in its order, but open and write no run folder.

    Args:
        synthetic: generated images instead of shards; base weights and heads that are not there start at random.

    Raises:
        ValueError: what a user can mend; a model that cannot fit before anything is allocated.
    """
    if config.pipeline_stages > 1:
        raise ValueError(
            "pipeline: a step is measured by part on one process, and a stage has only some of the parts; give another "
            "--engine (visft train --dry-run predicts what each stage does)"
        )
    notes: tuple[str, ...] = ()
    if synthetic:
        config, notes = without_missing_weights(config)
    if config.visft.features is not None:
        notes += ("features: computed in every step, not kept as visft.features says",)
    with (
        _data(config, synthetic) as sets,
        memory_bounded(distributed.local_device(), distributed.processes_here()),
    ):
        config = settle_classes(config, first_of(sets))
        vocabulary = vocabulary_of(config.visft, *captioned(sets))
        machine = check_machine(config, None if vocabulary is None else vocabulary.size)
        run = machine.planned
        check_fits(config, run.precision, run.device)
        start_process_group()
        distributed.assert_same_on_all_ranks({"configuration": config.fingerprint(), "data set": data_identity(sets)})
        if config.visft.model.recompute == "auto":
            config, _ = choose_recompute(config, run, None)
            run = run.changed(config)
        settings = config.visft
        prepared = prepare_model(
            settings,
            config.optimizer.params,
            precision=run.precision,
            heads_from=Path(settings.heads.path) if settings.heads.path else None,
            vocabulary=vocabulary,
            placement=machine.placement,
        )
        engine = build_engine(
            prepared,
            machine.deepspeed_config,
            config.optimizer.params,
            Schedule.of(config.scheduler, config.total_steps),
            seed=settings.seed,
            compile=settings.model.compile,
        )
        assert isinstance(engine, ZeroEngine)
        yield Session(
            config=config,
            batches=run.batches,
            engine=engine,
            sets=sets,
            vocabulary=vocabulary,
            precision=run.precision,
            precision_reason=machine.why_precision,
            memory=MemoryWatch(run),
            notes=notes,
        )


def make_step(session: Session, step: int, batches: Sequence[Batch]) -> StepReport:
    """Run a step on its batches as the training loop does, up to the record. Collective."""
    engine, kind = session.engine, f"step {step} {batches[0].tasks}"
    agreement = distributed.agree_on_step(kind, counts_of(engine.module, batches), False, engine.device)
    denominators = loss_denominators_of(agreement.counts, session.batches.micro_batches, engine.device)
    return engine.train_step(step, batches, denominators)


def without_missing_weights(config: ResolvedConfig) -> tuple[ResolvedConfig, tuple[str, ...]]:
    """Random values where files are missing, and what was replaced: speed does not depend on values."""
    # Generated captions are few: words need not be frequent.
    settings = every_word(config.visft)
    notes = [f"data: generated pictures of {GENERATED_SIZE[1]} x {GENERATED_SIZE[0]} pixels"]
    weights, heads = settings.model.weights, settings.heads.path
    if weights is not None and not local(weights).is_file():
        settings = settings.model_copy(update={"model": settings.model.model_copy(update={"weights": None})})
        notes.append(f"base weights: random, {weights} is not there")
    if heads is not None and any(not head_files(Path(heads), t) for t in settings.tasks.enabled()):
        settings = settings.model_copy(update={"heads": settings.heads.model_copy(update={"path": None})})
        notes.append(f"heads: random, {heads} does not have them all")
    return replace(config, visft=settings), tuple(notes)


def check_fits(config: ResolvedConfig, precision: Precision, device: torch.device) -> None:
    """Refuse a model whose weights and optimiser alone exceed the memory, before anything is allocated.

    Raises:
        ValueError: the sum by part, what there is, and what helps.
    """
    groups = plan_groups(config.visft, config.optimizer.params)
    sizes = {name: p.numel() for group in groups for name, p in zip(group.names, group.parameters, strict=True)}
    model, trained = config.visft.model, sum(sizes.values())
    backbone = build_empty(model.preset, DTYPES[precision], model.backbone_options())
    # From shapes alone. Frozen heads, small beside these, are left out.
    still = (p for name, p in backbone.named_parameters() if f"backbone.{name}" not in sizes)
    frozen = sum(p.numel() * p.element_size() for p in still)
    here = distributed.processes_here()
    weights = frozen + trained * 4
    zero, ranks = config.deepspeed["zero_optimization"], distributed.world_size()
    stage = int(zero["stage"])
    gradients, moments = trained * 4, trained * (8 if stage == 0 else 12)  # beside the moments, ZeRO's masters
    training = gradients // (ranks if stage > 1 else 1) + moments // (ranks if stage else 1)
    weights //= ranks if stage == 3 else 1
    help_ = "a smaller --model, 16-bit weights (--set visft.model.precision=bf16)"
    # Values go straight to where an engine wants them: beside GPUs, a host has one tensor, and what is offloaded.
    on_host, state = {}, "gradients and optimizer state"
    if device.type == "cpu" or "offload_param" in zero:
        on_host[f"weights of {here} processes on this machine"] = weights * here
    if device.type == "cpu" or "offload_optimizer" in zero:
        on_host[state] = training * here
    on_hosts = f"{help_}, {'more machines' if stage == 3 else 'fewer processes, --engine zero3'}"
    checks = [(on_host, host_memory_available(), "of host memory available", on_hosts)]
    if device.type == "cuda":
        on_gpu = {
            "weights": weights * ("offload_param" not in zero),
            state: training * ("offload_optimizer" not in zero),
        }
        total = torch.cuda.get_device_properties(device).total_memory
        checks.append((on_gpu, total, "of GPU memory", f"{help_}, --engine zero3 on more GPUs"))
    for need, found, where, what_helps in checks:
        whole, share = sum(need.values()), FILLED[device.type]
        if whole > share * found:
            parts = ", ".join(f"{part} {size / 2**30:.1f}" for part, size in need.items())
            raise ValueError(
                f"{model.name} does not fit: {whole / 2**30:.1f} GiB before the first activation ({parts}), and of "
                f"{found / 2**30:.1f} GiB {where} no more than {100 * share:.0f} % may be spoken for. What helps: "
                f"{what_helps}"
            )


@contextmanager
def _data(config: ResolvedConfig, synthetic: bool) -> Iterator[Mapping[str, TrainingSet]]:
    """The configured sets, or one of generated pictures in a temporary folder that is deleted afterwards."""
    settings = config.visft
    if not synthetic:
        yield open_training_data(settings)
        return
    # Twice a batch: a few pictures have no object, and a task may pass over these.
    with open_set(None, "train", 2 * max(stream.batch_size for stream in settings.streams().values())) as drawn:
        yield {settings.data.train: TrainingSet(drawn.manifest, tuple(settings.tasks.enabled()))}

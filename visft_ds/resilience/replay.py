"""Running the step of a bundle again to find where the first number that is none comes from: `tools/replay.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from visft_ds.config import ResolvedConfig, resolve_values
from visft_ds.data.features import FeatureCache
from visft_ds.model import MultiTaskModel
from visft_ds.ops import use_kernels
from visft_ds.prepare.datasets import captioned, open_training_data
from visft_ds.prepare.model import prepare_model
from visft_ds.prepare.streams import vocabulary_of
from visft_ds.resilience.bundle import Bundle, RankPart, open_bundle
from visft_ds.resilience.nan_debug import NonFinite, examine_batch


def build_model(config: ResolvedConfig, bundle: Bundle, device: torch.device) -> tuple[MultiTaskModel, str, list[str]]:
    """The model of the run as the step found it, its precision, and what is not as it was.

    Raises:
        ValueError: other base weights, or parameters that do not fit.
    """
    settings, identity = config.visft, bundle.record["identity"]
    use_kernels(settings.model.kernels, device)
    sets = open_training_data(settings)
    first = next(iter(sets.values())).manifest
    precision = identity["precision"]
    prepared = prepare_model(
        settings,
        config.optimizer.params,
        precision=precision,
        heads_from=Path(settings.heads.path) if settings.heads.path else None,
        categories=first.categories,
        vocabulary=vocabulary_of(settings, *captioned(sets)),
    )
    if prepared.base_weights != identity["base weights"]:
        raise ValueError(
            f"the run had base weights {identity['base weights']}, these are {prepared.base_weights}: give theirs with "
            "--set visft.model.weights=FILE"
        )
    values = bundle.parameters()
    notes = [] if values else ["what trains was too large for the bundle: the values of the start are used"]
    for name, parameter in prepared.module.named_parameters():
        if name in values:
            if parameter.shape != values[name].shape:
                raise ValueError(f"{bundle.path}: {name} is {tuple(values[name].shape)}, here {tuple(parameter.shape)}")
            parameter.data.copy_(values[name])
    if config.visft.features is not None:
        prepared.module.feature_cache = FeatureCache(None, {}, config.visft.features.storage)
    return prepared.module.to(device), precision, notes


def replay_part(
    module: MultiTaskModel, part: RankPart, precision: str, device: torch.device, loss_scale: float
) -> Iterator[list[NonFinite]]:
    """Every micro-batch of a rank, with the random numbers and, in fp16, the loss scale it had."""
    module.train()
    torch.manual_seed(part.seed)
    loss_denominators = {
        task: {name: v.to(device) for name, v in counts.items()} for task, counts in part.loss_denominators.items()
    }
    for batch in part.batches:
        module.zero_grad(set_to_none=True)
        yield examine_batch(module, batch.to(device), loss_denominators, precision, loss_scale / len(part.batches))


def replay(path: Path, settings: Sequence[str], limit: int) -> int:
    """Replay a bundle and print what is found. Returns 1 where something is not finite, 0 otherwise.

    Raises:
        ValueError: no bundle, or a model or data that cannot be had here.
    """
    bundle = open_bundle(path)
    record = bundle.record
    config = _with_settings(record["config"], settings, str(path))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"step {record['step']} ({record['task']}) of {record['dataset']}, epoch {record['epoch']}: {record['refused']}"
    )
    for rank, texts in record["faults"].items():
        print(f"  rank {rank} had: {'; '.join(texts)}")
    parts = bundle.parts()
    if not parts:
        raise ValueError(
            f"{path} has no tensors, they were too large to keep; its images, rank by rank, are {record['image_ids']}"
        )
    module, precision, notes = build_model(config, bundle, device)
    for note in notes:
        print(f"  note: {note}")
    bad = False
    for part in parts:
        for number, found in enumerate(replay_part(module, part, precision, device, record.get("loss_scale") or 1.0)):
            name = f"rank {part.rank}, micro-batch {number} (images {part.batches[number].image_ids.tolist()})"
            if not found:
                print(f"{name}: everything is finite")
                continue
            bad = True
            print(f"{name}: it begins with the {found[0].text()}")
            for one in found[1:limit]:
                print(f"    then {one.text()}")
            if len(found) > limit:
                print(f"    and {len(found) - limit} more (--limit)")
    if not bad:
        print("nothing that is not finite came up again: another machine, another precision, or faulty hardware?")
    return int(bad)


def _with_settings(values: Mapping[str, Any], settings: Sequence[str], origin: str) -> ResolvedConfig:
    config = resolve_values(values, origin)
    for text in settings:
        key, found, value = text.partition("=")
        if not found or key not in ("visft.data.root", "visft.model.weights", "visft.heads.path"):
            raise ValueError(
                f"--set {text}: only where files lie can be set: visft.data.root, visft.model.weights, visft.heads.path"
            )
        section, name = key.split(".")[1:]
        changed = getattr(config.visft, section).model_copy(update={name: value})
        config = replace(config, visft=config.visft.model_copy(update={section: changed}))
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit status: 0 nothing came up again, 1 something is not finite, 2 unusable input."""
    parser = argparse.ArgumentParser(prog="tools/replay.py", description="Run the step of a bundle again.")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder <run>/bundles/step_N")
    parser.add_argument("--limit", type=int, default=8, metavar="N", help="findings to print for a micro-batch (8)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="where a file lies here, e.g. visft.data.root=DIR",
    )
    options = parser.parse_args(argv)
    try:
        return replay(options.bundle, options.set, options.limit)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2

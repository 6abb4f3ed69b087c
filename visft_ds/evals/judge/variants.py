"""Variants of a comparison: what their models can be asked for, and whether they can be compared at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from visft_ds.evals.judge.agreement import check_classifier, load_classifier
from visft_ds.evals.judge.benchmark import PUBLISHED_SIDE, Benchmark
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import Settings, kinds_read
from visft_ds.evals.judge.layers import Choice, blocks_of, read_after
from visft_ds.evals.judge.model_text import ModelSpec
from visft_ds.evals.judge.models import alike, load_encoder, weights_of
from visft_ds.evals.judge.scoring import remembered


@dataclass(frozen=True)
class Variant:
    """Models of one recipe, trained with different seeds, and the blocks that they are read after."""

    name: str
    models: Sequence[ModelSpec]
    of_base: bool  #: of BASE's architecture: its weights can be mixed with those of BASE
    blocks: Mapping[str, int]  #: that it may be read after; bytes of an image's map after each
    kinds: tuple[str, ...]  #: of features that its models have
    has_text: bool  #: a side that encodes texts
    #: Full name of a number -> its block ("chosen"), and what all blocks reached ("held_out").
    layers: dict[str, Choice] = field(default_factory=dict)
    shift: float | None = None  #: how far it moved BASE's features

    def block(self, number: str) -> str:
        """The block that it is read after for a number."""
        block = self.layers[number]["chosen"] if number in self.layers else self.last
        return block if block in self.blocks else self.last

    @property
    def last(self) -> str:
        """The last block."""
        return list(self.blocks)[-1]

    @property
    def has_choice(self) -> bool:
        """Return True if there is a choice of blocks, which the command line has not made."""
        return len(self.blocks) > 1 and self.models[0].block is None


class Models:
    """Models of a comparison as benchmarks read them; the last one stays in memory."""

    def __init__(self, base: ModelSpec, settings: Settings) -> None:
        self.base = base
        self.settings = settings
        self._last: tuple[ModelSpec, Encoder] | None = None

    def settings_of(self, spec: ModelSpec) -> Settings:
        """Settings of a model: fp32 for weights that are mixed, since 16 bits would round a small change
        away.
        """
        return replace(self.settings, precision="fp32") if spec.mixed else self.settings

    def load(self, spec: ModelSpec) -> Encoder:
        """A model as it is. Raises ValueError for what is wrong with it."""
        if self._last is None or self._last[0] != spec:
            self._last = None  # two may not fit into memory
            self._last = spec, load_encoder(spec, self.settings_of(spec).precision)
        return self._last[1]

    def encoder(self, spec: ModelSpec, benchmark: Benchmark, *blocks: str) -> Encoder:
        """The encoder that a benchmark reads: features after blocks, or answers of BASE's classifier."""
        if benchmark.asks_classifier:
            return load_classifier(spec, self.base)
        encoder = self.load(spec)
        backbone = getattr(encoder.module, "backbone", None)
        if benchmark.published is not None and backbone is not None:
            side = PUBLISHED_SIDE // backbone.patch_size * backbone.patch_size
            encoder = replace(encoder, side=side)
        return read_after(encoder, *blocks)

    def open(self, name: str, models: Sequence[ModelSpec]) -> Variant:
        """A variant. Raises ValueError for what is wrong with its models."""
        facts = [self._facts(spec) for spec in models]
        return Variant(
            name,
            models,
            of_base=all(of_model["alike"] for of_model in facts),
            blocks=facts[0]["blocks"],
            kinds=tuple(facts[0]["kinds"]),
            has_text=facts[0]["text"],
        )

    def _facts(self, spec: ModelSpec) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            encoder = self.load(spec)
            settings = self.settings_of(spec)
            base = encoder if spec is self.base else load_encoder(self.base, settings.precision)
            return {
                "alike": alike(weights_of(encoder), weights_of(base)),
                "blocks": blocks_of(encoder, settings),
                "kinds": list(encoder.kinds),
                "text": encoder.text is not None,
            }

        return remembered({"facts": [spec.identity, self.base.identity]}, self.settings, make)


def check_needs(variants: Sequence[Variant], benchmarks: Sequence[Benchmark]) -> None:
    """Raise ValueError if a model lacks what a benchmark reads, before hours are spent on the others."""
    base = variants[0]
    for benchmark in benchmarks:
        if benchmark.asks_classifier:
            check_classifier(base.models[0])
        for variant in variants:
            if benchmark.asks_classifier:
                if not variant.of_base:
                    raise ValueError(
                        f"{benchmark.label}: {variant.name} cannot feed the classifier of {base.name}"
                    )
            elif not kinds_read(benchmark, variant.kinds):
                kinds = " or ".join(benchmark.kinds)
                raise ValueError(f"{benchmark.label} needs {kinds}, which {variant.name} does not have")
            elif benchmark.needs_text and not variant.has_text:
                raise ValueError(
                    f"{variant.name} has no text side, which {benchmark.label} needs: give a whole CLIP file"
                )


def check_controls(base: Variant, tuned: Sequence[Variant], controls: Sequence[Variant]) -> None:
    """Raise ValueError for controls that cannot be mixed with BASE, or not be read where a tuned variant
    is.
    """
    of_base = [variant for variant in tuned if variant.of_base]
    if controls and not (of_base and all(control.of_base for control in controls)):
        names = ", ".join(variant.name for variant in [base, *tuned, *controls])
        raise ValueError(f"--control: {names} do not have the same architecture")
    for control in controls:
        for variant in of_base:
            if not variant.blocks.keys() <= control.blocks.keys():
                raise ValueError(
                    f"--control {control.name} ends after {control.last}, before {variant.name}, which ends "
                    f"after {variant.last}: give a control that is as long"
                )


def up_to_the_end_of(variant: Variant, base: Variant) -> Variant | None:
    """BASE without the blocks behind the last one of a tuned variant; None for one that is as long as
    BASE.
    """
    blocks = list(variant.blocks)
    of_base = list(base.blocks)
    if not variant.of_base or len(blocks) == len(of_base) or blocks != of_base[: len(blocks)]:
        return None
    shared = {name: base.blocks[name] for name in blocks}
    return replace(base, name=f"{base.name} up to {variant.last}", blocks=shared, layers={})

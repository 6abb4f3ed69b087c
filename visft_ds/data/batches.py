"""Making of a batch: read, decode, transform and collate the samples of a micro-batch; substitutes for damaged ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from visft_ds.data.dataset import DataSet, SamplePipeline, read_raw
from visft_ds.data.features import FeatureCache, View
from visft_ds.data.plan import Plan, StepPlan, generator
from visft_ds.data.samples import Batch, RawSample, Sample
from visft_ds.data.shards import DamagedSample, Role
from visft_ds.data.spans import span

#: Substitutes tried for a sample before its damage is an error after all.
_ATTEMPTS = 8


@dataclass(frozen=True)
class Skipped:
    """A damaged sample that was replaced by another one."""

    step: int
    dataset: str
    index: int  #: of the damaged sample
    instead: int  #: index of the sample in its place
    reason: str


@dataclass(frozen=True)
class BatchMaker:
    """Everything a worker needs to make batches; it can be sent to another process.

    With `substitutes`, a damaged sample is replaced by the one that this plan chooses, so that a run with the same
    damage is the same run. That is possible only where a process reads images and labels both: two that read apart
    would not see the same damage and go on with labels of other images. None: damage is an error.

    With `features`, samples whose features are cached come with them, and their pixels are not read.
    """

    sets: Mapping[str, DataSet]
    pipelines: Mapping[str, Mapping[str, SamplePipeline]]  #: task -> data set -> what makes its batches
    role: Role = "both"
    substitutes: Plan | None = None
    features: FeatureCache | None = None

    def make(self, part: StepPlan) -> tuple[Batch, list[Skipped]]:
        """The batch of a micro-batch, and what was skipped to make it."""
        made = [self.sample(part, place) for place in range(len(part.indices))]
        skipped = [damaged for _, damaged_samples in made for damaged in damaged_samples]
        return self.collate(part, [sample for sample, _ in made]), skipped

    def sample(self, part: StepPlan, place: int) -> tuple[Sample, list[Skipped]]:
        """The sample at a place of a micro-batch, and what was skipped to get it.

        Raises:
            DamagedSample: and there are no substitutes, or they are damaged too.
        """
        index, key = int(part.indices[place]), int(part.keys[place])
        view = None
        if self.features is not None:
            with span("features"):
                view = self.features.get(key, index)
        raw, skipped = self._read(part, index, key, self.role if view is None else "labels")
        sample = self.pipelines[part.task][part.dataset].transform(raw, generator(key))
        if self.features is not None and view is None:
            assert sample.image is not None
            view = View((sample.image.shape[1], sample.image.shape[2]))
        # Without labels, empty targets would claim that there is nothing in the image.
        targets = {} if self.role == "images" else sample.targets
        return replace(sample, random_key=key, targets=targets, view=view), skipped

    def collate(self, part: StepPlan, samples: Sequence[Sample]) -> Batch:
        """The batch of all samples of a micro-batch."""
        with span("collate"):
            return self.pipelines[part.task][part.dataset].collate(list(samples))

    def _read(self, part: StepPlan, index: int, key: int, role: Role) -> tuple[RawSample, list[Skipped]]:
        dataset, skipped = self.sets[part.dataset], list[Skipped]()
        for attempt in range(1, _ATTEMPTS + 2):
            try:
                return read_raw(dataset.reader, index, role, dataset.categories), skipped
            except DamagedSample as error:
                if self.substitutes is None or attempt > _ATTEMPTS:
                    raise
                substitute = self.substitutes.substitute(part, key, attempt)
                skipped.append(Skipped(part.step, part.dataset, index, substitute, str(error)))
                index = substitute
        raise AssertionError("the last attempt returns or raises")

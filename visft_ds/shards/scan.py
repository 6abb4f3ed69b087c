"""Looking at all images before any shard is planned: which of them are duplicates must be known then.

Verdicts are noted in a file as they come, so that an interrupted build looks at no image twice. The file is a cache: a
line counts only if the image file still is what it was, and a last line that was cut off is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import orjson

from visft_ds.shards.duplicates import Duplicate, Fingerprint, find_duplicates
from visft_ds.shards.images import Checked
from visft_ds.shards.outputs import Output
from visft_ds.shards.shard_writer import Planned, Treatment
from visft_ds.shards.workers import BuildWorkers

_FILE = "scan.jsonl"


def scan(samples: Sequence[Planned], treatment: Treatment, output: Output, workers: BuildWorkers) -> dict[int, Checked]:
    """Image id -> verdict of every image."""
    verdicts = _noted(samples, treatment, output)
    rest = [sample for sample in samples if sample.image.image_id not in verdicts]
    workers.progress.phase, workers.progress.total_images = "comparing images", len(samples)
    workers.progress.images = len(samples) - len(rest)

    def look(sample: Planned) -> tuple[Planned, Checked]:
        data = treatment.read(sample)
        workers.count(len(data))
        return sample, treatment.check(data, sample)

    with open(output.scratch / _FILE, "ab") as file:

        def note(_: None) -> None:
            for sample, checked in workers.ahead(look, rest):
                verdicts[sample.image.image_id] = checked
                file.write(orjson.dumps({"key": _key(sample, treatment), "verdict": asdict(checked)}) + b"\n")
                file.flush()

        workers.run(note, [None])
    workers.progress.images = workers.progress.bytes = 0
    return verdicts


def duplicates(samples: Sequence[Planned], treatment: Treatment, verdicts: dict[int, Checked]) -> list[Duplicate]:
    """The images among the usable ones that repeat another, see `find_duplicates`."""
    by_id = {sample.image.image_id: sample for sample in samples}
    known = [
        Fingerprint(number, by_id[number].size, checked.crc32, checked.dhash)
        for number, checked in verdicts.items()
        if checked.reason is None
    ]
    return find_duplicates(known, lambda one, two: treatment.read(by_id[one]) == treatment.read(by_id[two]))


def _key(sample: Planned, treatment: Treatment) -> list[object]:
    image = sample.image
    file = [image.image_id, image.file_name, image.width, image.height, sample.size, sample.stamp]
    return [*file, treatment.level, treatment.reencoding is not None]


def _noted(samples: Sequence[Planned], treatment: Treatment, output: Output) -> dict[int, Checked]:
    path = output.scratch / _FILE
    if not path.is_file():
        return {}
    by_key = {orjson.dumps(_key(sample, treatment)): sample.image.image_id for sample in samples}
    verdicts = {}
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError:
            continue  # cut off
        image_id = by_key.get(orjson.dumps(entry["key"]))
        if image_id is not None:
            fields = entry["verdict"]
            verdicts[image_id] = Checked(**{**fields, "findings": tuple(fields["findings"])})
            kept.append(line)
    path.write_bytes(b"".join(line + b"\n" for line in kept))
    return verdicts

"""The measurement of packing: its numbers are there, and its made-up annotations have COCO's proportions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from visft_ds.profiling.conversion import (
    COCO_SIZES,
    ConversionOptions,
    make_sections,
    make_title,
    measure_conversion,
    write_annotations,
)
from visft_ds.shards.source import SourceSelection, read_source

TOOL = Path(__file__).resolve().parents[2] / "tools/profile.py"


def test_rates_of_all_depths_and_workers() -> None:
    record = measure_conversion(ConversionOptions(images=4, workers=2, repeats=2))
    assert [(rate["check"], rate["workers"]) for rate in record["rates"]] == [
        (check, workers) for check in ("decode", "header", "none") for workers in (1, 2)
    ]
    assert all(rate["per_core"]["least"] > 0 and rate["per_core"]["count"] == 2 for rate in record["rates"])
    # COCO's photographs have 160 to 170 kB
    assert 100_000 < record["bytes"] / 4 < 250_000 and record["annotations"] is None
    json.dumps(record)
    assert make_title(record) == "packing 4 images" and len(make_sections(record)) == 2


def test_made_up_annotations_have_cocos_proportions(tmp_path: Path) -> None:
    size = write_annotations(tmp_path, 3000)
    source = read_source(tmp_path / "instances.json", tmp_path / "captions.json", SourceSelection())
    assert sum(image.annotations for image in source.images) == 3000
    assert sum(len(image.captions) for image in source.images) == 3000 * COCO_SIZES[2] // COCO_SIZES[1]
    assert len(source.images) == 3000 * COCO_SIZES[0] // COCO_SIZES[1]
    # instances_train2017.json has 448 MB for 860,001 instances, captions_train2017.json 92 MB
    assert 0.8 < size / 3000 / (540e6 / 860_001) < 1.2
    kinds = {finding["kind"]: finding["count"] for finding in source.findings.listed()}
    assert 10 < kinds.pop("crowd") == kinds.pop("uncompressed run-length code") < 60
    assert kinds.keys() <= {"image without instances", "image without captions"}, "nothing malformed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--images", "0"], "--images 0 must be at least 1"), (["--photographs", "/nowhere"], "holds no *.jpg files")],
)
def test_wrong_usage_gets_one_clear_message(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        ConversionOptions(**{arguments[0][2:]: Path(arguments[1]) if "/" in arguments[1] else int(arguments[1])})


@pytest.mark.slow
def test_annotations_of_cocos_size_take_half_of_the_memory_allowed(tmp_path: Path) -> None:
    """4 GB are allowed; parsed in one piece the file takes more than that."""
    file = tmp_path / "record.json"
    arguments = ["build", "--images", "2", "--repeats", "1", "--annotations", str(COCO_SIZES[1]), "--json", str(file)]
    subprocess.run([sys.executable, str(TOOL), *arguments], check=True, timeout=1200)
    labels = json.loads(file.read_text())["annotations"]
    assert (labels["images"], labels["instances"], labels["captions"]) == COCO_SIZES
    # 1.07 GB measured for the reading alone; the rest of this process's peak is what it has loaded besides
    assert labels["peak_bytes"] < 2.0e9

"""A pipeline whose first stage reads pixels and whose last stage reads labels trains on matching pairs, or stops."""

from __future__ import annotations

import re
from pathlib import Path

from tests.coco_tree import make_split
from tests.ranks import run_ranks


def test_stages_that_read_apart_agree_and_a_stage_with_another_plan_is_found(tmp_path: Path) -> None:
    """Unequal numbers of workers are what breaks other loaders here: their order depends on them."""
    make_split(tmp_path, 18)
    first, last = run_ranks(["-m", "tests.parallel.pipeline_feed_case", str(tmp_path / "shards")])
    pixels, labels = (re.search(r"has seen (.*)", output) for output in (first, last))
    assert pixels and labels and pixels[1] == labels[1] and pixels[1].count("[") == 1 + 5 * 2
    assert "step 4: the last pipeline stage has labels of other samples than the pixels" in last

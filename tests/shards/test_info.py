"""What `make_shards.py info` says of a split."""

from __future__ import annotations

import json

import pytest

from tools.make_shards import main
from visft_ds.data.shards import Manifest
from visft_ds.shards.info import describe


def test_info_tells_what_a_split_holds(split: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    facts = describe(split, categories=True, shards=True)
    assert facts["trainable_per_image"] == {"mean": 1.25, "max": 3} and facts["captions_per_image"]["mean"] == 2
    assert facts["width"][0] == split.index["width"].min() and facts["width"][-1] == split.index["width"].max()
    assert [row["annotations"] for row in facts["category_table"]] == [9, 5, 2]
    assert [row["name"] for row in facts["shard_table"]] == [shard.name for shard in split.shards]
    assert main(["info", str(split.root), "--categories", "--shards"]) == 0
    output = capsys.readouterr().out
    assert "findings: " in output and "crowd 1" in output and "thing 13" in output and "toy-000002.tar" in output
    assert main(["info", str(split.root), "--json"]) == 0
    assert "category_table" not in json.loads(capsys.readouterr().out)[0]
    assert main(["info", str(split.root.parent)]) == 2
    capsys.readouterr()
    for wrong in ([], [str(split.root), "--shard"], [str(split.root), "x"]):
        assert main(["info", *wrong]) == 2
        assert "info needs one folder or URL of shards, or --step N" in capsys.readouterr().err

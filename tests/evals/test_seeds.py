"""Arms of several seeds on a command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.judge import record_in, run
from visft_ds.evals.judge.model_text import parse_variants


def test_arms_of_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt", "c.pt", "l,m.pt", "x"):
        Path(name).write_text("")
    found = parse_variants(["base=a.pt", "s=a.pt+x,c.pt+x#5@0.5"])["s"]
    parts = [(one.label, one.name, one.block, one.scale) for one in found]
    assert parts == [("s 1", "a.pt", None, 1.0), ("s 2", "c.pt", 5, 0.5)]
    assert all(one.origin is not None and one.origin.label == "base" for one in found)
    assert (
        len(parse_variants(["l,m.pt"])) == len(parse_variants(["x=l,m.pt"])) == 1
    )  # a name that exists is never cut
    assert [variant.label for variant in parse_variants(["c.pt", "a.pt,b.pt"])["a"]] == ["a 1", "a 2"]
    with pytest.raises(ValueError, match="seeds"):
        parse_variants(["c.pt", "a=a.pt,b.pt", "b=a.pt,b.pt,c.pt"])


def test_the_command_compares_seeds_and_keeps_what_was_named(clip_world: Path, tmp_path: Path) -> None:
    """An arm of three models; the record says which number was to decide, and no other is taken later."""
    base = clip_world / "clip.safetensors"
    seeds = ",".join(f"{base}+{clip_world}/adapter@{scale}" for scale in (0.8, 1, 1.2))
    command = [
        f"base={base}",
        f"seeds={seeds}",
        "--on",
        f"retrieval={clip_world}/coco",
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--layers", "last"]
    first, other = (f"retrieval/coco text to image R@{count}" for count in (1, 5))
    status, printed, errors = run(*command, "--primary", first)
    assert status == 0, errors
    assert f"in {first}" in printed
    record = record_in(tmp_path / "out")
    assert record["primary"] == first and record["variants"]["seeds"] == ["seeds 1", "seeds 2", "seeds 3"]
    (row,) = (row for row in record["rows"] if row["name"] == first)
    assert row["differences"].keys() == {"seeds"} and len(row["differences"]["seeds"]["each"]) == 3
    assert f"was judged by {first}" in run(*command, "--primary", other)[2]

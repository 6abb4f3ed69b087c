"""Traces of chosen steps: those steps and no other, and a run that has them behind it already."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from visft_ds.run.log import traced


def test_the_chosen_steps_are_traced(tmp_path: Path) -> None:
    said: list[str] = []
    with traced(tmp_path, (3, 4), 1, said.append) as profiler:  # a run that goes on after step 1
        for step in range(2, 7):
            torch.ones(step).cos()
            assert profiler is not None
            profiler.step()
    events = json.loads(gzip.decompress((tmp_path / "trace-3-4-rank0.json.gz").read_bytes()))["traceEvents"]
    assert {event["name"] for event in events if event["name"].startswith("ProfilerStep")} == {
        "ProfilerStep#1",
        "ProfilerStep#2",
    }
    assert sum(event["name"] == "aten::cos" for event in events) == 2
    assert said == [f"wrote {tmp_path / 'trace-3-4-rank0.json.gz'}: open it at https://ui.perfetto.dev"]


def test_what_cannot_be_traced_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    with traced(tmp_path, (3, 4), 3, said.append) as profiler:
        assert profiler is None
    with traced(tmp_path / "absent", (1, 1), 0, said.append) as profiler:
        assert profiler is not None
        profiler.step()
    assert said[0] == "no trace: step 3, its first one, was done before this start"
    assert said[1].startswith("warning: no trace in") and len(said) == 2

"""A cluster for all tests of this folder, and the run of one host beside which they look at theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, cluster, why_not
from tests.cluster.runs import training
from tests.ranks import run_ranks


@pytest.fixture(scope="package")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="package")
def straight(hosts: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks on one host."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run_ranks(training(shards, out))
    return out

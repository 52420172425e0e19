"""One local cluster of real processes for each test module, of its TIERS if it names them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import tierwise
from tierwise.sdk.operator import Operator


@pytest.fixture(scope="module")
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tierwise.LocalCluster]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    tiers = getattr(request.module, "TIERS", "1c,1f,1e")
    with tierwise.LocalCluster(folder, tiers, policy="ect", emulate=False) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: tierwise.LocalCluster) -> Iterator[tierwise.Client]:
    with tierwise.Client(cluster.context) as opened:
        yield opened


@pytest.fixture(scope="module")
def ask(client: tierwise.Client) -> Operator:
    return Operator(client)

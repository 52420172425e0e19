"""A cluster of real processes, started by the interpreter that has Flower."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tierwise

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
logging.getLogger("flwr").setLevel(logging.ERROR)
PROJECT = Path(__file__).parents[2] / "examples/flower_digits"
CLIENTS = 10
NODES = ("edge-1", "edge-2")


@pytest.fixture(scope="session", autouse=True)
def few_objects_to_collect() -> None:
    """Some of Flower's strategies collect garbage per array: let it be theirs, not pytest's."""
    gc.freeze()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tierwise.LocalCluster]:
    folder: Path = tmp_path_factory.mktemp("cluster")
    with tierwise.LocalCluster(folder, "1c,2e", policy="ect", emulate=False) as running:
        yield running


@pytest.fixture(scope="session")
def client(cluster: tierwise.LocalCluster) -> Iterator[tierwise.Client]:
    with tierwise.Client(cluster.context) as opened:
        yield opened


@pytest.fixture(scope="session")
def project() -> Any:
    from tierwise.sdk import flower

    return flower.load_project(PROJECT)

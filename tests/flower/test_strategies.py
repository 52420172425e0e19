"""Flower's own strategies, over our grid and over its own in-process one, with the same seeds."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: `make test-flower` runs these in .venv-flower")

from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp import strategy as strategies

import tierwise
from tests.flower.conftest import CLIENTS, NODES
from tests.flower.reference import InOrder, in_process
from tierwise.sdk import flower

ROUNDS = 2
STRATEGIES = {
    "FedAvg": {},
    "FedAvg, half of the clients": {"fraction_train": 0.5, "fraction_evaluate": 0.5},
    "FedProx": {"proximal_mu": 0.1},
    "FedAvgM": {"server_learning_rate": 0.9, "server_momentum": 0.5},
    "FedAdam": {},
    "FedAdagrad": {},
    "FedYogi": {},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 5},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.1, "train_loss_key": "train-loss"},
}


@pytest.fixture(scope="module")
def app(project: Any) -> Any:
    from digits_flower.client_app import app

    return app


@pytest.fixture(scope="module")
def ours(app: Any, project: Any, client: tierwise.Client) -> Iterator[Any]:
    clients = flower.participants(CLIENTS, NODES)
    config = project.run_config
    with flower.TierwiseGrid(
        app, clients, client=client, run_config=config, requirements=()
    ) as grid:
        yield InOrder(grid, {one.node_id: index for index, one in enumerate(clients)})


@pytest.fixture(scope="module")
def flowers(app: Any, project: Any) -> Iterator[Any]:
    with in_process(app, CLIENTS, project.run_config) as grid:
        yield grid


def trained(grid: InOrder, name: str, options: dict[str, Any]) -> Any:
    """Return what a strategy makes of digits in a few rounds."""
    from digits_flower import task

    grid.set_run(grid.run)
    random.seed(7)  # Flower samples clients with the standard library's generator
    arrays = {n: Array(a) for n, a in zip(task.NAMES, task.initial(0), strict=True)}

    def judge(server_round: int, found: ArrayRecord) -> MetricRecord:
        accuracy, loss = task.judge([found[n].numpy() for n in task.NAMES], *task.split()[2:])
        return MetricRecord({"accuracy": accuracy, "loss": loss})

    strategy = getattr(strategies, name.partition(",")[0])(**options)
    return strategy.start(
        grid, initial_arrays=ArrayRecord(arrays), num_rounds=ROUNDS, evaluate_fn=judge
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_of_flower_gives_the_same_bits_over_our_grid(
    name: str, ours: InOrder, flowers: InOrder
) -> None:
    found = trained(ours, name, STRATEGIES[name])
    expected = trained(flowers, name, STRATEGIES[name])
    assert set(found.arrays) == set(expected.arrays) != set()
    for key, array in expected.arrays.items():
        assert found.arrays[key].data == array.data, f"{key} differs"
    for field in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        ours_by_round, theirs_by_round = getattr(found, field), getattr(expected, field)
        assert {r: dict(m) for r, m in ours_by_round.items()} == {
            r: dict(m) for r, m in theirs_by_round.items()
        }
    assert found.evaluate_metrics_serverapp == expected.evaluate_metrics_serverapp
    accuracies = [found.evaluate_metrics_serverapp[r]["accuracy"] for r in range(ROUNDS + 1)]
    assert np.ptp(accuracies) > 0, "nothing was learnt"


def test_without_sorting_ours_repeats_bit_by_bit_and_flower_agrees_closely(
    ours: InOrder, flowers: InOrder
) -> None:
    first, second = (trained(ours.inner, "FedAvg", {}) for _ in range(2))
    for key, array in first.arrays.items():
        assert second.arrays[key].data == array.data
    expected = trained(flowers, "FedAvg", {})
    for key, array in expected.arrays.items():
        np.testing.assert_allclose(first.arrays[key].numpy(), array.numpy(), rtol=1e-4, atol=1e-6)

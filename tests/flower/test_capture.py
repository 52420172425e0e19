"""One line, and the rounds of a Flower project are in the cache."""

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr", reason="needs Flower: `make test-flower` runs these in .venv-flower")

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import tierwise
from tests.flower import apps
from tests.flower.conftest import CLIENTS, NODES
from tests.flower.reference import InOrder, in_process
from tierwise.errors import InvalidArgument, Unavailable
from tierwise.sdk import flower

ROUNDS = 2


@pytest.fixture(scope="module")
def in_memory(project: Any) -> Iterator[InOrder]:
    from digits_flower.client_app import app

    with in_process(app, CLIENTS, project.run_config) as grid:
        yield grid


@pytest.fixture
def job(client: tierwise.Client, request: Any) -> tierwise.Rounds:
    return tierwise.Rounds(client, f"flower-{abs(hash(request.node.name))}")


class Seen(FedAvg):
    """FedAvg that remembers what it was given and what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[int, dict[str, Any]] = {}
        self.updates: dict[int, list[Message]] = {}

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        self.models[server_round - 1] = {n: a.numpy() for n, a in arrays.items()}
        config["learning-rate"] = 0.1 / server_round
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        self.updates[server_round] = list(replies)
        arrays, metrics = super().aggregate_train(server_round, self.updates[server_round])
        self.models[server_round] = {n: a.numpy() for n, a in arrays.items()}
        return arrays, metrics


def train(grid: Any, strategy: Any) -> Any:
    from digits_flower import task

    grid.set_run(grid.run)
    random.seed(3)
    arrays = {n: Array(a) for n, a in zip(task.NAMES, task.initial(0), strict=True)}
    return strategy.start(grid, initial_arrays=ArrayRecord(arrays), num_rounds=ROUNDS)


def flat(arrays: dict[str, Any]) -> Any:
    return np.concatenate([arrays[name].reshape(-1) for name in ("w1", "b1", "w2", "b2")])


def check_rounds(job: tierwise.Rounds, seen: Seen, name: Callable[[int], str]) -> None:
    """Every model and update is there, as Flower had it."""
    assert job.newest() == ROUNDS
    for number, model in seen.models.items():
        np.testing.assert_array_equal(job.get(number), flat(model))
        record = flower.arrays(job, number)
        for key, array in model.items():
            np.testing.assert_array_equal(record[key].numpy(), array)
    for number, replies in seen.updates.items():
        for reply in replies:
            client = name(reply.metadata.src_node_id)
            sent = {n: a.numpy() for n, a in reply.content["arrays"].items()}
            np.testing.assert_array_equal(job.get(number, "update", client), flat(sent))
            info = job.info(number, "update", client)
            metrics = reply.content["metrics"]
            assert info.metadata is not None
            assert info.metadata["example_count"] == metrics["num-examples"]
            assert info.metadata["loss"] == metrics["train-loss"]
            assert 0 <= info.metadata["duration_s"] < 60


def test_a_captured_grid_fills_the_cache_with_what_passed(
    in_memory: InOrder, job: tierwise.Rounds
) -> None:
    grid, seen = flower.capture(in_memory, job), Seen()
    result = train(grid, seen)
    assert grid.capture.flush()
    assert not grid.capture.failures
    check_rounds(job, seen, lambda node_id: f"client-{node_id}")
    assert job.get(1, "metadata")["learning-rate"] == 0.1
    judged = [job.get(2, "metadata", f"client-{n}") for n in in_memory.get_node_ids()]
    weights = np.array([facts["evaluate-num-examples"] for facts in judged], float)
    accuracies = np.array([facts["accuracy"] for facts in judged])
    expected = result.evaluate_metrics_clientapp[2]["accuracy"]
    assert float(weights / weights.sum() @ accuracies) == pytest.approx(expected)


def test_the_rounds_of_a_captured_project_can_be_asked(
    in_memory: InOrder, job: tierwise.Rounds
) -> None:
    strategy = flower.capture(Seen(), job)
    train(in_memory, strategy)
    assert strategy.capture.flush()
    likeness = job.ask("similarity", round=1)
    base = flat(strategy.models[0])
    deltas = {
        f"client-{r.metadata.src_node_id}": flat(
            {n: a.numpy() for n, a in r.content["arrays"].items()}
        )
        - base
        for r in strategy.updates[1]
    }
    units = {name: delta / np.linalg.norm(delta) for name, delta in deltas.items()}
    for name, unit in units.items():
        others = np.mean([unit @ other for who, other in units.items() if who != name])
        assert likeness["with_others"][name] == pytest.approx(others, abs=1e-5)


def test_a_captured_strategy_also_tells_its_last_model_and_metrics(
    client: tierwise.Client, job: tierwise.Rounds, project: Any
) -> None:
    from digits_flower.client_app import app

    clients = flower.participants(CLIENTS, NODES)
    config = project.run_config
    strategy = flower.capture(Seen(), job)
    with flower.TierwiseGrid(
        app, clients, client=client, run_config=config, requirements=()
    ) as grid:
        result = train(grid, strategy)
        assert strategy.capture.flush()
        assert not strategy.capture.failures
        check_rounds(job, strategy, lambda node_id: grid.participants[node_id].name)
    trained = job.info(2).metadata
    assert trained is not None
    assert trained["train-loss"] == result.train_metrics_clientapp[2]["train-loss"]
    facts = job.get(2, "metadata")
    assert facts["evaluate-accuracy"] == result.evaluate_metrics_clientapp[2]["accuracy"]
    assert facts["learning-rate"] == 0.05


def test_strategies_from_before_messages_are_captured_too(
    client: tierwise.Client, job: tierwise.Rounds
) -> None:
    apps.histories.clear()
    strategies: list[Any] = []

    def captured(strategy: Any) -> Any:
        strategies.append(flower.capture(strategy, job))
        return strategies[0]

    before, apps.prepare = apps.prepare, captured
    try:
        clients = flower.participants(4, NODES)
        with flower.TierwiseGrid(
            apps.old_client_app, clients, client=client, requirements=(), name="flower-old"
        ) as grid:
            flower.run(apps.old_server_app, grid)
    finally:
        apps.prepare = before
    assert strategies[0].capture.flush()
    assert not strategies[0].capture.failures
    np.testing.assert_allclose(job.get(2), [4.0] * 3)
    counts = {
        row["client"]: row["metadata"]["example_count"]
        for row in job.list()
        if row["kind"] == "update" and row["round"] == 1
    }
    assert sorted(counts.values()) == [1, 2, 3, 4]


def test_a_cluster_that_is_away_costs_the_capture_and_not_the_training(
    in_memory: InOrder, job: tierwise.Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def away(*args: Any, **kwargs: Any) -> None:
        asked.append(args)
        raise Unavailable("there is nobody")

    monkeypatch.setattr(job, "put_aggregate", away)
    grid, seen = flower.capture(in_memory, job), Seen()
    train(grid, seen)
    assert grid.capture.flush()
    assert len(seen.updates[ROUNDS]) == CLIENTS
    assert len(asked) == ROUNDS  # once per round, not once per client
    assert [text.partition(":")[0] for text in grid.capture.failures] == [
        f"round {number} of {job.job}" for number in (1, 2)
    ]


def test_an_update_of_another_shape_is_left_out_and_named(job: tierwise.Rounds) -> None:
    odd = ClientApp()

    @odd.train()
    def train_odd(message: Message, context: Any) -> Message:
        size = 3 + int(context.node_config["partition-id"] == 1)
        arrays = ArrayRecord({"w": Array(np.ones(size, np.float32))})
        found = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(found), reply_to=message)

    with in_process(odd, 3, {}) as grid:
        grid.set_run(grid.run)
        captured = flower.capture(grid, job)
        content = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(3, np.float32))})})
        nodes = captured.get_node_ids()
        messages = [Message(content, node, "train") for node in nodes]
        assert len(list(captured.send_and_receive(messages))) == 3
        assert captured.capture.flush()
    (failure,) = captured.capture.failures
    assert f"client-{nodes[1]}: w has shape (4,)" in failure
    rows = [row for row in job.list() if row["kind"] == "update"]
    assert {row["client"] for row in rows} == {f"client-{nodes[0]}", f"client-{nodes[2]}"}


def test_what_is_neither_a_grid_nor_a_strategy_is_refused(job: tierwise.Rounds) -> None:
    with pytest.raises(InvalidArgument, match="int"):
        flower.capture(7, job)


def test_pushed_and_pulled_messages_are_captured_as_they_come(
    in_memory: InOrder, job: tierwise.Rounds
) -> None:
    from digits_flower import task

    in_memory.set_run(in_memory.run)
    grid = flower.capture(in_memory, job)
    arrays = {n: Array(a) for n, a in zip(task.NAMES, task.initial(0), strict=True)}
    settings = flower_config({"server-round": 1})
    content = RecordDict({"arrays": ArrayRecord(arrays), "config": settings})
    nodes = grid.get_node_ids()[:3]
    left = set(grid.push_messages([Message(content, node, "train") for node in nodes]))
    pause = threading.Event()
    while left:
        pause.wait(0.02)
        left -= {r.metadata.reply_to_message_id for r in grid.pull_messages(left)}
    assert grid.capture.flush()
    assert not grid.capture.failures
    rows = [row for row in job.list() if row["kind"] == "update"]
    assert {row["client"] for row in rows} == {f"client-{node}" for node in nodes}


def flower_config(values: dict[str, Any]) -> Any:
    from flwr.app import ConfigRecord

    return ConfigRecord(values)

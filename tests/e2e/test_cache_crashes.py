"""Caches of nodes that are killed: what was acknowledged is there, from a copy or from the disk."""

import shutil
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tierwise
from tierwise.domain.cache import Durability

COUNT = 200_000
NAMES = ["a", "b", "c"]


def update(index: int) -> np.ndarray:
    return np.random.default_rng(index).normal(size=COUNT).astype(np.float32)


def eventually(ask: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    ends_s = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except (tierwise.NotFound, tierwise.RetryLater, tierwise.FailedPrecondition):
            if time.monotonic() > ends_s:
                raise
            time.sleep(0.05)


def wait_for_copies(rounds: tierwise.Rounds) -> None:
    """Return when two nodes have every object of a job."""
    ends_s = time.monotonic() + 20
    while not all(len(row["node_ids"]) == 2 for row in rounds.list()):
        assert time.monotonic() < ends_s
        time.sleep(0.05)


def filled(client: tierwise.Client, job: str, **options: Any) -> tierwise.Rounds:
    rounds = tierwise.Rounds(client, job, node="edge-1")
    rounds.open(0, [], COUNT, **options)
    rounds.put_aggregate(0, update(100))
    rounds.open(1, NAMES, COUNT, base=0, **options)
    for index, name in enumerate(NAMES):
        rounds.put_update(1, name, update(index), {"example_count": index + 1})
    return rounds


def test_a_copy_answers_while_the_holder_is_dead_and_the_disk_when_it_is_back(
    client: tierwise.Client, cluster: tierwise.LocalCluster
) -> None:
    rounds = filled(client, "crash", replica_nodes=["fog-1"])
    info = rounds.put_update(1, "a", update(0), durability="replicated")
    assert info.durability >= Durability.REPLICATED
    wait_for_copies(rounds)
    before = rounds.ask("similarity", round=1)
    cluster.kill("edge-1")
    elsewhere = tierwise.Rounds(client, "crash", node="cloud-1")
    for index, name in enumerate(NAMES):
        assert np.array_equal(
            eventually(lambda n=name: elsewhere.get(1, "update", n)), update(index)
        )
    after = eventually(lambda: elsewhere.ask("similarity", round=1))
    assert after["with_mean"] == pytest.approx(before["with_mean"])
    app = tierwise.App("crash", client=client)
    summed = app.function(lambda matrix: float(matrix.sum()), name="summed", memory="128MiB")
    expected = sum(float(update(index).sum()) for index in range(3))
    found = eventually(lambda: summed.remote(elsewhere.ref(1, "matrix")))
    assert found == pytest.approx(expected, abs=1.0)
    cluster.restart("edge-1")
    cluster.wait_ready()
    for index, name in enumerate(NAMES):
        found = eventually(lambda n=name: rounds.get(1, "update", n))
        assert np.array_equal(found, update(index))
    assert rounds.ask("similarity", round=1) == before


def test_every_acknowledged_update_is_there_after_a_kill_without_copies(
    client: tierwise.Client, cluster: tierwise.LocalCluster
) -> None:
    rounds = filled(client, "alone")
    cluster.kill("edge-1")
    with pytest.raises((tierwise.Unavailable, tierwise.NotFound)):
        tierwise.Rounds(client, "alone", node="cloud-1").get(1, "update", "a")
    cluster.restart("edge-1")
    cluster.wait_ready()
    for index, name in enumerate(NAMES):
        found = eventually(lambda n=name: rounds.get(1, "update", n))
        assert np.array_equal(found, update(index))
    # The round goes on where it was.
    rounds.put_aggregate(1, update(7))
    assert rounds.newest() == 1


def test_what_a_node_has_lost_comes_back_from_a_copy(
    client: tierwise.Client, cluster: tierwise.LocalCluster
) -> None:
    rounds = filled(client, "refill", replica_nodes=["fog-1"])
    rounds.put_update(1, "c", update(2), durability="replicated")
    wait_for_copies(rounds)
    cluster.kill("edge-1")
    folder = cluster.state / "agents/edge-1"
    shutil.rmtree(folder / "store", ignore_errors=True)
    (objects,) = [path for path in (folder / "cache").iterdir() if path.name == "objects"]
    shutil.rmtree(objects)
    cluster.restart("edge-1")
    cluster.wait_ready()
    for index, name in enumerate(NAMES):
        found = eventually(lambda n=name: rounds.get(1, "update", n))
        assert np.array_equal(found, update(index))


def test_a_round_moves_to_another_node_and_brings_its_base(client: tierwise.Client) -> None:
    rounds = filled(client, "moves")
    rounds.put_aggregate(1, update(50))
    there = tierwise.Rounds(client, "moves", node="fog-1")
    eventually(lambda: there.info(1))
    there.open(2, NAMES, COUNT, base=1)
    there.put_update(2, "a", update(51))
    assert np.array_equal(there.get(2, "update", "a"), update(51))
    found = there.ask("round", round=2)
    assert found["base_digest"] == rounds.info(1).digest
    # The rounds before stay where they are: the base alone has come.
    assert np.array_equal(there.get(1, "matrix")[1], update(1))
    assert there.ask("round", round=1)["is_complete"]
    rows = {(row["round"], row["kind"], row["client"]): row for row in rounds.list()}
    assert rows[2, "update", "a"]["node_ids"] == ["fog-1"]
    assert rows[1, "update", "a"]["node_ids"] == ["edge-1"]
    assert set(rows[1, "aggregate", ""]["node_ids"]) == {"edge-1", "fog-1"}
    assert rounds.newest() == 1
    assert eventually(lambda: rounds.ask("round", round=-1))["round"] == 1


def test_a_round_goes_on_at_a_copy_while_its_home_is_dead(
    client: tierwise.Client, cluster: tierwise.LocalCluster
) -> None:
    rounds = tierwise.Rounds(client, "goes-on", node="edge-1")
    rounds.open(0, NAMES, COUNT, replica_nodes=["fog-1"])
    rounds.put_update(0, "a", update(0), durability="replicated")
    elsewhere = tierwise.Rounds(client, "goes-on", node="cloud-1")
    eventually(lambda: elsewhere.get(0, "update", "a"))
    cluster.kill("edge-1")
    info = eventually(lambda: elsewhere.put_update(0, "b", update(1)))
    assert info.node_ids == ("fog-1",)
    assert elsewhere.ask("round", round=0)["is_in"] == [True, True, False]
    cluster.restart("edge-1")
    cluster.wait_ready()
    assert np.array_equal(eventually(lambda: rounds.get(0, "update", "b")), update(1))
    rounds.put_update(0, "c", update(2))
    ends_s = time.monotonic() + 30
    while not all(set(row["node_ids"]) == {"edge-1", "fog-1"} for row in rounds.list()):
        assert time.monotonic() < ends_s, rounds.list()
        time.sleep(0.1)
    assert rounds.ask("round", round=0)["is_complete"]

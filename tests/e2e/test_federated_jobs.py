"""Federated jobs on real processes: the models are those of one process, over crashes too."""

import threading
import time
from typing import Any

import numpy as np
import pytest

import tierwise
from benchmarks.functions.digits import write_shares
from tests.e2e import digits_builders as digits
from tests.e2e.waiting import until
from tierwise.sdk.operator import Operator
from tierwise.v1 import cache_pb2

CONFIG: dict[str, Any] = {"steps": 10, "rate": 0.5}
TIERS = "1c,1f,2e"
NODES = ("cloud-1", "fog-1", "edge-1", "edge-2")


@pytest.fixture(scope="module")
def files(cluster: tierwise.LocalCluster) -> list[str]:
    return write_shares(cluster.state / "data", 10, alpha=1.0, seed=0)[0]


def job_of(
    client: tierwise.Client, files: list[str], name: str, count: int = 4, **options: Any
) -> tierwise.FederatedJob:
    config = {**CONFIG, "held": files[0].replace("c0.npz", "held.npz"), **options.pop("config", {})}
    return tierwise.FederatedJob(
        name,
        digits.client,
        digits.initial(),
        {f"c{i}": (f"edge-{1 + i % 2}", files[i]) for i in range(count)},
        **{
            "rounds": 3,
            "evaluate": digits.evaluate,
            "config": config,
            "encoding": "",
            "memory": "256MiB",
            "cluster": client,
            **options,
        },
    )


def rounds_of(job: tierwise.FederatedJob) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = job.state()["rounds"]
    return found


def moved_bytes(client: tierwise.Client) -> dict[str, int]:
    """Return what the caches have sent to each other, per class of link; each counts both ways."""
    total: dict[str, int] = {}
    for node in NODES:

        async def ask(node: str = node) -> cache_pb2.ListObjectsResponse:
            caches = client.connection().caches
            request = cache_pb2.ListObjectsRequest(namespace="default")
            response: cache_pb2.ListObjectsResponse = await caches.ask(node, "ListObjects", request)
            return response

        for link, size_bytes in client.run(ask).cache.moved_bytes.items():
            total[link] = total.get(link, 0) + size_bytes
    return total


def wide_area(moved: dict[str, int]) -> int:
    return sum(size_bytes for link, size_bytes in moved.items() if "cloud" in link)


def test_a_job_comes_to_the_model_that_one_process_comes_to(
    client: tierwise.Client, files: list[str]
) -> None:
    job = job_of(client, files, "plain")
    job.start()
    assert job.wait()["done_count"] == 3
    for ours, direct in zip(job.arrays(), digits.averaged(files[:4], CONFIG, 3), strict=True):
        np.testing.assert_allclose(ours, direct, atol=1e-5)
    last = rounds_of(job)[-1]
    assert last["metrics"]["accuracy"] > 0.6 and last["digest"]
    assert job.rounds.newest() == 3
    assert not job.start()["message"], "the same again is the same job"
    assert set(job.rounds.ask("similarity")["with_mean"]) == {"c0", "c1", "c2", "c3"}
    facts = job.rounds.ask("round")["round_metadata"]
    assert facts["layout"] == [[64, 10], [10]] and facts["rate"] == 0.5


def test_hierarchy_moves_a_third_or_less_over_the_wide_area_for_the_same_model(
    client: tierwise.Client, files: list[str]
) -> None:
    models, wide = [], []
    for name, is_hierarchical in (("flat", False), ("tree", True)):
        before = wide_area(moved_bytes(client))
        job = job_of(
            client,
            files,
            name,
            count=8,
            hierarchical=is_hierarchical,
            root="cloud-1",
            evaluate=None,
        )
        job.start()
        job.wait()
        wide.append(wide_area(moved_bytes(client)) - before)
        models.append(job.arrays())
    nodes = {site["node_id"] for round_ in rounds_of(job) for site in round_["aggregators"]}
    assert nodes == {"fog-1", "cloud-1"}
    for flat, tree in zip(*models, strict=True):
        np.testing.assert_allclose(flat, tree, atol=1e-5)
    assert wide[1] <= wide[0] / 3, wide


@pytest.mark.parametrize("victims", [["scheduler"], ["cloud-1"], ["edge-1", "scheduler"]])
def test_a_kill_9_in_the_middle_changes_nothing_of_the_result(
    victims: list[str], cluster: tierwise.LocalCluster, client: tierwise.Client, files: list[str]
) -> None:
    job = job_of(client, files, f"crash-{victims[0]}", rounds=6, config={"pause_s": 0.2})
    job.start()
    until(lambda: len(rounds_of(job)) >= 3, 60.0)
    for victim in victims:
        cluster.kill(victim)
    time.sleep(0.3)
    for victim in victims:
        cluster.restart(victim)
    until(lambda: _state(job) != "running", 90.0)
    found = job.state()
    assert found["job"]["state"] == "succeeded", found["job"]["message"]
    done = [round_ for round_ in found["rounds"] if round_["state"] == "done"]
    assert len(done) == 6
    wanted = digits.averaged(files[:4], CONFIG, 6)
    for ours, direct in zip(job.arrays(), wanted, strict=True):
        np.testing.assert_allclose(ours, direct, atol=1e-4)
    cluster.wait_ready()


def test_an_aggregator_on_the_way_may_die_in_the_middle(
    cluster: tierwise.LocalCluster, client: tierwise.Client, files: list[str]
) -> None:
    job = job_of(
        client,
        files,
        "tree-crash",
        rounds=6,
        hierarchical=True,
        root="cloud-1",
        config={"pause_s": 0.2},
        deadline="20s",
    )
    job.start()
    until(lambda: len(rounds_of(job)) >= 3, 60.0)
    cluster.kill("fog-1")
    until(lambda: _state(job) != "running", 90.0)
    found = job.state()
    cluster.restart("fog-1")
    assert found["job"]["state"] == "succeeded", found["job"]["message"]
    # Its rounds fail until the node is given up; then the cloud merges alone.
    last = found["rounds"][-1]
    assert [site["node_id"] for site in last["aggregators"]] == ["cloud-1"]
    wanted = digits.averaged(files[:4], CONFIG, 6)
    for ours, direct in zip(job.arrays(), wanted, strict=True):
        np.testing.assert_allclose(ours, direct, atol=1e-4)
    cluster.wait_ready()


def _state(job: tierwise.FederatedJob) -> str:
    try:
        return str(job.state()["job"]["state"])
    except tierwise.Unavailable:
        return "running"


def test_multi_krum_bears_a_fifth_of_clients_that_flip_signs(
    client: tierwise.Client, files: list[str]
) -> None:
    found = {}
    for name, strategy, bad in (
        ("honest", "fedavg", []),
        ("deceived", "fedavg", ["c2", "c7"]),
        ("robust", "multi-krum", ["c2", "c7"]),
    ):
        job = job_of(client, files, name, 10, strategy=strategy, rounds=5, config={"bad": bad})
        job.start()
        job.wait()
        found[name] = rounds_of(job)[-1]["metrics"]["accuracy"]
    assert found["robust"] >= found["honest"] - 0.02, found
    assert found["deceived"] < found["honest"] - 0.02, "the attack is one"
    left = {u["client"] for r in rounds_of(job) for u in r["updates"] if "left out" in u["message"]}
    assert left >= {"c2", "c7"}


def test_an_update_with_a_nan_is_quarantined_and_the_round_goes_on(
    client: tierwise.Client, files: list[str]
) -> None:
    job = job_of(client, files, "broken", quorum=3, rounds=2, config={"broken": ["c1"]})
    job.start()
    job.wait()
    updates = {update["client"]: update for update in rounds_of(job)[0]["updates"]}
    assert updates["c1"]["state"] == "quarantined" and updates["c1"]["message"]
    assert np.isfinite(job.arrays()[0]).all()
    rest = digits.averaged([files[0], files[2], files[3]], CONFIG, 1)
    np.testing.assert_allclose(job.arrays(1)[0], rest[0], atol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("fedbuff", {"buffer": 2.0, "rounds": 6}),
        ("fedadam", {"rate": 0.1, "rounds": 4}),
        ("median", {}),
        ("trimmed-mean", {"share": 0.25}),
        ("fedadam", {"rate": 0.1, "rounds": 4, "hierarchical": True}),
    ],
)
def test_every_strategy_learns(
    strategy: str, options: dict[str, Any], client: tierwise.Client, files: list[str]
) -> None:
    name = f"{strategy}-{'tree' if options.get('hierarchical') else 'flat'}"
    job = job_of(client, files, name, strategy=strategy, **options)
    job.start()
    job.wait()
    accuracy = [round_["metrics"]["accuracy"] for round_ in rounds_of(job)]
    assert accuracy[-1] > 0.5, accuracy


def test_an_update_travels_compressed_and_the_model_hardly_differs(
    client: tierwise.Client, files: list[str]
) -> None:
    moved = []
    for encoding in ("", "int8"):
        before = wide_area(moved_bytes(client))
        job = job_of(client, files, f"as-{encoding or 'is'}", encoding=encoding, rounds=4)
        job.start()
        job.wait()
        moved.append(wide_area(moved_bytes(client)) - before)
        accuracy = rounds_of(job)[-1]["metrics"]["accuracy"]
        assert accuracy > 0.6
    assert moved[1] < 0.75 * moved[0]  # models still come as they are


def test_a_job_is_stopped_resumed_and_given_more_rounds(
    client: tierwise.Client, files: list[str]
) -> None:
    job = job_of(client, files, "pausing", rounds=20, config={"pause_s": 0.1})
    job.start()
    until(lambda: job.state()["job"]["done_count"] >= 2, 60.0)
    stopped = job.stop()
    assert stopped["state"] == "stopped"
    done = stopped["done_count"]
    with pytest.raises(tierwise.Cancelled, match="was stopped"):
        job.wait()
    job.resume(rounds=done + 2)
    assert job.wait()["done_count"] == done + 2
    wanted = digits.averaged(files[:4], CONFIG, done + 2)
    np.testing.assert_allclose(job.arrays()[0], wanted[0], atol=1e-4)


def test_watching_sees_every_round_end(client: tierwise.Client, files: list[str]) -> None:
    job = job_of(client, files, "seen", rounds=5, config={"pause_s": 0.1})
    ended: list[int] = []

    def watch() -> None:
        ended.extend(
            change["round"]["round"]
            for change in job.watch()
            if change.get("round") and change["round"]["state"] == "done"
        )

    job.start()
    thread = threading.Thread(target=watch)
    thread.start()
    thread.join(60)
    assert sorted(set(ended)) == [1, 2, 3, 4, 5]


def test_a_client_that_breaks_its_promise_is_told_what_is_expected(
    client: tierwise.Client, files: list[str]
) -> None:
    def wrong(arrays: Any, config: Any) -> Any:
        return arrays[:1], 1, {}

    job = tierwise.FederatedJob(
        "wrong", wrong, digits.initial(), {"c0": "edge-1"}, rounds=1, failures=0, cluster=client
    )
    job.start()
    with pytest.raises(tierwise.TierwiseError, match="there are 1 arrays, and the model has 2"):
        job.wait()


def test_calls_of_a_job_are_billed_to_its_owner(client: tierwise.Client, files: list[str]) -> None:
    ask = Operator(client)
    time.sleep(1.5)  # reports wait for a heartbeat
    names = {call["outcome"]["function_id"].partition("@")[0] for call in ask.calls(limit=500)}
    assert "default/plain-client" in names or "default/seen-client" in names

"""Crashes during work: accepted durable work ends exactly once, agents come back."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

import tierwise
from tierwise.sdk.operator import Operator

app = tierwise.App("faults")


@app.function(memory="64MiB", retries=5)
def slow_square(x: int) -> int:
    import time

    time.sleep(0.03)
    return x * x


@app.function(memory="64MiB", retries=1)
def always_dies(x: int) -> int:
    import os

    os._exit(9)


@pytest.fixture(autouse=True)
def use_cluster(client: tierwise.Client) -> None:
    app.use(client)


def wait_until(condition: Callable[[], bool], timeout_s: float = 40.0) -> None:
    ends_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends_s, "the condition did not come true"
        time.sleep(0.05)


ALL_READY = dict.fromkeys(("cloud-1", "edge-1", "fog-1"), "ready")


def states(ask: Operator) -> dict[str, str]:
    return {node["node"]["node_id"]: node["state"] for node in ask.nodes()}


@pytest.mark.parametrize("victim", ["worker", "fog-1", "scheduler"])
def test_a_killed_process_loses_no_accepted_work_and_doubles_no_result(
    victim: str, cluster: tierwise.LocalCluster, ask: Operator
) -> None:
    count = 60
    handles = slow_square.spawn_map(range(count))
    time.sleep(0.4)
    if victim == "worker":
        for pid in _workers_of(cluster.pid("fog-1")) + _workers_of(cluster.pid("cloud-1")):
            with contextlib.suppress(ProcessLookupError):  # it has gone with its process 1
                os.kill(pid, signal.SIGKILL)
    else:
        cluster.kill(victim)
        time.sleep(0.3)
        cluster.restart(victim)
    results = [handle.result(60) for handle in handles]
    assert results == [x * x for x in range(count)]
    assert {handle.state() for handle in handles} == {"succeeded"}
    wait_until(lambda: states(ask) == ALL_READY)


def test_work_whose_worker_always_dies_is_dead_lettered_and_can_be_redriven(ask: Operator) -> None:
    handle = always_dies.spawn(1)
    with pytest.raises(tierwise.FunctionDied, match="code 9"):
        handle.result(30)
    assert handle.state() == "dead"
    assert handle.request_id in {work["request_id"] for work in ask.work("dead")}
    ask.redrive(handle.request_id)
    wait_until(lambda: handle.state() == "dead")


def test_calls_go_on_while_the_scheduler_is_gone(
    cluster: tierwise.LocalCluster, client: tierwise.Client, ask: Operator
) -> None:
    name = slow_square.deploy().function_id
    remote = client.function(name)
    assert remote.remote(3) == 9
    cluster.kill("scheduler")
    assert [remote.remote(x) for x in range(10)] == [x * x for x in range(10)]
    cluster.restart("scheduler")
    wait_until(lambda: _is_up(ask))
    wait_until(lambda: states(ask) == ALL_READY)


def test_an_agent_restarted_without_scheduler_serves_from_its_last_catalogue(
    cluster: tierwise.LocalCluster, client: tierwise.Client, ask: Operator
) -> None:
    name = slow_square.deploy().function_id
    remote = client.function(name).options(node="edge-1")
    assert remote.remote(2) == 4
    cluster.kill("scheduler")
    address = (cluster.state / "agents/edge-1/address").read_text()
    cluster.kill("edge-1")
    (cluster.state / "agents/edge-1/address").unlink(missing_ok=True)
    config = cluster.state / "agents/edge-1/agent.toml"
    config.write_text(config.read_text().replace('"127.0.0.1:0"', f'"{address}"'))
    cluster.restart("edge-1")
    wait_until(lambda: (cluster.state / "agents/edge-1/address").exists())
    assert remote.remote(5) == 25
    cluster.restart("scheduler")
    wait_until(lambda: _is_up(ask))
    wait_until(lambda: states(ask) == ALL_READY)


def test_a_node_cut_off_becomes_lost_and_comes_back_by_itself(
    cluster: tierwise.LocalCluster, ask: Operator
) -> None:
    os.kill(cluster.pid("fog-1"), signal.SIGSTOP)
    try:
        wait_until(lambda: states(ask).get("fog-1") == "lost")
    finally:
        os.kill(cluster.pid("fog-1"), signal.SIGCONT)
    wait_until(lambda: states(ask).get("fog-1") == "ready")


def test_calls_find_another_node_while_one_hangs(
    cluster: tierwise.LocalCluster, ask: Operator
) -> None:
    cluster.kill("cloud-1")
    remote = slow_square.options(tier=["edge", "cloud"])
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda x=x: results.append(remote.remote(x))) for x in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == [x * x for x in range(10)]
    cluster.restart("cloud-1")
    wait_until(lambda: states(ask) == ALL_READY)


def test_a_drained_node_gets_no_new_work(ask: Operator) -> None:
    ask.drain("fog-1", is_on=True)
    wait_until(lambda: states(ask).get("fog-1") == "draining")
    with pytest.raises(tierwise.Unplaceable, match="draining"):
        wait_until(lambda: slow_square.options(node="fog-1").remote(1) is None, 5.0)
    ask.drain("fog-1", is_on=False)
    wait_until(lambda: states(ask).get("fog-1") == "ready")


def _is_up(ask: Operator) -> bool:
    try:
        ask.identity()
    except tierwise.TierwiseError:
        return False
    return True


def _workers_of(agent_pid: int) -> list[int]:
    """Return the pids of an agent's workers: the children of its zygotes."""
    import psutil

    zygotes = psutil.Process(agent_pid).children()
    return [child.pid for zygote in zygotes for child in zygote.children()]

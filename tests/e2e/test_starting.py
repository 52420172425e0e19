"""Starts and large arrays as a user meets them: classes, floors, shared memory, Python versions."""

import time
from dataclasses import replace

import numpy as np
import pytest

import tierwise
from tierwise.sdk.code import pack
from tierwise.sdk.operator import Operator

app = tierwise.App("starts")
NODES = ("edge-1", "cloud-1")


@app.function(memory="64MiB")
class Counter:
    """Counts how often it was entered and called."""

    def enter(self) -> None:
        self.entered_count = 1
        self.call_count = 0

    def __call__(self, step: int) -> tuple[int, int]:
        self.call_count += step
        return self.entered_count, self.call_count


@app.function(memory="256MiB", deadline="10s")
def double(array: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return array * 2


@app.function(memory="64MiB", min_instances=1, keep_alive="100ms")
def ready(value: int) -> int:
    return value


@pytest.fixture(autouse=True)
def use_cluster(client: tierwise.Client) -> None:
    app.use(client)


def test_a_class_is_entered_once_per_instance() -> None:
    there = Counter.options(node="edge-1")
    assert [there.remote(2) for _ in range(3)] == [(1, 2), (1, 4), (1, 6)]


def test_a_class_runs_here_too() -> None:
    assert Counter.local(5) == (1, 5)
    assert Counter(5) == (1, 10)


@pytest.mark.parametrize("node", NODES)
def test_a_shared_array_gives_the_same_result_near_and_far(node: str) -> None:
    array = np.random.default_rng(0).random((600, 500))
    shared = tierwise.share(array)
    there = double.options(node=node)
    assert np.array_equal(there.remote(shared), array * 2)
    assert np.array_equal(there.remote(array), array * 2)
    assert np.array_equal(shared.array, array)


def test_when_the_short_way_breaks_calls_go_on(client: tierwise.Client) -> None:
    array = np.random.default_rng(0).random(300_000)
    there = double.options(node="edge-1")
    assert np.array_equal(there.remote(array), array * 2)

    async def cut() -> None:
        entry = client.connection()._entry
        assert entry is not None
        assert entry.handover is not None
        entry.handover._channel.shutdown(2)

    client.run(cut)
    for _ in range(3):
        assert np.array_equal(there.remote(array), array * 2)


def test_an_array_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(tierwise.InvalidArgument, match="plain dtype"):
        tierwise.share(np.array([object()]))


def warm_on(ask: Operator, node: str) -> int:
    function = f"default/ready@{ready.spec.version}"
    [found] = [row for row in ask.nodes() if row["node"]["node_id"] == node]
    return int(found["reading"]["warm"].get(function, 0))


def test_a_floor_is_there_before_the_first_call_and_after_a_restart(
    cluster: tierwise.LocalCluster, ask: Operator
) -> None:
    ready.deploy()
    for _ in range(2):
        for node in NODES:
            while warm_on(ask, node) < 1:  # the test's own timeout bounds this
                time.sleep(0.05)
        cluster.kill("edge-1")
        cluster.restart("edge-1")
    assert ready.remote(3) == 3


def test_code_of_a_python_that_no_node_has_is_refused_when_it_is_deployed(
    client: tierwise.Client,
) -> None:
    spec = replace(ready.spec, python_version="3.99")
    with pytest.raises(tierwise.FailedPrecondition, match=r"packed by Python 3\.99.*nodes .* have"):
        client.run(lambda: client.deploy(spec, pack(ready.code)))

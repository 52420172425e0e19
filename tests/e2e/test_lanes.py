"""Blocking calls to an agent of the same machine: they go by sockets of their own."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tierwise
from tierwise.sdk.lane import LANES_MAX, Lane
from tierwise.sdk.operator import Operator

app = tierwise.App("lanes")


@app.function(memory="300MiB")
def behave(how: str, value: object = None) -> object:
    import time

    import numpy as np

    if how == "raise":
        raise KeyError(f"no {value}")
    if how == "sleep":
        time.sleep(value)
    if how == "bytes":
        return bytes(value)
    if how == "array":
        return np.full(value, 7.0)
    return value


@pytest.fixture
def calls(client: tierwise.Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Yield the ids of the calls that went by a lane; there is one when the test begins."""
    app.use(client)
    taken: list[str] = []
    call = Lane.call

    def counted(self: Lane, invocation, *rest):  # type: ignore[no-untyped-def]
        taken.append(invocation.request_id)
        return call(self, invocation, *rest)

    monkeypatch.setattr(Lane, "call", counted)
    wait_for_a_lane(client)
    taken.clear()
    yield taken


def wait_for_a_lane(client: tierwise.Client) -> None:
    ends_s = time.monotonic() + 20.0
    while not client.lanes._idle:
        behave.remote("echo", 0)
        assert time.monotonic() < ends_s, "no lane was opened"


def test_results_of_every_size_and_errors_come_by_a_lane(calls: list[str]) -> None:
    assert behave.remote("echo", {"a": (1, None)}) == {"a": (1, None)}
    assert behave.remote("bytes", 100_000) == bytes(100_000)
    assert behave.remote("bytes", 9_000_000) == bytes(9_000_000)
    assert (behave.remote("array", 400_000) == np.full(400_000, 7.0)).all()
    with pytest.raises(tierwise.FunctionRaised, match="no 1"):
        behave.remote("raise", 1)
    assert behave.remote("echo", None) is None
    assert len(calls) == 6


def test_large_arguments_go_the_other_way(calls: list[str]) -> None:
    assert behave.remote("echo", bytes(200_000)) == bytes(200_000)
    assert not calls
    assert behave.remote("echo", 1) == 1
    assert len(calls) == 1


def test_threads_do_not_get_each_others_results(calls: list[str], client: tierwise.Client) -> None:
    with ThreadPoolExecutor(2 * LANES_MAX) as pool:
        assert list(pool.map(lambda x: behave.remote("echo", x), range(400))) == list(range(400))
    assert calls
    assert len(client.lanes._open) <= LANES_MAX


def test_ctrl_c_cancels_the_call_and_the_next_one_works(
    calls: list[str], client: tierwise.Client
) -> None:
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        behave.remote("sleep", 30.0)
    cancelled = calls[-1]
    assert behave.remote("echo", 2) == 2
    ask = Operator(client)
    ends_s = time.monotonic() + 20.0
    while time.monotonic() < ends_s:
        found = [c["outcome"] for c in ask.calls(limit=20)]
        if any(o["request_id"] == cancelled and o["state"] == "cancelled" for o in found):
            return
        time.sleep(0.1)
    pytest.fail("the call was not cancelled")


def test_a_call_outlives_its_agent(
    calls: list[str], client: tierwise.Client, cluster: tierwise.LocalCluster
) -> None:
    entry = client.run(_entry_of(client))
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(behave.remote, "sleep", 1.5)
        time.sleep(0.5)
        cluster.kill(entry)
        time.sleep(0.2)
        cluster.restart(entry)
        assert future.result(60) == 1.5
    assert len(calls) == 1
    wait_for_a_lane(client)


def _entry_of(client: tierwise.Client):  # type: ignore[no-untyped-def]
    async def entry() -> str:
        agent = client.connection().entry
        assert agent is not None
        return agent.node_id

    return entry


def test_a_forked_child_does_not_read_its_parents_lane(
    calls: list[str], client: tierwise.Client
) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if client.lanes.take() is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert client.lanes.take() is not None

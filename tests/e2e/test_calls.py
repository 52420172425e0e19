"""What a user meets: results, typed errors, bad input. Real processes, real mTLS."""

import asyncio
import os
import time

import numpy as np
import pytest

import tierwise
from tierwise.sdk.operator import Operator

app = tierwise.App("calls")


@app.function(memory="300MiB", timeout="1s")
def behave(how: str, value: object = None) -> object:
    import os
    import sys
    import time

    if how == "raise":
        raise KeyError(f"no {value}")
    if how == "hang":
        time.sleep(60)
    if how == "exit":
        os._exit(3)
    if how == "sys.exit":
        sys.exit(1)
    if how == "segfault":
        os.kill(os.getpid(), 11)
    if how == "print":
        print("x" * 3_000_000)
        print("the last line")
    if how == "allocate":
        return len(bytearray(900 << 20))
    if how == "unencodable":
        return object()
    if how == "large":
        return bytes(121 << 20)
    if how == "pid":
        return os.getpid()
    return value


@pytest.fixture(autouse=True)
def use_cluster(client: tierwise.Client) -> None:
    app.use(client)


def test_values_come_back_as_they_went() -> None:
    value = {"a": [1, 2.5, None, True], "b": (1, "ü"), "c": b"\0\xff"}
    assert behave.remote("echo", value) == value
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    back = behave.remote("echo", array)
    assert back.dtype == array.dtype
    assert (back == array).all()


async def test_async_calls_run_side_by_side_on_the_callers_own_loop(
    client: tierwise.Client,
) -> None:
    results = await asyncio.gather(*(behave.remote.aio("echo", i) for i in range(20)))
    assert results == list(range(20))
    await client.aclose()


def test_map_keeps_the_order_and_reads_its_input_lazily() -> None:
    taken = []

    def endless():  # type: ignore[no-untyped-def]
        index = 0
        while True:
            taken.append(index)
            yield index
            index += 1

    found = behave.map(iter(lambda: "echo", None), endless())
    assert [next(found) for _ in range(500)] == list(range(500))
    found.close()
    assert len(taken) < 100_000


def test_an_exception_arrives_with_its_remote_traceback() -> None:
    with pytest.raises(tierwise.FunctionRaised, match="no cheese") as caught:
        behave.remote("raise", "cheese")
    assert caught.value.remote_type == "KeyError"
    assert "in behave" in caught.value.remote_traceback


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("hang", tierwise.FunctionTimedOut, "longer than"),
        (
            "exit",
            tierwise.FunctionDied,
            "default/behave-exit@.* exited with code 3 .* must not end",
        ),
        ("sys.exit", tierwise.FunctionDied, "SystemExit"),
        ("segfault", tierwise.FunctionDied, "SIGSEGV"),
        ("allocate", tierwise.FunctionOutOfMemory, "limit is 300 MiB: raise memory="),
        (
            "unencodable",
            tierwise.FunctionError,
            "the result is of type object, which",
        ),
        ("large", tierwise.FunctionError, "bytes"),
    ],
)
def test_a_function_that_misbehaves_gives_a_typed_error_and_harms_nobody(
    how: str, error: type[Exception], words: str
) -> None:
    # Each under its own name: who kills two workers is quarantined.
    name = f"behave-{how.replace('.', '-')}"
    memory = "512MiB" if how == "large" else "300MiB"
    timeout = "1s" if how == "hang" else "60s"
    function = app.function(behave.code, name=name, memory=memory, timeout=timeout)
    with pytest.raises(error, match=words):
        function.remote(how)
    assert function.remote("echo", 1) == 1


def test_a_function_that_kills_two_workers_is_kept_off_the_node_until_it_is_mended() -> None:
    fragile = app.function(behave.code, name="fragile", timeout="2s")
    there = fragile.options(node="edge-1")
    with pytest.raises(tierwise.FunctionDied):
        there.remote("segfault")
    with pytest.raises(tierwise.FunctionDied, match=r"not run on this node .* deploy a corrected"):
        there.remote("segfault")
    with pytest.raises(tierwise.Unplaceable, match="edge-1: quarantined") as caught:
        there.remote("echo", 1)
    assert caught.value.retry_after_s > 1.0
    assert fragile.options(node="fog-1").remote("echo", 1) == 1
    mended = app.function(behave.code, name="fragile", timeout="3s")
    assert mended.options(node="edge-1").remote("echo", 2) == 2


def test_megabytes_of_output_are_cut_and_the_end_is_kept(ask: Operator) -> None:
    behave.options(node="edge-1").remote("print")
    for _ in range(100):
        printed = [c["log"] for c in ask.calls("behave", "edge-1") if c["log"]]
        if printed:
            break
        time.sleep(0.05)
    assert printed[0].rstrip().endswith("the last line")
    assert "dropped" in printed[0]
    assert len(printed[0]) < 20_000


def test_the_worker_is_another_process_than_the_agent(cluster: tierwise.LocalCluster) -> None:
    pid = behave.options(node="edge-1").remote("pid")
    assert pid not in {os.getpid(), cluster.pid("edge-1")}


def test_an_unknown_function_is_not_found(client: tierwise.Client) -> None:
    with pytest.raises(tierwise.NotFound, match="no-such"):
        client.function("no-such").remote(1)


def test_arguments_that_cannot_travel_are_refused_before_they_leave() -> None:
    with pytest.raises(tierwise.InvalidArgument, match="convert it"):
        behave.remote("echo", object())


def test_a_payload_beyond_the_limit_is_refused_with_a_typed_error() -> None:
    with pytest.raises(tierwise.TierwiseError):
        behave.remote("echo", bytes(140 << 20))
    assert behave.remote("echo", 1) == 1


def test_an_expired_call_never_runs_and_says_so() -> None:
    behave.remote("echo", 1)
    with pytest.raises(tierwise.DeadlineExceeded):
        behave.options(timeout="1us").remote("echo", 1)


def test_a_pin_to_a_node_that_is_not_there_is_not_found() -> None:
    with pytest.raises(tierwise.NotFound, match="there is no node 'mars'"):
        behave.options(node="mars").remote("echo", 1)


def test_a_call_that_fits_nowhere_is_the_callers_to_change() -> None:
    with pytest.raises(tierwise.Infeasible, match="cloud-1: over budget"):
        behave.options(budget_usd=0.0).remote("echo", 1)


def test_a_call_that_its_caller_gives_up_is_billed_where_it_ran(ask: Operator) -> None:
    for name in ("edge-1", "cloud-1"):
        there = behave.options(node=name)
        there.remote("echo", 1)
        with pytest.raises(tierwise.DeadlineExceeded, match=f"it ran .* s on {name}"):
            there.options(timeout="0.5s").remote("hang")
        late = [call["outcome"] for call in _calls_until(ask, name, state="expired")]
        [outcome] = [o for o in late if (o["node_id"], o["state"]) == (name, "expired")]
        assert outcome["latency"]["run_s"] > 0.0
        assert outcome["money_usd"] > 0.0


def test_a_tier_wish_is_obeyed(ask: Operator) -> None:
    for tier in ("edge", "fog", "cloud"):
        behave.options(tier=tier).remote("echo", tier)
    ran_on = {c["outcome"]["node_id"] for c in _calls_until(ask, "cloud-1")}
    assert {"edge-1", "fog-1", "cloud-1"} <= ran_on


def test_a_call_explains_itself(ask: Operator) -> None:
    behave.options(tier="fog").remote("echo", 1)
    explanation: dict = {}  # type: ignore[type-arg]
    while [row["node_id"] for row in explanation.get("candidates", ())] != ["fog-1"]:
        newest = ask.calls("behave", "fog-1", 1)
        if newest:
            outcome = ask.call(newest[0]["outcome"]["request_id"][:12])["outcome"]
            explanation = outcome["explanation"] or {}
        time.sleep(0.05)  # the test's own timeout bounds this
    assert {m["node_id"]: m["reason"] for m in explanation["masked"]} == {
        "edge-1": "wrong tier",
        "cloud-1": "wrong tier",
    }


def test_an_equal_deployment_is_the_same_version_and_a_changed_one_is_new(
    client: tierwise.Client,
) -> None:
    def make(step: int):  # type: ignore[no-untyped-def]
        other = tierwise.App("versions", client=client)

        @other.function(name="stepper", memory="64MiB")
        def stepper(x: int) -> int:
            return x + step

        return stepper

    first = make(1).deploy().version
    assert make(1).deploy().version == first
    second = make(2)
    assert second.remote(1) == 3
    assert second.deploy().version == first + 1
    assert client.function(f"stepper@{first}").remote(1) == 2


def _calls_until(ask: Operator, node: str, state: str = "") -> list[dict]:  # type: ignore[type-arg]
    """Return recorded calls, waiting until one that ran on `node` has been reported."""
    for _ in range(100):
        calls = ask.calls(limit=500)
        ended = [c["outcome"]["state"] for c in calls if c["outcome"]["node_id"] == node]
        if state in ended or (ended and not state):
            return calls
        time.sleep(0.05)
    raise AssertionError(f"no call on {node} was recorded")

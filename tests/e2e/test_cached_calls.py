"""Calls that read objects of caches and put their results there, on real nodes."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tierwise
from tests.e2e.waiting import until

COUNT = 400_000
BASE = np.linspace(0.0, 1.0, COUNT, dtype=np.float32)
app = tierwise.App("cached")


@app.function(memory="128MiB")
def total(matrix: Any, more: Any = None, times: float = 1.0) -> float:
    found = float(matrix.sum()) * times
    return found if more is None else found + float(more.sum())


@app.function(memory="128MiB")
def mapped(array: Any) -> dict[str, Any]:
    """Return which file the array is mapped from, and whether it can be changed."""
    address = array.__array_interface__["data"][0]
    found = {"is_writable": bool(array.flags.writeable), "file": ""}
    with open("/proc/self/maps") as lines:  # noqa: PTH123 - it runs elsewhere, and is small
        for line in lines:
            bounds, rights, _, device, inode, *name = line.split(None, 5)
            low, high = (int(bound, 16) for bound in bounds.split("-"))
            if low <= address < high:
                found |= {"rights": rights, "file": f"{device}/{inode}", "name": "".join(name)}
    return found


@app.function(memory="256MiB")
def learn(base: Any, by: float = 0.5, how: str = "") -> Any:
    import numpy as np

    if how == "double":
        return base.astype(np.float64), {}
    if how == "no vector":
        return {"loss": 1.0}
    if how == "raise":
        raise RuntimeError("diverged")
    if how == "nan":
        return base * np.float32("nan"), {}
    if how == "slow":
        import time

        time.sleep(30)
    return base + np.float32(by), {"example_count": 12, "loss": 0.25}


@app.function(memory="128MiB")
def facts(names: list[str]) -> dict[str, Any]:
    return {"clients": names, "battery": 0.5}


@pytest.fixture(scope="module")
def rounds(client: tierwise.Client) -> Iterator[tierwise.Rounds]:
    app.use(client)
    made = tierwise.Rounds(client, "calls", node="edge-1")
    made.open(0, [], COUNT)
    made.put_aggregate(0, BASE)
    made.open(1, ["a", "b", "c"], COUNT, base=0)
    for index, name in enumerate("abc"):
        made.put_update(1, name, BASE + np.float32(index + 1), {"example_count": index + 1})
    time.sleep(1.0)  # the other nodes know of it
    yield made


def test_a_function_maps_the_caches_own_memory(
    rounds: tierwise.Rounds, cluster: tierwise.LocalCluster
) -> None:
    there = mapped.options(node="edge-1")
    found = there.remote(rounds.ref(1, "matrix"))
    assert "memfd" in found["name"]
    assert found["rights"].startswith("r-")
    assert not found["is_writable"]
    maps = Path(f"/proc/{cluster.pid('edge-1')}/maps").read_text()
    inodes = {line.split()[4] for line in maps.splitlines() if "memfd" in line}
    assert found["file"].rpartition("/")[2] in inodes  # one memory, mapped by both


def test_the_same_call_gives_the_same_wherever_it_runs(rounds: tierwise.Rounds) -> None:
    expected = sum(float((BASE + np.float32(i + 1)).sum()) for i in range(3))
    for node in ("edge-1", "fog-1", "cloud-1"):
        found = total.options(node=node).remote(rounds.ref(1, "matrix"), times=2.0)
        assert found == pytest.approx(2 * expected, rel=1e-5)
        both = total.options(node=node).remote(rounds.ref(0), more=rounds.ref(1, "update", "b"))
        assert both == pytest.approx(2 * float(BASE.sum()) + 2 * COUNT, rel=1e-5)


def test_an_ordinary_array_goes_beside_a_cached_one(rounds: tierwise.Rounds) -> None:
    own = np.ones(COUNT, np.float32)
    found = total.options(node="fog-1").remote(rounds.ref(0), own)
    assert found == pytest.approx(float(BASE.sum()) + COUNT, rel=1e-5)


def test_calls_prefer_the_node_that_holds_what_they_read(
    rounds: tierwise.Rounds, client: tierwise.Client
) -> None:
    from tierwise.sdk.operator import Operator

    remote = tierwise.Rounds(client, "far", node="cloud-1")
    remote.open(0, ["a", "b", "c", "d"], 4 * COUNT)
    for name in "abcd":
        remote.put_update(0, name, np.ones(4 * COUNT, np.float32))
    time.sleep(1.0)
    far = app.function(total.code, name="far-total", memory="128MiB")
    assert far.remote(remote.ref(0, "matrix")) == 16 * COUNT
    operator = Operator(client)
    calls = until(lambda: operator.calls("far-total"), 20.0)
    assert calls[0]["outcome"]["node_id"] == "cloud-1"  # though edge-1 took the call


def test_a_result_stays_in_the_cache_and_its_caller_gets_a_receipt(
    rounds: tierwise.Rounds,
) -> None:
    rounds.open(2, ["a", "b", "c", "d", "e"], COUNT, base=0)
    time.sleep(0.5)
    places = {"a": ("edge-1", ""), "b": ("fog-1", ""), "c": ("cloud-1", "edge-1")}
    for name, (node, target) in places.items():
        output = rounds.result(2, "update", name, node=target)
        receipt = learn.options(node=node, output=output).remote(rounds.ref(0), by=0.25)
        assert receipt["node_id"] == "edge-1"
        assert receipt["example_count"] == 12
        assert receipt["quarantined"] == ""
        assert receipt["digest"] == rounds.info(2, "update", name).digest
        assert np.array_equal(rounds.get(2, "update", name), BASE + np.float32(0.25))
    output = rounds.result(
        2, "update", "d", encoding="int8", relative_to=rounds.key(0, "aggregate")
    )
    learn.options(node="fog-1", output=output).remote(rounds.ref(0), by=0.25)
    found = rounds.get(2, "update", "d")
    assert np.abs(found - BASE - 0.25).max() < 0.002  # int8 of the difference, not of the model
    output = rounds.result(2, "update", "e", encoding="auto")
    learn.options(node="cloud-1", output=output).remote(rounds.ref(0), by=0.25)
    assert np.abs(rounds.get(2, "update", "e") - BASE - 0.25).max() < 0.02
    found = rounds.ask("round", round=2)
    assert found["is_complete"]
    assert found["example_counts"] == dict.fromkeys("abcde", 12.0)


def test_metadata_can_be_a_result(rounds: tierwise.Rounds) -> None:
    output = rounds.result(1, "metadata", node="edge-1")
    facts.options(node="fog-1", output=output).remote(["a", "b"])
    assert rounds.get(1, "metadata") == {"clients": ["a", "b"], "battery": 0.5}


def test_durable_work_reads_and_fills_caches(rounds: tierwise.Rounds) -> None:
    rounds.open(3, ["a", "b"], COUNT, base=0)
    time.sleep(0.5)
    handles = [
        learn.options(node=node, output=rounds.result(3, "update", name)).spawn(rounds.ref(0))
        for node, name in (("edge-1", "a"), ("fog-1", "b"))
    ]
    receipts = [handle.result(30) for handle in handles]
    assert [receipt["node_id"] for receipt in receipts] == ["edge-1", "edge-1"]
    assert total.spawn(rounds.ref(3, "matrix")).result(30) == pytest.approx(
        2 * float(BASE.sum()) + COUNT, rel=1e-5
    )


def test_what_is_missing_or_misused_is_a_typed_error(rounds: tierwise.Rounds) -> None:
    rounds.open(4, ["a", "b", "c"], COUNT, base=0)
    time.sleep(0.5)
    nothing = tierwise.CachedArray(rounds.key(4, "update", "b"), (COUNT,))
    with pytest.raises(tierwise.NotFound, match="000004/update/b"):
        total.remote(nothing)
    other_size = tierwise.CachedArray(rounds.key(0, "aggregate"), (COUNT + 1,))
    with pytest.raises(tierwise.FailedPrecondition, match="bytes"):
        total.remote(other_size)
    output = rounds.result(4, "update", "a")
    for how in ("double", "no vector"):
        with pytest.raises(tierwise.ResultRejected, match="float32"):
            learn.options(output=output).remote(rounds.ref(0), how=how)
    with pytest.raises(tierwise.FunctionRaised, match="diverged"):
        learn.options(output=output).remote(rounds.ref(0), how="raise")
    with pytest.raises(tierwise.NotFound):
        rounds.get(4, "update", "a")
    receipt = learn.options(output=output).remote(rounds.ref(0), how="nan")
    assert "NaN" in receipt["quarantined"]
    for node in ("edge-1", "fog-1"):
        with pytest.raises(tierwise.InvalidArgument, match="'z'"):
            learn.options(node=node, output=rounds.result(4, "update", "z", node="edge-1")).remote(
                rounds.ref(0)
            )
        with pytest.raises((tierwise.DeadlineExceeded, tierwise.FunctionTimedOut)):
            late = learn.options(node=node, output=rounds.result(4, "update", "b"), timeout="1s")
            late.remote(rounds.ref(0), how="slow")
    with pytest.raises(tierwise.InvalidArgument, match="lie in a cache"):
        list(total.map([rounds.ref(0)]))


def test_a_call_that_reads_can_be_cancelled_at_any_time(rounds: tierwise.Rounds) -> None:
    handle = learn.spawn(rounds.ref(0), how="slow")
    time.sleep(0.5)
    handle.cancel()
    with pytest.raises(tierwise.Cancelled):
        handle.result(10)
    assert total.remote(rounds.ref(0)) == pytest.approx(float(BASE.sum()), rel=1e-5)


def test_a_question_that_needs_vectors_runs_where_they_lie(rounds: tierwise.Rounds) -> None:
    found = rounds.ask("layer-norms", round=1, layout=[[100, 1000], [COUNT - 100_000]])
    assert len(found["layers"]) == 2
    norm = np.sqrt(100_000)
    assert np.allclose([found["norms"][name][0] for name in "abc"], [norm, 2 * norm, 3 * norm])
    with pytest.raises(tierwise.InvalidArgument, match="layout"):
        rounds.ask("layer-norms", round=1, layout=[[0, 1]])
    with pytest.raises(tierwise.InvalidArgument, match="did you mean"):
        rounds.ask("layer-norm")
    with pytest.raises(tierwise.InvalidArgument):
        rounds.ask("similarity", wrong=1)
    with pytest.raises(tierwise.NotFound):
        rounds.ask("similarity", round=99)

"""Rounds over a real cluster: put here, read there, asked anywhere; bad input and bad people."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

import tierwise
from tests.e2e.waiting import eventually
from tierwise.cli.main import app
from tierwise.config import ClientConfig, dump
from tierwise.domain.cache import Durability
from tierwise.sdk.operator import Operator
from tierwise.v1 import cache_pb2
from tierwise.wire.convert_cache import key_to_pb
from tierwise.wire.identity import join

COUNT = 300_000
BASE = np.linspace(-1.0, 1.0, COUNT, dtype=np.float32)


def update(index: int, count: int = COUNT) -> np.ndarray:
    rng = np.random.default_rng(index)
    return (BASE[:count] + rng.normal(scale=0.1, size=count)).astype(np.float32)


def log_in(cluster: tierwise.LocalCluster, name: str) -> Path:
    """Return the context of a new user."""
    addresses = msgspec.toml.decode((cluster.state / "scheduler/address").read_bytes())
    with tierwise.Client(cluster.context) as admin:
        token = Operator(admin).create_token("user", name, 600.0)["token"]
    credentials, scheduler, _ = asyncio.run(join(addresses["join"], token, name))
    folder = cluster.state / f"user-{name}"
    credentials.save(folder)
    (folder / "client.toml").write_bytes(dump(ClientConfig(scheduler=scheduler)))
    return folder


@pytest.fixture(scope="module")
def ada(cluster: tierwise.LocalCluster) -> Iterator[tierwise.Client]:
    with tierwise.Client(log_in(cluster, "ada")) as opened:
        yield opened


@pytest.fixture(scope="module")
def mallory(cluster: tierwise.LocalCluster) -> Iterator[tierwise.Client]:
    with tierwise.Client(log_in(cluster, "mallory")) as opened:
        yield opened


@pytest.fixture(scope="module")
def filled(ada: tierwise.Client) -> tierwise.Rounds:
    """One ended round of three clients, opened at edge-1."""
    rounds = tierwise.Rounds(ada, "filled", node="edge-1")
    rounds.open(0, [], COUNT)
    rounds.put_aggregate(0, BASE)
    rounds.open(1, ["a", "b", "c"], COUNT, base=0)
    for index, name in enumerate("abc"):
        facts = {"example_count": 10 * (index + 1), "loss": 0.5 / (index + 1)}
        assert not rounds.put_update(1, name, update(index), facts).quarantined
    rounds.put_metadata(1, "a", {"battery": 0.8})
    rounds.put_aggregate(1, np.mean([update(i) for i in range(3)], axis=0))
    return rounds


def known_everywhere(rounds: tierwise.Rounds, number: int) -> None:
    """Wait until the index has reached the other nodes."""
    for node in ("fog-1", "cloud-1"):
        other = tierwise.Rounds(rounds.client(), rounds.job, node=node)
        eventually(lambda other=other: other.info(number, "aggregate"))


def test_what_one_node_holds_is_read_and_asked_at_every_node(filled: tierwise.Rounds) -> None:
    known_everywhere(filled, 1)
    for node in ("edge-1", "fog-1", "cloud-1"):
        rounds = tierwise.Rounds(filled.client(), "filled", node=node)
        for index, name in enumerate("abc"):
            assert np.array_equal(rounds.get(1, "update", name), update(index))
        matrix = rounds.get(1, "matrix")
        assert np.array_equal(matrix, [update(index) for index in range(3)])
        assert rounds.get(1, "metadata", "a") == {"battery": 0.8}
        assert rounds.newest() == 1
        found = rounds.ask("similarity", round=1)
        deltas = np.array([update(i) for i in range(3)], np.float64) - BASE
        unit = deltas / np.linalg.norm(deltas, axis=1)[:, None]
        with_others = (unit @ unit.T).sum(axis=1) / 2 - 0.5
        assert np.allclose([found["with_others"][name] for name in "abc"], with_others, atol=1e-6)
    with pytest.raises(ValueError, match="read-only"):
        matrix[0, 0] = 1


def test_a_put_at_the_wrong_node_goes_to_the_one_that_opened_the_round(
    filled: tierwise.Rounds,
) -> None:
    rounds = tierwise.Rounds(filled.client(), "forwarded", node="edge-1")
    rounds.open(0, ["a", "b"], COUNT)
    there = tierwise.Rounds(filled.client(), "forwarded", node="cloud-1")
    info = eventually(lambda: there.put_update(0, "a", update(1), {"example_count": 3}))
    assert info.node_ids == ("edge-1",)
    assert info.durability >= Durability.DISK
    assert np.array_equal(rounds.get(0, "update", "a"), update(1))
    there.open(0, ["a", "b"], COUNT)  # the same again, by way of another node
    with pytest.raises(tierwise.AlreadyExists):
        there.open(0, ["a", "z"], COUNT)


def test_the_same_again_changes_nothing_and_something_else_is_refused(
    filled: tierwise.Rounds,
) -> None:
    again = filled.put_update(1, "a", update(0), {"example_count": 10, "loss": 0.5})
    assert again.digest == filled.info(1, "update", "a").digest
    with pytest.raises(tierwise.AlreadyExists):
        filled.put_update(1, "a", update(9))
    with pytest.raises(tierwise.AlreadyExists):  # a replay of another round's update
        filled.put_aggregate(0, update(1))
    assert np.array_equal(filled.get(1, "update", "a"), update(0))


def test_updates_that_break_the_manifest_are_quarantined_or_refused(
    filled: tierwise.Rounds,
) -> None:
    rounds = tierwise.Rounds(filled.client(), "breaking", node="edge-1")
    rounds.open(0, [], COUNT)
    rounds.put_aggregate(0, BASE)
    rounds.open(1, list("abcde"), COUNT, base=0, distance_max=200.0)
    broken = update(0)
    broken[7] = np.nan
    assert "NaN" in rounds.put_update(1, "a", broken).quarantined
    assert rounds.put_update(1, "b", update(1)[:-1]).quarantined
    assert "200 at most" in rounds.put_update(1, "c", update(2) + 10).quarantined
    assert not rounds.put_update(1, "d", update(3)).quarantined
    with pytest.raises(tierwise.NotFound, match="quarantined"):
        rounds.get(1, "update", "a")
    found = rounds.ask("round", round=1)
    assert set(found["quarantined"]) == {"a", "b", "c"}
    assert found["is_in"] == [False, False, False, True, False]
    with pytest.raises(tierwise.InvalidArgument, match="'z'"):
        rounds.put_update(1, "z", update(4))
    with pytest.raises(tierwise.FailedPrecondition, match="open"):
        rounds.put_update(2, "a", update(4))
    rounds.put_aggregate(1, BASE)
    with pytest.raises(tierwise.FailedPrecondition, match="ended"):
        rounds.put_update(1, "e", update(4))


def test_a_stream_that_breaks_off_leaves_nothing(filled: tierwise.Rounds) -> None:
    rounds = tierwise.Rounds(filled.client(), "truncated", node="edge-1")
    rounds.open(0, ["a"], COUNT)
    key = rounds.key(0, "update", "a")
    head = cache_pb2.ObjectHead(key=key_to_pb(key), size_bytes=4 * COUNT)
    raw = update(0).tobytes()

    async def put(*chunks: bytes, said: cache_pb2.ObjectHead = head) -> Any:
        caches = filled.client().connection().caches
        return await caches.put("edge-1", said, lambda: chunks)

    with pytest.raises(tierwise.InvalidArgument):
        filled.client().run(lambda: put(raw[:-4]))
    with pytest.raises(tierwise.InvalidArgument):
        filled.client().run(lambda: put(raw, b"\0\0\0\0"))
    wrong = cache_pb2.ObjectHead(key=head.key, size_bytes=head.size_bytes, digest="00" * 32)
    with pytest.raises(tierwise.InvalidArgument):
        filled.client().run(lambda: put(raw, said=wrong))
    with pytest.raises(tierwise.NotFound):
        rounds.get(0, "update", "a")
    assert not rounds.put_update(0, "a", update(0)).quarantined


@pytest.mark.parametrize(("encoding", "error"), [("fp16", 1e-3), ("int8", 2e-2)])
def test_a_compressed_update_arrives_as_near_as_its_encoding_allows(
    filled: tierwise.Rounds, encoding: str, error: float
) -> None:
    rounds = tierwise.Rounds(filled.client(), f"small-{encoding}", node="edge-1")
    rounds.open(0, ["a"], COUNT)
    rounds.put_update(0, "a", update(0), encoding=encoding)
    found = rounds.get(0, "update", "a")
    assert 0 < np.abs(found - update(0)).max() < error


def test_nobody_touches_the_job_of_another(
    filled: tierwise.Rounds, mallory: tierwise.Client, client: tierwise.Client
) -> None:
    known_everywhere(filled, 1)
    for node in ("edge-1", "fog-1"):
        theirs = tierwise.Rounds(mallory, "filled", node=node)
        for forbidden in (
            lambda theirs=theirs: theirs.open(5, ["a"], COUNT),
            lambda theirs=theirs: theirs.put_update(1, "a", update(5)),
            lambda theirs=theirs: theirs.put_aggregate(1, update(5)),
            lambda theirs=theirs: theirs.get(1, "update", "a"),
            lambda theirs=theirs: theirs.ask("similarity", round=1),
            lambda theirs=theirs: theirs.forget(),
        ):
            with pytest.raises(tierwise.PermissionDenied):
                forbidden()
        assert theirs.list() == []
    operator = tierwise.Rounds(client, "filled", node="fog-1")  # an administrator may
    assert np.array_equal(operator.get(1, "update", "b"), update(1))


def test_only_the_named_writer_puts_a_clients_update(
    ada: tierwise.Client, mallory: tierwise.Client
) -> None:
    rounds = tierwise.Rounds(ada, "named", node="edge-1")
    rounds.open(0, [], COUNT)
    rounds.put_aggregate(0, BASE)
    writers = {
        "hers": "",
        "his": "tierwise://user/mallory",
        "its": "tierwise://node/fog-1",
    }
    rounds.open(1, writers, COUNT, base=0)
    theirs = tierwise.Rounds(mallory, "named", node="edge-1")
    assert not theirs.put_update(1, "his", update(1)).quarantined
    assert np.array_equal(theirs.get(0), BASE)  # he trains on it
    assert np.array_equal(theirs.get(1, "update", "his"), update(1))
    for client in ("hers", "its"):
        with pytest.raises(tierwise.PermissionDenied):
            theirs.put_update(1, client, update(2))
    with pytest.raises(tierwise.PermissionDenied):
        theirs.get(1, "matrix")
    with pytest.raises(tierwise.PermissionDenied):
        rounds.put_update(1, "its", update(2))
    app = tierwise.App("named", client=ada)
    learn = app.function(nudged, name="nudged", memory="128MiB")
    output = rounds.result(1, "update", "its", node="edge-1")
    with pytest.raises(tierwise.PermissionDenied):
        learn.options(node="cloud-1", output=output).remote(rounds.ref(0), 0.5)
    receipt = learn.options(node="fog-1", output=output).remote(rounds.ref(0), 0.5)
    assert receipt["node_id"] == "edge-1"


def nudged(base: Any, by: float) -> Any:
    return base + base.dtype.type(by), {"example_count": 7}


def test_everything_of_a_job_is_forgotten_everywhere(ada: tierwise.Client) -> None:
    rounds = tierwise.Rounds(ada, "forgotten", node="edge-1")
    rounds.open(0, ["a"], COUNT, replica_nodes=["fog-1"])
    rounds.put_update(0, "a", update(0), durability="replicated")
    assert rounds.list()[0]["node_ids"] == ["edge-1", "fog-1"]
    assert rounds.forget(with_store=True) == 2
    assert rounds.list() == []
    with pytest.raises(tierwise.NotFound):
        rounds.get(0, "update", "a")


def test_objects_are_listed_for_operators(
    filled: tierwise.Rounds,
    ask: Operator,
    cluster: tierwise.LocalCluster,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = ask.objects("default", "filled")
    kinds = [(row["round"], row["kind"], row["client"]) for row in rows]
    assert (1, "update", "b") in kinds and (0, "aggregate", "") in kinds
    row = rows[kinds.index((1, "update", "b"))]
    assert row["node_ids"] == ["edge-1"]
    assert row["size_bytes"] == 4 * COUNT
    assert row["metadata"]["example_count"] == 20
    monkeypatch.setenv("TIERWISE_CONTEXT", str(cluster.context))
    shown = CliRunner().invoke(app, ["get", "objects", "--job", "filled", "--node", "edge-1"])
    assert shown.exit_code == 0, shown.output
    header, *lines = shown.output.splitlines()
    assert header.split()[:3] == ["OBJECT", "SIZE", "DURABILITY"]
    (line,) = [line for line in lines if "filled/000001/update/b" in line]
    assert "1.2 MB" in line and "edge-1" in line and "20" in line
    found = CliRunner().invoke(app, ["get", "objects", "--job", "filled", "-o", "json"])
    assert json.loads(found.stdout) == ask.objects("", "filled")

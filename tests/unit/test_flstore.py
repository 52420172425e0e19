"""The parts of `bench_flstore`: trace, rivals, arithmetic, prices and the emulated line."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.cache.rivals import policy
from benchmarks.bench_cache_policies import Ingested, Memory
from benchmarks.flstore.aggregator import Aggregator, put_record
from benchmarks.flstore.ours import layout_of, parameters_of
from benchmarks.flstore.prices import Holding, Use, break_even, cost
from benchmarks.flstore.results import change, is_same
from benchmarks.flstore.rivals import drawn_inputs, reading
from benchmarks.flstore.stores import S3_CONNECTIONS, aggregate, cut, layers, metadata, update
from benchmarks.flstore.trace import MIX, WORKLOADS, Query, Vectors, make_trace, warm_up
from tierwise.domain.cache import ObjectKey, ObjectKind
from tierwise.functions.fl.answers.facts import facts as facts_of
from tierwise.functions.fl.blocks import mean
from tierwise.functions.fl.questions import find
from tierwise.functions.fl.statistics import RoundStatistics

ROUNDS, HIDDEN = 5, 3
P = HIDDEN * 795 + 10
TRACE = make_trace(rounds=ROUNDS, query_count=300)
INPUTS = drawn_inputs(784, 10, count=4, seed=3)


class Shelf:
    """A store in memory."""

    request_count = 0

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put(self, name: str, value: memoryview) -> None:
        self.objects[name] = bytes(value)

    def fetch(self, names: Sequence[str], rows: Sequence[memoryview]) -> None:
        for name, row in zip(names, rows, strict=True):
            row[:] = self.objects[name]

    def fetch_small(self, names: Sequence[str]) -> list[bytes]:
        return [self.objects[name] for name in names]

    def settle(self) -> None: ...


class World:
    """Rounds of the trace on a shelf, and as arrays."""

    def __init__(self) -> None:
        self.aggregator = Aggregator({}, P, INPUTS)
        shelf = Shelf()
        self.aggregator.stores["shelf"] = shelf
        vectors = Vectors(P)
        self.ends = [vectors.first().copy()]
        self.matrices: list[np.ndarray[Any, Any]] = []
        self.metadata: list[list[dict[str, float]]] = []
        shelf.put(aggregate(-1), memoryview(self.ends[0]).cast("B"))
        for number, clients in enumerate(TRACE.members):
            matrix = np.empty((len(clients), P), dtype=np.float32)
            for row, client in zip(matrix, clients, strict=True):
                vectors.fill(row, self.ends[-1], client, number)
                shelf.put(update(number, client), memoryview(row).cast("B"))
            known = [vectors.metadata(client, number) for client in clients]
            self.matrices.append(matrix)
            self.metadata.append(known)
            counts = [each["example_count"] for each in known]
            self.ends.append(mean(matrix, range(len(matrix)), counts))
            shelf.put(aggregate(number), memoryview(self.ends[-1]).cast("B"))
            record = {
                "round": number + 1,
                "clients": clients,
                "metadata": known,
                "parameter_count": P,
                "round_metadata": {"layout": layout_of(P)},
            }
            put_record(shelf, metadata(number), json.dumps(record).encode())

    def statistics(self, number: int) -> RoundStatistics:
        """Return them by the definition, in float64."""
        deltas = self.matrices[number].astype(np.float64) - self.ends[number]
        columns = {
            name: np.array([each[name] for each in self.metadata[number]])
            for name in self.metadata[number][0]
        }
        count = len(deltas)
        nothing = np.full(count, np.nan)
        return RoundStatistics(
            namespace="default",
            job="bench",
            round=number + 1,
            clients=TRACE.members[number],
            rows=np.arange(count),
            expected=TRACE.members[number],
            parameter_count=P,
            gram=deltas @ deltas.T,
            norms=np.linalg.norm(deltas, axis=1),
            base_dots=nothing,
            base_norm=0.0,
            aggregate_dots=nothing,
            aggregate_norm=float("nan"),
            example_counts=columns["example_count"],
            arrival_s=nothing,
            digests=("",) * count,
            columns=columns,
            metadata=tuple(self.metadata[number]),
            round_metadata={"layout": layout_of(P)},
            base_digest="-",
            aggregate_digest="-",
        )

    def expected(self, query: Query) -> Any:
        """Return the answer of the function to arrays that nobody has stored or fetched."""
        workload, rounds = query.workload, TRACE.rounds_of(query)
        question = find(workload.question)
        arguments = {
            **workload.arguments,
            **{name: np.array(INPUTS[name]) for name in workload.inputs},
        }
        if query.client and workload.question in ("similar-weights", "client-history"):
            arguments["client"] = query.client
        some = [self.statistics(number) for number in rounds]
        match workload.reads:
            case "statistics":
                return question.function(some[0], **arguments)
            case "history":
                return question.function(some, **arguments)
            case "records":
                return question.function(some[0] if question.rounds == 1 else some, **arguments)
            case "matrix":
                matrix = self.matrices[query.round]
                return question.function(matrix, facts=facts_of(some[0]), **arguments)
        models = [self.ends[number + 1] for number in rounds]
        if query.client:
            rows = [TRACE.members[number].index(query.client) for number in rounds]
            models = [self.matrices[n][row] for n, row in zip(rounds, rows, strict=True)]
        found = [
            question.function(model, facts=facts_of(each), **arguments)
            for model, each in zip(models, some, strict=True)
        ]
        return {"by_round": found} if workload.reads == "models" else found[0]


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda each: each.name)
def test_a_rivals_answer_is_that_of_the_function_on_the_vectors_themselves(
    world: World, workload: Any
) -> None:
    queries = [query for query in TRACE.queries if query.workload == workload]
    for query in [*queries[:6], *(q for q in warm_up(TRACE) if q.workload == workload)]:
        reply = world.aggregator.ask("shelf", as_json(reading(TRACE, query)))
        assert is_same(as_json(reply["answer"]), as_json(world.expected(query))), query


def test_a_rival_reads_what_its_question_is_about_and_no_more(world: World) -> None:
    for query in TRACE.queries[:80]:
        reply = world.aggregator.ask("shelf", as_json(reading(TRACE, query)))
        vectors = {"model": 1, "statistics": 11, "matrix": 10, "records": 0}
        count = vectors.get(query.workload.reads, len(TRACE.rounds_of(query)))
        if query.workload.reads != "history":
            assert reply["bytes"] // (4 * P) == count or not count
            assert reply["bytes"] - count * 4 * P < 60_000


def test_a_trace_follows_from_its_seed_and_asks_of_rounds_that_have_ended() -> None:
    again = make_trace(rounds=ROUNDS, query_count=300)
    assert again == TRACE
    assert make_trace(rounds=ROUNDS, query_count=300, seed=1) != TRACE
    for query in TRACE.queries:
        assert query.round <= query.after < ROUNDS
        assert TRACE.rounds_of(query)
        if query.client and query.workload.reads == "model":
            assert query.client in TRACE.members[query.round]


def test_classes_come_as_often_as_the_mix_says() -> None:
    trace = make_trace(rounds=ROUNDS, query_count=4000)
    for name, share in MIX.items():
        found = np.mean([query.workload.query_class == name for query in trace.queries])
        assert found == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("sizes", [(10_000_000,), (47_000_000,) * 10, (12,), (100_000_000, 8)])
def test_parts_of_a_fetch_cover_every_byte_once(sizes: tuple[int, ...]) -> None:
    rows = [memoryview(bytearray(size)) for size in sizes]
    names = [str(number) for number in range(len(rows))]
    seen = dict.fromkeys(names, 0)
    for name, start, view, is_whole in cut(names, rows):
        assert start == seen[name]
        seen[name] += len(view)
        assert is_whole == (len(view) == sizes[int(name)])
    assert [seen[name] for name in names] == list(sizes)
    assert len(cut(names, rows)) <= S3_CONNECTIONS + len(rows)


def test_layers_cover_a_vector_in_order() -> None:
    value = memoryview(np.arange(1000, dtype=np.float32)).cast("B")
    assert b"".join(layers(value)) == bytes(value)
    assert all(len(part) % 4 == 0 for part in layers(value))


def test_networks_are_about_as_large_as_asked() -> None:
    for size_mb in (10, 47, 113):
        count = parameters_of(size_mb)
        assert abs(4 * count - size_mb * 1e6) < 4000
        assert sum(int(np.prod(shape)) for shape in layout_of(count)) == count


def test_a_query_costs_its_seconds_by_its_memory_and_its_requests() -> None:
    use = Use(busy_s=2.0, read_gb=0.75, get_count=10)
    found = cost([use], Holding(kind="s3"), "listed", 60.0)
    assert found.compute == pytest.approx(1e3 * 2.0 * 1.0 * 1.66667e-5)
    assert found.requests == pytest.approx(1e3 * (0.2e-6 + 10 * 0.4e-6))
    assert found.held == 0.0


def test_memory_that_waits_is_billed_by_the_time_between_queries() -> None:
    use = Use(busy_s=0.001, read_gb=0.0)
    ours = Holding(kind="tierwise", held_gb=2.0, replica_gb=2.0)
    assert cost([use], ours, "equal").held == 0.0
    assert cost([use], ours, "held", 60.0).held == pytest.approx(1e3 * 4.0 * 4.1667e-6 * 60.0)
    redis = Holding(kind="redis", held_gb=26.32 * 1.073741824, replica_gb=1.0)
    assert cost([use], redis, "listed", 1000.0).held == pytest.approx(0.411)  # its hourly price
    assert cost([use], redis, "held", 1000.0).held > 0.411


def test_ours_breaks_even_where_the_costs_cross() -> None:
    ours = ([Use(busy_s=0.01, read_gb=0.0)], Holding(kind="tierwise", held_gb=1.0))
    other = ([Use(busy_s=1.0, read_gb=0.5, get_count=20)], Holding(kind="s3"))
    rate = break_even(ours, other, "held")
    assert 0.0 < rate < float("inf")
    costs = [cost(uses, holding, "held", rate).total for uses, holding in (ours, other)]
    assert costs[0] == pytest.approx(costs[1])
    assert break_even(ours, ours, "held") == 0.0


def test_answers_are_the_same_up_to_rounding_and_no_further() -> None:
    one = {"scores": {"a": 1.0, "b": None}, "kept": ["a"], "flag": True}
    assert is_same(one, {"scores": {"a": 1.0 + 1e-9, "b": None}, "kept": ("a",), "flag": True})
    for other in (
        {"scores": {"a": 1.01, "b": None}, "kept": ["a"], "flag": True},
        {"scores": {"a": 1.0, "b": None}, "kept": ["b"], "flag": True},
        {"scores": {"a": 1.0}, "kept": ["a"], "flag": True},
        {"scores": {"a": 1.0, "b": None}, "kept": ["a"], "flag": False},
    ):
        assert not is_same(one, other)


def test_a_change_is_a_ratio_of_means_within_its_interval() -> None:
    rng = np.random.default_rng(0)
    rival = rng.random(100) + 1.0
    found = change(0.1 * rival, rival)
    assert found.value == pytest.approx(-0.9)
    assert found.low <= found.value <= found.high < -0.89


def test_the_replayed_cache_never_holds_more_than_it_has_room_for() -> None:
    memory = Memory(policy("lru"), 3)
    keys = [
        ObjectKey(namespace="n", job="j", round=number, kind=ObjectKind.UPDATE, client="c")
        for number in range(5)
    ]
    for key in keys:
        memory.ingest(Ingested(key, 1))
        assert len(memory.held) <= 3
    found = [memory.ask((keys[4],)), memory.ask((keys[0],))]
    assert (sum(read for _, read in found), sum(hit for hit, _ in found)) == (2, 1)


def test_the_relay_delays_and_paces_and_changes_no_byte() -> None:
    size, first_byte_s, rate = 2_000_000, 0.05, 20e6
    body = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while connection.recv(100):
                    connection.sendall(body)

        threading.Thread(target=serve, daemon=True).start()
        arguments = [str(listener.getsockname()[1]), str(1e3 * first_byte_s), "20", "1000"]
        relay = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.flstore.relay", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert relay.stdout is not None
        with socket.create_connection(("127.0.0.1", int(relay.stdout.readline()))) as client:
            for _ in range(2):  # a connection that stays open waits for each request
                start_s = time.perf_counter()
                client.sendall(b"give")
                got = bytearray()
                while len(got) < size:
                    got += client.recv(1 << 16)
                assert bytes(got) == body
                assert time.perf_counter() - start_s > first_byte_s + 0.9 * size / rate
        relay.communicate()
        assert relay.returncode == 0

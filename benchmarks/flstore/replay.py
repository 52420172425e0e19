"""One trace on all systems, in turns: rounds come in, then what is asked after them."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.flstore.ours import CLASSES, INPUT_WIDTH, Ours, layout_of, parameters_of
from benchmarks.flstore.results import Sample, is_same
from benchmarks.flstore.rivals import (
    NAIVE,
    STORES,
    Aggregators,
    drawn_inputs,
    vectors_of,
)
from benchmarks.flstore.stores import aggregate, update
from benchmarks.flstore.trace import Query, Trace, Vectors, make_trace, warm_up
from tierwise.clock import precise_s
from tierwise.functions.fl.blocks import mean

RIVALS_WARM = ("inference", "cosine similarity", "scheduling by use")
INPUTS = 16  # test inputs of a query
IGNORED = ("arrival_s", "with_last_step")  # when it came; what reads one more vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one model size is tried with.

    Attributes:
        cache_rounds: How many rounds tierwise's memory has room for, aggregates included.
        naive_every: The naive rival is asked every so many queries; 0: never.
    """

    size_mb: int
    rounds: int
    query_count: int
    cache_rounds: float
    naive_every: int = 20
    seed: int
    policy: str = "adaptive"

    @property
    def cache_mib(self) -> int:
        """Return the cache's memory."""
        return int(self.cache_rounds * 11 * 4 * parameters_of(self.size_mb) / 2**20) + 1


@dataclass(slots=True)
class Replayed:
    """What came of it."""

    plan: Plan
    samples: list[Sample] = field(default_factory=list)
    first: list[Sample] = field(default_factory=list)  # each workload once, before the others
    ingest_s: list[float] = field(default_factory=list)
    compared_count: int = 0
    differing: list[str] = field(default_factory=list)
    hit_count: int = 0
    miss_count: int = 0


def replay(plan: Plan, *, with_rivals: bool = True) -> Replayed:
    """Run one size from the first round to the last query."""
    count = parameters_of(plan.size_mb)
    trace = make_trace(rounds=plan.rounds, query_count=plan.query_count, seed=plan.seed)
    inputs = drawn_inputs(INPUT_WIDTH, CLASSES, count=INPUTS, seed=plan.seed)
    vectors = Vectors(count, seed=plan.seed)
    found = Replayed(plan)
    with scratch() as folder, shared_file(count) as (path, matrix):
        ours = Ours(folder / "ours", count, inputs, memory_mib=plan.cache_mib, policy=plan.policy)
        rivals = None
        if with_rivals:
            rivals = Aggregators(folder, count, inputs, cache_mib=plan.cache_mib)
        # Rivals first: their servers are forked, which a process that speaks gRPC should not.
        with rivals or nullcontext(), ours:
            _run(trace, plan, vectors, ours, rivals, path, matrix, found)
            reading = ours.reading()
            found.hit_count, found.miss_count = reading.hit_count, reading.miss_count
    return found


def _run(
    trace: Trace,
    plan: Plan,
    vectors: Vectors,
    ours: Ours,
    rivals: Aggregators | None,
    path: Path,
    matrix: NDArray[np.float32],
    found: Replayed,
) -> None:
    stores = [store for store in STORES if store != NAIVE or plan.naive_every]
    naive = _read_by_naive(trace, plan)
    base = vectors.first().copy()
    ours.begin(base)
    matrix[0] = base
    for store in stores if rivals else ():
        assert rivals is not None
        rivals.put(store, path, {aggregate(-1): 0}, {})
    for number, clients in enumerate(trace.members):
        for row, client in enumerate(clients):
            vectors.fill(matrix[row], base, client, number)
        metadata = [vectors.metadata(client, number) for client in clients]
        counts = [facts["example_count"] for facts in metadata]
        base = mean(matrix, range(len(clients)), counts)
        matrix[len(clients)] = base
        facts = {"layout": layout_of(len(base))}
        found.ingest_s.append(
            ours.ingest(number, clients, matrix[: len(clients)], metadata, base, facts)
        )
        record = {
            "round": number + 1,
            "clients": clients,
            "metadata": metadata,
            "parameter_count": len(base),
            "round_metadata": facts,
        }
        names = [*(update(number, client) for client in clients), aggregate(number)]
        took = [found.ingest_s[-1]]
        rows = {name: row for row, name in enumerate(names)}
        for store in stores if rivals else ():
            assert rivals is not None
            some = {name: rows[name] for name in rows.keys() & naive} if store == NAIVE else rows
            start_s = precise_s()
            rivals.put(store, path, some, record)
            took.append(precise_s() - start_s)
        start_s = precise_s()
        ours.settle()
        took.append(precise_s() - start_s)
        start_s = precise_s()
        if number == 0:
            for query in warm_up(trace):
                # Ours starts a function for each; rivals need their connections and memory warm.
                some = rivals if query.workload.name in RIVALS_WARM else None
                _ask_all(trace, plan, query, ours, some, found, is_first=True)
        for query in (query for query in trace.queries if query.after == number):
            _ask_all(trace, plan, query, ours, rivals, found)
        took.append(precise_s() - start_s)
        print(f"  round {number + 1} of {plan.rounds}: " + _told(took), flush=True)


def _told(took: Sequence[float]) -> str:
    """Return the seconds of one round's steps: ours, each rival, written through, queries."""
    puts = " + ".join(f"{seconds:.1f}" for seconds in took[:-2])
    return f"put in {puts} s, settled in {took[-2]:.1f} s, asked in {took[-1]:.1f} s"


def _read_by_naive(trace: Trace, plan: Plan) -> set[str]:
    """Return what the naive rival will read; the rest need not be put for it, which takes long."""
    if not plan.naive_every:
        return set()
    some = [query for query in trace.queries if query.number % plan.naive_every == 0]
    return {name for query in some for name in vectors_of(trace, query)}


def _ask_all(
    trace: Trace,
    plan: Plan,
    query: Query,
    ours: Ours,
    rivals: Aggregators | None,
    found: Replayed,
    *,
    is_first: bool = False,
) -> None:
    """Ask every system the same, beginning with another one each time."""
    systems = [ours.name, *(rivals.systems if rivals else ())]
    if not plan.naive_every or is_first or query.number % plan.naive_every:
        systems = [system for system in systems if not system.startswith(NAIVE)]
    first = query.number % len(systems)
    answers: dict[str, Any] = {}
    for system in systems[first:] + systems[:first]:
        if system == ours.name:
            answers[system], sample = ours.ask(trace, query, plan.size_mb)
        else:
            assert rivals is not None
            reply = rivals.ask(system, trace, query)
            answers[system] = reply["answer"]
            sample = Sample(
                system=system,
                size_mb=plan.size_mb,
                number=query.number,
                query_class=query.workload.query_class,
                workload=query.workload.name,
                elapsed_s=reply["elapsed_s"],
                read_bytes=reply["bytes"],
                get_count=reply["gets"],
                fetch_s=reply["fetch_s"],
            )
        (found.first if is_first else found.samples).append(sample)
    expected = without(answers[ours.name])
    for system in systems[1:]:
        found.compared_count += 1
        if not is_same(expected, without(answers[system])):
            found.differing.append(f"{query.workload.name} ({system}, query {query.number})")


def without(answer: Any) -> Any:
    """Return an answer without what systems need not agree on."""
    if isinstance(answer, Mapping):
        return {key: without(value) for key, value in answer.items() if key not in IGNORED}
    if isinstance(answer, list | tuple):
        return [without(value) for value in answer]
    return answer


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder for everything that a run writes; it is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="bench-flstore-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def shared_file(parameter_count: int) -> Iterator[tuple[Path, NDArray[np.float32]]]:
    """Make a file in memory with one round and its end, shape (11, P), that rivals map."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() else None
    with tempfile.NamedTemporaryFile(prefix="bench-flstore-", dir=place) as file:
        path = Path(file.name)
        yield path, np.memmap(path, dtype=np.float32, mode="w+", shape=(11, parameter_count))

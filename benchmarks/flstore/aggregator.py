"""A rival's aggregator: a process that fetches what a query needs and answers with our functions.

    .venv-flstore/bin/python -m benchmarks.flstore.aggregator

Orders come on standard input, one JSON object a line, and are answered by one line each:

    {"op": "open", "stores": {name: {"kind": …, "port": …, …}}, "parameters": P, …}
    {"op": "put", "store": …, "file": path of float32 (n, P), "rows": {name: row}, "record": {…}}
    {"op": "ask", "store": …, "query": {…}}  →  {"answer", "elapsed_s", "fetch_s", "bytes", "gets"}

It keeps nothing between queries but its memory, whose pages have been touched before the first one,
and its connections. Vectors are read into rows of that memory; the functions are tierwise's own
(`tierwise.functions`), run here, in this process. Statistics, which tierwise takes while updates
come in, are computed here when they are asked for: in blocks that stay in the processor's cache,
products in float32, sums in float64.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.flstore.stores import (
    RedisOverS3,
    RedisTuned,
    S3Naive,
    S3Tuned,
    Store,
    aggregate,
    metadata,
    update,
)
from tierwise.clock import precise_s
from tierwise.functions.fl.answers.facts import facts
from tierwise.functions.fl.questions import find
from tierwise.functions.fl.statistics import RoundStatistics

BLOCK = 1 << 14  # elements: 14 rows of it are under 1 MB
ROWS = 14  # vectors held at a time
PUTS = 4  # at a time
HISTORY_CHUNK = 4  # rounds of a history at a time: an update and two aggregates each
Vector = NDArray[np.float32]
KINDS = {"s3": S3Tuned, "naive": S3Naive, "redis": RedisTuned, "redis over s3": RedisOverS3}


@dataclass(slots=True)
class Fetched:
    """What one query has read."""

    bytes: int = 0
    fetch_s: float = 0.0
    rows: dict[str, Vector] = field(default_factory=dict)


class Aggregator:
    """One process's stores, memory and functions."""

    def __init__(
        self,
        stores: Mapping[str, Mapping[str, Any]],
        parameters: int,
        inputs: Mapping[str, Sequence[Any]],
    ) -> None:
        """Connect, and touch the memory.

        Args:
            stores: By name.
            parameters: Length of every vector.
            inputs: Test data, which is sent once and not with every query.
        """
        self.inputs = {
            "inputs": np.array(inputs["inputs"], dtype=np.float32),
            "labels": np.array(inputs["labels"]),
        }
        self.stores: dict[str, Store] = {}
        for name, wanted in stores.items():
            options = {key: value for key, value in wanted.items() if key != "kind"}
            self.stores[name] = KINDS[wanted["kind"]](**options)
        self._memory = np.zeros((ROWS, parameters), dtype=np.float32)
        self._memory += 0.0
        self._threads = ThreadPoolExecutor(1)

    def put(
        self, store: str, file: str, rows: Mapping[str, int], record: Mapping[str, Any]
    ) -> None:
        """Store rows of a file by name, and the round's record."""
        vectors = np.memmap(file, dtype=np.float32, mode="r").reshape(-1, self._memory.shape[1])
        some = self.stores[store]
        with ThreadPoolExecutor(PUTS) as threads:
            list(
                threads.map(
                    lambda x: some.put(x[0], memoryview(vectors[x[1]]).cast("B")), rows.items()
                )
            )
        if record:
            text = json.dumps(record).encode()
            put_record(some, metadata(record["round"] - 1), text)

    def ask(self, store: str, query: Mapping[str, Any]) -> dict[str, Any]:
        """Fetch and answer."""
        start_s = precise_s()
        some = self.stores[store]
        before = some.request_count
        fetched = Fetched()
        answer = self._answer(some, query, fetched)
        elapsed_s = precise_s() - start_s
        some.settle()
        return {
            "answer": answer,
            "elapsed_s": elapsed_s,
            "fetch_s": fetched.fetch_s,
            "bytes": fetched.bytes,
            "gets": some.request_count - before,
        }

    def _answer(self, store: Store, query: Mapping[str, Any], fetched: Fetched) -> Any:
        question, number = find(query["question"]), int(query["round"])
        arguments = {**query["arguments"], **{name: self.inputs[name] for name in query["inputs"]}}
        match query["reads"]:
            case "records":
                records, _ = self._fetch(store, query["rounds"], [], fetched)
                statistics = [_statistics(each, None, None) for each in records]
                return question.function(
                    statistics[-1] if question.rounds == 1 else statistics, **arguments
                )
            case "history":
                return question.function(self._history(store, query, fetched), **arguments)
            case "models":
                names = query["vectors"]
                records, rows = self._fetch(store, query["rounds"], names, fetched)
                return {
                    "by_round": [
                        question.function(row, facts=_facts(each), **arguments)
                        for each, row in zip(records, rows, strict=True)
                    ]
                }
            case "model":
                records, rows = self._fetch(store, [number], query["vectors"], fetched)
                return question.function(rows[0], facts=_facts(records[0]), **arguments)
            case "matrix" | "statistics":
                # The updates, and the base if it is needed.
                records, rows = self._fetch(store, [number], query["vectors"], fetched)
                count = len(records[0]["clients"])
                arrays = {
                    "matrix": rows[:count],
                    "base": rows[count] if len(rows) > count else None,
                }
                if query["reads"] == "statistics":
                    known = _statistics(records[0], arrays["matrix"], arrays["base"])
                    return question.function(known, **arguments)
                inputs = [arrays[name] for name in question.inputs]
                return question.function(*inputs, facts=_facts(records[0]), **arguments)
        raise ValueError(f"unknown reading {query['reads']!r}")

    def _fetch(
        self, store: Store, rounds: Sequence[int], names: Sequence[str], fetched: Fetched
    ) -> tuple[list[dict[str, Any]], Vector]:
        """Read records and vectors at the same time, into the first rows of the memory."""
        start_s = precise_s()
        if len(names) > len(self._memory):
            raise ValueError(f"{len(names)} vectors at a time; there is room for {ROWS}")
        wanted = [metadata(number) for number in rounds]
        rows = self._memory[: len(names)]
        if isinstance(store, S3Tuned | RedisOverS3) and names:
            later = self._threads.submit(store.fetch_small, wanted)
            store.fetch(names, [memoryview(row).cast("B") for row in rows])
            found = later.result()
        else:
            found = store.fetch_small(wanted)
            if names:
                store.fetch(names, [memoryview(row).cast("B") for row in rows])
        fetched.bytes += rows.nbytes + sum(len(each) for each in found)
        fetched.fetch_s += precise_s() - start_s
        return [json.loads(each) for each in found], rows

    def _history(
        self, store: Store, query: Mapping[str, Any], fetched: Fetched
    ) -> list[RoundStatistics]:
        """Return statistics of one client in each of its rounds, from its update and two ends.

        A round's mean delta is its aggregate minus the one before, so the nine other updates need
        not be read: they are put together as one client of what is left.
        """
        client, rounds = query["arguments"]["client"], query["rounds"]
        found = []
        for place in range(0, len(rounds), HISTORY_CHUNK):
            some = rounds[place : place + HISTORY_CHUNK]
            ends = sorted({end for number in some for end in (number, number - 1)})
            names = [update(number, client) for number in some] + [aggregate(end) for end in ends]
            records, rows = self._fetch(store, some, names, fetched)
            at = {end: rows[len(some) + index] for index, end in enumerate(ends)}
            for index, number in enumerate(some):
                gram = _gram([rows[index], at[number]], at[number - 1])
                found.append(_of_client(records[index], client, gram))
        return found


def put_record(store: Store, name: str, text: bytes) -> None:
    """Store a small record, which the naive store does not cut into layers."""
    if isinstance(store, S3Naive):
        S3Tuned.put(store, name, memoryview(text))  # type: ignore[arg-type] # the same fields
    else:
        store.put(name, memoryview(text))


def _gram(rows: Sequence[Vector] | Vector, base: Vector) -> NDArray[np.float64]:
    """Return inner products of the rows minus the base, shape (n, n)."""
    count, width = len(rows), len(base)
    gram = np.zeros((count, count))
    deltas = np.empty((count, BLOCK), dtype=np.float32)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        some = deltas[:, : stop - start]
        for row, delta in zip(rows, some, strict=True):
            np.subtract(row[start:stop], base[start:stop], out=delta)
        gram += some @ some.T
    return gram


def _statistics(
    record: Mapping[str, Any], matrix: Vector | None, base: Vector | None
) -> RoundStatistics:
    """Return a round's statistics: from its vectors, or from its record alone (lengths unknown)."""
    clients = tuple(record["clients"])
    count = len(clients)
    gram = np.full((count, count), np.nan)
    if matrix is not None and base is not None:
        gram = _gram(matrix, base)
    columns = {
        name: np.array([each.get(name, np.nan) for each in record["metadata"]], dtype=np.float64)
        for name in sorted({name for each in record["metadata"] for name in each})
    }
    nothing = np.full(count, np.nan)
    return RoundStatistics(
        namespace="default",
        job="bench",
        round=record["round"],
        clients=clients,
        rows=np.arange(count),
        expected=clients,
        parameter_count=record["parameter_count"],
        gram=gram,
        norms=np.sqrt(np.diagonal(gram)),
        base_dots=nothing,
        base_norm=float("nan"),
        aggregate_dots=nothing,
        aggregate_norm=float("nan"),
        example_counts=columns["example_count"],
        arrival_s=nothing,
        digests=("",) * count,
        columns=columns,
        metadata=tuple(record["metadata"]),
        round_metadata=record["round_metadata"],
        base_digest="-",
        aggregate_digest="-",
    )


def _of_client(
    record: Mapping[str, Any], client: str, gram: NDArray[np.float64]
) -> RoundStatistics:
    """Return statistics of a client and of all others as one.

    Args:
        record: Of the round.
        client: Whose history it is.
        gram: Of the client's delta δ and the mean m of all, shape (2, 2).
    """
    row = record["clients"].index(client)
    counts = [float(each["example_count"]) for each in record["metadata"]]
    own, total = counts[row], sum(counts)
    share = own / total
    # Others' mean is (m − w·δ) ÷ (1 − w).
    change = np.array([[1.0, 0.0], [-share / (1.0 - share), 1.0 / (1.0 - share)]])
    both = change @ gram @ change.T
    other = {name: float("nan") for name in record["metadata"][row]}
    small = {
        **record,
        "clients": [client, "others"],
        "metadata": [record["metadata"][row], {**other, "example_count": total - own}],
    }
    return replace(_statistics(small, None, None), gram=both, norms=np.sqrt(np.diagonal(both)))


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    return facts(_statistics(record, None, None))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like answers
    aggregator: Aggregator | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            match order.pop("op"):
                case "open":
                    aggregator = Aggregator(**order)
                    reply: dict[str, Any] = {}
                case "bucket":
                    assert aggregator is not None
                    store = aggregator.stores[order["store"]]
                    assert isinstance(store, S3Tuned)
                    store.make_bucket()
                    reply = {}
                case "put":
                    assert aggregator is not None
                    aggregator.put(**order)
                    reply = {}
                case _:
                    assert aggregator is not None
                    reply = aggregator.ask(**order)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()

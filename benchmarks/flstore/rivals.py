"""The rivals as the benchmark sees them: a server, an aggregator, and the lines between them.

First-byte latency and bandwidth of the *emulated* lines:

    S3     30 ms and 87.5 MB/s per connection, 1,250 MB/s in all. AWS: 85–90 MB/s for each of
           about 15 concurrent requests on 10 Gbit/s (S3 performance design patterns); medians of
           small requests "often in the range of tens of milliseconds", first bytes after 100–200 ms
           (S3 performance guidelines). 30 ms is at the low end, in favour of the rival.
    Redis  0.5 ms and 625 MB/s per connection, 1,250 MB/s in all: a single flow has 5 Gbit/s (EC2
           instance network bandwidth), and 10 Gbit/s is what a cache.r6g.xlarge reaches in bursts;
           its baseline is an eighth of that.

The line between whoever asks and the aggregator, or the agent, is loopback for every system: who
asks is taken to sit beside both. Writing is not emulated.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.flstore.servers import (
    BUCKET,
    KEY,
    ROOT,
    SECRET,
    VENV,
    Line,
    Relay,
    start_redis,
    start_s3,
)
from benchmarks.flstore.stores import aggregate, update
from benchmarks.flstore.trace import Query, Trace

S3_LINE = Line(first_byte_ms=30.0, connection_mb_per_s=87.5, total_mb_per_s=1250.0)
REDIS_LINE = Line(first_byte_ms=0.5, connection_mb_per_s=625.0, total_mb_per_s=1250.0)
EMULATED = " (emulated)"
S3, REDIS, BOUNDED, NAIVE = "s3", "redis", "redis over s3", "s3 naive"
STORES = (S3, REDIS, BOUNDED, NAIVE)  # in this order: what is bounded reads what S3 has


class Aggregators:
    """All rivals of one model size, in front of them one aggregator. `systems` are their names."""

    def __init__(
        self, folder: Path, parameter_count: int, inputs: Mapping[str, Any], *, cache_mib: int
    ) -> None:
        self.systems: list[str] = []
        self._stack = ExitStack()
        self._folder = folder
        self._parameter_count = parameter_count
        self._inputs = inputs
        self._cache_mib = cache_mib

    def __enter__(self) -> "Aggregators":
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def put(
        self, store: str, file: Path, rows: Mapping[str, int], record: Mapping[str, Any]
    ) -> None:
        """Store rows of a file by name, and the round's record, on one rival's server."""
        self._process.order(op="put", store=store, file=str(file), rows=rows, record=record)

    def ask(self, system: str, trace: Trace, query: Query) -> dict[str, Any]:
        """Return what the aggregator answers; see aggregator.py."""
        return self._process.order(op="ask", store=system, query=reading(trace, query))

    def _start(self) -> None:
        enter = self._stack.enter_context
        weed = enter(start_s3(self._folder / "s3"))
        redis = enter(start_redis(self._folder / "redis"))
        bounded = enter(start_redis(self._folder / "bounded", self._cache_mib))
        stores: dict[str, dict[str, Any]] = {}
        for suffix in ("", EMULATED):
            s3_port, redis_port, bounded_port = (
                enter(Relay(server.port, line)).port if suffix else server.port
                for server, line in ((weed, S3_LINE), (redis, REDIS_LINE), (bounded, REDIS_LINE))
            )
            s3 = {"port": s3_port, "key": KEY, "secret": SECRET, "bucket": BUCKET}
            stores |= {
                S3 + suffix: {"kind": "s3", **s3},
                REDIS + suffix: {"kind": "redis", "port": redis_port},
                BOUNDED + suffix: {"kind": "redis over s3", "port": bounded_port, "s3": s3},
                NAIVE + suffix: {"kind": "naive", **s3},
            }
        self._process = enter(running(self._folder / "aggregator.log"))
        self._process.order(
            op="open", stores=stores, parameters=self._parameter_count, inputs=self._inputs
        )
        self._process.order(op="bucket", store=S3)
        self.systems = list(stores)


class Process:
    """An aggregator's process."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process = process
        self._log = log

    def order(self, **order: Any) -> dict[str, Any]:
        """Send one order and return its answer.

        Raises:
            RuntimeError: It failed, or the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in found:
            tail = self._log.read_text(errors="replace").strip().splitlines()[-5:]
            raise RuntimeError("\n".join([f"aggregator: {found['error']}", *tail]))
        return found


@contextmanager
def running(log: Path) -> Iterator[Process]:
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(VENV / "bin/python"), "-m", "benchmarks.flstore.aggregator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # as ours
        )
    try:
        yield Process(process, log)
    finally:
        process.communicate()


def reading(trace: Trace, query: Query) -> dict[str, Any]:
    """Return the order for a query: what to read, and what to ask of it."""
    workload = query.workload
    arguments = dict(workload.arguments)
    if query.client and workload.question in ("similar-weights", "client-history"):
        arguments["client"] = query.client
    return {
        "question": workload.question,
        "round": query.round,
        "reads": workload.reads,
        "rounds": trace.rounds_of(query),
        "vectors": vectors_of(trace, query),
        "arguments": arguments,
        "inputs": workload.inputs,
    }


def vectors_of(trace: Trace, query: Query) -> list[str]:
    """Return the keys of the vectors that a query reads."""
    workload, rounds = query.workload, trace.rounds_of(query)
    match workload.reads:
        case "model" if workload.is_of_client:
            return [update(query.round, query.client)]
        case "model":
            return [aggregate(query.round)]
        case "models":
            return [update(number, query.client) for number in rounds]
        case "history":
            ends = sorted({end for number in rounds for end in (number - 1, number)})
            updates = [update(number, query.client) for number in rounds]
            return updates + [aggregate(end) for end in ends]
        case "matrix" | "statistics":
            found = [update(query.round, client) for client in trace.members[query.round]]
            return found + ([aggregate(query.round - 1)] if workload.with_base else [])
        case _:
            return []


def drawn_inputs(width: int, classes: int, *, count: int, seed: int) -> dict[str, Any]:
    """Return inputs, shape (count, width), and labels, as lists."""
    rng = np.random.default_rng(seed)
    inputs: NDArray[np.float32] = rng.standard_normal((count, width), dtype=np.float32)
    return {"inputs": inputs.tolist(), "labels": rng.integers(classes, size=count).tolist()}

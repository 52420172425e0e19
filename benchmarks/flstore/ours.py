"""tierwise's side: real agents on this machine, and a client that asks them by the SDK.

Rounds are numbered from 1; round 0 holds what the first one starts from. `client-history` and
`schedule-oort` read every round that is held; a trace has fewer than they would read at most.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

import tierwise
from benchmarks.flstore.results import Sample
from benchmarks.flstore.trace import Query, Trace
from tierwise.clock import monotonic_s, pause, precise_s
from tierwise.config import AgentConfig, CacheConfig
from tierwise.domain.cache import Durability
from tierwise.functions.fl.answers.inference import evaluate
from tierwise.v1 import cache_pb2

HOME = "fog-1"  # the node that holds the rounds
NODES = "1c,1f"
FUNCTIONS_MIB = 4096  # on each node
SETTLE_TIMEOUT_S = 120.0
Vector = NDArray[np.float32]


class Ours:
    """A cluster, one job in its cache, and the questions of a trace.

    Attributes:
        name: In tables: "tierwise", or with the policy that is not the usual one.
        memory_mib: What the cache may hold in memory.
    """

    def __init__(
        self,
        folder: Path,
        parameter_count: int,
        inputs: Mapping[str, Any],
        *,
        memory_mib: int,
        policy: str = "adaptive",
    ) -> None:
        self.name = "tierwise" if policy == "adaptive" else f"own cache, {policy}"
        self.memory_mib = memory_mib
        self.parameter_count = parameter_count
        self._inputs = {
            "inputs": np.array(inputs["inputs"], dtype=np.float32),
            "labels": [int(label) for label in inputs["labels"]],
        }
        self._policy = policy
        self._stack = ExitStack()
        self.cluster = tierwise.LocalCluster(
            folder, NODES, policy="ect", emulate=False, adjust=self._adjust
        )
        self.app = tierwise.App("bench")
        width = 4 * parameter_count >> 20
        self._evaluate = self.app.function(
            evaluate_models, memory=512 + 2 * width, timeout="300s", deadline="300s"
        )

    def __enter__(self) -> "Ours":
        try:
            self._stack.enter_context(self.cluster)
            self.client = self._stack.enter_context(
                tierwise.Client(self.cluster.context, entry=HOME)
            )
            self.app.use(self.client)
            self.rounds = tierwise.Rounds(self.client, "bench", node=HOME)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, vector: Vector) -> None:
        """Put what the first round starts from."""
        self.rounds.open(0, (), self.parameter_count)
        self.rounds.put_aggregate(0, vector)

    def ingest(
        self,
        number: int,
        clients: Sequence[str],
        matrix: Vector,
        metadata: Sequence[Mapping[str, Any]],
        aggregate: Vector,
        round_metadata: Mapping[str, Any],
    ) -> float:
        """Put one round, round `number` of the trace; return the seconds that it took."""
        start_s = precise_s()
        self.rounds.open(number + 1, clients, self.parameter_count, base=number)
        self.rounds.put_metadata(number + 1, "", round_metadata)
        for client, vector, facts in zip(clients, matrix, metadata, strict=True):
            found = self.rounds.put_update(number + 1, client, vector, facts)
            if found.quarantined:
                raise RuntimeError(f"{client}: {found.quarantined}")
        self.rounds.put_aggregate(number + 1, aggregate)
        return precise_s() - start_s

    def settle(self) -> None:
        """Wait until everything is in the object store, so that nothing runs beside queries."""
        ends_s = monotonic_s() + SETTLE_TIMEOUT_S
        while True:
            behind = [
                row["kind"]
                for row in self.rounds.list()
                if row["durability"] != Durability.STORED.name.lower()
            ]
            if not behind:
                return
            if monotonic_s() > ends_s:
                raise RuntimeError(f"{len(behind)} objects are not in the store: {behind[:5]}")
            pause(0.1)

    def ask(self, trace: Trace, query: Query, size_mb: int) -> tuple[Any, Sample]:
        """Return the answer to a query, and what it took."""
        before = self.reading()
        start_s = precise_s()
        answer = self._answer(trace, query)
        elapsed_s = precise_s() - start_s
        after = self.reading()
        was_asked = after.hit_count + after.miss_count > before.hit_count + before.miss_count
        was_hit = after.miss_count == before.miss_count if was_asked else None
        return answer, Sample(
            system=self.name,
            size_mb=size_mb,
            number=query.number,
            query_class=query.workload.query_class,
            workload=query.workload.name,
            elapsed_s=elapsed_s,
            read_bytes=self._read_bytes(trace, query),
            was_hit=was_hit,
        )

    def reading(self) -> cache_pb2.CacheReading:
        """Return how the home node's cache is doing."""
        request = cache_pb2.ListObjectsRequest(namespace="default", job="none")

        async def ask() -> cache_pb2.CacheReading:
            caches = self.client.connection().caches
            response: cache_pb2.ListObjectsResponse = await caches.ask(HOME, "ListObjects", request)
            return response.cache

        return self.client.run(ask)

    def _answer(self, trace: Trace, query: Query) -> Any:
        workload, number = query.workload, query.round + 1
        inputs = {name: self._inputs[name] for name in workload.inputs}
        match workload.reads:
            case "model" if workload.is_of_client:
                return self._evaluate_updates([query.round], query.client, inputs)["by_round"][0]
            case "models":
                return self._evaluate_updates(trace.rounds_of(query), query.client, inputs)
            case "history" | "statistics" if query.client:
                arguments = {"client": query.client, **workload.arguments}
            case _:
                arguments = dict(workload.arguments)
        is_of_many = workload.reads in ("history", "records") and workload.question != "metrics"
        where = {} if is_of_many else {"round": number}
        return self.rounds.ask(workload.question, **where, **inputs, **arguments)

    def _evaluate_updates(
        self, rounds: Sequence[int], client: str, inputs: Mapping[str, Any]
    ) -> Any:
        references = [self.rounds.ref(number + 1, "update", client) for number in rounds]
        layout = layout_of(self.parameter_count)
        call = self._evaluate.options(node=HOME)
        return call.remote(*references, layout=layout, **inputs)

    def _read_bytes(self, trace: Trace, query: Query) -> int:
        """Return the bytes that the function viewed; none, if statistics answer."""
        vectors = {
            "model": 1,
            "models": len(trace.rounds_of(query)),
            "matrix": len(trace.members[query.round]),
        }
        return 4 * self.parameter_count * vectors.get(query.workload.reads, 0)

    def _adjust(self, config: AgentConfig) -> AgentConfig:
        cache = CacheConfig(memory_mib=self.memory_mib, policy=self._policy)
        return msgspec.structs.replace(config, memory_mib=FUNCTIONS_MIB, cpus=2.0, cache=cache)


def evaluate_models(
    *models: Vector, layout: list[Any], inputs: Vector, labels: list[int]
) -> dict[str, Any]:
    """Return how well each of some models does: the question `evaluate`, of several at once."""
    facts = {"parameter_count": len(models[0])}
    return {
        "by_round": [
            evaluate(model, facts=facts, layout=layout, inputs=inputs, labels=labels)
            for model in models
        ]
    }


INPUT_WIDTH, CLASSES = 784, 10
PER_HIDDEN = INPUT_WIDTH + 1 + CLASSES


def parameters_of(size_mb: int) -> int:
    """Return how many parameters a network of one hidden layer has that is about so large."""
    return size_mb * 250_000 // PER_HIDDEN * PER_HIDDEN + CLASSES


def layout_of(parameter_count: int) -> list[list[int]]:
    """Return the layout of that network: 784 inputs, one hidden layer, 10 classes."""
    hidden = (parameter_count - CLASSES) // PER_HIDDEN
    return [[hidden, INPUT_WIDTH], [hidden], [CLASSES, hidden], [CLASSES]]

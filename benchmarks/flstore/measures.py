"""What a trace does not show: answers from statistics, the price of ingest, and a killed node."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.flstore.ours import CLASSES, HOME, INPUT_WIDTH, Ours, layout_of, parameters_of
from benchmarks.flstore.replay import scratch
from benchmarks.flstore.rivals import drawn_inputs
from benchmarks.flstore.servers import ROOT
from benchmarks.flstore.trace import PER_ROUND, Vectors, make_trace
from tierwise.clock import pause, precise_s
from tierwise.domain.cache import ObjectKey
from tierwise.errors import TierwiseError
from tierwise.functions.fl.blocks import mean
from tierwise.v1 import cache_pb2, cache_pb2_grpc
from tierwise.wire import payload
from tierwise.wire.channel import secure_channel
from tierwise.wire.convert_cache import key_to_pb, metadata_to_bytes
from tierwise.wire.identity import Credentials, node_dns_name

QUESTIONS = ("similarity", "malicious", "clusters", "leave-one-out", "payments")
ARGUMENTS: dict[str, dict[str, Any]] = {"clusters": {"k": 3}, "payments": {"budget": 10_000}}
UPLINK_BYTES_PER_S = 72e6 / 8  # median 5G low-band uplink (SIGCOMM'21)
CHUNK_BYTES = 1 << 20
Vector = NDArray[np.float32]


def measures(size_mb: int, seed: int, *, rounds: int = 5, asks: int = 200) -> dict[str, Any]:
    """Return figures of one cluster with a few rounds of `size_mb`."""
    count = parameters_of(size_mb)
    inputs = drawn_inputs(INPUT_WIDTH, CLASSES, count=4, seed=seed)
    room = int((rounds + 3) * (PER_ROUND + 1) * 4 * count / 2**20)
    with scratch() as folder, Ours(folder, count, inputs, memory_mib=room) as ours:
        made = Rounds(count, seed)
        ours.begin(made.base)
        for _ in range(2):
            made.put(ours)
        ours.settle()
        found: dict[str, Any] = {"size_mb": size_mb, "statistics": statistics(ours, asks)}
        found["ingest"] = ingest(ours, made, rounds)
        ours.settle()
        found["kill"] = kill(ours, made)
    return found


class Rounds:
    """Rounds of a seed, one after the other."""

    def __init__(self, parameter_count: int, seed: int) -> None:
        self._vectors = Vectors(parameter_count, seed=seed)
        self._trace = make_trace(rounds=32, query_count=0, seed=seed)
        self.matrix = np.empty((PER_ROUND, parameter_count), dtype=np.float32)
        self.base = self._vectors.first().copy()
        self.number = -1
        self.clients: Sequence[str] = ()
        self.metadata: list[dict[str, float]] = []

    def make(self) -> Vector:
        """Draw the next round; return what it ends with."""
        self.number += 1
        self.clients = self._trace.members[self.number]
        for row, client in zip(self.matrix, self.clients, strict=True):
            self._vectors.fill(row, self.base, client, self.number)
        self.metadata = [self._vectors.metadata(x, self.number) for x in self.clients]
        counts = [each["example_count"] for each in self.metadata]
        return mean(self.matrix, range(PER_ROUND), counts)

    def put(self, ours: Ours) -> None:
        """Draw the next round and put it."""
        end = self.make()
        facts = {"layout": layout_of(len(end))}
        ours.ingest(self.number, self.clients, self.matrix, self.metadata, end, facts)
        self.base = end


def statistics(ours: Ours, asks: int) -> dict[str, list[float]]:
    """Return seconds of P2 questions: as the asker sees them, and in the node."""
    seen: list[float] = []
    inside: list[float] = []
    for number in range(asks + 10):
        question = QUESTIONS[number % len(QUESTIONS)]
        request = cache_pb2.AskStatisticsRequest(
            namespace="default",
            job="bench",
            round=-1,
            question=question,
            arguments=payload.encode(ARGUMENTS.get(question, {}), "arguments"),
        )

        async def ask(request: cache_pb2.AskStatisticsRequest = request) -> float:
            caches = ours.client.connection().caches
            response: cache_pb2.AskStatisticsResponse = await caches.ask(
                HOME, "AskStatistics", request
            )
            return response.elapsed_s

        start_s = precise_s()
        elapsed_s = ours.client.run(ask)
        if number >= 10:
            seen.append(precise_s() - start_s)
            inside.append(elapsed_s)
    return {"asker_s": seen, "node_s": inside}


def ingest(ours: Ours, made: Rounds, rounds: int) -> dict[str, Any]:
    """Return seconds of a round's ten updates: into the cache, and into a server that only takes.

    Both get the same messages from the same senders over mTLS, in turns; the cache's round ends
    when all are on disk and the statistics of all ten have answered once. `loopback`: one after
    the other, as fast as it goes. `uplinks`: ten at a time, UPLINK_BYTES_PER_S each (*emulated*).
    """
    folder = ours.cluster.state / "agents" / HOME / "credentials"
    figures: dict[str, Any] = {}
    with plain_server(folder, made.matrix.shape) as port:
        for way, rate, count in (("loopback", 0.0, rounds), ("uplinks", UPLINK_BYTES_PER_S, 3)):
            taken: dict[str, list[float]] = {"tierwise_s": [], "plain_s": []}
            for turn in range(count):
                end = made.make()
                number = made.number + 1
                ours.rounds.open(number, made.clients, made.matrix.shape[1], base=number - 1)
                ports = {"tierwise_s": 0, "plain_s": port}
                for name in sorted(ports, reverse=bool(turn % 2)):
                    taken[name].append(_sent(ours, made, rate, ports[name]))
                ours.rounds.put_aggregate(number, end)
                made.base = end
                ours.settle()
            figures[way] = taken
    return figures


def _sent(ours: Ours, made: Rounds, rate: float, port: int) -> float:
    """Send a round to the cache, or to the plain server at `port`; return seconds."""
    number = made.number + 1

    async def send() -> float:
        connection = ours.client.connection()
        agents = {agent.node_id: agent.address for agent in await connection.agents()}
        address = f"127.0.0.1:{port}" if port else agents[HOME]
        credentials = Credentials.load(ours.cluster.context)
        channel = secure_channel(address, credentials, node_dns_name(HOME))
        put: Any = cache_pb2_grpc.CacheServiceStub(channel).Put
        try:
            await channel.channel_ready()
            start_s = precise_s()
            updates = [
                _messages(ours.rounds.key(number, "update", client), row, facts, rate)
                for client, row, facts in zip(made.clients, made.matrix, made.metadata, strict=True)
            ]
            if rate:
                await asyncio.gather(*(put(update) for update in updates))
            else:
                for update in updates:
                    await put(update)
            if not port:
                await ours.rounds.ask.aio("similarity", round=number)
            return precise_s() - start_s
        finally:
            await channel.close()

    return ours.client.run(send)


async def _messages(
    key: ObjectKey, row: Vector, facts: Mapping[str, Any], rate: float
) -> AsyncIterator[cache_pb2.PutRequest]:
    """Yield an update's messages, no faster than `rate` bytes per second; 0: as fast as it goes."""
    head = cache_pb2.ObjectHead(
        key=key_to_pb(key), size_bytes=row.nbytes, metadata=metadata_to_bytes(facts)
    )
    yield cache_pb2.PutRequest(head=head)
    view = row.view(np.uint8).data
    start_s = precise_s()
    for start in range(0, len(view), CHUNK_BYTES):
        chunk = bytes(view[start : start + CHUNK_BYTES])
        if rate:
            due_s = start_s + (start + len(chunk)) / rate
            await asyncio.sleep(max(0.0, due_s - precise_s()))
        yield cache_pb2.PutRequest(chunk=chunk)


@contextmanager
def plain_server(folder: Any, shape: tuple[int, ...]) -> Iterator[int]:
    """Run the server that only takes; yield its port."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "benchmarks.flstore.plain_server",
            str(folder),
            str(shape[0]),
            str(shape[1] * 4),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.communicate()


def kill(ours: Ours, made: Rounds) -> dict[str, Any]:
    """Kill the only holder with SIGKILL while a round comes in; return what is lost, and when.

    Every update that was acknowledged (on disk, the default) must be there afterwards, byte for
    byte. Full service is back when a question about the statistics and one that reads the vectors
    of the last whole round are answered; time counts from the kill, the restart of the process
    included.
    """
    made.make()
    number = made.number + 1
    acknowledged: set[str] = set()

    async def put_all() -> None:
        await ours.rounds.open.aio(number, made.clients, made.matrix.shape[1], base=number - 1)
        for client, vector, facts in zip(made.clients, made.matrix, made.metadata, strict=True):
            await ours.rounds.put_update.aio(number, client, vector, facts)
            acknowledged.add(client)
            if len(acknowledged) == PER_ROUND // 2:
                ours.cluster.kill(HOME)  # with the next one about to be sent
                return

    ours.client.run(put_all)
    start_s = precise_s()
    ours.cluster.restart(HOME)
    answered_s = _until(lambda: ours.rounds.ask("similarity", round=number - 1), start_s)
    layout = layout_of(made.matrix.shape[1])
    vectors_s = _until(
        lambda: ours.rounds.ask("feddebug", round=number - 1, layout=layout), start_s
    )
    lost = []
    for row, client in zip(made.matrix, made.clients, strict=True):
        if client not in acknowledged:
            continue
        try:
            held = ours.rounds.get(number, "update", client)
        except TierwiseError:
            lost.append(client)
            continue
        if not np.array_equal(held.view(np.uint8), row.view(np.uint8)):
            lost.append(client)
    for row, client, facts in zip(made.matrix, made.clients, made.metadata, strict=True):
        ours.rounds.put_update(number, client, row, facts)  # the round goes on where it was
    complete = ours.rounds.ask("round", round=number)["is_complete"]
    return {
        "acknowledged": len(acknowledged),
        "lost": len(lost),
        "statistics_again_s": answered_s,
        "vectors_again_s": vectors_s,
        "is_complete_afterwards": complete,
    }


def _until(ask: Any, start_s: float, timeout_s: float = 120.0) -> float:
    """Ask until there is an answer; return seconds since `start_s`."""
    while True:
        try:
            ask()
            return precise_s() - start_s
        except TierwiseError:
            if precise_s() - start_s > timeout_s:
                raise
            pause(0.02)

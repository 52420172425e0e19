"""How large should the chunks be in which objects of the cache travel?

    python -m benchmarks.bench_cache_chunks [--size-mb 47] [--repeats 7]

A vector over loopback with mTLS, between two processes, to a server that only copies it. Sizes and
directions take turns.
"""

import argparse
import asyncio
import multiprocessing
import tempfile
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.report import make_table, show, spread
from scheduler.authority import Authority
from tierwise.clock import precise_s
from tierwise.v1 import cache_pb2, cache_pb2_grpc
from tierwise.wire.channel import new_server, secure_channel, server_credentials
from tierwise.wire.identity import Credentials, Identity, Role, node_dns_name

SIZES_KIB = (64, 128, 256, 512, 1024)


class Copier(cache_pb2_grpc.CacheServiceServicer):
    """Takes and gives bytes; nothing else."""

    def __init__(self, size_bytes: int) -> None:
        self._body = memoryview(np.random.default_rng(0).bytes(size_bytes))
        self._taken = np.empty(size_bytes, np.uint8)

    async def Put(self, messages: Any, context: Any) -> cache_pb2.PutResponse:  # noqa: N802
        count = 0
        async for message in messages:
            chunk = message.chunk
            self._taken[count : count + len(chunk)] = np.frombuffer(chunk, np.uint8)
            count += len(chunk)
        return cache_pb2.PutResponse()

    async def Get(  # noqa: N802
        self, request: cache_pb2.GetRequest, context: Any
    ) -> AsyncIterator[cache_pb2.GetResponse]:
        step = request.key.round
        for start in range(0, len(self._body), step):
            yield cache_pb2.GetResponse(chunk=bytes(self._body[start : start + step]))


async def serve(folder: Path, size_bytes: int, ready: Connection) -> None:
    authority = Authority(folder)
    authority.issue(Identity(Role.USER, "ada")).save(folder / "ada")
    server = new_server([])
    cache_pb2_grpc.add_CacheServiceServicer_to_server(Copier(size_bytes), server)
    own = server_credentials(authority.issue(Identity(Role.NODE, "edge-1")))
    port = server.add_secure_port("127.0.0.1:0", own)
    await server.start()
    ready.send(port)
    await asyncio.Event().wait()


def run_server(folder: Path, size_bytes: int, ready: Connection) -> None:
    uvloop.run(serve(folder, size_bytes, ready))


async def measure(folder: Path, port: int, size_bytes: int, repeats: int) -> None:
    credentials = Credentials.load(folder / "ada")
    channel = secure_channel(f"127.0.0.1:{port}", credentials, node_dns_name("edge-1"))
    await channel.channel_ready()
    stub: Any = cache_pb2_grpc.CacheServiceStub(channel)
    body = memoryview(np.random.default_rng(0).bytes(size_bytes))
    taken = np.empty(size_bytes, np.uint8)

    async def put(step: int) -> None:
        async def requests() -> AsyncIterator[cache_pb2.PutRequest]:
            for start in range(0, size_bytes, step):
                yield cache_pb2.PutRequest(chunk=bytes(body[start : start + step]))

        await stub.Put(requests())

    async def get(step: int) -> None:
        request = cache_pb2.GetRequest(key=cache_pb2.ObjectKey(round=step))
        count = 0
        async for response in stub.Get(request):
            chunk = response.chunk
            taken[count : count + len(chunk)] = np.frombuffer(chunk, np.uint8)
            count += len(chunk)

    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(repeats):
        for name, move in (("put", put), ("get", get)):
            for size_kib in SIZES_KIB:
                started_s = precise_s()
                await move(size_kib << 10)
                seconds.setdefault((name, size_kib), []).append(precise_s() - started_s)
    await channel.close()
    table = make_table(
        f"{size_bytes / 1e6:g} MB in chunks, mTLS on loopback",
        ("direction, KiB", "ms", "MB/s"),
        f"{repeats} times in turns.",
    )
    for (name, size_kib), taken_s in seconds.items():
        ms = 1e3 * np.array(taken_s)
        table.add_row(f"{name}, {size_kib}", spread(ms), f"{size_bytes / np.median(ms) / 1e3:,.0f}")
    show(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mb", type=float, default=47.0)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    size_bytes = int(options.size_mb * 1e6)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        ours, theirs = context.Pipe()
        server = context.Process(
            target=run_server, args=(Path(name), size_bytes, theirs), daemon=True
        )
        server.start()
        uvloop.run(measure(Path(name), ours.recv(), size_bytes, options.repeats))
        server.kill()


if __name__ == "__main__":
    main()

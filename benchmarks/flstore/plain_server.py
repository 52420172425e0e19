"""The rival of ingest: an mTLS server that takes updates into rows and does nothing else.

    python -m benchmarks.flstore.plain_server CREDENTIALS ROWS BYTES

Speaks the Put of CacheService, so that the same client sends the same messages. No hash, no
statistics, no check, no disk. Prints its port and ends with its standard input.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import uvloop

from tierwise.v1 import cache_pb2, cache_pb2_grpc
from tierwise.wire.channel import new_server, server_credentials
from tierwise.wire.identity import Credentials


class Taker(cache_pb2_grpc.CacheServiceServicer):
    """Takes updates into rows that are there already, one after the other."""

    def __init__(self, rows: int, size: int) -> None:
        self._memory = np.ones((rows, size), dtype=np.uint8)
        self._taken = 0

    async def Put(  # noqa: N802
        self, requests: AsyncIterator[cache_pb2.PutRequest], context: object
    ) -> cache_pb2.PutResponse:
        row, place = self._memory[self._taken % len(self._memory)], 0
        self._taken += 1
        info = cache_pb2.ObjectInfo()
        async for request in requests:
            if request.WhichOneof("body") == "head":
                info.key.CopyFrom(request.head.key)
            else:
                chunk = request.chunk
                row[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
                place += len(chunk)
        info.durability = cache_pb2.DURABILITY_MEMORY
        return cache_pb2.PutResponse(object=info)


async def main() -> None:
    folder, rows, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    server = new_server([])
    cache_pb2_grpc.add_CacheServiceServicer_to_server(Taker(rows, size), server)
    port = server.add_secure_port("127.0.0.1:0", server_credentials(Credentials.load(folder)))
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main())

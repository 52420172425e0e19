"""The rival of ingest: an mTLS server that takes updates into rows and does nothing else.

    python -m benchmarks.flstore.plain_server CREDENTIALS ROWS BYTES

Speaks the Put of CacheService, so that the same client sends the same messages. No hash, no
statistics, no check, no disk. Prints its port and ends with its standard input.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import numpy as np
import uvloop

from tierwise.v1 import cache_pb2
from tierwise.wire.channel import channel_options, server_credentials
from tierwise.wire.identity import Credentials

METHOD = "/tierwise.v1.CacheService/Put"


async def main() -> None:
    folder, rows, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    memory = np.zeros((rows, size), dtype=np.uint8)
    memory += 1
    taken = 0

    async def put(
        requests: AsyncIterator[cache_pb2.PutRequest], context: object
    ) -> cache_pb2.PutResponse:
        nonlocal taken
        row, place = memory[taken % rows], 0
        taken += 1
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

    server = grpc.aio.server(options=channel_options())
    handler = grpc.stream_unary_rpc_method_handler(
        put,
        request_deserializer=cache_pb2.PutRequest.FromString,
        response_serializer=cache_pb2.PutResponse.SerializeToString,
    )
    _, service, name = METHOD.split("/")
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {name: handler}),)
    )
    port = server.add_secure_port("127.0.0.1:0", server_credentials(Credentials.load(folder)))
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main())

"""The rival of `bench_calls`: a gRPC server in Python that only sends back what it gets.

    python -m benchmarks.echo_server [CREDENTIALS]

Prints its port. With a folder of credentials it speaks mTLS as our agents do, else plain text.
"""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import uvloop

from tierwise.wire.channel import channel_options, server_credentials
from tierwise.wire.identity import Credentials


async def unary(request: bytes, context: object) -> bytes:
    return request


async def stream(requests: AsyncIterator[bytes], context: object) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


async def main() -> None:
    server = grpc.aio.server(options=channel_options())
    handlers = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", handlers),))
    if len(sys.argv) > 1:
        credentials = server_credentials(Credentials.load(Path(sys.argv[1])))
        port = server.add_secure_port("127.0.0.1:0", credentials)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the benchmark ends


if __name__ == "__main__":
    uvloop.run(main())

"""Many calls over one bidirectional stream. Users and peers speak to agents through this."""

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from tierwise.v1 import invocation_pb2, invocation_pb2_grpc, types_pb2

BATCH_ITEMS_MAX = 256
BATCH_BYTES_MAX = 1 << 20

Call = Any  # grpc.aio.StreamStreamCall, which is generic in its stubs only
OnResult = Callable[[types_pb2.InvocationResult | None], None]


class CallStream:
    """Multiplexes invocations to one agent. Belongs to one event loop.

    All that is waiting when the writer wakes goes out in one message. Each invocation ends in
    exactly one call of its `on_result`: with the result, or with None if the stream broke first
    (the request may or may not have run). The next `send` after a break opens a new stream.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = invocation_pb2_grpc.InvocationServiceStub(channel)
        self._waiting: dict[str, OnResult] = {}
        self._outgoing: list[types_pb2.Invocation] = []
        self._cancels: list[str] = []
        self._wake: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False
        self.last_error: BaseException | None = None

    @property
    def in_flight_count(self) -> int:
        """Return how many invocations wait for a result."""
        return len(self._waiting)

    def send(self, invocation: types_pb2.Invocation, on_result: OnResult) -> None:
        """Send one invocation; `on_result` is called later, never from inside this call."""
        if self._is_closed:
            asyncio.get_running_loop().call_soon(on_result, None)
            return
        self._waiting[invocation.request_id] = on_result
        self._outgoing.append(invocation)
        self._wake_writer()

    def cancel(self, request_id: str) -> None:
        """Tell the agent that a result is not wanted; `on_result` still follows."""
        if request_id in self._waiting:
            self._cancels.append(request_id)
            self._wake_writer()

    async def close(self) -> None:
        """End the stream; what is in flight gets None."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._break(None)

    def _wake_writer(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="call-stream")
        elif self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _run(self) -> None:
        call = self._stub.InvokeStream()
        try:
            async with asyncio.TaskGroup() as group:
                reader = group.create_task(self._read(call))
                writer = group.create_task(self._write(call))
                reader.add_done_callback(lambda _: writer.cancel())
        except* (grpc.RpcError, asyncio.InvalidStateError) as failures:
            self._break(failures.exceptions[0])
        else:
            self._break(None)
        finally:
            call.cancel()

    async def _read(self, call: Call) -> None:
        while True:
            response = await call.read()
            if not isinstance(response, invocation_pb2.InvokeStreamResponse):
                return  # end of stream
            for result in response.results:
                on_result = self._waiting.pop(result.request_id, None)
                if on_result is not None:
                    on_result(result)
                del result, on_result  # they may be large, and the next may be far
            del response

    async def _write(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._outgoing or self._cancels:
                request = invocation_pb2.InvokeStreamRequest(cancels=self._cancels)
                self._cancels = []
                batch, self._outgoing = _head(self._outgoing)
                request.invocations.extend(batch)
                await call.write(request)
                del request, batch  # they may be large, and the next may be far
            self._wake = loop.create_future()
            await self._wake

    def _break(self, error: BaseException | None) -> None:
        self.last_error = error
        self._outgoing = []
        self._cancels = []
        waiting, self._waiting = self._waiting, {}
        for on_result in waiting.values():
            on_result(None)


def _head(
    invocations: list[types_pb2.Invocation],
) -> tuple[list[types_pb2.Invocation], list[types_pb2.Invocation]]:
    """Split off what goes into one message: at least one invocation, then up to the bounds."""
    if len(invocations) == 1:
        return invocations, []
    size_bytes = 0
    for index, invocation in enumerate(invocations):
        size_bytes += sum(map(len, invocation.arguments))
        if index and (index >= BATCH_ITEMS_MAX or size_bytes > BATCH_BYTES_MAX):
            return invocations[:index], invocations[index:]
    return invocations, []

"""Many calls over one bidirectional stream. Users and peers speak to agents through this."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

import grpc

from tierwise.v1 import invocation_pb2, invocation_pb2_grpc, types_pb2
from tierwise.wire.handover import BOUND, SHORT_BYTES_MAX, Handover

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

    def __init__(self, channel: grpc.aio.Channel, lane: Handover | None = None) -> None:
        """Make a stream that opens with its first call.

        Args:
            channel: To the agent.
            lane: The short way to an agent of this machine, for small calls once it is bound.
        """
        self._lane = lane
        self._is_lane_bound = False
        self._stub = invocation_pb2_grpc.InvocationServiceStub(channel)
        self._waiting: dict[str, OnResult] = {}
        self._outgoing: list[types_pb2.Invocation] = []
        self._cancels: list[str] = []
        self._channels: list[bytes] = []  # that are to be bound to this stream
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
        if self._is_lane_bound and self._went_short(invocation):
            return
        self._outgoing.append(invocation)
        self._wake_writer()

    def cancel(self, request_id: str) -> None:
        """Tell the agent that a result is not wanted; `on_result` still follows."""
        if request_id in self._waiting:
            self._cancels.append(request_id)
            self._wake_writer()

    @property
    def has_short_way(self) -> bool:
        """Return whether the agent is on this machine, and takes calls by a socket."""
        return self._is_lane_bound

    def bind(self, channel_id: bytes) -> None:
        """Have the agent bind one more socket to this stream; it says there when it has."""
        self._channels.append(channel_id)
        self._wake_writer()

    async def close(self) -> None:
        """End the stream; what is in flight gets None."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._break(None)

    def _went_short(self, invocation: types_pb2.Invocation) -> bool:
        if self._lane is None or sum(map(len, invocation.arguments)) > SHORT_BYTES_MAX:
            return False
        request = invocation_pb2.InvokeStreamRequest(invocations=[invocation])
        return self._lane.post(request.SerializeToString())

    def _bind(self, lane: Handover, call: Call) -> None:
        """Ask the agent to take the lane's messages as this stream's, and listen to it."""
        loop = asyncio.get_running_loop()

        def readable() -> None:
            fileno = lane.fileno()
            lane.drain()
            if not lane.is_open:  # the agent is gone, and what it had of us with it
                self._is_lane_bound = False
                loop.remove_reader(fileno)
                call.cancel()

        def came(message: bytes) -> None:
            if message == BOUND:
                self._is_lane_bound = True
            else:
                self._settle(invocation_pb2.InvokeStreamResponse.FromString(message).results)

        lane.on_message = came
        loop.add_reader(lane.fileno(), readable)

    def _unbind(self, lane: Handover) -> None:
        self._is_lane_bound = False
        if lane.is_open:
            asyncio.get_running_loop().remove_reader(lane.fileno())

    def _wake_writer(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name="call-stream")
        elif self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _run(self) -> None:
        call = self._stub.InvokeStream()
        lane = self._lane if self._lane is not None and self._lane.is_open else None
        if lane is not None:
            self._bind(lane, call)
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
            if lane is not None:
                self._unbind(lane)
            call.cancel()

    async def _read(self, call: Call) -> None:
        while True:
            response = await call.read()
            if not isinstance(response, invocation_pb2.InvokeStreamResponse):
                return  # end of stream
            self._settle(response.results)
            del response  # may be large, and the next may be far

    def _settle(self, results: Iterable[types_pb2.InvocationResult]) -> None:
        for result in results:
            on_result = self._waiting.pop(result.request_id, None)
            if on_result is not None:
                on_result(result)

    async def _write(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        if self._lane is not None and self._lane.is_open:
            channel_id = self._lane.channel_id
            await call.write(invocation_pb2.InvokeStreamRequest(channel_id=channel_id))
        while True:
            while self._channels:
                channel_id = self._channels.pop()
                await call.write(invocation_pb2.InvokeStreamRequest(channel_id=channel_id))
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
        self._channels = []
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

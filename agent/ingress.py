"""The gRPC side of an agent: users and peers bring calls here."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import grpc
import structlog
from google.protobuf.message import DecodeError

from agent.billing import Billing
from agent.catalogue import FunctionIndex
from agent.door import Door
from agent.objects import Cached, placed
from agent.shell import Shell
from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import NodeId
from tierwise.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    TierwiseError,
)
from tierwise.v1 import invocation_pb2, invocation_pb2_grpc, types_pb2
from tierwise.wire import convert
from tierwise.wire.channel import MESSAGE_BYTES_MAX
from tierwise.wire.errors import item_from_error
from tierwise.wire.handover import ATTACHMENT_LOST, BOUND, SHORT_BYTES_MAX, Handover
from tierwise.wire.identity import Role, peer_identity
from tierwise.wire.memfd import ATTACHMENTS_MAX, Memfd

log = structlog.get_logger()

STREAM_IN_FLIGHT_MAX = 8192
ITEMS_MAX = 4096
LANES_MAX = 8  # of one stream
BATCH_RESULTS_MAX = 256
BATCH_BYTES_MAX = 4 << 20
_Request = invocation_pb2.InvokeStreamRequest


class Ingress(invocation_pb2_grpc.InvocationServiceServicer):
    """Hands calls to the shell and answers to their callers."""

    def __init__(
        self,
        shell: Shell,
        functions: FunctionIndex,
        billing: Billing,
        pull: Callable[[str], Awaitable[FunctionSpec | None]],
        node_id: NodeId,
        group: asyncio.TaskGroup,
        door: Door,
    ) -> None:
        """Serve calls.

        Args:
            shell: Runs them.
            functions: What may be called.
            billing: Whose new calls are refused, for their budget is spent.
            pull: Asks the scheduler for a function that is not in `functions` yet.
            node_id: This node.
            group: Owns the tasks that wait for `pull`.
            door: Where clients on this machine hand over large arrays.
        """
        self._shell = shell
        self._functions = functions
        self._billing = billing
        self._pull = pull
        self._node_id = node_id
        self._group = group
        self._door = door

    async def Invoke(
        self,
        request: invocation_pb2.InvokeRequest,
        context: "grpc.aio.ServicerContext[object, object]",
    ) -> invocation_pb2.InvokeResponse:
        """Run one invocation; a caller that goes away cancels it."""
        done: asyncio.Future[types_pb2.InvocationResult] = (
            asyncio.get_running_loop().create_future()
        )

        def replied(result: types_pb2.InvocationResult) -> None:
            if not done.done():
                done.set_result(result)

        caller = _Caller(context)
        self._take(request.invocation, caller, replied)
        try:
            return invocation_pb2.InvokeResponse(result=await done)
        except asyncio.CancelledError:
            self._shell.cancel(request.invocation.request_id)
            raise

    async def InvokeStream(  # type: ignore[override]  # writes to the context, yields nothing
        self,
        request_iterator: AsyncIterator[invocation_pb2.InvokeStreamRequest],
        context: "grpc.aio.ServicerContext[object, object]",
    ) -> None:
        """Run invocations as they come, answer as they end; a broken stream cancels the rest."""
        caller = _Caller(context)
        replies = _Replies()
        open_ids: set[str] = set()

        def replied(result: types_pb2.InvocationResult) -> None:
            open_ids.discard(result.request_id)
            replies.put(result)

        lanes: list[Handover] = []  # the first is the client's loop's, the others are threads'

        def bind(channel_id: bytes) -> None:
            lane = self._door.find(channel_id)
            if lane is None or caller.is_node or len(lanes) == LANES_MAX:
                return
            is_first = not lanes
            lanes.append(lane)

            def replied_short(result: types_pb2.InvocationResult) -> None:
                open_ids.discard(result.request_id)
                answer = invocation_pb2.InvokeStreamResponse(results=[result])
                if not is_first:
                    if not lane.post_large(answer.SerializeToString()):
                        lane.shut_down()  # who waits there asks again another way
                    return
                is_small = sum(len(item.value) for item in result.items) < SHORT_BYTES_MAX
                if not (is_small and lane.post(answer.SerializeToString())):
                    replies.put(result)

            def came_short(message: bytes) -> None:
                try:
                    take(_Request.FromString(message), replied_short)
                except DecodeError:
                    log.warning("channel.sent_nonsense", caller=caller.name)

            lane.on_message = came_short
            lane.post(BOUND)

        def take(
            message: invocation_pb2.InvokeStreamRequest,
            replied: Callable[[types_pb2.InvocationResult], None],
        ) -> None:
            for invocation in message.invocations:
                if len(open_ids) >= STREAM_IN_FLIGHT_MAX:
                    error = Overloaded(
                        f"this stream has {STREAM_IN_FLIGHT_MAX} calls in flight; "
                        "wait for some of them",
                        retry_after_s=0.1,
                    )
                    replies.put(_refusal(invocation, error))
                    continue
                open_ids.add(invocation.request_id)
                self._take(invocation, caller, replied)
            for request_id in message.cancels:
                self._shell.cancel(request_id)

        async with asyncio.TaskGroup() as group:
            writer = group.create_task(replies.write_forever(context))
            try:
                # Not `async for`, which would hold a large message until the next one comes.
                while isinstance(message := await context.read(), _Request):
                    if message.channel_id:
                        bind(message.channel_id)
                    take(message, replied)
                    del message
                await replies.flushed(lambda: not open_ids)  # the caller has said all
            finally:
                writer.cancel()
                for lane in lanes[:1]:
                    lane.on_message = _ignore
                for lane in lanes[1:]:
                    lane.shut_down()
                for request_id in list(open_ids):
                    self._shell.cancel(request_id)

    def _take(
        self,
        invocation: types_pb2.Invocation,
        caller: "_Caller",
        replied: Callable[[types_pb2.InvocationResult], None],
    ) -> None:
        spec = self._functions.find(invocation.function)
        if spec is None:
            self._group.create_task(self._take_unknown(invocation, caller, replied))
        else:
            self._invoke(invocation, spec, caller, replied)

    async def _take_unknown(
        self,
        invocation: types_pb2.Invocation,
        caller: "_Caller",
        replied: Callable[[types_pb2.InvocationResult], None],
    ) -> None:
        try:
            spec = await self._pull(invocation.function)
            if spec is None:
                raise NotFound(
                    f"there is no function {invocation.function!r}; "
                    "`tierwise get functions` lists those that exist"
                )
        except TierwiseError as error:
            replied(_refusal(invocation, error))
        else:
            self._invoke(invocation, spec, caller, replied)

    def _invoke(
        self,
        invocation: types_pb2.Invocation,
        spec: FunctionSpec,
        caller: "_Caller",
        replied: Callable[[types_pb2.InvocationResult], None],
    ) -> None:
        try:
            if len(invocation.arguments) > ITEMS_MAX:
                raise PayloadTooLarge(
                    f"{len(invocation.arguments)} items in one call; send at most {ITEMS_MAX}"
                )
            if not caller.is_node:
                self._billing.check(spec)
                invocation.hops = 0
                invocation.lease = 0
                invocation.memory_mib = 0
                invocation.ClearField("expected_wait_s")
            origin = NodeId(invocation.origin) if caller.is_node else self._node_id
            request = convert.request_from_invocation(invocation, spec, origin=origin)
            cached = Cached.of(invocation, "" if caller.is_node else caller.name)
            if cached is not None:
                request = placed(request, cached, invocation.arguments[0], self._shell.objects)
            channel: Handover | None = None
            files: tuple[Memfd, ...] = ()
            if invocation.channel_id and not caller.is_node:
                channel = self._door.find(invocation.channel_id)
            if invocation.attachments:
                files = _handed_over(invocation, channel)
                beside_bytes = sum(file.nbytes for file in files)
                request = replace(request, request_bytes=request.request_bytes + beside_bytes)
        except TierwiseError as error:
            replied(_refusal(invocation, error))
            return
        self._shell.invoke(
            request,
            invocation.arguments,
            replied,
            caller=caller.name,
            attachments=files,
            channel=channel,
            cached=cached,
        )


def _handed_over(invocation: types_pb2.Invocation, channel: Handover | None) -> tuple[Memfd, ...]:
    """Return the files that came beside a call.

    Raises:
        InvalidArgument: There are too many, or more than one argument set.
        FailedPrecondition: One is not there: the client must send the bytes instead.
        PayloadTooLarge: Together they are larger than a message may be.
    """
    numbers = invocation.attachments
    if len(numbers) > ATTACHMENTS_MAX or len(invocation.arguments) != 1:
        raise InvalidArgument(f"attachments: at most {ATTACHMENTS_MAX}, of one argument set")
    found = [channel.take(number) for number in numbers] if channel is not None else []
    files = tuple(file for file in found if file is not None)
    if len(files) < len(numbers):
        raise FailedPrecondition(ATTACHMENT_LOST)
    size_bytes = sum(file.nbytes for file in files)
    if size_bytes > MESSAGE_BYTES_MAX:
        raise PayloadTooLarge(f"{size_bytes} bytes in one call; send at most {MESSAGE_BYTES_MAX}")
    return files


def _ignore(_: bytes) -> None:
    """Take what comes over a channel whose stream has ended."""


class _Caller:
    """Who is at the other end; read once per stream."""

    def __init__(self, context: "grpc.aio.ServicerContext[object, object]") -> None:
        identity = peer_identity(context)
        self.name = identity.uri
        self.is_node = identity.role is Role.NODE


class _Replies:
    """Results on their way to one caller: whatever is there goes out in one message."""

    def __init__(self) -> None:
        self._results: list[types_pb2.InvocationResult] = []
        self._wake: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()

    def put(self, result: types_pb2.InvocationResult) -> None:
        self._results.append(result)
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def write_forever(self, context: "grpc.aio.ServicerContext[object, object]") -> None:
        loop = asyncio.get_running_loop()
        while True:
            while self._results:
                count = _fitting(self._results)
                batch, self._results = self._results[:count], self._results[count:]
                await context.write(invocation_pb2.InvokeStreamResponse(results=batch))
                del batch  # it may be large, and the next may be far
            self._wake = loop.create_future()
            self._idle.set()
            await self._wake

    async def flushed(self, is_complete: Callable[[], bool]) -> None:
        """Return when `is_complete` and everything has been written."""
        while self._results or not is_complete():
            self._idle.clear()
            await self._idle.wait()


def _fitting(results: list[types_pb2.InvocationResult]) -> int:
    """Return how many of the first results go into one message, at least one."""
    if len(results) == 1:
        return 1
    size_bytes = 0
    for index, result in enumerate(results[:BATCH_RESULTS_MAX]):
        size_bytes += sum(len(item.value) for item in result.items)
        if index and size_bytes > BATCH_BYTES_MAX:
            return index
    return min(len(results), BATCH_RESULTS_MAX)


def _refusal(invocation: types_pb2.Invocation, error: TierwiseError) -> types_pb2.InvocationResult:
    item = item_from_error(error)
    count = min(max(1, len(invocation.arguments)), ITEMS_MAX)
    return types_pb2.InvocationResult(request_id=invocation.request_id, items=[item] * count)

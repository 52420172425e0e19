"""Durable work from its submitter's side."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from tierwise.clock import monotonic_s
from tierwise.errors import Cancelled, DeadlineExceeded, TierwiseError, Unavailable
from tierwise.v1 import types_pb2, work_pb2
from tierwise.wire import payload
from tierwise.wire.errors import error_from_item, error_from_rpc

if TYPE_CHECKING:
    from tierwise.sdk.client import Client

T = TypeVar("T")
POLL_S = 20.0
RETRY_S = 0.5
WATCH_TIMEOUT_S = 86400.0


class Handle:
    """One piece of work that the scheduler has accepted; it outlives this process."""

    def __init__(self, client: "Client", request_id: str) -> None:
        self._client = client
        self.request_id = request_id

    def __repr__(self) -> str:
        return f"Handle({self.request_id!r})"

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result and return it.

        Raises:
            DeadlineExceeded: It did not come within `timeout` seconds; the work goes on.
            TierwiseError: How the work failed.
        """
        return self._run(lambda: self.result_aio(timeout))

    async def result_aio(self, timeout: float | None = None) -> Any:
        """Wait as `result` does, on the running loop. A scheduler that restarts is waited for."""
        ends_s = None if timeout is None else monotonic_s() + timeout
        while True:
            left_s = POLL_S if ends_s is None else max(0.0, min(POLL_S, ends_s - monotonic_s()))
            try:
                response = await self._get(left_s)
            except Unavailable:
                if ends_s is not None and monotonic_s() >= ends_s:
                    raise
                await asyncio.sleep(RETRY_S)
                continue
            if response.work.state == work_pb2.WORK_STATE_CANCELLED:
                raise Cancelled(f"work {self.request_id} was cancelled")
            if response.HasField("result"):
                return _value(response.result)
            if response.work.state not in (
                work_pb2.WORK_STATE_QUEUED,
                work_pb2.WORK_STATE_LEASED,
            ):
                raise TierwiseError(response.work.message)
            if ends_s is not None and monotonic_s() >= ends_s:
                raise DeadlineExceeded(
                    f"work {self.request_id} has not ended within {timeout} s; it goes on"
                )

    def state(self) -> str:
        """Return queued, leased, succeeded, failed, cancelled or dead."""
        return self._run(self._state)

    def cancel(self) -> None:
        """Stop the work, queued or running."""
        request = work_pb2.CancelRequest(request_id=self.request_id)

        async def cancel() -> None:
            connection = self._client.connection()
            await connection.ask(connection.work.Cancel, request)

        self._run(cancel)

    async def watch(self) -> AsyncIterator[work_pb2.Work]:
        """Yield every change of state until the work has ended; on the running loop."""
        request = work_pb2.WatchRequest(request_id=self.request_id)
        call = self._client.connection().work.Watch(request, timeout=WATCH_TIMEOUT_S)
        try:
            async for response in call:
                yield response.work
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        finally:
            call.cancel()

    async def _get(self, wait_s: float) -> work_pb2.GetResultResponse:
        connection = self._client.connection()
        request = work_pb2.GetResultRequest(request_id=self.request_id, wait_s=wait_s)
        return await connection.ask(connection.work.GetResult, request, wait_s + 10.0)

    async def _state(self) -> str:
        response = await self._get(0.0)
        return work_pb2.WorkState.Name(response.work.state).removeprefix("WORK_STATE_").lower()

    def _run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self._client.run(make)


def _value(result: types_pb2.InvocationResult) -> Any:
    error = error_from_item(result.items[0])
    if error is not None:
        raise error
    return payload.decode(result.items[0].value)

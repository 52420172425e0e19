"""Durable work from its submitter's side."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierwise.clock import monotonic_s
from tierwise.errors import Cancelled, DeadlineExceeded, TierwiseError, Unavailable
from tierwise.sdk.verb import Verb
from tierwise.sdk.watching import WatchVerb
from tierwise.v1 import types_pb2, work_pb2
from tierwise.wire import payload
from tierwise.wire.errors import error_from_item

if TYPE_CHECKING:
    from tierwise.sdk.client import Client

POLL_S = 20.0
RETRY_S = 0.5
UNREACHABLE_S_MAX = 120.0  # a scheduler that restarts is waited for, one that is gone is not
WATCH_TIMEOUT_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where durable work stands: queued, leased, succeeded, failed, cancelled or dead."""

    state: str
    attempt_count: int
    node: str
    message: str


class Handle:
    """One piece of work that the scheduler has accepted; it outlives this process.

    `result(timeout=None)`, `state()`, `cancel()` and `watch()` block; each has an `.aio` twin.
    """

    def __init__(self, client: "Client", request_id: str) -> None:
        self._client = client
        self.request_id = request_id
        self.result = Verb(self._get_client, self._result)
        self.state = Verb(self._get_client, self._state)
        self.cancel = Verb(self._get_client, self._cancel)
        watched = work_pb2.WatchRequest(request_id=request_id)
        self.watch: WatchVerb[Progress] = WatchVerb(
            self._get_client,
            lambda connection: connection.work.Watch(watched, timeout=WATCH_TIMEOUT_S),
            lambda response: _progress(response.work),
        )

    def __repr__(self) -> str:
        return f"Handle({self.request_id!r})"

    def _get_client(self) -> "Client":
        return self._client

    async def _result(self, timeout: float | None = None) -> Any:
        """Wait for the result and return it.

        Raises:
            DeadlineExceeded: It did not come within `timeout` seconds; the work goes on.
            Unavailable: The scheduler has been away for two minutes, or beyond `timeout`.
            TierwiseError: How the work failed.
        """
        ends_s = None if timeout is None else monotonic_s() + timeout
        away_since_s: float | None = None
        while True:
            now_s = monotonic_s()
            left_s = POLL_S if ends_s is None else max(0.0, min(POLL_S, ends_s - now_s))
            try:
                response = await self._get(left_s)
            except Unavailable:
                now_s = monotonic_s()
                away_since_s = away_since_s or now_s
                gives_up_s = away_since_s + UNREACHABLE_S_MAX
                if now_s >= (gives_up_s if ends_s is None else min(ends_s, gives_up_s)):
                    raise
                await asyncio.sleep(RETRY_S)
                continue
            away_since_s = None
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
                    f"work {self.request_id} has not ended within {timeout:g} s; it goes on"
                )

    async def _state(self) -> str:
        """Return queued, leased, succeeded, failed, cancelled or dead."""
        return _progress((await self._get(0.0)).work).state

    async def _cancel(self) -> None:
        """Stop the work, queued or running."""
        connection = self._client.connection()
        request = work_pb2.CancelRequest(request_id=self.request_id)
        await connection.ask(connection.work.Cancel, request)

    async def _get(self, wait_s: float) -> work_pb2.GetResultResponse:
        connection = self._client.connection()
        request = work_pb2.GetResultRequest(request_id=self.request_id, wait_s=wait_s)
        return await connection.ask(connection.work.GetResult, request, wait_s + 10.0)


def _progress(work: work_pb2.Work) -> Progress:
    return Progress(
        state=work_pb2.WorkState.Name(work.state).removeprefix("WORK_STATE_").lower(),
        attempt_count=work.attempt_count,
        node=work.node_id,
        message=work.message,
    )


def _value(result: types_pb2.InvocationResult) -> Any:
    error = error_from_item(result.items[0])
    if error is not None:
        raise error
    return payload.decode(result.items[0].value)

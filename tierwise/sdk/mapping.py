"""`.map`: many calls in flight, small ones many to a message."""

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tierwise.clock import monotonic_s
from tierwise.errors import (
    FunctionTimedOut,
    InvalidArgument,
    Overloaded,
    TierwiseError,
    Unavailable,
)
from tierwise.sdk.connection import Connection, Options, scaled
from tierwise.v1 import types_pb2
from tierwise.wire import payload
from tierwise.wire.errors import error_from_item
from tierwise.wire.memfd import Memfd

CHUNK_TARGET_S = 0.02
CHUNK_ITEMS_MAX = 512
CHUNK_BYTES_MAX = 1 << 20
WINDOW_EXTRA = 4
RESENDS_MAX = 8
RESEND_FIRST_S = 0.05  # doubles: an item waits 13 s in all for room on the cluster
RESEND_IN_FLIGHT_MAX = 16


class ChunkSize:
    """How many items ride in one message: about 20 ms of work, at most doubling each time."""

    def __init__(self) -> None:
        self.item_count = 1

    def learn(self, run_s: float, item_count: int) -> None:
        """Take in how long a chunk of `item_count` items ran."""
        per_item_s = max(run_s / max(1, item_count), 1e-6)
        wanted = int(CHUNK_TARGET_S / per_item_s)
        self.item_count = max(1, min(wanted, 2 * self.item_count, CHUNK_ITEMS_MAX))

    def shrink(self) -> None:
        """Begin again: a chunk went wrong as a whole."""
        self.item_count = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a call or a map is for, and what is known of it here; None if it is not."""

    function: str
    options: Options
    deadline_s: float | None = None
    timeout_s: float | None = None  # including the time that it may wait in queues


class Mapping:
    """One `.map` in progress: takes chunks of arguments, gives back chunks of results.

    Belongs to one event loop, but for the properties, which any thread may read. Whoever drives
    it pulls the inputs, so that a user's generator runs in the user's own thread.
    """

    def __init__(self, connection: Connection, target: Target, *, is_ordered: bool) -> None:
        self._connection = connection
        self._target = target
        self._is_ordered = is_ordered
        self._chunks: deque[asyncio.Task[list[Any]]] = deque()
        self._resending = asyncio.Semaphore(RESEND_IN_FLIGHT_MAX)
        self._size = ChunkSize()
        self.window = WINDOW_EXTRA

    async def open(self) -> None:
        """Learn how many chunks keep the cluster busy: 2 × its CPUs + 4."""
        self.window = int(2 * await self._connection.cpu_count()) + WINDOW_EXTRA

    @property
    def item_count(self) -> int:
        """Return how many items the next chunk should have."""
        return self._size.item_count

    @property
    def is_ready(self) -> bool:
        """Return whether `next` has something to give at once."""
        chunks = tuple(self._chunks)
        return any(chunk.done() for chunk in (chunks[:1] if self._is_ordered else chunks))

    def start(self, blobs: list[bytes]) -> None:
        """Send a chunk of encoded arguments."""
        run = self._run(blobs)
        self._chunks.append(asyncio.get_running_loop().create_task(run, name="map-chunk"))

    async def next(self) -> list[Any]:
        """Wait for a chunk: the oldest, or whichever ends first; values, or TierwiseErrors."""
        if self._is_ordered:
            chunk = self._chunks[0]
            await asyncio.wait((chunk,))
        else:
            done, _ = await asyncio.wait(self._chunks, return_when=asyncio.FIRST_COMPLETED)
            chunk = next(chunk for chunk in self._chunks if chunk in done)
        self._chunks.remove(chunk)
        return chunk.result()

    async def close(self) -> None:
        """Cancel what is in flight."""
        for chunk in self._chunks:
            chunk.cancel()
        await asyncio.gather(*self._chunks, return_exceptions=True)
        self._chunks.clear()

    async def _run(self, blobs: list[bytes]) -> list[Any]:
        """Run one chunk; items that were not run or refused are sent again one by one, bounded."""
        results = await self._send(blobs)
        again = [i for i, value in enumerate(results) if _may_run_again(value, len(blobs))]
        if again:
            self._size.shrink()
            found = await asyncio.gather(*(self._resend(blobs[i], results[i]) for i in again))
            for index, value in zip(again, found, strict=True):
                results[index] = value
        return results

    async def _resend(self, blob: bytes, value: Any) -> Any:
        for resend in range(RESENDS_MAX):
            if resend or not isinstance(value, FunctionTimedOut):
                await asyncio.sleep(RESEND_FIRST_S * 2**resend)
            async with self._resending:
                (value,) = await self._send([blob])
            if not _may_run_again(value, 1):
                break
        return value

    async def _send(self, blobs: list[bytes]) -> list[Any]:
        target = self._target
        try:
            answer = await self._connection.invoke(
                target.function,
                blobs,
                scaled(target.options, target.deadline_s, len(blobs)),
                target.timeout_s,
            )
        except TierwiseError as error:
            return [error] * len(blobs)
        if answer.outcome.state == types_pb2.OUTCOME_STATE_OK:
            self._size.learn(answer.outcome.latency.run_s, len(blobs))
        return [value_of(item) for item in answer.items]


def take(
    inputs: Iterator[tuple[Any, ...]], item_count: int, within_s: float = CHUNK_TARGET_S
) -> list[bytes]:
    """Encode the next inputs: up to the bounds of one message, or what comes in that time.

    Raises:
        InvalidArgument: An input cannot travel.
    """
    blobs: list[bytes] = []
    size_bytes = 0
    ends_s = monotonic_s() + within_s
    for arguments in inputs:
        blobs.append(encode(arguments, {}))
        size_bytes += len(blobs[-1])
        is_full = len(blobs) >= item_count or size_bytes >= CHUNK_BYTES_MAX
        if is_full or monotonic_s() > ends_s:
            break
    return blobs


def encode(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    detached: list[Any] | None = None,
    *,
    only_cached: bool = False,
) -> bytes:
    """Return the arguments of one call as they travel.

    Large arrays go to `detached`, if given; cached ones do, and then no others.

    Raises:
        InvalidArgument: They hold something that cannot.
    """
    try:
        return payload.encode((args, kwargs), detached=detached, only_refs=only_cached)
    except payload.PayloadError as error:
        raise InvalidArgument(f"the arguments cannot travel: {error}") from None


def value_of(item: types_pb2.Item, files: dict[int, Memfd] | None = None) -> Any:
    """Return the decoded value of an item, or its error as an object.

    Args:
        item: What came.
        files: What was handed over with it, by number.
    """
    error = error_from_item(item)
    if error is not None:
        return error
    found = [files[n].view() for n in item.attachments if files and n in files]
    if len(found) < len(item.attachments):
        return Unavailable("an array of the result was lost on its way; send the call again")
    return payload.decode(item.value, found)


def _may_run_again(value: Any, item_count: int) -> bool:
    """Return whether an item of a chunk deserves another try, alone.

    Its worker may have died in an earlier item, or the time of the whole chunk was over; or there
    was no room on the cluster.
    """
    match value:
        case Overloaded():
            return True
        case Unavailable():
            return value.message.startswith("not run")
        case FunctionTimedOut():
            return item_count > 1
        case _:
            return False

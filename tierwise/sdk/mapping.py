"""`.map`: many calls in flight, small ones many to a message."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from tierwise.errors import Overloaded, Unavailable
from tierwise.sdk.connection import Connection, Options, scaled
from tierwise.v1 import types_pb2
from tierwise.wire import payload
from tierwise.wire.errors import error_from_item

CHUNK_TARGET_S = 0.02
CHUNK_ITEMS_MAX = 512
CHUNK_BYTES_MAX = 1 << 20
WINDOW_EXTRA = 4
RETRIES_MAX = 8
RETRY_FIRST_S = 0.05


class ChunkSize:
    """How many items ride in one message: about 20 ms of work, at most doubling each time."""

    def __init__(self) -> None:
        self.item_count = 1

    def learn(self, run_s: float, item_count: int) -> None:
        """Take in how long a chunk of `item_count` items ran."""
        per_item_s = max(run_s / max(1, item_count), 1e-6)
        wanted = int(CHUNK_TARGET_S / per_item_s)
        self.item_count = max(1, min(wanted, 2 * self.item_count, CHUNK_ITEMS_MAX))


async def map_chunks(
    connection: Connection,
    function: str,
    argument_sets: Iterable[tuple[Any, ...]],
    options: Options,
    *,
    deadline_s: float | None,
    timeout_s: float | None,
    is_ordered: bool,
) -> AsyncIterator[list[Any]]:
    """Yield lists of results (values, or TierwiseError objects), lazily over the inputs.

    At most 2 × the cluster's CPUs + 4 chunks are in flight, so inputs may be endless.
    """
    window = int(2 * await connection.cpu_count()) + WINDOW_EXTRA
    size = ChunkSize()
    inputs = iter(argument_sets)
    pending: deque[asyncio.Task[list[Any]]] = deque()
    is_exhausted = False
    try:
        while pending or not is_exhausted:
            while not is_exhausted and len(pending) < window:
                blobs = _take(inputs, size.item_count)
                if not blobs:
                    is_exhausted = True
                    break
                chunk_options = scaled(options, deadline_s, len(blobs))
                run = _run(connection, function, blobs, chunk_options, timeout_s, size)
                pending.append(asyncio.ensure_future(run))
            if not pending:
                return
            if is_ordered:
                yield await pending.popleft()
                continue
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            pending = deque(task for task in pending if task not in done)
            for task in done:
                yield task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


def _take(inputs: Iterator[tuple[Any, ...]], item_count: int) -> list[bytes]:
    """Encode the next inputs, up to the bounds of one message."""
    blobs: list[bytes] = []
    size_bytes = 0
    for arguments in itertools.islice(inputs, item_count):
        blob = payload.encode((arguments, {}))
        blobs.append(blob)
        size_bytes += len(blob)
        if size_bytes >= CHUNK_BYTES_MAX:
            break
    return blobs


async def _run(
    connection: Connection,
    function: str,
    blobs: list[bytes],
    options: Options,
    timeout_s: float | None,
    size: ChunkSize,
) -> list[Any]:
    """Run one chunk; items that were not run or refused are sent again, one by one, bounded."""
    results: list[Any] = [None] * len(blobs)
    open_indices = list(range(len(blobs)))
    limit_s = (options.timeout_s or timeout_s or 0.0) * len(blobs) or None
    for retry in range(RETRIES_MAX + 1):
        groups = [open_indices] if retry == 0 else [[index] for index in open_indices]
        again: list[int] = []
        for group in groups:
            answer = await connection.invoke(
                function, [blobs[index] for index in group], options, limit_s
            )
            size.learn(answer.outcome.latency.run_s, len(group))
            for index, item in zip(group, answer.items, strict=True):
                value = value_of(item)
                if isinstance(value, Overloaded) or _was_not_run(value):
                    again.append(index)
                results[index] = value
        open_indices = again
        if not open_indices:
            break
        await asyncio.sleep(RETRY_FIRST_S * 2**retry)
    return results


def value_of(item: types_pb2.Item) -> Any:
    """Return the decoded value of an item, or its error as an object."""
    error = error_from_item(item)
    if error is not None:
        return error
    return payload.decode(item.value)


def _was_not_run(value: Any) -> bool:
    return isinstance(value, Unavailable) and value.message.startswith("not run")



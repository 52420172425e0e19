"""Waits until a count stops moving: zygotes make spares a moment after a start."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
POLL_S = 0.02
SAME_COUNT = 15  # polls in a row, longer than a zygote waits before it makes a spare
TIMEOUT_S = 20.0


async def settled(read: Callable[[], T]) -> T:
    """Return what `read` gives once it gives the same for a while.

    Raises:
        TimeoutError: It never does.
    """
    seen, count = read(), 0
    async with asyncio.timeout(TIMEOUT_S):
        while count < SAME_COUNT:
            await asyncio.sleep(POLL_S)
            now = read()
            seen, count = now, count + 1 if now == seen else 0
    return seen

"""Work of a cache that outlives the call which began it: held, logged, waited for at the end."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import structlog

log = structlog.get_logger()

Result = TypeVar("Result")


class Tasks:
    """Running tasks. What starts them is bounded: objects coming in, rounds being opened."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Run `work`; what it raises is for who waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def start_unattended(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run `work` for nobody in particular."""
        self.start(_logged(work))

    async def close(self) -> None:
        """Wait for all of them."""
        while self._running:
            await asyncio.wait(self._running)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it may be gone


async def _logged(work: Coroutine[Any, Any, Any]) -> None:
    try:
        await work
    except Exception as error:
        log.warning("cache.work_failed", cause=f"{type(error).__name__}: {error}")

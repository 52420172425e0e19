"""Bytes of objects from this disk, or from the object store onto it.

A file that this process has not written itself is checked against its name when it is first needed.
One that is damaged comes back from the store; if the store does not have it, it is quarantined.
"""

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from agent.cache.arena import Sheet
from agent.cache.disk import Disk
from agent.cache.folder import DIGEST_BYTES
from agent.cache.index import Entry, Index
from agent.cache.journal import Journal
from agent.cache.writethrough import WriteThrough
from tierwise.domain.cache import ObjectKey
from tierwise.errors import NotFound, Overloaded, Unavailable

log = structlog.get_logger()

HASH_BYTES = 4 << 20


class Loader:
    """Reads files."""

    def __init__(
        self,
        index: Index,
        disk: Disk,
        journal: Journal,
        write_through: WriteThrough,
        executor: Executor,
    ) -> None:
        self._index = index
        self._disk = disk
        self._journal = journal
        self._write_through = write_through
        self._executor = executor

    async def into(self, entry: Entry, target: memoryview) -> None:
        """Fill `target`.

        Raises:
            NotFound: The object is nowhere any more.
            Unavailable: It is in the store, which does not answer; or the disk fails.
        """
        if entry.file is not None:
            await self._run(_copy, entry.file.view(), target)
        else:
            await self._read(entry, lambda: self._disk.folder.read_into(entry.digest, target))

    async def onto(self, entry: Entry, sheet: Sheet) -> None:
        """Fill a sheet; raises as `into`."""
        path = self._disk.folder.path(entry.digest)
        await self._read(entry, lambda: sheet.fill_from(path, entry.size_bytes))

    async def mapped(self, entry: Entry) -> memoryview:
        """Return an object's file as memory; raises as `into`."""
        found: memoryview = await self._read(entry, lambda: self._disk.folder.map(entry.digest))
        return found

    def vector(self, entry: Entry) -> NDArray[np.float32]:
        """Return a vector that is here: of its file if it has one, for that pins no memory.

        Raises:
            OSError: It is not here.
        """
        if entry.has_file:
            return np.frombuffer(self._disk.folder.map(entry.digest), np.float32)
        if entry.file is not None:
            return np.frombuffer(entry.file.view(), np.float32)
        raise FileNotFoundError(f"{entry.key} is not here")

    async def ready(self, entry: Entry) -> None:
        """Have an object's file here, and sound; raises as `into`."""
        if entry.has_file and not entry.is_checked:
            digest = await self._run(self._digest, entry.digest)
            if digest == entry.digest:
                entry.is_checked = True
            else:
                await self._damaged(entry)
        if not entry.has_file:
            await self._bring_back(entry)

    async def _damaged(self, entry: Entry) -> None:
        log.error("cache.file_damaged", key=str(entry.key), is_stored=entry.is_stored)
        self._disk.discard([self._index.mark_on_disk(entry, False)])
        if entry.is_stored or entry.quarantined:
            return
        entry.quarantined = "its file is damaged on this disk"
        await self._journal.append(entry.put())

    async def _bring_back(self, entry: Entry) -> None:
        if not entry.is_stored:
            reason = entry.quarantined or "it was never stored"
            raise NotFound(f"{entry.key} is not on this disk, nor in the store: {reason}")
        namespace = entry.key.namespace
        self._disk.claim(namespace, entry.size_bytes)
        try:
            draft = self._disk.begin()
            await self._write_through.fetch(entry, draft)
            await self._disk.finish(draft, entry.digest)
        except OSError as error:
            raise Overloaded(f"the cache's disk is full: {error}") from None
        finally:
            self._disk.release(namespace, entry.size_bytes)
        self._index.mark_on_disk(entry, True)
        entry.is_checked = True
        await self._write_through.mark(entry)

    def _digest(self, digest: str) -> str:
        found = hashlib.blake2b(digest_size=DIGEST_BYTES)
        try:
            content = self._disk.folder.map(digest)
        except (OSError, ValueError):
            return ""
        for start in range(0, content.nbytes, HASH_BYTES):
            found.update(content[start : start + HASH_BYTES])
        return found.hexdigest()

    async def _read(self, entry: Entry, read: Callable[[], Any]) -> Any:
        entry.reader_count += 1  # what is read does not go for room
        try:
            await self.ready(entry)
            return await self._run(read)
        except FileNotFoundError:
            raise NotFound(f"{entry.key} was forgotten meanwhile") from None
        except OSError as error:
            raise Unavailable(f"{entry.key} cannot be read from this disk: {error}") from None
        finally:
            entry.reader_count -= 1

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, function, *arguments
        )


def unavailable(key: ObjectKey) -> Unavailable:
    """Return the error for an object that others are measured from, and that is not here."""
    return Unavailable(f"{key}, which this round is measured from, is not here now")


def _copy(source: memoryview, target: memoryview) -> None:
    target[:] = source

"""What a cache has acknowledged, in order, on the disk.

A file of frames `u32 length | u32 CRC-32 | record`. Records that come while one batch is written
share the next `fdatasync`. The state is what all records make of it; now and then one file with no
more than the state takes the place of the old one.
"""

import asyncio
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path

import msgspec
import structlog

from tierwise.domain.cache import ObjectKey, RoundManifest
from tierwise.errors import Overloaded
from tierwise.files import write_atomically

log = structlog.get_logger()

_FRAME = struct.Struct("<II")
RECORD_BYTES_MAX = 8 << 20
PENDING_MAX = 10_000


class Opened(msgspec.Struct, frozen=True, tag="opened"):
    """A round was announced."""

    manifest: RoundManifest
    opened_unix_s: float


class Put(msgspec.Struct, frozen=True, tag="put", kw_only=True):
    """An object is on the disk, whole. METADATA has no file: `metadata` is all of it.

    The last record of a key holds: a counted update follows one that was quarantined.
    """

    key: ObjectKey
    size_bytes: int
    digest: str
    metadata: bytes = b""  # payload-encoded
    quarantined: str = ""
    is_replica: bool = False
    arrived_unix_s: float = 0.0
    is_on_disk: bool = True
    is_stored: bool = False
    node_ids: tuple[str, ...] = ()


class Marked(msgspec.Struct, frozen=True, tag="marked", kw_only=True):
    """What became of an object: None where nothing changed."""

    key: ObjectKey
    is_on_disk: bool | None = None
    is_stored: bool | None = None
    node_ids: tuple[str, ...] | None = None


class Forgot(msgspec.Struct, frozen=True, tag="forgot"):
    """A job is gone."""

    namespace: str
    job: str


Record = Opened | Put | Marked | Forgot
_decoder = msgspec.msgpack.Decoder(Record)


class Journal:
    """Appends records. On one loop; the disk is touched in `executor`, one batch at a time."""

    def __init__(self, path: Path, executor: Executor) -> None:
        self._path = path
        self._executor = executor
        self._fd = -1
        self._pending: list[tuple[bytes, asyncio.Future[None]]] = []
        self._is_writing = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.record_count = 0  # in the file

    def open(self) -> list[Record]:
        """Return what is there, and make ready to append. Blocking.

        A frame that a crash cut off ends the file. One that is damaged is skipped if a sound one
        follows; what cannot be read is kept aside, in `journal.damaged`.
        """
        content = self._path.read_bytes() if self._path.exists() else b""
        records, end = records_in(content)
        if end < len(content):
            log.warning("cache.journal_cut", size_bytes=len(content) - end)
            self._path.with_suffix(".damaged").write_bytes(content[end:])
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(self._path, flags, 0o600)
        os.ftruncate(self._fd, end)
        os.lseek(self._fd, end, os.SEEK_SET)
        self.record_count = len(records)
        return records

    async def append(self, *records: Record) -> None:
        """Return when the records are on the disk.

        Raises:
            Overloaded: The disk is full, or too much waits for it; nothing is written.
        """
        if len(self._pending) >= PENDING_MAX:
            raise Overloaded("the cache's disk is too slow for what comes in", retry_after_s=1.0)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append((framed(records), future))
        self.record_count += len(records)
        if not self._is_writing:
            self._write_next()
        # Shielded: the batch of others is written whoever gives up waiting.
        await asyncio.shield(future)

    async def replace(self, state: Callable[[], Sequence[Record]]) -> None:
        """Begin a new file with the state, asked for when nothing else is being written.

        Raises:
            OSError: The disk is full; the old file stays.
        """
        while self._is_writing:
            await self._is_idle.wait()
        self._begin()
        try:
            records = state()
            content = b"".join(framed([record]) for record in records)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._executor, self._swap, content)
            self.record_count = len(records) + len(self._pending)
        finally:
            self._end()

    def close(self) -> None:
        """Close the file. Blocking, brief."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _write_next(self) -> None:
        batch, self._pending = self._pending, []
        self._begin()
        loop = asyncio.get_running_loop()
        content = b"".join(frame for frame, _ in batch)
        written = loop.run_in_executor(self._executor, self._write, content)

        def _done(future: asyncio.Future[None]) -> None:
            error = None if future.cancelled() else future.exception()
            for _, waiter in batch:
                if waiter.done():
                    continue
                if error is None:
                    waiter.set_result(None)
                else:
                    waiter.set_exception(Overloaded(f"the cache cannot write its journal: {error}"))
                    waiter.exception()  # whoever waited may be gone
            self._end()

        written.add_done_callback(_done)

    def _begin(self) -> None:
        self._is_writing = True
        self._is_idle.clear()

    def _end(self) -> None:
        self._is_writing = False
        if self._pending:
            self._write_next()
        else:
            self._is_idle.set()

    def _write(self, content: bytes) -> None:
        start = os.lseek(self._fd, 0, os.SEEK_CUR)
        try:
            left = memoryview(content)
            while left:
                left = left[os.write(self._fd, left) :]
            os.fdatasync(self._fd)
        except OSError:
            # Nothing of it was acknowledged: half a frame must not stand before the next one.
            os.ftruncate(self._fd, start)
            os.lseek(self._fd, start, os.SEEK_SET)
            raise

    def _swap(self, content: bytes) -> None:
        write_atomically(self._path, content)
        self.close()
        self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)


def framed(records: Sequence[Record]) -> bytes:
    """Return records as they stand in a file."""
    frames = []
    for record in records:
        content = msgspec.msgpack.encode(record)
        frames += [_FRAME.pack(len(content), zlib.crc32(content)), content]
    return b"".join(frames)


def records_in(content: bytes) -> tuple[list[Record], int]:
    """Return the sound records, and where the last of them ends."""
    found: list[Record] = []
    offset = end = 0
    while offset + _FRAME.size <= len(content):
        length, checksum = _FRAME.unpack_from(content, offset)
        start = offset + _FRAME.size
        if length > RECORD_BYTES_MAX or start + length > len(content):
            break
        offset = start + length
        body = content[start:offset]
        if zlib.crc32(body) != checksum:
            log.error("cache.record_damaged", offset=start, size_bytes=length)
            continue
        try:
            found.append(_decoder.decode(body))
        except msgspec.MsgspecError as error:
            log.error("cache.record_unknown", offset=start, cause=str(error))
        end = offset
    return found, end

"""One object on its way in.

The loop copies each chunk to where it stays. A thread follows some MiB behind: hashes, looks for
numbers that are none, measures the distance from the base and writes the file. So when the last
byte has come little is left to do, and the loop never waits for a hash or a disk.
"""

import asyncio
import hashlib
import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from agent.cache.folder import DIGEST_BYTES, Draft
from tierwise.domain.cache import IncomingHead, ObjectInfo
from tierwise.errors import AlreadyExists, Cancelled, InvalidArgument, Overloaded

STEP_BYTES = 4 << 20  # that the thread takes at a time; a multiple of the size of a float
BLOCK_ELEMENTS = 16_384


class Target(Protocol):
    """Where the bytes of one object stay."""

    view: memoryview | None
    """The bytes, to be read; None if they are not kept."""

    def write(self, chunk: memoryview, offset: int) -> None:
        """Put bytes at their place."""
        ...

    def drop(self) -> None:
        """Forget what came."""
        ...


class Nowhere:
    """Takes what is not kept: an object that is here already, or one of a wrong size."""

    view: memoryview | None = None

    def write(self, chunk: memoryview, offset: int) -> None:
        """Keep nothing."""

    def drop(self) -> None:
        """Keep nothing."""


class Distance:
    """Euclidean distance of a vector from its base, block by block.

    Differences and products are float32, sums of blocks float64: an error of about 1e-7, which is
    enough to bound it. What leaves float32's range is computed again in float64.
    """

    __slots__ = ("_base", "_difference", "has_bad_numbers", "square")

    def __init__(self, base: NDArray[np.float32] | None) -> None:
        self._base = base
        self._difference = np.empty(BLOCK_ELEMENTS, np.float32)
        self.square = 0.0
        self.has_bad_numbers = False

    def add(self, part: NDArray[np.float32], at: int) -> None:
        """Add elements `at` and on."""
        for start in range(0, len(part), BLOCK_ELEMENTS):
            block = part[start : start + BLOCK_ELEMENTS]
            if self._base is not None:
                difference = self._difference[: len(block)]
                with np.errstate(all="ignore"):
                    np.subtract(block, self._base[at + start : at + start + len(block)], difference)
            else:
                difference = block
            with np.errstate(all="ignore"):
                square = float(difference @ difference)
            if not math.isfinite(square):
                square = self._exact(block, at + start)
            self.square += square

    def _exact(self, block: NDArray[np.float32], at: int) -> float:
        if not np.isfinite(block).all():
            self.has_bad_numbers = True
            return 0.0
        wide = block.astype(np.float64)
        if self._base is not None:
            wide -= self._base[at : at + len(block)]
        return float(wide @ wide)


class Tail:
    """What follows behind the bytes, in a thread; `step` is never called twice at a time."""

    def __init__(self, view: memoryview | None, draft: Draft | None) -> None:
        self.hash = hashlib.blake2b(digest_size=DIGEST_BYTES)
        self.done_bytes = 0
        self.distance: Distance | None = None
        self._view = view
        self._draft = draft

    def step(self, end: int) -> None:
        """Take the bytes up to `end`.

        Raises:
            OSError: The disk is full.
        """
        assert self._view is not None
        while self.done_bytes < end:
            stop = min(self.done_bytes + STEP_BYTES, end)
            part = self._view[self.done_bytes : stop]
            self.hash.update(part)
            if self.distance is not None:
                self.distance.add(np.frombuffer(part, np.float32), self.done_bytes // 4)
            if self._draft is not None:
                self._draft.write(part)
            self.done_bytes = stop


Finish = Callable[["Incoming", str], "asyncio.Future[ObjectInfo]"]


class Incoming:
    """One object on its way in. Exactly one of `commit` and `abort` ends it.

    Attributes:
        known: Set if the very same object (key and digest) is held already: no byte need be sent,
            and `commit` returns it whether or not bytes were written.
        misfit: Why it cannot count, known before its bytes.
    """

    def __init__(
        self,
        head: IncomingHead,
        target: Target,
        draft: Draft | None,
        executor: Executor,
        *,
        finish: Finish,
        on_end: Callable[["Incoming"], None],
        distance: Callable[[], Distance | None] = lambda: None,
        known: ObjectInfo | None = None,
        held: ObjectInfo | None = None,
        misfit: str = "",
    ) -> None:
        """Begin.

        Args:
            head: What comes.
            target: Where its bytes stay.
            draft: Its file.
            executor: Where threads come from.
            finish: Takes this object, complete, and its digest into the cache.
            on_end: Called once, however it ends.
            distance: What measures it; called in a thread, for the base may have to be mapped.
            known: See the class.
            held: What is held under this key, with a digest that the head does not tell.
            misfit: See the class.
        """
        self.head = head
        self.target = target
        self.draft = draft
        self.known = known
        self.misfit = misfit
        self.tail = Tail(target.view, draft)
        self.received_bytes = 0
        self._executor = executor
        self._finish = finish
        self._on_end = on_end
        self._distance = distance
        self._held = held
        self._running: asyncio.Future[None] | None = None
        self._failed: BaseException | None = None
        self._is_ended = False
        self._is_committing = False

    def write(self, chunk: bytes | memoryview) -> None:
        """Take the next bytes: one copy, into the row or file in shared memory.

        Raises:
            InvalidArgument: There are more bytes than the head says.
            Cancelled: The same object is being sent anew, which ended this attempt.
        """
        if self._is_ended or self._is_committing:
            raise Cancelled(f"{self.head.key}: this attempt has ended; it was sent anew")
        part = memoryview(chunk)
        if self.received_bytes + part.nbytes > self.head.size_bytes:
            self.abort()
            raise InvalidArgument(
                f"{self.head.key}: more than the {self.head.size_bytes} bytes that its head says"
            )
        if self.target.view is None:
            self.tail.hash.update(part)
        else:
            self.target.write(part, self.received_bytes)
        self.received_bytes += part.nbytes
        if self.target.view is not None and self._running is None and self._failed is None:
            end = self.received_bytes // STEP_BYTES * STEP_BYTES
            if end > self.tail.done_bytes:
                self._follow(end)

    async def commit(self) -> ObjectInfo:
        """Return once the object is as durable as its head asks for, up to DISK or STORED.

        REPLICATED is the caller's business (`CacheStore.mark_replicated`): DISK is returned. The
        answer's `quarantined` says why an update does not count.

        Raises:
            InvalidArgument: Bytes are missing, or they have another digest, or an aggregate holds
                NaN; nothing is kept.
            AlreadyExists: The key is held with other content.
            FailedPrecondition: The round has ended meanwhile.
            Overloaded: The disk is full; nothing is kept.
            Unavailable: STORED was asked for, and the store does not answer; it is on disk.
            Cancelled: The same object is being sent anew, which ended this attempt.
        """
        if self.known is not None:
            self.abort()
            return self.known
        if self._is_ended or self._is_committing:
            raise Cancelled(f"{self.head.key}: this attempt has ended; it was sent anew")
        try:
            digest = await self._complete()
            if self._held is not None:
                return self._compared(digest)
            self._is_committing = True
            finishing = self._finish(self, digest)
        except BaseException:
            self.abort()
            raise
        # Shielded: what is being put on the disk is put there whoever gives up waiting.
        return await asyncio.shield(finishing)

    def abort(self) -> None:
        """Forget what came. Safe to call after `commit` and twice."""
        if self._is_committing:
            return
        self.end(is_kept=False)

    def end(self, *, is_kept: bool) -> None:
        """Let go of everything; for the store."""
        if self._is_ended:
            return
        self._is_ended = True
        if self._running is not None and not is_kept:
            # The thread still reads and writes: clean up behind it.
            self._running.add_done_callback(lambda _: self._drop())
        elif not is_kept:
            self._drop()
        self._on_end(self)

    def _drop(self) -> None:
        self.target.drop()
        if self.draft is not None:
            self.draft.drop()

    async def _complete(self) -> str:
        """Return the digest once every byte is hashed and, but for the last, written."""
        key, size_bytes = self.head.key, self.head.size_bytes
        if self.received_bytes != size_bytes:
            raise InvalidArgument(
                f"{key}: truncated, {self.received_bytes} of {size_bytes} bytes came"
            )
        while self._running is not None:
            await asyncio.wait([self._running])
        if self._failed is None and self.target.view is not None:
            self._follow(size_bytes)
            assert self._running is not None
            await asyncio.wait([self._running])
        if isinstance(self._failed, OSError):
            raise Overloaded(f"the cache's disk is full: {self._failed}")
        if self._failed is not None:
            raise self._failed
        if self._is_ended:
            raise Cancelled(f"{key}: this attempt has ended; it was sent anew")
        digest = self.tail.hash.hexdigest()
        if self.head.digest not in ("", digest):
            raise InvalidArgument(f"{key}: its bytes have digest {digest}, not {self.head.digest}")
        return digest

    def _compared(self, digest: str) -> ObjectInfo:
        """Answer for bytes that came a second time."""
        assert self._held is not None
        self.end(is_kept=False)
        if digest != self._held.digest:
            raise AlreadyExists(f"{self.head.key} is held with other content: names are final")
        return self._held

    def _follow(self, end: int) -> None:
        loop = asyncio.get_running_loop()
        self._running = loop.run_in_executor(self._executor, self._step, end)
        self._running.add_done_callback(self._stepped)

    def _step(self, end: int) -> None:
        if self.tail.done_bytes == 0:
            self.tail.distance = self._distance()
        self.tail.step(end)

    def _stepped(self, future: "asyncio.Future[None]") -> None:
        self._running = None
        if future.cancelled():
            self._failed = Cancelled("the cache is closing")
            return
        self._failed = future.exception()
        if self._is_ended or self._failed is not None:
            return
        end = self.received_bytes // STEP_BYTES * STEP_BYTES
        if end > self.tail.done_bytes:
            self._follow(end)

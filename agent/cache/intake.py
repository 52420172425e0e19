"""How an object comes in: room for it, its bytes, the verdict, the disk, the journal."""

import math
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray

from agent.cache import admission
from agent.cache.arena import RowTarget, Sheet
from agent.cache.disk import Disk
from agent.cache.folder import Draft
from agent.cache.incoming import Distance, Incoming, Nowhere, Target
from agent.cache.index import Entry, Index, Round
from agent.cache.journal import Journal
from agent.cache.residency import Residency
from agent.cache.tasks import Tasks
from tierwise.clock import wall_s
from tierwise.domain.cache import Durability, IncomingHead, ObjectInfo, ObjectKey, ObjectKind
from tierwise.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    Overloaded,
)
from tierwise.wire import payload

log = structlog.get_logger()

INCOMING_MAX = 256


@dataclass(slots=True)
class _Claims:
    """What one incoming object holds until it ends."""

    namespace: str
    memory_bytes: int = 0
    disk_bytes: int = 0
    round: Round | None = None  # in whose matrix it writes


class Intake:
    """Objects on their way in."""

    def __init__(
        self,
        index: Index,
        disk: Disk,
        journal: Journal,
        residency: Residency,
        executor: Executor,
        tasks: Tasks,
        *,
        info: Callable[[Entry], ObjectInfo],
        base: Callable[[Round], NDArray[np.float32] | None],
        on_put: Callable[[Entry, IncomingHead], None],
        on_disk: Callable[[Entry], None],
        stored: Callable[[ObjectKey], Awaitable[ObjectInfo]],
    ) -> None:
        """Wire it.

        Args:
            index: What is known.
            disk: Files, within their bound.
            journal: What is acknowledged.
            residency: What is in memory.
            executor: Threads that hash and write.
            tasks: Who runs what outlives its caller.
            info: Describes an entry.
            base: Returns what a round's deltas are taken from; called in a thread.
            on_put: Told of each new entry that is safe (or was asked to be in memory only).
            on_disk: Told of each that is on the disk.
            stored: Waits for the object store.
        """
        self._index = index
        self._disk = disk
        self._journal = journal
        self._residency = residency
        self._executor = executor
        self._tasks = tasks
        self._info = info
        self._base = base
        self._on_put = on_put
        self._on_disk = on_disk
        self._stored = stored
        self._receiving: dict[ObjectKey, Incoming] = {}
        self._claims: dict[Incoming, _Claims] = {}

    def receive(self, head: IncomingHead, writer_uri: str) -> Incoming:
        """Begin to take an object; see `CacheStore.receive`."""
        key = head.key
        blob = _blob(head)
        round_ = self._index.round(key.namespace, key.job, key.round)
        misfit = admission.check_put(head, blob, round_, writer_uri)
        assert round_ is not None
        held = self._index.entry(key)
        if held is not None:
            if head.digest == held.digest:
                return self._unkept(head, known=self._info(held))
            if not held.quarantined:
                if head.digest:
                    raise AlreadyExists(f"{key} is held with other content: names are final")
                return self._unkept(head, held=self._info(held))
            if round_.has_ended and not head.is_replica:
                raise FailedPrecondition(f"{key}: round {key.round} has ended")
        admission.check_count(self._index)
        if (before := self._receiving.get(key)) is not None:
            before.abort()
        if len(self._claims) >= INCOMING_MAX:
            raise Overloaded(
                f"the cache takes {INCOMING_MAX} objects at a time, and does", retry_after_s=0.5
            )
        return self._begin(head, round_, misfit)

    def abort_all(self, namespace: str = "", job: str = "") -> None:
        """End what comes in, all or of one job."""
        for key, incoming in list(self._receiving.items()):
            if not namespace or (key.namespace, key.job) == (namespace, job):
                incoming.abort()

    def _begin(self, head: IncomingHead, round_: Round, misfit: str) -> Incoming:
        claims = _Claims(head.key.namespace)
        draft: Draft | None = None
        try:
            if head.key.kind is not ObjectKind.METADATA:
                self._disk.claim(claims.namespace, head.size_bytes)
                claims.disk_bytes = head.size_bytes
            target = self._target(head, round_, misfit, claims)
            if claims.disk_bytes:
                draft = self._disk.begin()
        except BaseException as error:
            self._release(claims)
            if isinstance(error, OSError):
                raise Overloaded(f"there is no room for {head.key}: {error}") from None
            raise
        measured = head.key.kind is not ObjectKind.METADATA and not misfit
        incoming = Incoming(
            head,
            target,
            draft,
            self._executor,
            finish=lambda one, digest: self._tasks.start(self._settle(one, digest)),
            on_end=self._ended,
            distance=(lambda: self._distance(head, round_)) if measured else lambda: None,
            misfit=misfit,
        )
        self._claims[incoming] = claims
        self._receiving[head.key] = incoming
        return incoming

    def _target(self, head: IncomingHead, round_: Round, misfit: str, claims: _Claims) -> Target:
        row = round_.row_of.get(head.key.client)
        is_row = head.key.kind is ObjectKind.UPDATE and not misfit and row is not None
        if is_row and round_.matrix is not None:
            assert row is not None
            round_.user_count += 1
            claims.round = round_
            return RowTarget(round_.matrix, row)
        self._residency.claim(claims.namespace, head.size_bytes)
        claims.memory_bytes = head.size_bytes
        return Sheet(head.size_bytes)

    def _distance(self, head: IncomingHead, round_: Round) -> Distance:
        # An aggregate is only looked through for numbers that are none.
        return Distance(self._base(round_) if head.key.kind is ObjectKind.UPDATE else None)

    async def _settle(self, incoming: Incoming, digest: str) -> ObjectInfo:
        """Take a complete object in: the verdict, memory, disk, journal."""
        head, key = incoming.head, incoming.head.key
        try:
            entry = self._accepted(incoming, digest)
            stale = self._index.remove(key)  # quarantined before
            self._place(incoming, entry)
            self._index.add(entry)
        except BaseException:
            incoming.end(is_kept=False)
            raise
        if head.durability is Durability.MEMORY:
            self._on_put(entry, head)
            self._tasks.start_unattended(self._to_disk(incoming, entry, stale))
            return self._info(entry)
        await self._to_disk(incoming, entry, stale)
        if head.durability is Durability.STORED and not entry.quarantined and not head.is_replica:
            return await self._stored(key)
        return self._info(entry)

    def _accepted(self, incoming: Incoming, digest: str) -> Entry:
        """Return the entry of a complete object, with the verdict.

        Raises:
            FailedPrecondition: The round has ended, or is gone.
            InvalidArgument: It is an aggregate that holds NaN, or metadata that is none.
        """
        head, key = incoming.head, incoming.head.key
        round_ = self._index.round(key.namespace, key.job, key.round)
        is_late = key.kind is ObjectKind.UPDATE and not head.is_replica
        if round_ is None or (is_late and round_.has_ended):
            raise FailedPrecondition(f"{key}: round {key.round} has ended meanwhile")
        blob = _blob(head)
        reason = incoming.misfit or _verdict(incoming, round_)
        if key.kind is ObjectKind.AGGREGATE and reason:
            raise InvalidArgument(f"{key}: the aggregate {reason}")
        if key.kind is ObjectKind.METADATA:
            assert incoming.target.view is not None
            blob = bytes(incoming.target.view)
            try:
                is_dict = isinstance(payload.decode(blob), dict)
            except payload.PayloadError as error:
                raise InvalidArgument(f"{key}: {error}") from None
            if not is_dict:
                raise InvalidArgument(f"{key}: metadata is a dict")
        if reason:
            log.warning("cache.update_quarantined", key=str(key), reason=reason)
        return Entry(
            key=key,
            size_bytes=head.size_bytes,
            digest=digest,
            blob=blob,
            quarantined=reason,
            is_replica=head.is_replica,
            arrived_unix_s=wall_s(),
        )

    def _place(self, incoming: Incoming, entry: Entry) -> None:
        """Let its bytes stay in memory, if they count."""
        claims, target = self._claims[incoming], incoming.target
        if claims.memory_bytes:
            self._residency.release(claims.namespace, claims.memory_bytes)
            claims.memory_bytes = 0
        if entry.quarantined or entry.key.kind is ObjectKind.METADATA:
            target.drop()
        elif isinstance(target, Sheet):
            self._residency.keep(entry, target.seal())
        elif isinstance(target, RowTarget):
            target.fill()

    async def _to_disk(self, incoming: Incoming, entry: Entry, stale: str) -> None:
        """Make an object durable, or take it back.

        Raises:
            Overloaded: The disk is full; nothing is kept, unless memory was all that was asked for.
        """
        try:
            if incoming.draft is not None:
                await self._disk.finish(incoming.draft, entry.digest)
            if self._index.entry(entry.key) is not entry:
                self._disk.discard([entry.digest])
                raise FailedPrecondition(f"{entry.key}: its job was forgotten meanwhile")
            self._index.mark_on_disk(entry, True)
            entry.is_checked = True
            await self._journal.append(entry.put())
            entry.is_journaled = True
        except (OSError, Overloaded) as error:
            text = f"the cache's disk is full: {error}"
            if incoming.head.durability is Durability.MEMORY:
                log.error("cache.disk_failed", key=str(entry.key), cause=text)
                return
            self._take_back(incoming, entry)
            raise Overloaded(text) from None
        finally:
            incoming.end(is_kept=True)
        self._disk.discard([stale])
        self._on_disk(entry)
        if incoming.head.durability is not Durability.MEMORY:
            self._on_put(entry, incoming.head)

    def _take_back(self, incoming: Incoming, entry: Entry) -> None:
        if self._index.entry(entry.key) is entry:
            self._disk.discard([self._index.remove(entry.key)])
        self._residency.drop(entry)
        incoming.target.drop()

    def _unkept(
        self, head: IncomingHead, known: ObjectInfo | None = None, held: ObjectInfo | None = None
    ) -> Incoming:
        return Incoming(
            head,
            Nowhere(),
            None,
            self._executor,
            finish=lambda one, digest: self._tasks.start(self._settle(one, digest)),
            on_end=self._ended,
            known=known,
            held=held,
        )

    def _ended(self, incoming: Incoming) -> None:
        if self._receiving.get(incoming.head.key) is incoming:
            del self._receiving[incoming.head.key]
        if (claims := self._claims.pop(incoming, None)) is not None:
            self._release(claims)

    def _release(self, claims: _Claims) -> None:
        if claims.memory_bytes:
            self._residency.release(claims.namespace, claims.memory_bytes)
        if claims.disk_bytes:
            self._disk.release(claims.namespace, claims.disk_bytes)
        if claims.round is not None:
            claims.round.user_count -= 1


def _blob(head: IncomingHead) -> bytes:
    """Return the metadata of a head, encoded.

    Raises:
        InvalidArgument: It cannot travel.
    """
    if not head.metadata:
        return b""
    try:
        return payload.encode(dict(head.metadata), "metadata")
    except payload.PayloadError as error:
        raise InvalidArgument(f"{head.key}: {error}") from None


def _verdict(incoming: Incoming, round_: Round) -> str:
    """Return why a vector does not count, "" if it does."""
    distance = incoming.tail.distance
    if distance is None:
        return ""
    if distance.has_bad_numbers:
        return "holds NaN or infinity"
    found, bound = math.sqrt(distance.square), round_.manifest.distance_max
    if incoming.head.key.kind is ObjectKind.UPDATE and bound and found > bound:
        return f"is {found:.6g} from its base; {bound:.6g} at most"
    return ""

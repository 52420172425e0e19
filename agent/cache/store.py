"""The cache of one node: rounds in shared memory, written through to disk and an object store.

Used on one event loop. What blocks (hashing, disk, statistics) runs in threads of its own.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import structlog

from agent.cache import admission
from agent.cache.archive import Archive
from agent.cache.arena import Matrix
from agent.cache.counting import Counting, file_of
from agent.cache.disk import Disk
from agent.cache.folder import Folder
from agent.cache.incoming import Incoming
from agent.cache.index import Entry, Index, Round
from agent.cache.intake import Intake
from agent.cache.journal import Forgot, Journal, Marked, Opened
from agent.cache.loading import Loader
from agent.cache.reading import Reading
from agent.cache.residency import Residency
from agent.cache.restoring import compact, free_bytes, memory_bytes_of_machine, restore, step_back
from agent.cache.rivals import policy
from agent.cache.tasks import Tasks
from agent.cache.writethrough import WriteThrough
from tierwise.clock import wall_s
from tierwise.config import CacheConfig
from tierwise.domain.cache import (
    CacheReading,
    Durability,
    HeldRounds,
    IncomingHead,
    ObjectInfo,
    ObjectKey,
    ObjectKind,
    RoundManifest,
)
from tierwise.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    Overloaded,
)
from tierwise.functions.fl.statistics import RoundStatistics
from tierwise.wire.memfd import Memfd

log = structlog.get_logger()

THREADS = 4
TIDY_S = 1.0
HISTORY_MAX = 256


class CacheStore:
    """See the module. `run_forever` must run for write-through, prefetch and tidying to happen.

    Attributes:
        on_committed: Called on the loop after each commit of a new object that counts.
    """

    def __init__(self, folder: Path, config: CacheConfig, *, node_id: str = "") -> None:
        """Use `folder` (made if missing) for files; nothing is read before `recover`.

        Raises:
            InvalidArgument: A size is negative; the policy or URL means nothing to us.
        """
        try:
            chosen = policy(config.policy)
        except ValueError as error:
            raise InvalidArgument(f"[cache] policy: {error}") from None
        if min(config.memory_mib, config.disk_mib, config.quota_mib) < 0:
            raise InvalidArgument("[cache] memory_mib, disk_mib and quota_mib are 0 or more")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._root = folder
        self._node_id = node_id
        self._lock_fd = -1
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="cache")
        self._counter = ThreadPoolExecutor(
            1, thread_name_prefix="cache-count", initializer=step_back
        )
        memory_bytes = (config.memory_mib << 20) or memory_bytes_of_machine() // 4
        disk_bytes = (config.disk_mib << 20) or free_bytes(folder) // 2
        quota_bytes = (config.quota_mib << 20) or max(memory_bytes, disk_bytes)
        self._index = Index()
        self._journal = Journal(folder / "journal", self._executor)
        self._tasks = Tasks()
        self._folder = Folder(folder)
        self._archive = Archive(config.store, default=folder.parent / "store")
        self._residency = Residency(chosen, bytes_max=memory_bytes, quota_bytes=quota_bytes)
        self._disk = Disk(
            self._index,
            self._folder,
            self._journal,
            chosen,
            self._executor,
            self._tasks,
            bytes_max=disk_bytes,
            quota_bytes=quota_bytes,
            may_evict=not self._archive.shares_disk(folder),
        )
        self._write_through = WriteThrough(
            self._index,
            self._folder,
            self._journal,
            self._archive,
            node_id,
            lambda name: file_of(folder / "statistics", name),
        )
        self._reading = Reading(
            self._index,
            Loader(self._index, self._disk, self._journal, self._write_through, self._executor),
            self._residency,
            self._write_through,
            self._executor,
            node_id,
        )
        self._counting = Counting(
            folder / "statistics",
            self._counter,
            self._tasks,
            vectors=self._reading.vectors,
            bases=self._reading.bases,
            on_saved=self._write_through.add_statistics,
        )
        self._intake = Intake(
            self._index,
            self._disk,
            self._journal,
            self._residency,
            self._executor,
            self._tasks,
            info=self._reading.info,
            base=self._reading.base,
            on_put=self._on_put,
            on_disk=self._write_through.add,
            stored=lambda key: self.settled(key, Durability.STORED),
        )
        self.on_committed: list[Callable[[ObjectInfo, IncomingHead], None]] = []

    async def recover(self) -> None:
        """Take up what the disk holds; call once, before anything else.

        Raises:
            FailedPrecondition: Another process uses this folder.
        """
        self._lock_fd = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FailedPrecondition(f"another process uses {self._root}") from None
        await asyncio.to_thread(restore, self._index, self._folder, self._journal)
        for entry in sorted(self._index.entries(), key=lambda each: each.key):
            if not entry.quarantined:
                self._residency.policy.ingested(entry.key, entry.size_bytes)
            self._write_through.add(entry)
        for found in self._index.jobs.values():
            newest = found.rounds[max(found.rounds)]
            if newest.updates():
                self._residency.wishes.append(newest.key(ObjectKind.MATRIX))
        log.info(
            "cache.recovered",
            jobs=len(self._index.jobs),
            objects=self._index.object_count,
            size_bytes=self._index.disk_bytes,
        )

    async def run_forever(self) -> None:
        """Write through to the object store, fetch ahead, tidy; until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write_through.run_forever())
            while True:
                self._residency.tidy()
                await self._reading.fetch_ahead()
                await compact(self._index, self._journal)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(TIDY_S):
                        await self._reading.wished.wait()

    async def close(self) -> None:
        """Finish what is being written and release the folder."""
        self._intake.abort_all()
        await self._tasks.close()
        await asyncio.to_thread(self._executor.shutdown)
        await asyncio.to_thread(self._counter.shutdown)
        self._journal.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def open_round(self, manifest: RoundManifest) -> None:
        """Make room for a round; durable when it returns. The same manifest again is no error.

        Raises:
            InvalidArgument: A name or number is out of bounds.
            PayloadTooLarge: Its matrix could never fit.
            AlreadyExists: The round is open with another manifest.
            PermissionDenied: The job belongs to another owner.
            FailedPrecondition: A later round has ended; the base is not known here.
            Overloaded: Memory, disk or quota are full.
        """
        admission.check_manifest(manifest, self._index)
        base = manifest.base
        if base is not None and not await self._reading.has(base):
            raise FailedPrecondition(f"base {base} is not known here: put it first")
        round_ = self._index.round(manifest.namespace, manifest.job, manifest.round)
        if round_ is not None:
            if round_.manifest != manifest:
                raise AlreadyExists(
                    f"round {manifest.round} of {manifest.namespace}/{manifest.job} is open with "
                    "another manifest"
                )
            await self._journal.append()  # who opened it first may still wait for the disk
            return
        admission.check_count(self._index)
        round_ = self._reading.opened(manifest, wall_s())
        if round_.matrix is not None:
            self._tasks.start_unattended(self._prepare(round_, round_.matrix))
        try:
            await self._journal.append(Opened(manifest, round_.opened_unix_s))
        except Overloaded:
            self._residency.drop_matrix(round_)
            self._index.close(round_)
            raise

    def manifest(self, namespace: str, job: str, round_number: int) -> RoundManifest | None:
        """Return how a round was opened, or None."""
        found = self._index.round(namespace, job, round_number)
        return found.manifest if found else None

    def receive(self, head: IncomingHead, writer_uri: str) -> Incoming:
        """Begin to take an object.

        Args:
            head: What comes.
            writer_uri: Identity that puts it; empty: the cluster itself (a peer's copy, this node).

        Raises:
            InvalidArgument: A field is wrong, the client is not in the manifest.
            AlreadyExists: The key is held with another digest than the head's.
            PermissionDenied: Not this client's writer, or not the owner.
            FailedPrecondition: The round is not open, or has ended.
            Overloaded: Memory, disk, quota, or too many at a time.
        """
        return self._intake.receive(head, writer_uri)

    async def read(
        self, key: ObjectKey, *, with_quarantined: bool = False
    ) -> tuple[Memfd, ObjectInfo]:
        """Return an object as a shared file: from memory, else disk, else the object store.

        A MATRIX is shape (K, P) float32, row k of the k-th client of the manifest; rows of clients
        that are not in are zeros or unfinished: leave them out, a weight of 0 does not hide NaN.
        Its info's metadata holds `clients` (K names), `is_in` (K booleans) and `parameter_count`.
        An UPDATE of a matrix is copied once (a row is part of a larger file): who only sends the
        bytes on uses `view`. A MATRIX's file is live (see memfd.py): for workers.

        Raises:
            NotFound: Nothing of that name is here or in the store, or it is quarantined.
            Unavailable: It is in the store, which does not answer.
            Overloaded: There is no memory for it.
        """
        return await self._reading.read(key, with_quarantined=with_quarantined)

    async def view(
        self, key: ObjectKey, *, with_quarantined: bool = False
    ) -> tuple[memoryview, ObjectInfo]:
        """Return an object's bytes, read-only and uncopied; as `read` otherwise."""
        return await self._reading.view(key, with_quarantined=with_quarantined)

    async def statistics(self, namespace: str, job: str, round_number: int = -1) -> RoundStatistics:
        """Return what is known of a round; waits for updates that are being counted.

        Args:
            namespace: Of the job.
            job: Its name.
            round_number: −1: the newest that has ended or is complete, else the newest.

        Raises:
            NotFound: No such round is known here, nor in the store.
        """
        found = await self._reading.round(namespace, job, round_number)
        return await self._counting.of(found)

    async def history(
        self, namespace: str, job: str, *, count: int = 16
    ) -> Sequence[RoundStatistics]:
        """Return the statistics of the newest `count` rounds that have updates, ascending."""
        found = self._index.jobs.get((namespace, job))
        if found is None:
            return []
        numbers = sorted(n for n, round_ in found.rounds.items() if round_.updates())
        chosen = numbers[-min(count, HISTORY_MAX) :] if count > 0 else []
        return [await self._counting.of(found.rounds[number]) for number in chosen]

    def rounds(self, namespace: str, job: str) -> Sequence[int]:
        """Return the rounds of a job that are known here, ascending."""
        found = self._index.jobs.get((namespace, job))
        return sorted(found.rounds) if found else []

    def newest_aggregate(self, namespace: str, job: str) -> ObjectKey | None:
        """Return the key of the newest round's end, or None."""
        found = self._index.jobs.get((namespace, job))
        if found is None or found.newest_ended < 0:
            return None
        return found.rounds[found.newest_ended].key(ObjectKind.AGGREGATE)

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        """Return one object's entry, quarantined or not."""
        entry = self._index.entry(key)
        return self._reading.info(entry) if entry else None

    def list(self, namespace: str = "", job: str = "") -> Sequence[ObjectInfo]:
        """Return entries in the order of their keys, quarantined ones among them."""
        entries = sorted(self._index.entries(namespace, job), key=lambda entry: entry.key)
        return [self._reading.info(entry) for entry in entries]

    def discard(self, key: ObjectKey) -> None:
        """Forget an object whose bytes are gone, so that a copy of it can be taken."""
        entry = self._index.entry(key)
        if entry is not None:
            self._residency.drop(entry)
            self._disk.discard([self._index.remove(key)])

    def mark_replicated(self, key: ObjectKey, node_ids: Sequence[str]) -> None:
        """Note that other nodes hold a copy; unknown keys are ignored."""
        entry = self._index.entry(key)
        if entry is None:
            return
        entry.node_ids = tuple(dict.fromkeys([*entry.node_ids, *node_ids]))
        self._tasks.start_unattended(self._marked(Marked(key=key, node_ids=entry.node_ids)))

    async def settled(self, key: ObjectKey, durability: Durability) -> ObjectInfo:
        """Wait until an object is so durable.

        Raises:
            NotFound: It is not here.
            Unavailable: The store has not answered for 30 s.
        """
        entry = await self._write_through.settled(key, durability)
        return self._reading.info(entry)

    def held(self) -> Sequence[HeldRounds]:
        """Return what heartbeats say: the newest 256 jobs, 64 rounds of each."""
        return self._index.held()

    def reading(self) -> CacheReading:
        """Return how full the cache is and how often it was hit."""
        chosen = self._residency.policy.chosen
        return CacheReading(
            memory_bytes=self._residency.used_bytes(),
            memory_bytes_max=self._residency.bytes_max,
            disk_bytes=self._index.disk_bytes,
            hit_count=self._reading.hit_count,
            miss_count=self._reading.miss_count,
            policies={f"{name}/{job}": chosen(name, job) for name, job in self._index.jobs},
        )

    async def forget(self, namespace: str, job: str, *, with_store: bool = False) -> int:
        """Drop a job from memory and disk, and the store if asked; return how many objects.

        Raises:
            Unavailable: The store does not answer; the job is gone from here.
        """
        self._intake.abort_all(namespace, job)
        self._residency.forget(namespace, job)
        self._write_through.forget(namespace, job)
        found = self._index.jobs.get((namespace, job))
        rounds = list(found.rounds.values()) if found else []
        count, digests = self._index.forget(namespace, job)
        # Files go when no restart looks for them any more.
        await self._journal.append(Forgot(namespace, job))
        self._disk.discard(digests)
        await asyncio.to_thread(self._counting.forget, namespace, job, rounds)
        if with_store:
            await self._write_through.delete(namespace, job)
        return count

    def _on_put(self, entry: Entry, head: IncomingHead) -> None:
        key = entry.key
        round_ = self._index.round(key.namespace, key.job, key.round)
        if round_ is None:  # forgotten meanwhile
            return
        self._counting.changed(round_)
        if entry.quarantined:
            return
        self._residency.policy.ingested(key, entry.size_bytes)
        if key.kind is ObjectKind.UPDATE:
            self._counting.follow(round_)
        info = self._reading.info(entry)
        for tell in self.on_committed:
            tell(info, head)

    async def _marked(self, mark: Marked) -> None:
        await self._journal.append(mark)
        await self._write_through.announce()

    async def _prepare(self, round_: Round, matrix: Matrix) -> None:
        loop = asyncio.get_running_loop()
        wanted = lambda: round_.matrix is matrix  # noqa: E731
        await loop.run_in_executor(self._executor, matrix.prepare, wanted)

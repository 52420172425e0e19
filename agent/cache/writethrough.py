"""From the disk to the object store, later and once; and back, when the disk has it no more.

What is on the disk and not in the store waits here, in no hurry. Objects of a batch go first, then
the list of their round, then the mark: what is called stored can be found again from the store
alone. A store that is down is asked again after 1 s, 2 s, … 60 s; nothing is lost meanwhile.
"""

import asyncio
import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import structlog

from agent.cache.archive import Archive
from agent.cache.folder import DIGEST_BYTES, Draft, Folder
from agent.cache.index import Entry, Index, Round
from agent.cache.journal import Journal, Marked, Opened, Put, framed, records_in
from tierwise.clock import monotonic_s
from tierwise.domain.cache import Durability, ObjectKey, ObjectKind
from tierwise.errors import NotFound, TierwiseError, Unavailable
from tierwise.files import write_atomically

log = structlog.get_logger()

BATCH_MAX = 16
AT_A_TIME = 4
WAIT_S_MIN, WAIT_S_MAX = 1.0, 60.0
SETTLE_S_MAX = 30.0
UNKNOWN_S = 10.0  # how long the store is not asked again for a job that it did not have
UNKNOWN_MAX = 1024
ROUNDS_AT_ONCE_MAX = 64  # taken up of a job that only the store knows

Name = tuple[str, str, int]  # namespace, job, round


class WriteThrough:
    """Brings objects to the store, and rounds back."""

    def __init__(
        self,
        index: Index,
        folder: Folder,
        journal: Journal,
        archive: Archive,
        node_id: str,
        statistics_of: Callable[[Name], Path],
    ) -> None:
        self._index = index
        self._folder = folder
        self._journal = journal
        self._archive = archive
        self._node_id = node_id or "node"
        self._statistics_of = statistics_of
        self._counted: OrderedDict[Name, None] = OrderedDict()
        self._waiting: OrderedDict[ObjectKey, None] = OrderedDict()
        self._is_wanted = asyncio.Event()
        self._stored = asyncio.Condition()
        self._storing = asyncio.Lock()
        self._unknown: OrderedDict[tuple[str, str], float] = OrderedDict()
        self.failure = ""  # why the store did not take what came last
        self.is_copy_local = archive.shares_disk(folder.root)

    def add(self, entry: Entry) -> None:
        """Let an object be stored, if it is this node's to store."""
        if not (entry.is_stored or entry.is_replica or entry.quarantined):
            self._waiting[entry.key] = None
            self._is_wanted.set()

    def add_statistics(self, round_: Round) -> None:
        """Let a round's statistics be stored beside it."""
        self._counted[_name(round_)] = None
        self._is_wanted.set()

    async def run_forever(self) -> None:
        """Store what waits, until cancelled."""
        wait_s = WAIT_S_MIN
        while True:
            await self._is_wanted.wait()
            batch = list(islice(self._waiting, BATCH_MAX))
            counted = next(iter(self._counted), None)
            if not batch and counted is None:
                self._is_wanted.clear()
                continue
            try:
                async with self._storing:
                    if batch:
                        await self._store(batch)
                    elif counted is not None:
                        await self._store_statistics(counted)
                wait_s, self.failure = WAIT_S_MIN, ""
            except (TierwiseError, OSError) as error:
                if str(error) != self.failure:
                    log.warning("cache.store_failed", cause=str(error), waiting=len(self._waiting))
                self.failure = str(error)
                for key in batch:
                    if key in self._waiting:
                        self._waiting.move_to_end(key)  # one that cannot go holds up no other
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, WAIT_S_MAX)

    async def settled(self, key: ObjectKey, durability: Durability) -> Entry:
        """Wait until an object is so durable.

        Raises:
            NotFound: It is not here.
            Unavailable: It was not for `SETTLE_S_MAX`.
        """

        def _is() -> bool:
            entry = self._index.entry(key)
            return entry is None or entry.durability >= durability

        try:
            async with asyncio.timeout(SETTLE_S_MAX), self._stored:
                await self._stored.wait_for(_is)
        except TimeoutError:
            raise Unavailable(
                f"{key} is not {durability.name.lower()} after {SETTLE_S_MAX:.0f} s; it is safe on "
                f"this node's disk. {self.failure}".rstrip()
            ) from None
        entry = self._index.entry(key)
        if entry is None:
            raise NotFound(f"{key} is not here any more")
        return entry

    async def announce(self) -> None:
        """Wake those who wait for a mark."""
        async with self._stored:
            self._stored.notify_all()

    async def fetch(self, entry: Entry, draft: Draft) -> None:
        """Write an object's bytes from the store to a file, which is dropped on failure.

        Raises:
            NotFound: The store has it no more.
            Unavailable: The store does not answer, or holds other bytes.
            OSError: The disk is full.
        """
        found = hashlib.blake2b(digest_size=DIGEST_BYTES)

        def _take(part: memoryview) -> None:
            found.update(part)
            draft.write(part)

        try:
            await self._archive.get(str(entry.key), entry.size_bytes, _take)
            if found.hexdigest() != entry.digest:
                raise Unavailable(f"the store holds other bytes for {entry.key} than were put")
        except BaseException:
            draft.drop()
            raise

    async def mark(self, entry: Entry) -> None:
        """Note that an object is on this disk again."""
        await self._journal.append(Marked(key=entry.key, is_on_disk=True))

    async def take_up(self, namespace: str, job: str, number: int = -1) -> bool:
        """Learn of a job, or one round of it, from the store; return whether anything came.

        Raises:
            Unavailable: The store does not answer.
        """
        name = (namespace, job)
        if self._unknown.get(name, -UNKNOWN_S) > monotonic_s() - UNKNOWN_S:
            return False
        of_round = f"{number:06d}/index/" if number >= 0 else ""
        prefix = f"{namespace}/{job}/{of_round}"
        paths = [path for path in await self._archive.paths(prefix) if "/index/" in path]
        taken: list[Opened | Put] = []
        for path in sorted(paths)[-ROUNDS_AT_ONCE_MAX:]:
            records, _ = records_in(await self._archive.get_small(path))
            taken += [r for r in records if isinstance(r, Opened | Put) and self._is_new(r)]
            await self._take_up_statistics(path)
        for record in taken:
            if isinstance(record, Opened):
                self._index.open(record.manifest, record.opened_unix_s)
            elif self._index.entry(record.key) is None:
                self._index.take_up(record)
        if taken:
            await self._journal.append(*taken)
            return True
        self._unknown[name] = monotonic_s()
        while len(self._unknown) > UNKNOWN_MAX:
            self._unknown.popitem(last=False)
        return False

    async def delete(self, namespace: str, job: str) -> None:
        """Delete a job from the store.

        Raises:
            Unavailable: The store does not answer.
        """
        async with self._storing:  # what is on its way would come after
            await self._archive.delete(await self._archive.paths(f"{namespace}/{job}/"))

    def forget(self, namespace: str, job: str) -> None:
        """Store nothing more of a job."""
        for key in [k for k in self._waiting if (k.namespace, k.job) == (namespace, job)]:
            del self._waiting[key]
        for name in [name for name in self._counted if name[:2] == (namespace, job)]:
            del self._counted[name]

    async def _store(self, keys: list[ObjectKey]) -> None:
        found = [self._index.entry(key) for key in keys]
        entries = [e for e in found if e is not None and e.is_on_disk and not e.is_stored]
        gate = asyncio.Semaphore(AT_A_TIME)

        async def _one(entry: Entry) -> None:
            async with gate:
                if entry.has_file:
                    source = self._folder.path(entry.digest)
                    await self._archive.put_file(str(entry.key), source)
                else:
                    await self._archive.put(str(entry.key), entry.blob)

        results = await asyncio.gather(*map(_one, entries), return_exceptions=True)
        sent = [e for e, result in zip(entries, results, strict=True) if result is None]
        rounds = {(e.key.namespace, e.key.job, e.key.round) for e in sent}
        for name in sorted(rounds):
            round_ = self._index.round(*name)
            if round_ is not None:
                await self._list(round_, {e.key for e in sent})
        # A job may have been forgotten meanwhile, or an update replaced.
        kept = [entry for entry in sent if self._index.entry(entry.key) is entry]
        for entry in kept:
            entry.is_stored = True
        if kept:
            await self._journal.append(*(Marked(key=e.key, is_stored=True) for e in kept))
        failed = {e.key for e, result in zip(entries, results, strict=True) if result is not None}
        for key in keys:
            if key not in failed:
                self._waiting.pop(key, None)
        await self.announce()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _list(self, round_: Round, new: set[ObjectKey]) -> None:
        """Store what a round holds: the manifest, and each object that is in the store."""
        puts = []
        for entry in round_.entries.values():
            if entry.is_stored or entry.key in new:
                put = entry.put()
                puts.append(
                    Put(
                        key=put.key,
                        size_bytes=put.size_bytes,
                        digest=put.digest,
                        metadata=put.metadata,
                        arrived_unix_s=put.arrived_unix_s,
                        is_on_disk=put.key.kind is ObjectKind.METADATA,  # the record is all of it
                        is_stored=True,
                    )
                )
        path = f"{_prefix(_name(round_))}/index/{self._node_id}"
        content = framed([Opened(round_.manifest, round_.opened_unix_s), *puts])
        await self._archive.put(path, content)

    async def _store_statistics(self, name: Name) -> None:
        self._counted.pop(name, None)
        round_ = self._index.round(*name)
        path = self._statistics_of(name)
        if round_ is None or not await asyncio.to_thread(path.exists):
            return
        try:
            target = f"{_prefix(name)}/statistics/{self._node_id}"
            await self._archive.put_file(target, path, is_final=False)
        except TierwiseError:
            self._counted[name] = None
            raise

    async def _take_up_statistics(self, path: str) -> None:
        """Fetch what was counted of a round whose list is at `path`; without it, count anew."""
        namespace, job, number, _, node_id = path.split("/")
        name = (namespace, job, int(number))
        target = self._statistics_of(name)
        with contextlib.suppress(NotFound, OSError):
            if not await asyncio.to_thread(target.exists):
                found = await self._archive.get_small(f"{_prefix(name)}/statistics/{node_id}")
                await asyncio.to_thread(write_atomically, target, found)

    def _is_new(self, record: Opened | Put) -> bool:
        if isinstance(record, Opened):
            manifest = record.manifest
            name = (manifest.namespace, manifest.job, manifest.round)
            return self._index.round(*name) is None
        return self._index.entry(record.key) is None


def _name(round_: Round) -> Name:
    manifest = round_.manifest
    return manifest.namespace, manifest.job, manifest.round


def _prefix(name: Name) -> str:
    namespace, job, number = name
    return f"{namespace}/{job}/{number:06d}"

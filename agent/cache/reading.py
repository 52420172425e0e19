"""How objects are read: memory, else disk, else the object store, which brings them back."""

import asyncio
import contextlib
import weakref
from collections.abc import Iterable
from concurrent.futures import Executor

import numpy as np
import structlog
from numpy.typing import NDArray

from agent.cache.arena import Matrix, Sheet
from agent.cache.counting import Bases
from agent.cache.index import Entry, Index, Round, info_of
from agent.cache.loading import Loader, unavailable
from agent.cache.residency import Residency
from agent.cache.writethrough import WriteThrough
from tierwise.domain.cache import Durability, ObjectInfo, ObjectKey, ObjectKind, RoundManifest
from tierwise.errors import NotFound, Overloaded, TierwiseError, Unavailable
from tierwise.wire import memfd
from tierwise.wire.memfd import Memfd

log = structlog.get_logger()

Vector = NDArray[np.float32]


class Reading:
    """Reads objects of one cache."""

    def __init__(
        self,
        index: Index,
        loader: Loader,
        residency: Residency,
        write_through: WriteThrough,
        executor: Executor,
        node_id: str,
    ) -> None:
        self.hit_count = 0
        self.miss_count = 0
        self.wished = asyncio.Event()
        self._index = index
        self._loader = loader
        self._residency = residency
        self._write_through = write_through
        self._executor = executor
        self._node_id = node_id
        self._locks: weakref.WeakValueDictionary[ObjectKey, asyncio.Lock] = (
            weakref.WeakValueDictionary()
        )

    def info(self, entry: Entry) -> ObjectInfo:
        """Describe an entry."""
        is_in_memory = self._residency.is_resident(entry)
        return info_of(entry, node_id=self._node_id, is_in_memory=is_in_memory)

    async def read(self, key: ObjectKey, *, with_quarantined: bool) -> tuple[Memfd, ObjectInfo]:
        """Return an object as a shared file; see `CacheStore.read`."""
        async with self._lock(key):
            if key.kind is ObjectKind.MATRIX:
                return await self._whole(key)
            entry = await self._found(key, with_quarantined=with_quarantined)
            self._asked(key, self._residency.is_resident(entry))
            if key.kind is ObjectKind.METADATA:
                return memfd.make([entry.blob]), self.info(entry)
            file = entry.file or self._residency.copies.get(key) or await self._fetched(entry)
            return file, self.info(entry)

    async def view(
        self, key: ObjectKey, *, with_quarantined: bool
    ) -> tuple[memoryview, ObjectInfo]:
        """Return an object's bytes; see `CacheStore.view`."""
        if key.kind is ObjectKind.MATRIX:
            file, info = await self.read(key, with_quarantined=False)
            return file.view(), info
        entry = await self._found(key, with_quarantined=with_quarantined)
        is_resident = self._residency.is_resident(entry)
        self._asked(key, is_resident)
        if key.kind is ObjectKind.METADATA:
            return memoryview(entry.blob), self.info(entry)
        round_ = self._round_of(key)
        if entry.file is not None:
            return entry.file.view(), self.info(entry)
        if (row := round_.row(key)) is not None:
            return row, self.info(entry)
        if not entry.quarantined and self._residency.policy.is_admitted(key):
            self._wish([key])  # sent from the disk now, from memory the next time
        return await self._loader.mapped(entry), self.info(entry)

    async def round(self, namespace: str, job: str, number: int) -> Round:
        """Return a round, −1: the newest that has ended or is complete, else the newest.

        Raises:
            NotFound: There is none.
        """
        for attempt in range(2):
            found = self._index.jobs.get((namespace, job))
            rounds = found.rounds if found else {}
            if number in rounds:
                return rounds[number]
            if number < 0 and rounds:
                done = [n for n, round_ in rounds.items() if _is_done(round_)]
                begun = [n for n, round_ in rounds.items() if round_.updates()]
                return rounds[max(done or begun or rounds)]
            if attempt or not await self._write_through.take_up(namespace, job, number):
                break
        which = f"round {number}" if number >= 0 else "a round"
        raise NotFound(f"{which} of {namespace}/{job} is not known to this node, nor to its store")

    def opened(self, manifest: RoundManifest, opened_unix_s: float) -> Round:
        """Add a round, with its matrix in memory.

        Raises:
            PayloadTooLarge: It could never fit.
            Overloaded: There is no room now.
        """
        row_count = len(manifest.clients)
        matrix = self._matrix(manifest) if row_count else None
        round_ = self._index.open(manifest, opened_unix_s)
        if matrix is not None:
            self._residency.place(round_, matrix)
        return round_

    async def has(self, key: ObjectKey) -> bool:
        """Return whether an object is on this disk or in memory, bringing it back if need be."""
        return await self._here(key) is not None

    def base(self, round_: Round) -> Vector | None:
        """Return what a round's deltas are taken from. May block: called in threads.

        Raises:
            OSError: It is not here.
        """
        if (key := round_.manifest.base) is None:
            return None
        entry = self._index.entry(key)
        if entry is None:
            raise FileNotFoundError(f"{key} is not here")
        return self._loader.vector(entry)

    async def bases(self, round_: Round) -> Bases:
        """Return what a round's deltas are taken from, and the base of the round before.

        Raises:
            Unavailable: The base is in the store, which does not answer.
        """
        if (key := round_.manifest.base) is None:
            return Bases()
        entry = await self._here(key)
        if entry is None:
            raise unavailable(key)
        base, before = self._loader.vector(entry), None
        of_before = self._index.round(key.namespace, key.job, key.round)
        key_before = of_before.manifest.base if of_before else None
        entry_before = await self._here(key_before) if key_before else None
        if entry_before is not None and entry_before.size_bytes == entry.size_bytes:
            before = self._loader.vector(entry_before)
        return Bases(base, before, entry.digest)

    async def vectors(self, round_: Round) -> dict[int, Vector]:
        """Return the updates of a round that count, by row: views of memory or of files.

        Raises:
            Unavailable: One is in the store, which does not answer.
        """
        found: dict[int, Vector] = {}
        for entry in round_.updates():
            row = round_.row(entry.key)
            if row is not None:
                found[round_.row_of[entry.key.client]] = np.frombuffer(row, np.float32)
                continue
            with contextlib.suppress(NotFound):  # damaged: it is quarantined now
                if not self._residency.is_resident(entry):
                    await self._loader.ready(entry)
                found[round_.row_of[entry.key.client]] = self._loader.vector(entry)
        return found

    async def fetch_ahead(self) -> None:
        """Bring into memory what policies wish for, while it is worth more than what goes."""
        self.wished.clear()
        wishes = self._residency.wishes
        while wishes:
            key = wishes.popleft()
            try:
                await self._fetch(key)
            except TierwiseError as error:
                log.debug("cache.not_fetched", key=str(key), cause=str(error))

    async def _fetch(self, key: ObjectKey) -> None:
        async with self._lock(key):
            if key.kind is ObjectKind.MATRIX:
                round_ = self._index.round(key.namespace, key.job, key.round)
                if round_ is None or not round_.updates():
                    return
                if round_.matrix is None and self._residency.is_worth(key, round_.matrix_bytes):
                    await self._fill(round_, self._new_matrix(round_, is_kept=True))
                return
            entry = self._index.entry(key)
            if entry is None or entry.quarantined or self._residency.is_resident(entry):
                return
            if self._residency.is_worth(key, entry.size_bytes):
                await self._fetched(entry, is_kept=True)

    async def _whole(self, key: ObjectKey) -> tuple[Memfd, ObjectInfo]:
        """Return a round's matrix, every update that counts in its row."""
        round_ = await self.round(key.namespace, key.job, max(key.round, 0))
        if not round_.row_of:
            raise NotFound(f"round {key.round} of {key.namespace}/{key.job} expects no updates")
        matrix = round_.matrix
        rows = [round_.row_of[entry.key.client] for entry in round_.updates()]
        is_hit = matrix is not None and matrix.filled.issuperset(rows)
        self._asked(key, is_hit)
        if matrix is None:
            is_kept = self._residency.policy.is_admitted(key)
            matrix = self._new_matrix(round_, is_kept=is_kept)
        await self._fill(round_, matrix)
        info = ObjectInfo(
            key=key,
            size_bytes=matrix.nbytes,
            digest="",
            durability=min((e.durability for e in round_.updates()), default=Durability.MEMORY),
            node_ids=(self._node_id,) if self._node_id else (),
            is_in_memory=True,
            metadata={
                "clients": [each.client for each in round_.manifest.clients],
                "is_in": [row in matrix.filled for row in range(len(round_.row_of))],
                "parameter_count": round_.manifest.parameter_count,
            },
        )
        return matrix.file, info

    def _new_matrix(self, round_: Round, *, is_kept: bool) -> Matrix:
        matrix = self._matrix(round_.manifest)
        if is_kept:
            self._residency.place(round_, matrix)
        else:
            self._residency.lend(round_.manifest.namespace, matrix.file)
        return matrix

    def _matrix(self, manifest: RoundManifest) -> Matrix:
        """Make room for a matrix, and it; the caller places or lends it at once."""
        row_count, length = len(manifest.clients), manifest.parameter_count
        self._residency.claim(manifest.namespace, 4 * row_count * length)
        try:
            return Matrix(row_count, length)
        except OSError as error:
            raise Overloaded(f"there is no memory for a matrix: {error}") from None
        finally:
            self._residency.release(manifest.namespace, 4 * row_count * length)

    async def _fill(self, round_: Round, matrix: Matrix) -> None:
        """Bring the updates that count into their rows."""
        round_.user_count += 1  # it must not go while it is filled
        try:
            while True:
                left = [
                    entry
                    for entry in round_.updates()
                    if round_.row_of[entry.key.client] not in matrix.filled
                ]
                if not left:
                    return
                for entry in left:
                    row = round_.row_of[entry.key.client]
                    if row in matrix.filled or entry.quarantined:
                        continue  # meanwhile
                    await self._loader.into(entry, matrix.row(row))
                    if not entry.quarantined:
                        matrix.filled.add(row)
                    if round_.matrix is matrix:
                        self._residency.drop(entry)
        finally:
            round_.user_count -= 1

    async def _fetched(self, entry: Entry, *, is_kept: bool = False) -> Memfd:
        """Return an object as a file of its own, made of a row or read from the disk."""
        key, namespace = entry.key, entry.key.namespace
        row = self._round_of(key).row(key)
        self._residency.claim(namespace, entry.size_bytes)
        sheet: Sheet | None = None
        try:
            sheet = Sheet(entry.size_bytes)
            if row is not None:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._executor, sheet.write, row, 0)
            else:
                await self._loader.onto(entry, sheet)
            file = sheet.seal()
        except OSError as error:
            raise Overloaded(f"there is no memory for {key}: {error}") from None
        finally:
            self._residency.release(namespace, entry.size_bytes)
            if sheet is not None:
                sheet.drop()
        is_known = self._index.entry(key) is entry and not entry.quarantined
        if row is not None:
            self._residency.copies[key] = file
        elif is_known and (is_kept or self._residency.policy.is_admitted(key)):
            self._residency.keep(entry, file)
        else:
            self._residency.lend(namespace, file)
        return file

    async def _found(self, key: ObjectKey, *, with_quarantined: bool) -> Entry:
        """Return an entry, from the store's list if need be.

        Raises:
            NotFound: There is none, or it is quarantined.
            Unavailable: It is not here, and the store does not answer.
        """
        entry = self._index.entry(key)
        if entry is None and self._index.round(key.namespace, key.job, key.round) is None:
            await self._write_through.take_up(key.namespace, key.job, key.round)
            entry = self._index.entry(key)
        if entry is None:
            raise NotFound(f"{key} is not known to this node, nor to its store")
        if entry.quarantined and not with_quarantined:
            raise NotFound(f"{key} is quarantined: it {entry.quarantined}")
        return entry

    async def _here(self, key: ObjectKey) -> Entry | None:
        """Return an entry whose bytes are on this disk or in memory; None if they cannot be."""
        try:
            entry = await self._found(key, with_quarantined=False)
            if not entry.has_file and not self._residency.is_resident(entry):
                await self._loader.ready(entry)
        except (NotFound, Unavailable):
            return None
        return entry

    def _asked(self, key: ObjectKey, is_hit: bool) -> None:
        self.hit_count += is_hit
        self.miss_count += not is_hit
        self._wish(self._residency.policy.read(key, is_hit))

    def _wish(self, keys: Iterable[ObjectKey]) -> None:
        for key in keys:
            self._residency.wishes.append(key)
            self.wished.set()

    def _round_of(self, key: ObjectKey) -> Round:
        round_ = self._index.round(key.namespace, key.job, key.round)
        assert round_ is not None, key
        return round_

    def _lock(self, key: ObjectKey) -> asyncio.Lock:
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock


def _is_done(round_: Round) -> bool:
    if not round_.row_of:
        return False
    return round_.has_ended or len(round_.updates()) == len(round_.row_of)

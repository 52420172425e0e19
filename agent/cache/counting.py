"""Statistics of rounds: counted in a thread while updates come in, kept in small files.

An answer never touches a vector: updates that are not counted yet are counted first, then it is
made of what is there, and kept until the round changes.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from agent.cache.index import Entry, Round
from agent.cache.tasks import Tasks
from tierwise.domain.cache import ObjectKind
from tierwise.files import write_atomically
from tierwise.functions.fl.statistics import RoundStatistics, RunningStatistics
from tierwise.wire import payload

log = structlog.get_logger()

KEPT_BYTES_MAX = 64 << 20  # of Gram matrices in memory
SCHEMA = 1

Vector = NDArray[np.float32]


@dataclass(slots=True)
class Bases:
    """What deltas are taken from, and the base of the round before; with the base's digest."""

    base: Vector | None = None
    before: Vector | None = None
    digest: str = ""


VectorsOf = Callable[[Round], Awaitable[Mapping[int, Vector]]]
BasesOf = Callable[[Round], Awaitable[Bases]]


@dataclass(slots=True)
class _Count:
    """One round as far as it is counted."""

    running: RunningStatistics
    digests: dict[int, str] = field(default_factory=dict)  # by row, of what is counted
    base_digest: str = ""
    is_saved: bool = True
    snapshot: RoundStatistics | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def nbytes(self) -> int:
        return self.running.gram.nbytes + 512


class Counting:
    """Statistics by round."""

    def __init__(
        self,
        folder: Path,
        executor: Executor,
        tasks: Tasks,
        *,
        vectors: VectorsOf,
        bases: BasesOf,
        on_saved: Callable[[Round], None],
    ) -> None:
        """Wire it.

        Args:
            folder: Where small files go.
            tasks: Who runs what nobody waits for.
            executor: One thread, for counting never needs to hurry past an upload.
            vectors: Returns the updates of a round that count, by row.
            bases: Returns what a round's deltas are taken from.
            on_saved: Told of a round whose file has changed.
        """
        self._folder = folder
        self._executor = executor
        self._tasks = tasks
        self._following: set[tuple[str, str, int]] = set()
        self._vectors = vectors
        self._bases = bases
        self._on_saved = on_saved
        self._counts: OrderedDict[tuple[str, str, int], _Count] = OrderedDict()

    async def of(self, round_: Round) -> RoundStatistics:
        """Return what is known of a round, all its updates counted."""
        count = self._count(round_)
        if count.snapshot is None:
            await self.catch_up(round_)
            count = self._count(round_)
            if count.snapshot is None:
                count.snapshot = _snapshot(round_, count)
        return count.snapshot

    def changed(self, round_: Round) -> None:
        """Note that something of a round changed."""
        if (count := self._counts.get(_name(round_))) is not None:
            count.snapshot = None

    async def catch_up(self, round_: Round) -> None:
        """Count what has come and is not counted, and save it."""
        count = self._count(round_)
        async with count.lock:
            updates = {round_.row_of[entry.key.client]: entry for entry in round_.updates()}
            if any(row not in updates for row in count.digests):  # one was damaged
                count.running, count.digests = RunningStatistics(len(round_.row_of)), {}
            if len(updates) > len(count.digests):
                round_.user_count += 1
                try:
                    vectors = await self._vectors(round_)
                    bases = await self._bases(round_)
                    loop = asyncio.get_running_loop()
                    await loop.run_in_executor(
                        self._executor, count.running.add, vectors, bases.base, bases.before
                    )
                finally:
                    round_.user_count -= 1
                here = {round_.row_of[entry.key.client]: entry for entry in round_.updates()}
                count.digests = {row: here[row].digest for row in vectors if row in here}
                del vectors  # they keep what they are views of
                count.base_digest = bases.digest
                count.is_saved, count.snapshot = False, None
            if not count.is_saved:
                await self._save(round_, count)
        self._bound()

    def follow(self, round_: Round) -> None:
        """Count what has come, soon, with nobody waiting."""
        name = _name(round_)
        if name not in self._following:
            self._following.add(name)
            self._tasks.start_unattended(self._follow(round_))

    async def _follow(self, round_: Round) -> None:
        try:
            while round_.updates() and self._is_behind(round_):
                await self.catch_up(round_)
        finally:
            self._following.discard(_name(round_))

    def forget(self, namespace: str, job: str, rounds: Iterable[Round]) -> None:
        """Drop a job's statistics, and their files. May block, briefly."""
        for name in [name for name in self._counts if name[:2] == (namespace, job)]:
            self._counts.pop(name, None)
        for round_ in rounds:
            self._path(round_).unlink(missing_ok=True)

    def _is_behind(self, round_: Round) -> bool:
        return len(self._count(round_).digests) < len(round_.updates())

    def _count(self, round_: Round) -> _Count:
        name = _name(round_)
        count = self._counts.get(name)
        if count is None:
            count = self._counts[name] = self._restored(round_)
        self._counts.move_to_end(name)
        return count

    async def _save(self, round_: Round, count: _Count) -> None:
        running = count.running
        state = {
            "schema": SCHEMA,
            "digests": count.digests,
            "base_digest": count.base_digest,
            "base_norm": running.base_norm,
            "aggregate_norm": running.aggregate_norm,
            "gram": running.gram,
            "base_dots": running.base_dots,
            "aggregate_dots": running.aggregate_dots,
            "is_in": running.is_in,
        }
        content = payload.encode(state, "statistics")
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(
                self._executor, write_atomically, self._path(round_), content
            )
            count.is_saved = True
            self._on_saved(round_)
        except OSError as error:  # they can be counted again
            log.warning("cache.statistics_not_saved", cause=str(error))

    def _restored(self, round_: Round) -> _Count:
        """Return what was saved, if it is of the updates that are here."""
        running = RunningStatistics(len(round_.row_of))
        try:
            state = payload.decode(self._path(round_).read_bytes())
            digests = {int(row): str(digest) for row, digest in state["digests"].items()}
            here = {round_.row_of[e.key.client]: e.digest for e in round_.updates()}
            if state["schema"] != SCHEMA or any(here.get(r) != d for r, d in digests.items()):
                return _Count(running)
            if state["gram"].shape != running.gram.shape:
                return _Count(running)
            for name in ("gram", "base_dots", "aggregate_dots", "is_in"):
                setattr(running, name, state[name].copy())
            running.base_norm = float(state["base_norm"])
            running.aggregate_norm = float(state["aggregate_norm"])
            return _Count(running, digests, str(state["base_digest"]))
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever the file holds, they can be counted again
            log.warning("cache.statistics_not_restored", cause=str(error))
        return _Count(running)

    def _path(self, round_: Round) -> Path:
        return file_of(self._folder, _name(round_))

    def _bound(self) -> None:
        total = sum(count.nbytes for count in self._counts.values())
        for name, count in list(self._counts.items()):
            if total <= KEPT_BYTES_MAX or len(self._counts) == 1:
                break
            if count.is_saved and not count.lock.locked():
                total -= count.nbytes
                del self._counts[name]


def file_of(folder: Path, name: tuple[str, str, int]) -> Path:
    """Return where the statistics of a round (namespace, job, number) are kept."""
    return folder / hashlib.blake2b(repr(name).encode(), digest_size=16).hexdigest()


def _snapshot(round_: Round, count: _Count) -> RoundStatistics:
    manifest, running = round_.manifest, count.running
    updates = [e for e in round_.updates() if round_.row_of[e.key.client] in count.digests]
    rows = np.array([round_.row_of[entry.key.client] for entry in updates], np.int64)
    metadata = [_facts(round_, entry) for entry in updates]
    columns = _columns(metadata)
    gram = running.gram[np.ix_(rows, rows)]
    aggregate = round_.entries.get((ObjectKind.AGGREGATE, ""))
    counts = columns.get("example_count", np.full(len(rows), np.nan))
    found = RoundStatistics(
        namespace=manifest.namespace,
        job=manifest.job,
        round=manifest.round,
        clients=tuple(entry.key.client for entry in updates),
        rows=rows,
        expected=tuple(each.client for each in manifest.clients),
        quarantined={
            entry.key.client: entry.quarantined
            for entry in round_.entries.values()
            if entry.quarantined
        },
        parameter_count=manifest.parameter_count,
        gram=gram,
        norms=np.sqrt(np.diagonal(gram)),
        base_dots=running.base_dots[rows],
        base_norm=running.base_norm,
        aggregate_dots=running.aggregate_dots[rows],
        aggregate_norm=running.aggregate_norm,
        example_counts=np.where(np.isnan(counts), 1.0, counts),
        arrival_s=np.array([e.arrived_unix_s - round_.opened_unix_s for e in updates]),
        digests=tuple(entry.digest for entry in updates),
        columns=columns,
        metadata=tuple(metadata),
        round_metadata=_round_facts(round_),
        base_digest=count.base_digest,
        aggregate_digest=aggregate.digest if aggregate else "",
    )
    for array in (
        found.rows, found.gram, found.norms, found.base_dots, found.aggregate_dots,
        found.example_counts, found.arrival_s, *columns.values(),
    ):  # fmt: skip
        array.flags.writeable = False
    return found


def _facts(round_: Round, update: Entry) -> dict[str, object]:
    """Return what came with an update and what was put beside it, which has the last word."""
    beside = round_.entries.get((ObjectKind.METADATA, update.key.client))
    return {**update.metadata, **(beside.metadata if beside else {})}


def _round_facts(round_: Round) -> dict[str, object]:
    aggregate = round_.entries.get((ObjectKind.AGGREGATE, ""))
    beside = round_.entries.get((ObjectKind.METADATA, ""))
    return {
        **(aggregate.metadata if aggregate else {}),
        **(beside.metadata if beside else {}),
    }


def _columns(metadata: list[dict[str, object]]) -> dict[str, NDArray[np.float64]]:
    """Return every number by its key; a key whose values are all of another kind has no column."""
    keys = dict.fromkeys(key for facts in metadata for key, value in facts.items() if _is(value))
    return {
        str(key): np.array([_number(facts.get(key)) for facts in metadata], np.float64)
        for key in keys
    }


def _is(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating)


def _number(value: object) -> float:
    try:
        return float(value) if _is(value) else float("nan")  # type: ignore[arg-type]
    except OverflowError:
        return float("nan")


def _name(round_: Round) -> tuple[str, str, int]:
    manifest = round_.manifest
    return manifest.namespace, manifest.job, manifest.round

"""What one cache knows: jobs, rounds, objects, and where each object's bytes are.

Pure bookkeeping on one loop: `apply` takes up a journal's records, `records` returns as few as make
the same state.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from agent.cache.arena import Matrix
from agent.cache.journal import Forgot, Marked, Opened, Put, Record
from tierwise.domain.cache import (
    Durability,
    HeldRounds,
    ObjectInfo,
    ObjectKey,
    ObjectKind,
    RoundManifest,
)
from tierwise.wire import payload
from tierwise.wire.memfd import Memfd

HELD_JOBS_MAX, HELD_ROUNDS_MAX = 256, 64


@dataclass(slots=True, eq=False)
class Entry:
    """One object.

    Attributes:
        blob: Its metadata, payload-encoded; of METADATA, all there is.
        file: Its bytes in memory, unless they are a row of the round's matrix.
        is_on_disk: Whether a file holds it (METADATA: a record of the journal).
        is_journaled: Whether a restart would find it.
        reader_count: How many read its file now, which must not go.
        is_checked: Whether this process has seen that the file holds what its name says.
    """

    key: ObjectKey
    size_bytes: int
    digest: str
    blob: bytes = b""
    quarantined: str = ""
    is_replica: bool = False
    arrived_unix_s: float = 0.0
    is_on_disk: bool = False
    is_journaled: bool = False
    is_stored: bool = False
    node_ids: tuple[str, ...] = ()
    file: Memfd | None = None
    is_checked: bool = False
    reader_count: int = 0

    @property
    def durability(self) -> Durability:
        """Return the highest mark it has reached."""
        if self.is_stored:
            return Durability.STORED
        if self.node_ids:
            return Durability.REPLICATED
        return Durability.DISK if self.is_on_disk and self.is_journaled else Durability.MEMORY

    @property
    def has_file(self) -> bool:
        """Return whether its bytes are a file on this disk."""
        return self.is_on_disk and self.key.kind is not ObjectKind.METADATA

    @property
    def metadata(self) -> Mapping[str, object]:
        """Return the small facts; empty if they are damaged."""
        if not self.blob:
            return {}
        try:
            found = payload.decode(self.blob)
        except payload.PayloadError:
            return {}
        return found if isinstance(found, dict) else {}

    def put(self) -> Put:
        """Return the record that makes this entry."""
        return Put(
            key=self.key,
            size_bytes=self.size_bytes,
            digest=self.digest,
            metadata=self.blob,
            quarantined=self.quarantined,
            is_replica=self.is_replica,
            arrived_unix_s=self.arrived_unix_s,
            is_on_disk=self.is_on_disk,
            is_stored=self.is_stored,
            node_ids=self.node_ids,
        )


@dataclass(slots=True, eq=False)
class Round:
    """One round: how it was opened, and what came."""

    manifest: RoundManifest
    opened_unix_s: float
    row_of: dict[str, int]
    entries: dict[tuple[ObjectKind, str], Entry] = field(default_factory=dict)
    matrix: Matrix | None = None
    user_count: int = 0  # who writes or reads rows of the matrix now: it must not go

    @property
    def has_ended(self) -> bool:
        """Return whether its aggregate is in."""
        return (ObjectKind.AGGREGATE, "") in self.entries

    @property
    def row_bytes(self) -> int:
        """Return the size of each vector."""
        return 4 * self.manifest.parameter_count

    @property
    def matrix_bytes(self) -> int:
        """Return the size of all rows."""
        return self.row_bytes * len(self.row_of)

    def updates(self) -> list[Entry]:
        """Return updates that count, by row."""
        found = [
            entry
            for (kind, _), entry in self.entries.items()
            if kind is ObjectKind.UPDATE and not entry.quarantined
        ]
        return sorted(found, key=lambda entry: self.row_of[entry.key.client])

    def row(self, key: ObjectKey) -> memoryview | None:
        """Return an update's bytes in the matrix, if they are there."""
        if self.matrix is None or key.kind is not ObjectKind.UPDATE:
            return None
        index = self.row_of.get(key.client, -1)
        return self.matrix.row(index).toreadonly() if index in self.matrix.filled else None

    def key(self, kind: ObjectKind, client: str = "") -> ObjectKey:
        """Return the name of one of its objects."""
        return ObjectKey(
            namespace=self.manifest.namespace,
            job=self.manifest.job,
            round=self.manifest.round,
            kind=kind,
            client=client,
        )


@dataclass(slots=True, eq=False)
class Job:
    """One job's rounds."""

    owner: str
    rounds: dict[int, Round] = field(default_factory=dict)
    touched: int = 0  # the larger, the later something came
    size_bytes: int = 0  # of all its objects

    @property
    def newest_ended(self) -> int:
        """Return the newest round whose aggregate is in, −1 if none."""
        return max((n for n, found in self.rounds.items() if found.has_ended), default=-1)


class Index:
    """All jobs, and how many bytes are on the disk."""

    def __init__(self) -> None:
        self.jobs: dict[tuple[str, str], Job] = {}
        self.disk_bytes = 0
        self.object_count = 0
        self._sizes: dict[str, int] = {}  # of files, by digest
        self._references: Counter[str] = Counter()
        self._namespaces: Counter[str] = Counter()
        self._touches = 0

    def round(self, namespace: str, job: str, number: int) -> Round | None:
        """Return one round."""
        found = self.jobs.get((namespace, job))
        return found.rounds.get(number) if found else None

    def entry(self, key: ObjectKey) -> Entry | None:
        """Return one object."""
        found = self.round(key.namespace, key.job, key.round)
        return found.entries.get((key.kind, key.client)) if found else None

    def entries(self, namespace: str = "", job: str = "") -> Iterator[Entry]:
        """Return objects, all or of one namespace or job."""
        for (of_namespace, of_job), found in self.jobs.items():
            if namespace in ("", of_namespace) and job in ("", of_job):
                for round_ in found.rounds.values():
                    yield from round_.entries.values()

    def namespace_bytes(self, namespace: str) -> int:
        """Return how much of the disk a namespace's objects are."""
        return self._namespaces[namespace]

    def open(self, manifest: RoundManifest, opened_unix_s: float) -> Round:
        """Add a round, or return it."""
        job = self.jobs.setdefault((manifest.namespace, manifest.job), Job(manifest.owner))
        found = job.rounds.get(manifest.round)
        if found is None:
            rows = {each.client: row for row, each in enumerate(manifest.clients)}
            found = Round(manifest, opened_unix_s, rows)
            job.rounds[manifest.round] = found
        self._touch(job)
        return found

    def close(self, round_: Round) -> None:
        """Take an empty round back."""
        name = (round_.manifest.namespace, round_.manifest.job)
        job = self.jobs[name]
        del job.rounds[round_.manifest.round]
        if not job.rounds:
            del self.jobs[name]

    def take_up(self, put: Put) -> None:
        """Add an object that a record tells of, unless its round is unknown or has no such row."""
        key = put.key
        round_ = self.round(key.namespace, key.job, key.round)
        is_row = key.kind is ObjectKind.UPDATE
        if round_ is not None and (not is_row or key.client in round_.row_of):
            self.add(entry_of(put))

    def add(self, entry: Entry) -> None:
        """Add an object of a known round, or put it in another's place."""
        key = entry.key
        round_ = self.round(key.namespace, key.job, key.round)
        assert round_ is not None, key
        self.remove(key)
        round_.entries[key.kind, key.client] = entry
        self.object_count += 1
        if entry.has_file:
            self._count(entry)
        job = self.jobs[key.namespace, key.job]
        job.size_bytes += entry.size_bytes
        self._touch(job)

    def remove(self, key: ObjectKey) -> str:
        """Drop an object; return the digest of a file that nothing refers to any more, or ""."""
        round_ = self.round(key.namespace, key.job, key.round)
        entry = round_.entries.pop((key.kind, key.client), None) if round_ else None
        if entry is None:
            return ""
        self.object_count -= 1
        self.jobs[key.namespace, key.job].size_bytes -= entry.size_bytes
        return self._discount(entry) if entry.has_file else ""

    def mark_on_disk(self, entry: Entry, is_on_disk: bool) -> str:
        """Note where an object's file is; return as `remove`."""
        if entry.is_on_disk == is_on_disk:
            return ""
        if entry.has_file:
            entry.is_on_disk = False
            return self._discount(entry)
        entry.is_on_disk = is_on_disk
        if entry.has_file:
            self._count(entry)
        return ""

    def forget(self, namespace: str, job: str) -> tuple[int, list[str]]:
        """Drop a job; return how many objects, and the digests of files to delete."""
        found = self.jobs.get((namespace, job))
        if found is None:
            return 0, []
        keys = [entry.key for round_ in found.rounds.values() for entry in round_.entries.values()]
        digests = [digest for key in keys if (digest := self.remove(key))]
        del self.jobs[namespace, job]
        return len(keys), digests

    def is_used(self, digest: str) -> bool:
        """Return whether some object is in the file of that name."""
        return self._references[digest] > 0

    def digests(self) -> list[str]:
        """Return the names of all files."""
        return list(self._sizes)

    def apply(self, record: Record) -> None:
        """Take up one record; one of an unknown round is ignored."""
        match record:
            case Opened():
                self.open(record.manifest, record.opened_unix_s)
            case Put():
                self.take_up(record)
            case Marked():
                entry = self.entry(record.key)
                if entry is not None:
                    if record.is_on_disk is not None:
                        self.mark_on_disk(entry, record.is_on_disk)
                    if record.is_stored is not None:
                        entry.is_stored = record.is_stored
                    if record.node_ids is not None:
                        entry.node_ids = record.node_ids
            case Forgot():
                self.forget(record.namespace, record.job)

    def records(self) -> Sequence[Record]:
        """Return what makes this state."""
        found: list[Record] = []
        for job in self.jobs.values():
            for round_ in job.rounds.values():
                found.append(Opened(round_.manifest, round_.opened_unix_s))
                # What is not on the disk would not be there after a crash.
                found += [e.put() for e in round_.entries.values() if e.is_on_disk or e.is_stored]
        return found

    def held(self) -> list[HeldRounds]:
        """Return the newest jobs with their newest rounds that hold something."""
        newest = sorted(self.jobs.items(), key=lambda item: -item[1].touched)[:HELD_JOBS_MAX]
        found = []
        for (namespace, name), job in newest:
            rounds = sorted(n for n, round_ in job.rounds.items() if round_.entries)
            found.append(
                HeldRounds(
                    namespace=namespace,
                    job=name,
                    rounds=tuple(rounds[-HELD_ROUNDS_MAX:]),
                    size_bytes=job.size_bytes,
                )
            )
        return found

    def _touch(self, job: Job) -> None:
        self._touches += 1
        job.touched = self._touches

    def _count(self, entry: Entry) -> None:
        self._references[entry.digest] += 1
        self._namespaces[entry.key.namespace] += entry.size_bytes
        if self._references[entry.digest] == 1:
            self._sizes[entry.digest] = entry.size_bytes
            self.disk_bytes += entry.size_bytes

    def _discount(self, entry: Entry) -> str:
        self._references[entry.digest] -= 1
        self._namespaces[entry.key.namespace] -= entry.size_bytes
        if self._references[entry.digest]:
            return ""
        del self._references[entry.digest]
        self.disk_bytes -= self._sizes.pop(entry.digest)
        return entry.digest


def info_of(entry: Entry, *, node_id: str, is_in_memory: bool) -> ObjectInfo:
    """Return an object as lists show it."""
    here = (node_id,) if entry.is_on_disk or is_in_memory else ()
    return ObjectInfo(
        key=entry.key,
        size_bytes=entry.size_bytes,
        digest=entry.digest,
        durability=entry.durability,
        node_ids=tuple(dict.fromkeys([*here, *entry.node_ids])),
        is_in_memory=is_in_memory,
        quarantined=entry.quarantined,
        metadata=entry.metadata,
    )


def entry_of(record: Put) -> Entry:
    """Return the object that a record puts."""
    return Entry(
        key=record.key,
        size_bytes=record.size_bytes,
        digest=record.digest,
        blob=record.metadata,
        quarantined=record.quarantined,
        is_replica=record.is_replica,
        arrived_unix_s=record.arrived_unix_s,
        is_on_disk=record.is_on_disk,
        is_journaled=True,
        is_stored=record.is_stored,
        node_ids=record.node_ids,
    )

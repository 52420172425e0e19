"""What a cache keeps of federated jobs: told by ingest and by what is asked, not by misses alone.

FLStore (Khan et al., 2024) sorts non-training work by what it reads, and so do we:

    P1  the newest aggregate, or one client's newest update
    P2  all updates of one round, one round after the other
    P3  one client's updates over many rounds
    P4  small facts of the last rounds

Each class has an estimate of how often one of its queries reads a given object. `Tailored` keeps
what its class reads most; `Adaptive` weighs the classes by what was asked of the job of late. All
of them put oldest rounds first where estimates are equal, so a job that is never asked keeps its
newest rounds. Rivals are in `rivals.py`. Pure: no clock, no chance.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tierwise.domain.cache import ObjectKey, ObjectKind

JOBS_MAX = 1024  # whose queries are remembered
CLIENTS_MAX = 4096  # per job, likewise
METADATA_ROUNDS = 64  # P4: whose facts always stay
HISTORY_ROUNDS_MAX = 64  # P3: longest history of one client that is kept for it
FORGETTING = 0.98  # per query of a job: the last 50 count most
SHARE_MIN = 0.02  # what a class that nobody asked for is still given
PREFETCHES_MAX = 4  # per query


class CachePolicy(Protocol):
    """Says what stays in memory.

    Told of every object that comes in and of every one that is read. Objects of one round's matrix
    are read as one MATRIX, which stands for all its updates. Whatever it answers, the store obeys
    its own bounds and never drops the only copy.
    """

    def ingested(self, key: ObjectKey, size_bytes: int) -> None:
        """Note that an object came in."""
        ...

    def read(self, key: ObjectKey, is_hit: bool) -> Sequence[ObjectKey]:
        """Note that an object was asked for; return what to fetch ahead if there is room."""
        ...

    def is_admitted(self, key: ObjectKey) -> bool:
        """Return whether an object that just came in, or was just read, shall stay in memory."""
        ...

    def victims(self, held: Mapping[ObjectKey, int], need_bytes: int) -> list[ObjectKey]:
        """Return which of `held` (bytes by key) to drop, in order, for at least `need_bytes`.

        All of it, if that is not enough. A key of kind MATRIX is the room that a round still
        keeps free for updates to come.
        """
        ...

    def chosen(self, namespace: str, job: str) -> str:
        """Return what governs a job, for people."""
        ...

    def forget(self, namespace: str, job: str) -> None:
        """Drop what is known of a job."""
        ...


def first_of(
    ordered: Iterable[ObjectKey], held: Mapping[ObjectKey, int], need_bytes: int
) -> list[ObjectKey]:
    """Return the shortest head of `ordered` that frees `need_bytes`."""
    chosen: list[ObjectKey] = []
    for key in ordered:
        if need_bytes <= 0:
            break
        chosen.append(key)
        need_bytes -= held[key]
    return chosen


@dataclass(slots=True)
class JobHistory:
    """What one job's classes share: what came, and what was read."""

    newest_round: int = -1
    aggregate_round: int = -1  # newest whose aggregate is in
    matrix_round: int = -1  # last that was read as a whole
    update_rounds: OrderedDict[str, int] = field(default_factory=OrderedDict)  # newest by client
    watched: OrderedDict[str, "_Watch"] = field(default_factory=OrderedDict)
    newest_reads: OrderedDict[str, float] = field(default_factory=OrderedDict)  # P1, by client
    aggregate_reads: float = 0.0
    update_reads: float = 0.0

    def ingested(self, key: ObjectKey) -> None:
        """Follow what comes in."""
        self.newest_round = max(self.newest_round, key.round)
        if key.kind is ObjectKind.AGGREGATE and not key.client:
            self.aggregate_round = max(self.aggregate_round, key.round)
        elif key.kind is ObjectKind.UPDATE:
            newest = max(key.round, self.update_rounds.pop(key.client, -1))
            self.update_rounds[key.client] = newest
            _bound(self.update_rounds, CLIENTS_MAX)

    def class_of(self, key: ObjectKey) -> str:
        """Return which class a read belongs to."""
        if key.kind is ObjectKind.METADATA:
            return "P4"
        if key.kind is ObjectKind.MATRIX:
            return "P2"
        is_newest = (
            key.round >= self.aggregate_round
            if key.kind is ObjectKind.AGGREGATE
            else key.round >= self.update_rounds.get(key.client, -1)
        )
        return "P1" if is_newest else "P3"

    def read(self, key: ObjectKey) -> Sequence[ObjectKey]:
        """Follow what is read; return what is likely next."""
        match self.class_of(key), key.kind:
            case "P1", ObjectKind.AGGREGATE:
                self.aggregate_reads = self.aggregate_reads * FORGETTING + 1.0
                self.update_reads *= FORGETTING
            case "P1", _:
                self.update_reads = self.update_reads * FORGETTING + 1.0
                self.aggregate_reads *= FORGETTING
                count = self.newest_reads.pop(key.client, 0.0)
                self.newest_reads[key.client] = count + 1.0
                _bound(self.newest_reads, CLIENTS_MAX)
            case "P2", _:
                self.matrix_round = key.round
                if key.round < self.newest_round:
                    return [_at(key, key.round + 1)]
            case "P3", ObjectKind.UPDATE:
                return self._watch(key)
            case _:
                pass
        return ()

    def _watch(self, key: ObjectKey) -> Sequence[ObjectKey]:
        watch = self.watched.pop(key.client, None) or _Watch(last=key.round, oldest=key.round)
        self.watched[key.client] = watch
        _bound(self.watched, CLIENTS_MAX)
        step = -1 if key.round <= watch.last else 1
        watch.last = key.round
        depth = min(self.newest_round - key.round + 1, HISTORY_ROUNDS_MAX)
        watch.oldest = min(watch.oldest, key.round)
        # A history slides: how far back it goes is what was read of late, not the first round ever.
        watch.depth = max(depth, watch.depth * FORGETTING)
        ahead = [key.round + step * n for n in range(1, PREFETCHES_MAX + 1)]
        return [_at(key, n) for n in ahead if 0 <= n <= self.newest_round]


@dataclass(slots=True)
class _Watch:
    """One client whose history is read: which round last, and how far back."""

    last: int
    oldest: int
    depth: float = 1.0


Rate = float  # expected reads of an object per query of one class


def rate_newest(job: JobHistory, key: ObjectKey) -> Rate:
    """P1: the newest aggregate, and each client's newest update as often as it was asked for."""
    queries = job.aggregate_reads + job.update_reads
    aggregate_share = (job.aggregate_reads + 1.0) / (queries + 2.0)
    if key.kind is ObjectKind.AGGREGATE:
        return aggregate_share if key.round >= job.aggregate_round else 0.0
    if key.kind is ObjectKind.UPDATE and key.round >= job.update_rounds.get(key.client, -1):
        count = job.newest_reads.get(key.client, 0.0)
        total = sum(job.newest_reads.values())
        # Laplace's estimate: who was never asked for is one of those who may be next.
        chance = (count + 1.0) / (total + len(job.update_rounds) + 1.0)
        return (1.0 - aggregate_share) * chance
    return 0.0


def rate_rounds(job: JobHistory, key: ObjectKey) -> Rate:
    """P2: the newest round, the one after that which was read last, and that one."""
    if key.kind not in (ObjectKind.UPDATE, ObjectKind.MATRIX):
        return 0.0
    if key.round == job.newest_round:
        return 0.9
    if job.matrix_round >= 0 and key.round == job.matrix_round + 1:
        return 0.8
    if key.round == job.matrix_round:
        return 0.5
    return 0.1 / (1.0 + job.newest_round - key.round)


def rate_histories(job: JobHistory, key: ObjectKey) -> Rate:
    """P3: the updates of watched clients as far back as they were read."""
    watch = job.watched.get(key.client) if key.kind is ObjectKind.UPDATE else None
    if watch is None:
        return 0.0
    age = job.newest_round - key.round
    if age > watch.depth:
        return 0.0
    # Who was watched last is watched next: clients come and go as they are found suspicious.
    recency = list(reversed(job.watched)).index(key.client)
    return 1.0 / (1.0 + recency) / max(watch.depth, 1.0)


def rate_metadata(job: JobHistory, key: ObjectKey) -> Rate:
    """P4: the facts of the last rounds."""
    is_recent = key.round > job.newest_round - METADATA_ROUNDS
    return 1.0 if key.kind is ObjectKind.METADATA and is_recent else 0.0


RATES = {
    "P1": rate_newest,
    "P2": rate_rounds,
    "P3": rate_histories,
    "P4": rate_metadata,
}


class Tailored:
    """Keeps what queries of fixed classes read most; each class weighs the same."""

    def __init__(self, *classes: str) -> None:
        """Name the classes.

        Raises:
            ValueError: There is no such class.
        """
        if not classes or (unknown := set(classes) - set(RATES)):
            raise ValueError(f"no such class of queries: {sorted(unknown) if classes else 'none'}")
        self._classes = classes
        self._jobs: OrderedDict[tuple[str, str], JobHistory] = OrderedDict()

    def ingested(self, key: ObjectKey, size_bytes: int) -> None:
        """Follow what is newest."""
        self._job(key).ingested(key)

    def read(self, key: ObjectKey, is_hit: bool) -> Sequence[ObjectKey]:
        """Follow what is asked; prefetch if the read is of a class that is kept."""
        job = self._job(key)
        kind = job.class_of(key)
        self._asked(key, kind)
        ahead = job.read(key)
        return ahead if self._weight(key, kind) > SHARE_MIN else ()

    def is_admitted(self, key: ObjectKey) -> bool:
        """Return whether some class may read it again."""
        return self._worth(key) > 0.0

    def victims(self, held: Mapping[ObjectKey, int], need_bytes: int) -> list[ObjectKey]:
        """Drop what is read least, oldest rounds first."""
        ranked = sorted(held, key=lambda key: (self._worth(key), key.round, key))
        return first_of(ranked, held, need_bytes)

    def chosen(self, namespace: str, job: str) -> str:
        """Return the classes."""
        return "+".join(self._classes)

    def forget(self, namespace: str, job: str) -> None:
        """Drop its history."""
        self._jobs.pop((namespace, job), None)

    def _worth(self, key: ObjectKey) -> float:
        job = self._job(key)
        return sum(self._weight(key, kind) * RATES[kind](job, key) for kind in self._classes)

    def _weight(self, key: ObjectKey, kind: str) -> float:
        return 1.0 if kind in self._classes else 0.0

    def _asked(self, key: ObjectKey, kind: str) -> None:
        """Fixed classes learn nothing from what is asked."""

    def _job(self, key: ObjectKey) -> JobHistory:
        name = (key.namespace, key.job)
        if name not in self._jobs:
            self._jobs[name] = JobHistory()
            _bound(self._jobs, JOBS_MAX)
        return self._jobs[name]


class Adaptive(Tailored):
    """Weighs the classes, per job, by how often each was asked of late."""

    def __init__(self) -> None:
        super().__init__(*RATES)
        self._mixes: OrderedDict[tuple[str, str], dict[str, float]] = OrderedDict()

    def is_admitted(self, key: ObjectKey) -> bool:
        """Admit whatever comes or is read; `victims` says what goes for it."""
        return True

    def chosen(self, namespace: str, job: str) -> str:
        """Return the classes with their shares, largest first: "P2 71 % P1 20 %"."""
        mix = self._mix((namespace, job))
        ranked = sorted(mix, key=lambda kind: (-mix[kind], kind))
        return " ".join(f"{kind} {mix[kind]:.0%}" for kind in ranked if mix[kind] > SHARE_MIN)

    def forget(self, namespace: str, job: str) -> None:
        """Drop its history and its mix."""
        super().forget(namespace, job)
        self._mixes.pop((namespace, job), None)

    def _asked(self, key: ObjectKey, kind: str) -> None:
        name = (key.namespace, key.job)
        counts = self._mixes.setdefault(name, dict.fromkeys(RATES, 1.0))
        for each in counts:
            counts[each] *= FORGETTING
        counts[kind] += 1.0
        _bound(self._mixes, JOBS_MAX)

    def _weight(self, key: ObjectKey, kind: str) -> float:
        return self._mix((key.namespace, key.job))[kind]

    def _mix(self, name: tuple[str, str]) -> dict[str, float]:
        counts = self._mixes.get(name) or dict.fromkeys(RATES, 1.0)
        total = sum(counts.values())
        return {kind: max(count / total, SHARE_MIN) for kind, count in counts.items()}


def _at(key: ObjectKey, round_number: int) -> ObjectKey:
    return ObjectKey(
        namespace=key.namespace,
        job=key.job,
        round=round_number,
        kind=key.kind,
        client=key.client,
    )


def _bound(known: OrderedDict[Any, Any], count_max: int) -> None:
    while len(known) > count_max:
        known.popitem(last=False)

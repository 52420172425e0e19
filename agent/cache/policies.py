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

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tierwise.domain.cache import ObjectKey, ObjectKind

JOBS_MAX = 1024  # whose queries are remembered
CLIENTS_MAX = 4096  # per job, likewise
METADATA_ROUNDS = 64  # P4: whose facts always stay
HISTORY_ROUNDS_MAX = 64  # P3: longest history of one client that is known
FORGETTING = 0.98  # per query of a job: the last 50 count most
WATCH_FORGETTING = 0.8  # per session of reading one client's history
SHARE_MIN = 0.02  # what a class that nobody asked for is still given
PREFETCHES_MAX = 4  # per query
STEPS = ("newest", "next", "same", "other")  # P2: which round is read after which


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


def bound(known: OrderedDict[Any, Any], count_max: int) -> None:
    """Forget what was noted first, beyond so many."""
    while len(known) > count_max:
        known.popitem(last=False)


@dataclass(slots=True)
class ClientHistory:
    """One client of a job."""

    rounds: deque[int] = field(default_factory=lambda: deque(maxlen=HISTORY_ROUNDS_MAX))
    watched_at: int = 0  # P3: number of the session in which its history was read last
    depth: float = 0.0  # P3: how many of its newest updates such sessions read, of late

    def position(self, round_number: int) -> int:
        """Return how many newer updates it has sent."""
        return sum(1 for each in self.rounds if each > round_number)

    def ahead(self, round_number: int) -> list[int]:
        """Return the rounds that a history read at `round_number`, backwards, reads next."""
        return [each for each in reversed(self.rounds) if each < round_number][:PREFETCHES_MAX]


@dataclass(slots=True)
class JobHistory:
    """What came and what was read of one job; all classes estimate from it."""

    newest_round: int = -1
    aggregate_round: int = -1  # newest whose aggregate is in
    clients: OrderedDict[str, ClientHistory] = field(default_factory=OrderedDict)
    newest_count: int = 0  # updates of the newest round that came
    aggregate_reads: float = 0.0  # P1
    update_reads: float = 0.0
    fresh_reads: float = 0.0  # of these, of updates of the newest round
    matrix_round: int = -1  # P2: last that was read as a whole, the newest aside
    matrix_reads: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STEPS, 1.0))
    matrix_total: float = 4.0
    session: int = 0  # P3
    session_client: str = ""
    watch_total: float = 1.0

    def ingested(self, key: ObjectKey) -> None:
        """Follow what comes in."""
        if key.round > self.newest_round:
            self.newest_round, self.newest_count = key.round, 0
        if key.kind is ObjectKind.AGGREGATE and not key.client:
            self.aggregate_round = max(self.aggregate_round, key.round)
        elif key.kind is ObjectKind.UPDATE:
            self.newest_count += key.round == self.newest_round
            client = self.clients.pop(key.client, None) or ClientHistory()
            self.clients[key.client] = client
            if not client.rounds or key.round > client.rounds[-1]:
                client.rounds.append(key.round)
            bound(self.clients, CLIENTS_MAX)

    def is_newest(self, key: ObjectKey) -> bool:
        """Return whether nothing newer of its kind, or client, has come."""
        if key.kind is ObjectKind.AGGREGATE:
            return key.round >= self.aggregate_round
        client = self.clients.get(key.client)
        return client is None or not client.rounds or key.round >= client.rounds[-1]

    def class_of(self, key: ObjectKey) -> str:
        """Return which class a read belongs to."""
        if key.kind is ObjectKind.METADATA:
            return "P4"
        if key.kind is ObjectKind.MATRIX:
            return "P2"
        if not self.is_newest(key):
            return "P3"
        # A history begins with the newest: who had one read of late is having it read again.
        client = self.clients.get(key.client) if key.kind is ObjectKind.UPDATE else None
        is_watched = client is not None and client.depth and self.watch_share(client) > SHARE_MIN
        return "P3" if is_watched else "P1"

    def read(self, key: ObjectKey) -> list[ObjectKey]:
        """Follow what is read; return what is likely next."""
        match self.class_of(key):
            case "P1":
                is_aggregate = key.kind is ObjectKind.AGGREGATE
                is_fresh = not is_aggregate and key.round == self.newest_round
                self.aggregate_reads = self.aggregate_reads * FORGETTING + is_aggregate
                self.update_reads = self.update_reads * FORGETTING + (not is_aggregate)
                self.fresh_reads = self.fresh_reads * FORGETTING + is_fresh
            case "P2":
                step = self._step(key.round)
                for each in self.matrix_reads:
                    self.matrix_reads[each] *= FORGETTING
                self.matrix_reads[step] += 1.0
                self.matrix_total = sum(self.matrix_reads.values())
                if step != "newest":  # a walk over older rounds goes on where it was
                    self.matrix_round = key.round
                if step == "next" and key.round < self.newest_round:
                    return [replace(key, round=key.round + 1)]
            case "P3":
                if client := self.clients.get(key.client):
                    return self._history(key, client)
            case _:
                pass
        return []

    def _history(self, key: ObjectKey, client: ClientHistory) -> list[ObjectKey]:
        if key.client != self.session_client:
            self.session_client = key.client
            self.session += 1
            client.watched_at = self.session
            self.watch_total = sum(
                WATCH_FORGETTING ** (self.session - each.watched_at)
                for each in self.clients.values()
                if each.depth or each is client
            )
        # A history slides: how far back it goes is what was read of late.
        client.depth = max(client.position(key.round) + 1.0, client.depth * FORGETTING)
        return [replace(key, round=number) for number in client.ahead(key.round)]

    def watch_share(self, client: ClientHistory) -> float:
        """Return how likely a history that is read next is this client's.

        Who was watched last is watched next: clients come and go as they are found suspicious.
        """
        return WATCH_FORGETTING ** (self.session - client.watched_at) / self.watch_total

    def _step(self, round_number: int) -> str:
        if round_number == self.matrix_round + 1:
            return "next"
        if round_number == self.newest_round:
            return "newest"
        return "same" if round_number == self.matrix_round else "other"

    def matrix_share(self, step: str) -> float:
        """Return how large a part of P2's queries takes this step."""
        return self.matrix_reads[step] / self.matrix_total


def rate_newest(job: JobHistory, key: ObjectKey) -> float:
    """P1: the newest aggregate, and each client's newest update as often as it was asked for."""
    reads = job.aggregate_reads + job.update_reads
    aggregate_share = (job.aggregate_reads + 1.0) / (reads + 2.0)
    if key.kind is ObjectKind.AGGREGATE:
        return aggregate_share if job.is_newest(key) else 0.0
    client = job.clients.get(key.client) if key.kind is ObjectKind.UPDATE else None
    if client is None or not job.is_newest(key):
        return 0.0
    # Laplace's estimates: who was never asked for is one of those who may be next. Most ask for
    # clients that have just sent something, so these share what such questions have had.
    fresh_share = (job.fresh_reads + 1.0) / (job.update_reads + 2.0)
    chance = (1.0 - fresh_share) / len(job.clients)
    if key.round == job.newest_round:
        chance += fresh_share / max(job.newest_count, 1)
    return (1.0 - aggregate_share) * chance


def rate_rounds(job: JobHistory, key: ObjectKey) -> float:
    """P2: the newest round, that which was read last, and the one after it."""
    if key.kind not in (ObjectKind.UPDATE, ObjectKind.MATRIX):
        return 0.0
    rate = 0.0
    if key.round >= job.newest_round:
        rate += job.matrix_share("newest")
    if job.matrix_round >= 0:
        # The round that comes next is read next, whether it is there yet or not.
        rate += job.matrix_share("next") * (key.round == job.matrix_round + 1)
        rate += job.matrix_share("same") * (key.round == job.matrix_round)
    age = max(job.newest_round - key.round, 0)  # a round that is open is newer than what came
    return rate + job.matrix_share("other") / (2.0 + age) ** 2


def rate_histories(job: JobHistory, key: ObjectKey) -> float:
    """P3: the updates of watched clients as far back as they were read."""
    client = job.clients.get(key.client) if key.kind is ObjectKind.UPDATE else None
    if client is None or not client.depth or client.position(key.round) > client.depth:
        return 0.0
    return job.watch_share(client) / max(client.depth, 1.0)


def rate_metadata(job: JobHistory, key: ObjectKey) -> float:
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
        return ahead if self._weights((key.namespace, key.job)).get(kind, 0.0) > SHARE_MIN else ()

    def is_admitted(self, key: ObjectKey) -> bool:
        """Return whether some class may read it again."""
        job = self._job(key)
        return any(RATES[kind](job, key) > 0.0 for kind in self._classes)

    def victims(self, held: Mapping[ObjectKey, int], need_bytes: int) -> list[ObjectKey]:
        """Drop what is read least, oldest rounds first."""
        weights: dict[tuple[str, str], Mapping[str, float]] = {}
        ranks = []
        for key in held:
            name = (key.namespace, key.job)
            if name not in weights:
                weights[name] = self._weights(name)
            job = self._job(key)
            worth = sum(weight * RATES[kind](job, key) for kind, weight in weights[name].items())
            ranks.append((worth, key.round, key))
        return first_of((rank[2] for rank in sorted(ranks)), held, need_bytes)

    def chosen(self, namespace: str, job: str) -> str:
        """Return the classes."""
        return "+".join(self._classes)

    def forget(self, namespace: str, job: str) -> None:
        """Drop its history."""
        self._jobs.pop((namespace, job), None)

    def _weights(self, name: tuple[str, str]) -> Mapping[str, float]:
        return dict.fromkeys(self._classes, 1.0)

    def _asked(self, key: ObjectKey, kind: str) -> None:
        """Fixed classes learn nothing from what is asked."""

    def _job(self, key: ObjectKey) -> JobHistory:
        name = (key.namespace, key.job)
        if name not in self._jobs:
            self._jobs[name] = JobHistory()
            bound(self._jobs, JOBS_MAX)
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
        bound(self._mixes, JOBS_MAX)

    def _weights(self, name: tuple[str, str]) -> Mapping[str, float]:
        return self._mix(name)

    def _mix(self, name: tuple[str, str]) -> dict[str, float]:
        counts = self._mixes.get(name) or dict.fromkeys(RATES, 1.0)
        total = sum(counts.values())
        return {kind: max(count / total, SHARE_MIN) for kind, count in counts.items()}

"""How often each cache policy has what is read: the policies' own code on a long trace. Simulated.

The policies are the agent's (`agent/cache/policies.py`, `rivals.py`); the cache around them is a
dict with a bound. Objects are a round's updates and aggregate, all of one size; metadata has none.
Hits are counted in bytes. Two ways to read: `vectors`, where every question about a round reads its
updates, as in FLStore; and `statistics`, where those that need no vectors read none.
"""

from collections.abc import Sequence

from agent.cache.rivals import policy
from benchmarks.flstore.trace import Query, Trace, make_trace
from tierwise.domain.cache import ObjectKey, ObjectKind

ROUNDS, QUERIES = 100, 1500
POLICIES = ("adaptive", "lru", "lfu", "fifo", "lru-reads", "lfu-reads", "fifo-reads")
CACHE_ROUNDS = (2.5, 4.0)


class Cache:
    """A bound, and a policy that says what stays within it."""

    def __init__(self, name: str, capacity: int) -> None:
        self.held: dict[ObjectKey, int] = {}
        self.read_count = 0
        self.hit_count = 0
        self._capacity = capacity
        self._policy = policy(name)

    def ingest(self, key: ObjectKey) -> None:
        """Take a new object."""
        self._policy.ingested(key, 1)
        if self._policy.is_admitted(key):
            self._add(key)

    def read(self, key: ObjectKey, parts: Sequence[ObjectKey]) -> None:
        """Read one object, or a matrix that is made of parts."""
        hits = [part for part in parts if part in self.held]
        self.read_count += len(parts)
        self.hit_count += len(hits)
        ahead = self._policy.read(key, len(hits) == len(parts))
        for part in parts:
            if part not in self.held and self._policy.is_admitted(part):
                self._add(part)
        for wanted in ahead:
            is_room = len(self.held) < self._capacity
            if is_room and wanted.kind is not ObjectKind.MATRIX and wanted not in self.held:
                self._add(wanted)

    def _add(self, key: ObjectKey) -> None:
        self.held[key] = 1
        over = len(self.held) - self._capacity
        if over > 0:
            for victim in self._policy.victims(self.held, over):
                self.held.pop(victim, None)


def hit_rates(seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the share of bytes that was in memory: way to read → rounds of memory → policy."""
    trace = make_trace(rounds=ROUNDS, query_count=QUERIES, seed=seed)
    return {
        way: {
            f"{rounds:g}": {
                name: _replay(trace, name, int(rounds * 11), is_all_vectors=way == "vectors")
                for name in POLICIES
            }
            for rounds in CACHE_ROUNDS
        }
        for way in ("vectors", "statistics")
    }


def _replay(trace: Trace, name: str, capacity: int, *, is_all_vectors: bool) -> float:
    cache = Cache(name, capacity)
    waiting = list(trace.queries)
    for number, clients in enumerate(trace.members):
        for client in clients:
            cache.ingest(_key(number, ObjectKind.UPDATE, client))
        cache.ingest(_key(number, ObjectKind.AGGREGATE))
        while waiting and waiting[0].after == number:
            _read(cache, trace, waiting.pop(0), is_all_vectors)
    return cache.hit_count / cache.read_count


def _read(cache: Cache, trace: Trace, query: Query, is_all_vectors: bool) -> None:
    reads = query.workload.reads
    if reads == "matrix" or (reads == "statistics" and is_all_vectors):
        clients = trace.members[query.round]
        parts = [_key(query.round, ObjectKind.UPDATE, client) for client in clients]
        cache.read(_key(query.round, ObjectKind.MATRIX), parts)
    elif reads == "models" or (reads == "history" and is_all_vectors):
        for number in reversed(trace.rounds_of(query)[-8:]):
            key = _key(number, ObjectKind.UPDATE, query.client)
            cache.read(key, [key])
    elif reads == "model":
        kind = ObjectKind.UPDATE if query.client else ObjectKind.AGGREGATE
        key = _key(query.round, kind, query.client)
        cache.read(key, [key])


def _key(number: int, kind: ObjectKind, client: str = "") -> ObjectKey:
    return ObjectKey(namespace="default", job="bench", round=number, kind=kind, client=client)

"""How often each cache policy has what is read: the policies' own code on a long trace. Simulated.

The policies are the agent's (`agent/cache/policies.py`, `rivals.py`), the memory around them is
that of `bench_cache_policies`. Objects are a round's updates and aggregate, all of one size;
metadata has none. Hits are counted in bytes. Two ways to read: `vectors`, where every question
about a round reads its updates, as in FLStore; and `statistics`, where those that need no vectors
read none.
"""

from agent.cache.rivals import policy
from benchmarks.bench_cache_policies import Ingested, Memory, key
from benchmarks.flstore.trace import PER_ROUND, Query, Trace, make_trace
from tierwise.domain.cache import ObjectKey, ObjectKind

ROUNDS, QUERIES = 100, 1500
POLICIES = ("adaptive", "lru", "lfu", "fifo", "lru-reads", "lfu-reads", "fifo-reads")
CACHE_ROUNDS = (2.5, 4.0)


def hit_rates(seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return the share of bytes that was in memory: way to read → rounds of memory → policy."""
    trace = make_trace(rounds=ROUNDS, query_count=QUERIES, seed=seed)
    return {
        way: {
            f"{rounds:g}": {
                name: _replay(
                    trace,
                    Memory(policy(name), int(rounds * (PER_ROUND + 1))),
                    is_all_vectors=way == "vectors",
                )
                for name in POLICIES
            }
            for rounds in CACHE_ROUNDS
        }
        for way in ("vectors", "statistics")
    }


def _replay(trace: Trace, memory: Memory, *, is_all_vectors: bool) -> float:
    hits = reads = 0
    waiting = list(trace.queries)
    for number, clients in enumerate(trace.members):
        for client in clients:
            memory.ingest(Ingested(key(number, ObjectKind.UPDATE, client), 1))
        memory.ingest(Ingested(key(number, ObjectKind.AGGREGATE), 1))
        while waiting and waiting[0].after == number:
            found = memory.ask(_keys(trace, waiting.pop(0), is_all_vectors))
            hits, reads = hits + found[0], reads + found[1]
    return hits / reads


def _keys(trace: Trace, query: Query, is_all_vectors: bool) -> tuple[ObjectKey, ...]:
    reads = query.workload.reads
    if reads == "matrix" or (reads == "statistics" and is_all_vectors):
        return (key(query.round, ObjectKind.MATRIX),)
    if reads == "models" or (reads == "history" and is_all_vectors):
        rounds = reversed(trace.rounds_of(query)[-8:])
        return tuple(key(number, ObjectKind.UPDATE, query.client) for number in rounds)
    if reads == "model":
        kind = ObjectKind.UPDATE if query.client else ObjectKind.AGGREGATE
        return (key(query.round, kind, query.client),)
    return ()

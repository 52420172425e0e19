"""Which policy keeps in memory what a federated job's questions read?

    python -m benchmarks.bench_cache_policies [--seeds N] [--kept-rounds N]

Simulated: the policies are the cache's own, the memory is a dict. Every policy sees the same seeded
trace: rounds of 10 out of 250 clients come in, each followed by questions of FLStore's classes.
What is read and found in memory counts by its bytes.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from agent.cache.policies import CachePolicy
from agent.cache.rivals import NAMES, policy
from tierwise.domain.cache import ObjectKey, ObjectKind

MIB = 1 << 20
VECTOR_BYTES = 47 * MIB
CLIENT_COUNT, PER_ROUND = 250, 10
HISTORY_LENGTH = 6
MIXES = {
    "P1": {"aggregate": 0.5, "update": 0.5},
    "P2": {"round": 0.7, "walk": 0.3},
    "P3": {"history": 1.0},
    "mixed": {"aggregate": 0.3, "update": 0.1, "round": 0.25, "walk": 0.1, "history": 0.25},
}


@dataclass(frozen=True)
class Ingested:
    """An object comes in."""

    key: ObjectKey
    size_bytes: int


@dataclass(frozen=True)
class Asked:
    """A question reads objects, one after the other."""

    kind: str
    keys: tuple[ObjectKey, ...]


def key(number: int, kind: ObjectKind, client: str = "") -> ObjectKey:
    return ObjectKey(namespace="default", job="j", round=number, kind=kind, client=client)


def trace(
    mix: dict[str, float], rng: Generator, *, rounds: int, questions: int
) -> Iterator[Ingested | Asked]:
    """Yield what happens: a round comes in, then it and older ones are asked about."""
    sent: dict[str, list[int]] = {}
    walk = 0
    # A job watches a few clients at a time, and others as time goes by; some take part often.
    popularity = rng.dirichlet(np.full(CLIENT_COUNT, 0.5))
    watched: list[str] = []
    kinds, shares = list(mix), np.array(list(mix.values()))
    for number in range(rounds):
        chosen = rng.choice(CLIENT_COUNT, PER_ROUND, replace=False, p=popularity)
        for client in (f"c{index}" for index in chosen):
            sent.setdefault(client, []).append(number)
            yield Ingested(key(number, ObjectKind.UPDATE, client), VECTOR_BYTES)
            yield Ingested(key(number, ObjectKind.METADATA, client), 1024)
        yield Ingested(key(number, ObjectKind.AGGREGATE), VECTOR_BYTES)
        often = sorted(sent, key=lambda c: -len(sent[c]))[:20]
        if number % 4 == 0:
            watched = [str(c) for c in rng.choice(often, min(3, len(often)), replace=False)]
        for _ in range(questions):
            kind = str(rng.choice(kinds, p=shares / shares.sum()))
            match kind:
                case "aggregate":
                    keys = [key(number, ObjectKind.AGGREGATE)]
                case "update":
                    client = (
                        f"c{rng.choice(chosen)}"
                        if rng.random() < 0.7
                        else str(rng.choice(sorted(sent)))
                    )
                    keys = [key(sent[client][-1], ObjectKind.UPDATE, client)]
                case "round":
                    keys = [key(number, ObjectKind.MATRIX)]
                case "walk":
                    walk = min(walk + 1, number)
                    keys = [key(walk, ObjectKind.MATRIX)]
                case _:
                    client = str(rng.choice(watched))
                    numbers = reversed(sent[client][-HISTORY_LENGTH:])
                    keys = [key(n, ObjectKind.UPDATE, client) for n in numbers]
            yield Asked(kind, tuple(keys))


class Memory:
    """A cache of `bytes_max` that obeys a policy, as the store does."""

    def __init__(self, chosen: CachePolicy, bytes_max: int) -> None:
        self._policy = chosen
        self._bytes_max = bytes_max
        self._sizes: dict[ObjectKey, int] = {}  # of all there is
        self._rounds: dict[int, list[ObjectKey]] = {}
        self.held: dict[ObjectKey, int] = {}
        self.ahead_bytes = 0

    def ingest(self, event: Ingested) -> None:
        self._sizes[event.key] = event.size_bytes
        if event.key.kind is ObjectKind.UPDATE:
            self._rounds.setdefault(event.key.round, []).append(event.key)
        self._policy.ingested(event.key, event.size_bytes)
        if self._policy.is_admitted(event.key):
            self._take(event.key)

    def ask(self, keys: tuple[ObjectKey, ...]) -> tuple[int, int]:
        """Return bytes that were in memory, and all that were read."""
        hit_bytes = read_bytes = 0
        for each in keys:
            rows = self._rounds[each.round] if each.kind is ObjectKind.MATRIX else [each]
            hits = [row for row in rows if row in self.held]
            hit_bytes += sum(self._sizes[row] for row in hits)
            read_bytes += sum(self._sizes[row] for row in rows)
            wishes = self._policy.read(each, len(hits) == len(rows))
            for row in rows:
                if row not in self.held and self._policy.is_admitted(row):
                    self._take(row)
            self._fetch(wishes)
        return hit_bytes, read_bytes

    def _fetch(self, wishes: object) -> None:
        for wish in wishes:  # type: ignore[attr-defined]
            is_whole = wish.kind is ObjectKind.MATRIX
            for row in self._rounds.get(wish.round, []) if is_whole else [wish]:
                if row in self._sizes and row not in self.held and self._take(row, is_wish=True):
                    self.ahead_bytes += self._sizes[row]

    def _take(self, new: ObjectKey, *, is_wish: bool = False) -> bool:
        size_bytes = self._sizes[new]
        over = sum(self.held.values()) + size_bytes - self._bytes_max
        if over > 0:
            held = {**self.held, new: size_bytes} if is_wish else self.held
            victims = self._policy.victims(held, over)
            if new in victims:
                return False
            for victim in victims:
                del self.held[victim]
        self.held[new] = size_bytes
        assert sum(self.held.values()) <= self._bytes_max
        return True


def hit_share(name: str, mix: str, *, seed: int, kept_rounds: int, rounds: int = 60) -> float:
    """Return the part of the bytes read that was in memory, the first rounds left out."""
    memory = Memory(policy(name), kept_rounds * (PER_ROUND + 1) * VECTOR_BYTES)
    hit_bytes = read_bytes = 0
    rng = np.random.default_rng(seed)
    for event in trace(MIXES[mix], rng, rounds=rounds, questions=12):
        if isinstance(event, Ingested):
            memory.ingest(event)
            continue
        found = memory.ask(event.keys)
        if event.keys[0].round >= 5 or event.kind in ("walk", "history"):
            hit_bytes += found[0]
            read_bytes += found[1]
    return hit_bytes / read_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kept-rounds", type=int, default=4)
    arguments = parser.parse_args()
    print(
        f"simulated: bytes found in memory, %, median of {arguments.seeds} seeds (0…); room for "
        f"{arguments.kept_rounds} rounds of {PER_ROUND} of {CLIENT_COUNT} clients"
    )
    print(f"{'policy':12}" + "".join(f"{mix:>16}" for mix in MIXES))
    for name in NAMES:
        cells = []
        for mix in MIXES:
            shares = [
                100 * hit_share(name, mix, seed=seed, kept_rounds=arguments.kept_rounds)
                for seed in range(arguments.seeds)
            ]
            cells.append(f"{np.median(shares):.1f} ({min(shares):.0f}–{max(shares):.0f})")
        print(f"{name:12}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()

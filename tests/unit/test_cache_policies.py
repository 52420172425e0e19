"""What stays in memory, by policy; and that knowing rounds beats not knowing them."""

from statistics import median

import numpy as np
import pytest

from agent.cache.policies import Adaptive, Tailored
from agent.cache.rivals import NAMES, policy
from benchmarks.bench_cache_policies import MIXES, hit_share
from tierwise.domain.cache import ObjectKey, ObjectKind

SIZE = 100


def update(number: int, client: str, job: str = "j") -> ObjectKey:
    return ObjectKey(
        namespace="default", job=job, round=number, kind=ObjectKind.UPDATE, client=client
    )


def aggregate(number: int) -> ObjectKey:
    return ObjectKey(namespace="default", job="j", round=number, kind=ObjectKind.AGGREGATE)


def matrix(number: int) -> ObjectKey:
    return ObjectKey(namespace="default", job="j", round=number, kind=ObjectKind.MATRIX)


def came(chosen: Tailored, rounds: dict[int, str]) -> dict[ObjectKey, int]:
    """Let rounds come in, with a client per letter; return all of it as held."""
    held = {}
    for number, clients in rounds.items():
        for key in [*(update(number, client) for client in clients), aggregate(number)]:
            chosen.ingested(key, SIZE)
            held[key] = SIZE
    return held


def test_p1_keeps_the_newest_of_each_client_and_the_newest_aggregate() -> None:
    chosen = Tailored("P1")
    held = came(chosen, {0: "ab", 1: "bc", 2: "c"})
    gone = chosen.victims(held, 5 * SIZE)
    assert set(held) - set(gone) == {
        update(0, "a"),
        update(1, "b"),
        update(2, "c"),
        aggregate(2),
    } - {gone[-1]}
    assert set(chosen.victims(held, 4 * SIZE)) == {
        aggregate(0), update(0, "b"), update(1, "c"), aggregate(1),
    }  # fmt: skip


def test_p2_keeps_whole_rounds_and_fetches_the_next() -> None:
    chosen = Tailored("P2")
    held = came(chosen, dict.fromkeys(range(5), "ab"))
    for number in (0, 1):
        chosen.read(matrix(number), is_hit=False)
    assert chosen.read(matrix(2), is_hit=False) == [matrix(3)]
    gone = chosen.victims(held, 9 * SIZE)
    kept = {key.round for key in held if key not in gone and key.kind is ObjectKind.UPDATE}
    assert {3, 4} <= kept  # the next, and the newest


def test_p3_keeps_what_a_watched_client_sent() -> None:
    chosen = Tailored("P3")
    held = came(chosen, dict.fromkeys(range(6), "ab"))
    for number in (5, 4, 3):
        chosen.read(update(number, "b"), is_hit=True)
    assert chosen.read(update(4, "b"), is_hit=True) == [update(n, "b") for n in (3, 2, 1, 0)]
    gone = chosen.victims(held, 15 * SIZE)
    assert {update(n, "b") for n in (5, 4, 3)} == set(held) - set(gone)


def test_p4_keeps_the_facts_of_the_last_rounds() -> None:
    chosen = Tailored("P4")
    held = came(chosen, {0: "a", 100: "a"})
    facts = [
        ObjectKey(namespace="default", job="j", round=n, kind=ObjectKind.METADATA) for n in (0, 100)
    ]
    held |= dict.fromkeys(facts, 1)
    assert facts[1] not in chosen.victims(held, 4 * SIZE + 1)
    assert chosen.is_admitted(facts[1]) and not chosen.is_admitted(facts[0])


def test_the_adaptive_policy_follows_what_is_asked() -> None:
    chosen = Adaptive()
    held = came(chosen, dict.fromkeys(range(8), "abc"))
    for _ in range(30):
        for number in (7, 6, 5, 4):
            chosen.read(update(number, "b"), is_hit=True)
    assert chosen.chosen("default", "j").startswith("P3")
    kept = set(held) - set(chosen.victims(held, (len(held) - 4) * SIZE))
    assert kept >= {update(n, "b") for n in (7, 6, 5)}
    for _ in range(300):
        chosen.read(matrix(7), is_hit=True)
    assert chosen.chosen("default", "j").startswith("P2")
    kept = set(held) - set(chosen.victims(held, (len(held) - 3) * SIZE))
    assert kept == {update(7, client) for client in "abc"}


def test_jobs_are_weighed_apart() -> None:
    chosen = Adaptive()
    came(chosen, {0: "a"})
    chosen.ingested(update(0, "a", "other"), SIZE)
    for _ in range(20):
        chosen.read(matrix(0), is_hit=True)
    assert chosen.chosen("default", "j") != chosen.chosen("default", "other")
    chosen.forget("default", "j")
    assert chosen.chosen("default", "j") == chosen.chosen("default", "other")


def test_what_only_reads_allocate_is_not_kept_when_it_comes() -> None:
    for order in ("lru", "lfu", "fifo"):
        chosen = policy(f"{order}-reads")
        chosen.ingested(update(0, "a"), SIZE)
        assert not chosen.is_admitted(update(0, "a"))
        chosen.read(matrix(0), is_hit=False)  # of which it is a row
        assert chosen.is_admitted(update(0, "a"))
        assert policy(order).is_admitted(update(0, "a"))


@pytest.mark.parametrize("name", NAMES)
def test_victims_are_of_what_is_held_and_no_more_than_needed(name: str) -> None:
    chosen = policy(name)
    rng = np.random.default_rng(7)
    held: dict[ObjectKey, int] = {}
    for _ in range(300):
        key = update(int(rng.integers(10)), f"c{rng.integers(6)}")
        if rng.random() < 0.5:
            chosen.ingested(key, SIZE)
        else:
            chosen.read(key, bool(key in held))
        held[key] = int(rng.integers(1, SIZE))
        need = int(rng.integers(1, 3 * SIZE))
        gone = chosen.victims(held, need)
        assert len(set(gone)) == len(gone) and set(gone) <= set(held)
        freed = sum(held[key] for key in gone)
        assert freed >= min(need, sum(held.values()))
        assert freed - held[gone[-1]] < need
        if len(held) > 20:
            for key in gone:
                del held[key]


def test_the_names_of_policies_are_checked() -> None:
    for name in ("", "lru-writes", "P1", "adaptive-reads"):
        with pytest.raises(ValueError, match="adaptive"):
            policy(name)


@pytest.mark.parametrize("mix", [name for name in MIXES if name != "P2"])
def test_knowing_rounds_beats_every_rival_on_the_same_trace(mix: str) -> None:
    """Simulated: bytes found in memory, room for 4 rounds; medians of 3 seeds."""

    def _share(name: str) -> float:
        return median(hit_share(name, mix, seed=s, kept_rounds=4, rounds=30) for s in range(3))

    ours = _share("adaptive")
    rivals = {
        name: _share(name) for name in NAMES if name.partition("-")[0] in ("lru", "fifo", "lfu")
    }
    assert all(ours > share for share in rivals.values()), (ours, rivals)

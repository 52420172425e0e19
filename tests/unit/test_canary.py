"""Time blocks: who decides when, and what a comparison by block may claim."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierwise.placement.canary import Arm, Schedule, compare, student_t_95


@given(
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 2**31),
    at_s=st.lists(st.floats(0.0, 1e6), max_size=20),
)
def test_every_node_that_knows_share_and_seed_switches_alike(
    share: float, seed: int, at_s: list[float]
) -> None:
    one, two = Schedule(share, 30.0, seed), Schedule(share, 30.0, seed)
    for elapsed_s in reversed(at_s):
        two.is_canary(two.block(elapsed_s))  # asked in another order, the answers are the same
    for elapsed_s in at_s:
        assert one.is_canary(one.block(elapsed_s)) == two.is_canary(two.block(elapsed_s))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.25, 1 / 3, 0.5, 0.8, 0.95])
def test_the_canary_gets_its_share_of_any_stratum(share: float) -> None:
    schedule = Schedule(share, 1.0, 7)
    turns = [schedule.is_canary(block) for block in range(1, 60 * 7 + 1)]
    assert np.mean(turns) == pytest.approx(share, abs=0.011)


def test_the_canarys_turns_do_not_repeat_a_pattern() -> None:
    schedule = Schedule(0.2, 1.0, 7)
    strata = {tuple(schedule.is_canary(5 * s + i) for i in range(1, 6)) for s in range(40)}
    assert len(strata) == 5


def test_blocks_are_counted_from_one_and_their_first_part_does_not_count() -> None:
    schedule = Schedule(0.5, 10.0, 0)
    assert [schedule.block(s) for s in (-3.0, 0.0, 9.99, 10.0, 25.0)] == [1, 1, 1, 2, 3]
    assert [schedule.is_settled(s) for s in (0.0, 0.9, 1.0, 9.9, 10.5)] == [
        False, False, True, True, False,
    ]  # fmt: skip


def arm(rng: np.random.Generator, n: int, mean: float, spread: float) -> Arm:
    """Return blocks of different sizes, whose own means differ: calls of one block are alike."""
    calls = rng.integers(5, 50, size=n).astype(float)
    means = mean + spread * rng.standard_normal(n)
    return Arm(blocks=np.stack([calls, np.zeros(n), calls * means], axis=1))


@pytest.mark.parametrize(("n", "m"), [(4, 16), (10, 10), (8, 40)])
def test_the_interval_covers_the_true_difference_as_often_as_it_says(n: int, m: int) -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(600):
        found = compare(arm(rng, n, 0.9, 0.1), arm(rng, m, 1.0, 0.3))
        covered += found.low <= -0.1 <= found.high
    assert covered / 600 > 0.90


def test_calls_of_a_block_are_not_taken_for_independent_ones() -> None:
    rng = np.random.default_rng(2)
    few = compare(arm(rng, 5, 1.0, 0.2), arm(rng, 5, 1.0, 0.2))
    blocks = np.array([[1000.0, 0, 1000.0 * m] for m in (0.8, 1.0, 1.3)])
    many = compare(Arm(blocks=blocks), Arm(blocks=blocks[::-1]))
    assert few.high - few.low > 0.1
    assert many.high - many.low > 0.5  # 3000 calls, but only three blocks each


def test_too_few_blocks_give_a_mean_and_no_interval() -> None:
    two = Arm(blocks=np.array([[10.0, 1, 5.0], [10.0, 0, 5.0]]))
    found = compare(two, two)
    assert found.mean == 0.0
    assert math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(compare(two, Arm(blocks=np.zeros((0, 3)))).mean)


def test_sums_are_those_of_the_blocks() -> None:
    some = Arm(blocks=np.array([[10.0, 1, 5.0], [0.0, 0, 0.0], [30.0, 3, 7.0]]))
    assert (some.calls, some.misses, some.mean_cost_s) == (40, 4, pytest.approx(0.3))


@pytest.mark.parametrize(
    ("freedom", "expected"), [(2, 4.3027), (3, 3.1824), (5, 2.5706), (10, 2.2281), (30, 2.0423)]
)
def test_quantiles_are_those_of_the_tables(freedom: float, expected: float) -> None:
    assert student_t_95(freedom) == pytest.approx(expected, rel=0.008)

"""What the advisor learns: growth, coverage of its margin, advice, drift."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.advisors.memory import (
    OOM_CHANCE,
    SAMPLES_MIN,
    Drift,
    Sample,
    conformal,
    fit,
    guess,
    recommend,
)
from tierwise.domain.sizing import FLOOR_MIB, STEP_MIB, Growth, Sizing, Term, in_steps

Law = Callable[[float, float], float]


def samples(
    law: Law, count: int, *, seed: int = 0, noise: float = 0.03, low: float = 10, high: float = 2000
) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        n, k = float(np.exp(rng.uniform(np.log(low), np.log(high)))), float(rng.integers(1, 9))
        peak = law(n, k) * float(np.exp(rng.normal(0.0, noise)))
        measures = {"n": n, "k": k, "bytes": 20.0, "arrays": 0.0}
        found.append(Sample(measures=measures, peak_mib=peak, run_s=1e-9 * n**3))
    return found


LAWS: dict[str, Law] = {
    "constant": lambda n, k: 40.0,
    "linear": lambda n, k: 5.0 + 0.3 * n,
    "square": lambda n, k: 6.0 + 2.4e-5 * n * n,
    "product": lambda n, k: 8.0 + 0.05 * n * k,
    "n log n": lambda n, k: 4.0 + 0.02 * n * np.log2(n),
}


@pytest.mark.parametrize("law", LAWS)
def test_memory_of_inputs_twice_as_large_as_any_seen_is_foretold(law: str) -> None:
    sizing = fit(samples(LAWS[law], 64, noise=0.0))
    assert sizing is not None
    for k in (1.0, 5.0):
        need = LAWS[law](4000.0, k)
        allotted = sizing.memory_mib({"n": 4000.0, "k": k, "bytes": 20.0, "arrays": 0.0})
        assert allotted is not None
        assert need <= allotted <= 1.25 * need + STEP_MIB


@pytest.mark.parametrize("seed", range(5))
def test_peaks_a_little_below_a_line_through_zero_grow_by_that_line(seed: int) -> None:
    sizing = fit(samples(lambda n, k: n - 0.5, 40, seed=seed, noise=0.002, low=2, high=60))
    assert sizing is not None
    allotted = sizing.memory_mib({"n": 300.0, "k": 1.0, "bytes": 20.0, "arrays": 0.0})
    assert allotted is not None
    assert 300 <= allotted <= 1.25 * 300 + STEP_MIB


def test_the_margin_covers_as_many_new_calls_as_was_asked_for() -> None:
    asked = 0.1
    shares = []
    for seed in range(20):
        known = fit(samples(LAWS["product"], 150, seed=seed, noise=0.2), oom_chance=asked)
        assert known is not None
        new = samples(LAWS["product"], 300, seed=1000 + seed, noise=0.2)
        short = [s.peak_mib > (known.memory_mib(s.measures) or 0) for s in new]
        shares.append(float(np.mean(short)))
    assert np.mean(shares) <= asked
    assert np.mean(shares) > asked / 20  # it is no blank cheque either


def test_at_one_per_cent_hardly_any_call_runs_out() -> None:
    shares = []
    for seed in range(5):
        known = fit(samples(LAWS["square"], 300, seed=seed, noise=0.1))
        assert known is not None
        new = samples(LAWS["square"], 1000, seed=50 + seed, noise=0.1)
        shares.append(np.mean([s.peak_mib > (known.memory_mib(s.measures) or 0) for s in new]))
    assert np.mean(shares) <= 1.5 * OOM_CHANCE


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=400), st.floats(0.005, 0.5))
def test_a_conformal_factor_leaves_at_most_the_chance_above_it(
    scores: list[float], chance: float
) -> None:
    factor = conformal(np.array(scores), chance)
    above = sum(score > factor for score in scores)
    assert above <= chance * (len(scores) + 1)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(SAMPLES_MIN, 60),
    st.integers(0, 1000),
    st.sampled_from(sorted(LAWS)),
    st.floats(0.0, 0.5),
)
def test_whatever_was_learnt_a_larger_input_never_gets_less_within_the_same_range(
    count: int, seed: int, law: str, noise: float
) -> None:
    sizing = fit(samples(LAWS[law], count, seed=seed, noise=noise))
    assert sizing is not None
    sizes = [
        sizing.memory_mib({"n": n, "k": 4.0, "bytes": 20.0, "arrays": 0.0}) or 0
        for n in np.geomspace(1.0, 1e6, 40)
    ]
    assert sizes == sorted(sizes)
    assert min(sizes) >= FLOOR_MIB


def test_too_few_samples_give_a_guess_that_is_generous() -> None:
    few = samples(LAWS["linear"], SAMPLES_MIN - 1)
    assert fit(few) is None
    assert guess([]) is None
    first = guess(few)
    assert first is not None
    assert first.memory_mib({}) == in_steps(2.0 * max(s.peak_mib for s in few))


def test_an_input_that_lacks_what_the_formula_needs_gets_no_answer() -> None:
    sizing = fit(samples(LAWS["square"], 40))
    assert sizing is not None
    assert sizing.memory_mib({"bytes": 20.0}) is None


def test_calls_that_ran_out_count_and_their_times_do_not() -> None:
    known = samples(LAWS["square"], 40, noise=0.0)
    killed = Sample(measures=known[0].measures, peak_mib=5000.0, run_s=1e6, is_out_of_memory=True)
    with_killed, without = fit([*known, killed]), fit(known)
    assert with_killed is not None
    assert without is not None
    assert with_killed.margin > without.margin
    assert with_killed.run == without.run


def test_the_same_samples_give_the_same_answer() -> None:
    assert fit(samples(LAWS["product"], 50)) == fit(samples(LAWS["product"], 50))


def test_sizing_each_call_is_recommended_where_memory_follows_the_input() -> None:
    found = recommend(samples(LAWS["square"], 100, high=6000), declared_mib=2048)
    assert found is not None
    assert found.is_auto
    assert found.gb_s_auto < found.gb_s_fixed < found.gb_s_declared
    assert found.out_of_memory_share <= 0.05


def test_one_size_is_recommended_where_memory_does_not_follow_the_input() -> None:
    found = recommend(samples(LAWS["constant"], 100), declared_mib=512)
    assert found is not None
    assert not found.is_auto
    assert 40 <= found.memory_mib <= 60


def test_nothing_is_recommended_without_evidence() -> None:
    assert recommend(samples(LAWS["linear"], SAMPLES_MIN - 1), declared_mib=256) is None


def test_drift_is_noticed_and_noise_is_not() -> None:
    rng = np.random.default_rng(3)
    drift = Drift()
    assert not any(drift.saw(100.0 * float(np.exp(rng.normal(0, 0.1))), 100.0) for _ in range(500))
    assert any(drift.saw(160.0 * float(np.exp(rng.normal(0, 0.1))), 100.0) for _ in range(30))


def test_huge_measures_give_a_huge_but_bounded_size() -> None:
    sizing = Sizing(
        memory=Growth(terms=(Term(powers=(("n", 3.0),), coefficient=1e12),)),
        run=Growth(terms=()),
        margin=1.5,
        margin_beyond=2.0,
        highest={"n": 1.0},
        sample_count=9,
    )
    assert sizing.memory_mib({"n": 1e15}) == 10_000_000
    assert sizing.memory_mib({"n": -5.0}) == FLOOR_MIB

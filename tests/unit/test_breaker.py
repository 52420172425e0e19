"""The circuit breaker: what opens it, for how long, and what closes it again."""

import numpy as np
import pytest

from tierwise.placement import breaker
from tierwise.placement.breaker import BreakerState, Cause, CircuitBreaker

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
FAST_S = 1e-4


def opened(cause: Cause, now_s: float = 0.0) -> CircuitBreaker:
    guard = CircuitBreaker()
    if cause is Cause.ERROR:
        guard.failed(now_s)
    elif cause is Cause.LATE:
        guard.decided(1.0, now_s)
    elif cause is Cause.RANGE:
        for _ in range(100):
            guard.decided(FAST_S, now_s, is_out_of_range=True)
    else:
        end(guard, 100, missed=100, now_s=now_s)
    assert guard.state is OPEN
    assert guard.cause is cause
    return guard


def end(
    guard: CircuitBreaker,
    count: int,
    *,
    missed: int,
    predicted: int = 0,
    by_base: bool = False,
    now_s: float = 0.0,
) -> None:
    """Let calls end, the misses spread evenly among them."""
    for i in range(count):
        is_missed, was_predicted = (
            (i + 1) * some // count > i * some // count for some in (missed, predicted)
        )
        guard.ended(now_s, is_missed=is_missed, was_predicted=was_predicted, by_base=by_base)


def test_a_sound_policy_always_decides() -> None:
    guard = CircuitBreaker()
    for step in range(10_000):
        assert guard.allows(step * 0.01)
        guard.decided(FAST_S, step * 0.01, is_out_of_range=step % 4 == 0)
        guard.ended(step * 0.01, is_missed=False, was_predicted=False, by_base=False)
    assert guard.state is CLOSED
    assert guard.opened_count == 0


def test_one_error_opens_it() -> None:
    guard = opened(Cause.ERROR)
    assert not guard.allows(1.0)


def test_one_decision_that_sleeps_opens_it_and_one_pause_of_the_machine_does_not() -> None:
    opened(Cause.LATE)
    guard = CircuitBreaker()
    for step in range(1000):
        guard.decided(0.05 if step % 50 == 0 else FAST_S, step * 0.01)
    assert guard.state is CLOSED


def test_a_policy_that_is_always_a_little_late_opens_it_too() -> None:
    guard = CircuitBreaker()
    for _ in range(100):
        guard.decided(2.0 * breaker.PACE_S, 0.0)
    assert guard.cause is Cause.LATE


def test_inputs_that_are_mostly_out_of_range_open_it() -> None:
    opened(Cause.RANGE)


def test_misses_beyond_the_prediction_open_it_and_predicted_ones_do_not() -> None:
    guard = CircuitBreaker()
    end(guard, 200, missed=100, predicted=100)
    assert guard.state is CLOSED
    end(guard, 200, missed=100, predicted=10)
    assert guard.cause is Cause.MISSES


def test_few_calls_say_nothing() -> None:
    guard = CircuitBreaker()
    end(guard, breaker.ENDED_MIN - 1, missed=breaker.ENDED_MIN - 1)
    assert guard.state is CLOSED
    end(guard, 1, missed=1)
    assert guard.state is OPEN


def test_calls_that_ended_long_ago_do_not_count() -> None:
    guard = CircuitBreaker()
    end(guard, breaker.ENDED_MIN - 1, missed=breaker.ENDED_MIN - 1)
    end(guard, breaker.ENDED_MIN - 1, missed=0, now_s=breaker.WINDOW_S + 1.0)
    end(guard, 1, missed=1, now_s=breaker.WINDOW_S + 1.0)
    assert guard.state is CLOSED


def test_chance_alone_does_not_open_it() -> None:
    rng = np.random.default_rng(3)
    opened_count = 0
    for _ in range(50):
        guard = CircuitBreaker()
        for is_missed, was_predicted in rng.random((1000, 2)) < 0.2:
            guard.ended(
                0.0, is_missed=is_missed, was_predicted=was_predicted, by_base=False
            )  # as many as predicted, but others
        opened_count += guard.opened_count
    assert opened_count == 0


def test_a_heuristic_that_was_chosen_on_purpose_is_not_judged_by_its_misses() -> None:
    guard = CircuitBreaker(watches_misses=False)
    end(guard, 500, missed=500)
    assert guard.state is CLOSED
    guard.failed(0.0)
    assert guard.state is OPEN


@pytest.mark.parametrize("cause", [Cause.ERROR, Cause.LATE, Cause.RANGE])
def test_after_a_rest_good_probes_close_it(cause: Cause) -> None:
    guard = opened(cause)
    now_s = breaker.REST_FIRST_S
    assert not guard.allows(now_s - 0.01)
    for _ in range(breaker.PROBES_MAX):
        assert guard.allows(now_s)
        assert guard.state is HALF_OPEN
        guard.decided(FAST_S, now_s)
    assert guard.state is CLOSED
    assert guard.allows(now_s)


@pytest.mark.parametrize("cause", list(Cause))
def test_bad_probes_open_it_again_for_twice_as_long(cause: Cause) -> None:
    guard = opened(cause)
    now_s = breaker.REST_FIRST_S
    for _ in range(breaker.PROBES_MAX):
        if not guard.allows(now_s):
            break
        match cause:
            case Cause.ERROR:
                guard.failed(now_s)
            case Cause.MISSES:
                guard.decided(FAST_S, now_s)
                end(guard, 1, missed=1, now_s=now_s)
            case _:
                guard.decided(
                    1.0 if cause is Cause.LATE else FAST_S,
                    now_s,
                    is_out_of_range=cause is Cause.RANGE,
                )
    assert guard.state is OPEN
    assert guard.opened_count == 2
    assert not guard.allows(now_s + 1.9 * breaker.REST_FIRST_S)
    assert guard.allows(now_s + 2.0 * breaker.REST_FIRST_S)


def test_only_so_many_probes_are_handed_out_and_new_ones_if_no_verdict_came() -> None:
    guard = opened(Cause.MISSES)
    now_s = breaker.REST_FIRST_S
    allowed = [guard.allows(now_s) for _ in range(3 * breaker.PROBES_MAX)]
    assert sum(allowed) == breaker.PROBES_MAX
    assert guard.state is HALF_OPEN
    assert guard.allows(now_s + breaker.REST_FIRST_S)


def test_probes_that_end_well_close_what_misses_have_opened() -> None:
    guard = opened(Cause.MISSES)
    assert guard.allows(breaker.REST_FIRST_S)
    end(guard, breaker.PROBES_MAX // 2, missed=1, now_s=breaker.REST_FIRST_S)
    assert guard.state is CLOSED


def test_if_the_base_score_misses_as_much_the_policy_is_not_blamed() -> None:
    guard = opened(Cause.MISSES)
    end(guard, 100, missed=60, by_base=True, now_s=1.0)
    assert guard.allows(breaker.REST_FIRST_S)
    end(guard, 200, missed=120, now_s=breaker.REST_FIRST_S)
    assert guard.state is CLOSED
    later_s = breaker.REST_FIRST_S + breaker.REFERENCE_S + 1.0  # believed for a while only
    end(guard, 200, missed=120, now_s=later_s)
    assert guard.state is OPEN


def test_it_rests_at_most_so_long() -> None:
    guard, now_s = opened(Cause.ERROR), 0.0
    for _ in range(20):
        now_s += breaker.REST_MAX_S
        assert guard.allows(now_s)
        guard.failed(now_s)
    assert guard.allows(now_s + breaker.REST_MAX_S)


def test_an_opening_right_after_a_closing_rests_longer() -> None:
    guard = opened(Cause.ERROR)
    now_s = breaker.REST_FIRST_S
    while guard.state is not CLOSED:
        assert guard.allows(now_s)
        guard.decided(FAST_S, now_s)
    guard.failed(now_s + 1.0)
    assert not guard.allows(now_s + 1.0 + 1.5 * breaker.REST_FIRST_S)

"""What is learnt of a function from its calls."""

import pytest

from tierwise.cost.profiles import Profiles
from tierwise.domain.function import PRIOR
from tierwise.domain.ids import FunctionId, NodeId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState

FUNCTION = FunctionId("default/f@1")


def outcome(run_s: float = 0.1, cold_start_s: float | None = None) -> Outcome:
    return Outcome(
        request_id=RequestId("r"),
        function_id=FUNCTION,
        state=OutcomeState.OK,
        origin=NodeId("n"),
        node_id=NodeId("n"),
        latency=LatencySplit(run_s=run_s, cold_start_s=cold_start_s or 0.0),
        is_cold=cold_start_s is not None,
    )


def test_the_first_cold_start_replaces_the_prior_even_after_many_warm_calls() -> None:
    profiles = Profiles()
    for _ in range(50):
        profiles.learn(outcome(), 1.0, 0.0)
    assert profiles.get(FUNCTION).cold_start_s == PRIOR.cold_start_s
    profiles.learn(outcome(cold_start_s=0.01), 1.0, 0.0)
    assert profiles.get(FUNCTION).cold_start_s == pytest.approx(0.01)


def test_later_cold_starts_move_the_mean_and_one_outlier_does_not_own_it() -> None:
    profiles = Profiles()
    for _ in range(10):
        profiles.learn(outcome(cold_start_s=0.1), 1.0, 0.0)
    profiles.learn(outcome(cold_start_s=1.1), 1.0, 0.0)
    assert profiles.get(FUNCTION).cold_start_s == pytest.approx(0.1 + 0.3 * 1.0)


def test_what_was_stored_is_moved_and_not_replaced() -> None:
    before = Profiles()
    before.learn(outcome(cold_start_s=0.1), 1.0, 0.0)
    after = Profiles(before.snapshot())
    after.learn(outcome(cold_start_s=1.1), 1.0, 0.0)
    assert after.get(FUNCTION).cold_start_s == pytest.approx(0.1 + 0.3 * 1.0)


def test_times_are_those_of_the_reference_device() -> None:
    profiles = Profiles()
    profiles.learn(outcome(run_s=1.0, cold_start_s=2.0), 0.25, 0.0)
    assert profiles.get(FUNCTION).run_s == pytest.approx(0.25)
    assert profiles.get(FUNCTION).cold_start_s == pytest.approx(0.5)

"""One run tells a world's parameters, and the world that they make predicts other runs."""

from dataclasses import replace

import numpy as np
import pytest

from envs.calibrate import VIEW_INTERVAL_S, calibrated, fit, least_absolute
from envs.fidelity import is_resolved, rank_agreement, relative_error
from envs.overheads import NO_OVERHEADS, Overheads, Spread
from envs.schedule import Schedule
from envs.simulator import Simulator, service_stream
from envs.traces import Mix, make_functions, make_trace
from envs.world import World, make_world
from scheduler import inventory
from tierwise.domain.ids import RequestId
from tierwise.domain.outcome import Outcome
from tierwise.placement.policy import create

TAIL_S = tuple(0.0004 * np.exp(3.0 * np.linspace(0.0, 1.0, 11)) - 0.0004)
TRUE = Overheads(
    call_s=0.002,
    run_s=Spread(TAIL_S),
    message_s=Spread((0.001, 0.0015, 0.002, 0.006)),
    cold=Spread((0.5, 0.8, 1.0, 1.3, 2.5)),
    view_interval_s=0.2,
    reports_late=True,
)
FACTOR = 1.3  # how much slower everything is than the world to be fitted says


def small_world(seed: int, *, request_count: int = 400) -> World:
    """Return a world of plain calls, as a live replay sends them, at a bearable load."""
    world = make_world("small", seed)
    behaviours = make_functions(np.random.default_rng(1), 4)
    rng = np.random.default_rng(seed)
    mix = Mix(load=0.12, function_count=4, request_count=request_count, burstiness=2.0)
    trace = make_trace(rng, list(world.nodes), mix, behaviours)
    plain = tuple(
        replace(arrival, item_count=1, data_node=None, data_bytes=0) for arrival in trace.arrivals
    )
    return replace(world, trace=replace(trace, arrivals=plain))


def reality(world: World) -> World:
    """Return the world as it really is: slower functions, and a platform that takes its share."""
    slower = {
        key: replace(
            behaviour,
            profile=replace(
                behaviour.profile,
                run_s=FACTOR * behaviour.profile.run_s,
                cold_start_s=0.05,
            ),
        )
        for key, behaviour in world.trace.behaviours.items()
    }
    return replace(world, trace=replace(world.trace, behaviours=slower), overheads=TRUE)


def draws(world: World, seed: int) -> dict[RequestId, float]:
    return {name: noise for name, _, noise in Schedule(world.trace, service_stream(seed)).planned()}


def run(world: World, policy: str, seed: int, service_seed: int) -> list[Outcome]:
    return Simulator(world, seed, service_seed=service_seed).run(create(policy))


def test_known_parameters_are_recovered_from_one_run() -> None:
    world = small_world(3, request_count=600)
    seen = run(reality(world), "edge-first", 5, 5)
    found = fit(world, seen, draws(world, 5))
    for key, behaviour in found.behaviours.items():
        base = world.trace.behaviours[key]
        # The curve takes the median of what the platform adds with it.
        expected_s = FACTOR * base.profile.run_s + float(np.median(TAIL_S))
        assert behaviour.profile.run_s == pytest.approx(expected_s, rel=0.05, abs=0.002)
        assert behaviour.run_sigma == pytest.approx(base.run_sigma, abs=0.05)
        assert behaviour.profile.cold_start_s == pytest.approx(0.05, rel=0.25)
        assert behaviour.profile.response_bytes == base.profile.response_bytes
    assert found.overheads.message_s.mean == pytest.approx(TRUE.message_s.mean, abs=0.001)
    assert found.overheads.cold.mean == pytest.approx(TRUE.cold.mean, rel=0.25)
    assert 0.0 <= found.overheads.call_s < 0.01
    assert found.run_count == 600


def test_the_fitted_world_predicts_runs_that_it_has_not_seen() -> None:
    world = small_world(3)
    found = fit(world, run(reality(world), "edge-first", 5, 5), draws(world, 5))
    for trace_seed in (8, 9):
        other = small_world(trace_seed)
        for policy in ("cloud-only", "ect"):
            errors = {}
            for share in (50, 95):
                live_s, sim_s = (
                    np.mean(
                        [
                            np.percentile([o.latency.total_s for o in outcomes], share)
                            for outcomes in (run(twin, policy, s, trace_seed) for s in range(4))
                        ]
                    )
                    for twin in (reality(other), calibrated(other, found))
                )
                errors[share] = relative_error(float(sim_s), float(live_s))
            assert abs(errors[50]) < 0.05 and abs(errors[95]) < 0.1, (trace_seed, policy, errors)


def test_without_draws_all_spread_of_run_times_is_the_functions_own() -> None:
    world = small_world(4, request_count=600)
    twin = reality(world)
    quiet = replace(twin, overheads=replace(TRUE, run_s=Spread(), call_s=0.0))
    found = fit(world, run(quiet, "cloud-only", 2, 2))
    assert found.overheads.run_s == Spread()
    for key, behaviour in found.behaviours.items():
        true = twin.trace.behaviours[key]
        assert behaviour.profile.run_s == pytest.approx(true.profile.run_s, rel=0.1)
        assert behaviour.run_sigma == pytest.approx(true.run_sigma, rel=0.35, abs=0.02)


def test_a_run_that_shows_nothing_is_refused() -> None:
    world = small_world(4)
    seen = run(world, "ect", 1, 1)
    with pytest.raises(ValueError, match="good calls"):
        fit(world, seen[:3])


def test_outliers_do_not_bend_the_line() -> None:
    x = np.linspace(-2.0, 2.0, 60)
    y = 1.0 + 0.3 * x
    y[::10] += 50.0
    assert np.allclose(least_absolute(x, y), (1.0, 0.3), atol=0.01)


def test_a_spread_draws_what_was_measured_and_the_empty_one_touches_no_stream() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert Spread().draw(rng) == Spread().mean == 0.0
    assert rng.bit_generator.state == before
    measured = np.random.default_rng(1).lognormal(0.0, 1.0, 5000)
    spread = Spread.of(measured)
    drawn = [spread.draw(rng) for _ in range(5000)]
    for share in (5, 50, 90):
        assert np.percentile(drawn, share) == pytest.approx(np.percentile(measured, share), rel=0.1)


def test_a_world_without_overheads_is_as_before() -> None:
    world = small_world(2, request_count=120)
    assert world.overheads == NO_OVERHEADS
    simulators = [Simulator(world, 1), Simulator(world, 1, service_seed=1)]
    for simulator in simulators:
        simulator.run(create("ect"))
    assert simulators[0].log_digest() == simulators[1].log_digest()


def test_ranks_agree_where_reality_tells_policies_apart() -> None:
    noise = np.random.default_rng(0).normal(0.0, 0.1, 40)
    measured = {"a": 1.0 + noise, "b": 2.0 + noise, "c": 2.0 + noise[::-1]}
    same = rank_agreement(measured, {"a": 1.1, "b": 2.0, "c": 1.9})
    assert same.is_same and same.pair_count == 3 and same.resolved_count == 2
    swapped = rank_agreement(measured, {"a": 2.5, "b": 2.0, "c": 2.9})
    assert not swapped.is_same and swapped.disagreements == (("a", "b"),)
    assert rank_agreement(measured, {k: v.mean() for k, v in measured.items()}).kendall == 1.0


def test_differences_within_their_noise_are_ties() -> None:
    rng = np.random.default_rng(1)
    assert not is_resolved(rng.normal(0.0, 1.0, 30))
    assert is_resolved(rng.normal(1.0, 0.5, 30))
    assert not is_resolved(np.array([np.nan, 1.0]))


def test_views_go_out_as_often_as_the_scheduler_sends_them() -> None:
    assert VIEW_INTERVAL_S == inventory.VIEW_INTERVAL_S

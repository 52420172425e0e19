"""The simulated world is a function of its seed, and its figures are what they say."""

import numpy as np
import pytest

from envs.simulator import Simulator
from envs.traces import Mix, make_trace
from envs.world import PRESETS, Faults, make_world, with_faults
from tierwise.placement.policy import create


def test_the_same_seed_gives_the_same_outcomes_and_another_seed_does_not() -> None:
    def digest(seed: int) -> str:
        simulator = Simulator(make_world("campus", 3, request_count=120), seed)
        simulator.run(create("ect"))
        return simulator.log_digest()

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_request_of_a_preset_ends(preset: str) -> None:
    simulator = Simulator(make_world(preset, 5, request_count=150), 5)
    outcomes = simulator.run(create("ect"))
    assert len(outcomes) == simulator.world.trace.request_count >= 150
    assert simulator.unfinished_count == 0


def test_adding_faults_moves_no_service_time() -> None:
    """Named streams: the draws of one are not shifted by another."""
    world = make_world("small", 2, request_count=60)
    plain = Simulator(world, 9)
    faulty = Simulator(with_faults(world, Faults(duplicate=1e-12)), 9)
    runs = [
        {o.request_id: o.latency.run_s for o in simulator.run(create("edge-only"))}
        for simulator in (plain, faulty)
    ]
    assert runs[0] == runs[1]


def test_a_trace_asks_for_the_load_that_was_ordered() -> None:
    nodes = list(make_world("factory", 1).nodes)
    capacity = sum(node.capacity.cpus * node.speed for node in nodes)
    loads = []
    for seed in range(20):
        trace = make_trace(
            np.random.default_rng(seed),
            nodes,
            Mix(
                load=0.5,
                function_count=6,
                request_count=1500,
                burstiness=1.0,
            ),
        )
        asked_s = sum(
            trace.behaviours[a.function].profile.run_s for a in trace.arrivals if a.item_count == 1
        )
        loads.append(asked_s / trace.arrivals[-1].at_s / capacity)
    assert np.mean(loads) == pytest.approx(0.5, rel=0.25)


def test_bursts_keep_the_mean_rate_and_raise_the_variance() -> None:
    nodes = list(make_world("small", 1).nodes)

    def counts(burstiness: float) -> np.ndarray:  # type: ignore[type-arg]
        per_second = []
        for seed in range(10):
            trace = make_trace(
                np.random.default_rng(seed),
                nodes,
                Mix(
                    load=0.5,
                    function_count=1,
                    request_count=2000,
                    burstiness=burstiness,
                ),
            )
            times = np.array([a.at_s for a in trace.arrivals])
            found = np.bincount(times.astype(int))[:-1]
            per_second.extend(found / found.mean())
        return np.array(per_second)

    assert counts(4.0).var() > 1.5 * counts(1.0).var()

"""Figures of a run: what is counted, and what a wrapper leaves alone."""

from dataclasses import replace

import numpy as np
import pytest

from envs.simulator import Simulator
from envs.world import make_world
from tierwise.domain.ids import NodeId
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policy import create
from training.figures import Clocked, Waste, clock, fairness, mean_cost_s, measure
from training.report import to_markdown
from training.suite import run_bounds


def test_the_figures_are_those_of_the_same_run_without_a_clock() -> None:
    world = make_world("small", 4, request_count=60)
    figures = measure(create("ect"), world, 4)
    outcomes = Simulator(world, 4).run(EarliestCompletion())
    assert figures["cost_s"] == mean_cost_s(outcomes)
    assert figures["missed"] == np.mean([o.is_missed for o in outcomes])
    assert figures["edge"] + figures["fog"] + figures["cloud"] == pytest.approx(1.0)
    assert figures["decision_us"] > 0.0


def test_a_clock_times_every_decision() -> None:
    simulator, policy = (
        Simulator(make_world("small", 4, request_count=60), 4),
        Clocked(create("ect")),
    )
    simulator.run(policy)
    assert len(policy.elapsed_s) == simulator.decision_count


def test_a_learner_still_learns_under_the_clock() -> None:
    world = make_world("small", 4, request_count=60)
    timed, plain = clock(create("linucb")), create("linucb")
    assert [o.node_id for o in Simulator(world, 4).run(timed)] == [
        o.node_id for o in Simulator(world, 4).run(plain)
    ]
    assert len(timed.elapsed_s) > 10


def test_idle_memory_is_wasted_from_the_end_of_a_run_until_the_next_begins() -> None:
    world = make_world("small", 4, request_count=40)
    longest = max(b.spec.memory_mib for b in world.trace.behaviours.values())
    simulator = Simulator(world, 4)
    waste = Waste(simulator)
    simulator.on_step = waste.stepped
    simulator.run(create("cloud-only"))
    started = sum(machine.pool._started_count for machine in simulator.machines())
    assert 0.0 < waste.gb_s() <= started * longest / 1024.0 * simulator.now_s
    short = {
        f: replace(b, spec=replace(b.spec, keep_alive_s=0.01))
        for f, b in world.trace.behaviours.items()
    }
    frugal = Simulator(replace(world, trace=replace(world.trace, behaviours=short)), 4)
    less = Waste(frugal)
    frugal.on_step = less.stepped
    frugal.run(create("cloud-only"))
    assert less.gb_s() < 0.5 * waste.gb_s()


def test_fairness_is_one_for_equals_and_one_nth_for_a_monopoly() -> None:
    world = make_world("small", 4, request_count=40)
    outcome = Simulator(world, 4).run(create("ect"))[0]
    held, missed = replace(outcome, deadline_s=1e9), replace(outcome, deadline_s=0.0)
    a, b = NodeId("a"), NodeId("b")
    assert fairness([replace(held, origin=a), replace(held, origin=b)]) == pytest.approx(1.0)
    assert fairness([replace(held, origin=a), replace(missed, origin=b)]) == pytest.approx(0.5)


def test_bounds_say_what_share_of_the_gap_a_policy_closes() -> None:
    row = {"part": "bounds", "case": "small", "ect_s": 1.0, "clairvoyant_s": 0.5, "relaxed_s": 0.1}
    text = to_markdown([row | {"learned_s": 0.75}], 1, 1)
    assert "`learned` closes +50% on average over the 1 presets" in text
    flat = row | {"clairvoyant_s": 0.99, "learned_s": 0.9}
    assert "closes" not in to_markdown([flat], 1, 1).split("headroom")[-1]


def test_the_bounds_of_a_suite_come_from_its_own_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.suite.NAMED", ("small",))
    monkeypatch.setattr("training.suite.BOUND_REQUESTS", 25)
    (row,) = run_bounds(["ect"], range(1_000_000, 1_000_001), workers=1)
    assert row["relaxed_s"] <= row["clairvoyant_s"] <= row["ect_s"] * 1.2

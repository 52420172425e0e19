"""Bounds of what any policy can reach, and the standard suite."""

import numpy as np

from envs.simulator import Simulator
from envs.world import make_world
from tierwise.domain.decision import NotPlaced
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policy import create
from tierwise.placement.ranking import rank
from training.bounds import clairvoyant, cost_in_a_copy, relaxed_cost_s
from training.figures import mean_cost_s
from training.report import to_markdown
from training.suite import cases, run


def test_no_policy_is_below_the_relaxed_bound() -> None:
    for seed in (1, 2):
        world = make_world("small", seed, request_count=80)
        bound = relaxed_cost_s(world, seed)
        for name in ("ect", "cloud-only", "probabilistic"):
            assert bound <= mean_cost_s(Simulator(world, seed).run(create(name)))


def test_looking_ahead_leaves_no_trace_in_the_simulation() -> None:
    world = make_world("small", 3, request_count=40)

    def digest(is_curious: bool) -> str:
        simulator, policy = Simulator(world, 3), EarliestCompletion()
        rng = np.random.default_rng(0)
        while (question := simulator.next_question()) is not None:
            view, request = question.ask.view, question.ask.request
            found = rank(view, request)
            if is_curious and not isinstance(found, NotPlaced):
                first = cost_in_a_copy(simulator, found, 0, 5)
                assert first == cost_in_a_copy(simulator, found, 0, 5)
                assert np.isfinite(first)
            simulator.answer(policy.decide(view, request, rng), policy.policy_id)
        return simulator.log_digest()

    assert digest(True) == digest(False)


def test_who_sees_the_future_does_better() -> None:
    ratios = []
    for seed in (11, 12):
        world = make_world("small", seed, request_count=40)
        heuristic = mean_cost_s(Simulator(world, seed).run(EarliestCompletion()))
        outcomes = clairvoyant(world, seed)
        assert len(outcomes) == world.trace.request_count
        ratios.append(mean_cost_s(outcomes) / heuristic)
    assert np.mean(ratios) < 1.0


def test_the_suite_compares_on_the_same_worlds() -> None:
    case = next(c for c in cases() if c.name == "small")
    rows = run(["ect", "edge-only"], [case], range(1_000_000, 1_000_002), 60, workers=1)
    by_name = {row["policy"]: row for row in rows}
    assert by_name["ect"]["versus_ect"] == 0.0
    assert by_name["edge-only"]["edge"] == 1.0
    text = to_markdown(rows, 2, 60)
    assert (
        text.index("| ect ") < text.index("| edge-only ") or by_name["edge-only"]["versus_ect"] < 0
    )

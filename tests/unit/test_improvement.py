"""Bounds, labels from copies of the simulation, and learning from them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from envs.simulator import Simulator
from envs.world import make_world
from tierwise.domain.decision import NotPlaced
from tierwise.errors import InvalidArgument
from tierwise.placement.features import CANDIDATES_MAX, FEATURES
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policy import create
from tierwise.placement.ranking import rank
from training.bounds import clairvoyant, cost_in_a_copy, relaxed_cost_s
from training.figures import mean_cost_s
from training.improve import Examples, expected_cost, improve, load
from training.network import Residual
from training.report import to_markdown
from training.suite import cases, run
from training.teacher import Labels, label


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


def test_labels_are_relative_to_the_base_scores_choice() -> None:
    labels = Labels()
    label("small", 7, 60, create("ect"), np.random.default_rng(1), labels)
    assert len(labels) > 3
    for gaps, valid, costs in zip(labels.gaps, labels.valid, labels.costs, strict=True):
        tried = np.isfinite(costs)
        assert 2 <= tried.sum() <= valid.sum()
        assert not tried[valid == 0.0].any()
        best = int(np.argmin(np.where(valid > 0.0, gaps, np.inf)))
        assert costs[best] == 0.0


def examples(count: int, seed: int) -> Examples:
    """Return decisions of three candidates where the one with the lowest feature 1 costs least."""
    rng = np.random.default_rng(seed)
    features = np.zeros((count, CANDIDATES_MAX, len(FEATURES)), dtype=np.float32)
    features[:, :3, 1] = rng.uniform(0.0, 2.0, size=(count, 3))
    valid = np.zeros((count, CANDIDATES_MAX), dtype=np.float32)
    valid[:, :3] = 1.0
    costs = np.zeros((count, CANDIDATES_MAX), dtype=np.float32)
    costs[:, :3] = features[:, :3, 1] - features[:, :1, 1] + rng.normal(0.0, 0.5, size=(count, 3))
    gaps = np.zeros((count, CANDIDATES_MAX), dtype=np.float32)
    return Examples(*map(torch.from_numpy, (features, gaps, valid, costs)))


def test_the_network_learns_the_mean_of_noisy_labels() -> None:
    learn, held = examples(1500, 1), examples(500, 2)
    with torch.no_grad():
        start = float(expected_cost(Residual(16), held))
    _, learnt = improve(learn, held, seed=1, hidden=16, epochs=25)
    best_possible = float(held.costs[:, :3].min(dim=1).values.mean())
    assert learnt < start - 0.2
    assert learnt > best_possible


def test_labels_that_were_not_tried_are_never_attractive(tmp_path: Path) -> None:
    labels = Labels()
    label("small", 7, 60, create("ect"), np.random.default_rng(1), labels)
    labels.write(tmp_path / "a.npz")
    learn, held = load([tmp_path])
    assert len(learn) + len(held) == len(labels)
    assert torch.isfinite(learn.costs).all()
    with pytest.raises(InvalidArgument, match="no labels"):
        load([tmp_path / "nothing"])


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

"""Rivals that learn or plan: LinUCB, DeF-DReL-style, rollouts; and the prices of the LP."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linprog

from envs.simulator import Simulator
from envs.world import make_world
from tierwise.cost.profiles import Profiles
from tierwise.domain.decision import Placed
from tierwise.domain.function import FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import FunctionId, NodeId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView
from tierwise.placement.futures import total_rate
from tierwise.placement.policies import defdrel
from tierwise.placement.policies.defdrel import DefDrel
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policies.linucb import PENDING_MAX, LinUCB
from tierwise.placement.policies.probabilistic import Probabilistic, node_prices, softmin
from tierwise.placement.policies.rollout import Rollout
from tierwise.placement.policy import Learner, Policy
from tierwise.placement.ranking import Ranking, rank
from training import defdrel as train_defdrel
from training import linucb as train_linucb
from training import tune as tuning

SPEC = FunctionSpec(namespace="default", name="f", version=1, code_digest="d")
F = SPEC.function_id
REQUEST = Request(request_id=RequestId("r"), spec=SPEC, origin=NodeId("edge-1"))
IDLE = NodeReading(free=Resources(cpus=1, memory_mib=1024), warm={F: 1})
BUSY = NodeReading(free=Resources(cpus=0, memory_mib=1024), backlog_s=2.0, queued=3)
LINKS = LinkTable(
    by_tier={
        (Tier.EDGE, Tier.FOG): Link(rtt_s=0.01, bandwidth_bytes_per_s=1e7),
        (Tier.EDGE, Tier.CLOUD): Link(rtt_s=0.05, bandwidth_bytes_per_s=1e7),
    }
)


def row(name: str, reading: NodeReading = IDLE, *, cpus: float = 1.0) -> NodeView:
    node = Node(
        node_id=NodeId(name),
        tier=Tier[name.split("-")[0].upper()],
        capacity=Resources(cpus=cpus, memory_mib=1024),
    )
    return NodeView(node=node, reading=reading)


def view(*rows: NodeView, profiles: dict[FunctionId, FunctionProfile] | None = None) -> ClusterView:
    return ClusterView(
        now_s=0.0, origin=rows[0].node, nodes=rows, links=LINKS, profiles=profiles or {}
    )


def first(policy: Policy, seen: ClusterView, **changes: Any) -> str:
    decision = policy.decide(seen, replace(REQUEST, **changes), np.random.default_rng(0))
    assert isinstance(decision, Placed), decision
    return decision.node_ids[0]


def outcome(request_id: str, node: str | None, seconds: float) -> Outcome:
    return Outcome(
        request_id=RequestId(request_id),
        function_id=F,
        state=OutcomeState.OK if node else OutcomeState.FAILED,
        origin=NodeId("edge-1"),
        node_id=NodeId(node) if node else None,
        latency=LatencySplit(run_s=seconds),
        deadline_s=1.0,
    )


# -- LinUCB -------------------------------------------------------------------------------------


def test_linucb_learns_to_avoid_what_turned_out_dear() -> None:
    policy = LinUCB(alpha=0.05, prior=0.0)
    seen = view(row("edge-1"), row("cloud-1"))
    taken = []
    for number in range(60):
        taken.append(first(policy, seen, request_id=RequestId(f"r{number}")))
        policy.learn(outcome(f"r{number}", taken[-1], 5.0 if taken[-1] == "edge-1" else 0.1))
    assert taken[0] == "edge-1"  # nothing is known, and the base score prefers it
    assert set(taken[-20:]) == {"cloud-1"}


def test_linucb_tries_what_it_knows_little_of_if_its_optimism_is_wide() -> None:
    seen = view(row("edge-1"), row("cloud-1"))
    policy = LinUCB(alpha=0.0, prior=0.0)
    for number in range(30):
        first(policy, seen, request_id=RequestId(f"r{number}"))
        policy.learn(outcome(f"r{number}", *(("edge-1", 0.3) if number else ("cloud-1", 0.5))))
    assert first(policy, seen) == "edge-1"
    policy.alpha = 5.0
    assert first(policy, seen) == "cloud-1"


def test_linucb_counts_an_outcome_for_the_node_where_it_ran() -> None:
    seen = view(row("edge-1"), row("cloud-1"))
    policy = LinUCB(alpha=0.0, prior=0.0)
    for number in range(20):  # sent to the edge, which refused: the cloud was dear
        policy._pending.clear()
        first(policy, seen, request_id=RequestId(f"r{number}"))
        policy.learn(outcome(f"r{number}", "cloud-1", 9.0))
    assert policy.observation_count == 20
    assert first(policy, seen) == "edge-1"


def test_linucb_counts_a_request_that_never_ran_for_its_first_choice() -> None:
    policy = LinUCB(alpha=0.0, prior=0.0)
    seen = view(row("edge-1"), row("cloud-1"))
    for number in range(20):
        node = first(policy, seen, request_id=RequestId(f"r{number}"))
        policy.learn(outcome(f"r{number}", None if node == "edge-1" else node, 0.1))
    assert first(policy, seen) == "cloud-1"


def test_linucb_awaits_a_bounded_number_of_outcomes_and_ignores_strange_ones() -> None:
    policy = LinUCB()
    seen = view(row("edge-1"), row("cloud-1"))
    for number in range(PENDING_MAX + 5):
        first(policy, seen, request_id=RequestId(f"r{number}"))
    assert len(policy._pending) == PENDING_MAX
    policy.learn(outcome("r0", "edge-1", 1.0))  # forgotten
    policy.learn(outcome("never asked", "edge-1", 1.0))
    assert policy.observation_count == 0


def test_a_fresh_linucb_has_forgotten_its_outcomes_but_not_its_prior() -> None:
    policy = LinUCB(alpha=0.3, prior=50.0)
    seen = view(row("edge-1"), row("cloud-1"))
    first(policy, seen)
    policy.learn(outcome("r", "edge-1", 30.0))
    again = policy.fresh()
    assert (again.alpha, again.prior, again.observation_count) == (0.3, 50.0, 0)
    np.testing.assert_array_equal(again._inverse, LinUCB(0.3, 50.0)._inverse)
    assert not np.array_equal(again._moment, policy._moment)


def test_the_inverse_that_is_kept_is_the_inverse() -> None:
    policy = LinUCB(prior=0.0)
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(50, len(policy._moment)))
    for x in inputs:
        policy._observe(x, 1.0)
    direct = np.linalg.inv(np.eye(inputs.shape[1]) + inputs.T @ inputs)
    np.testing.assert_allclose(policy._inverse, direct, atol=1e-9)


@pytest.mark.parametrize("policy", [LinUCB(alpha=0.5, prior=0.0), Rollout(samples=2)])
def test_a_run_of_the_simulator_starts_afresh_whatever_ran_before(policy: Policy) -> None:
    assert isinstance(policy, Learner)
    world = make_world("small", 3, request_count=60)
    digests = []
    for _ in range(2):
        simulator = Simulator(world, 3)
        simulator.run(policy)
        digests.append(simulator.log_digest())
    assert digests[0] == digests[1]
    if isinstance(policy, LinUCB):
        assert policy.observation_count == 0 and not policy._pending
    else:
        assert isinstance(policy, Rollout) and not policy._habits


def test_the_simulator_tells_a_learner_how_every_request_ended() -> None:
    class Counting(EarliestCompletion):
        def __init__(self) -> None:
            super().__init__()
            self.told: list[RequestId] = []

        def fresh(self) -> "Counting":
            return self

        def learn(self, outcome: Outcome) -> None:
            self.told.append(outcome.request_id)

    policy = Counting()
    world = make_world("city", 4, request_count=60)
    outcomes = Simulator(world, 4).run(policy)
    assert policy.told == [each.request_id for each in outcomes]


# -- DeF-DReL -----------------------------------------------------------------------------------


def test_defdrel_takes_one_side_and_lets_the_base_score_choose_there() -> None:
    seen = view(row("edge-1", BUSY), row("fog-1"), row("cloud-1", BUSY), row("cloud-2"))
    rng = np.random.default_rng(0)
    near = DefDrel(margin=1e9).decide(seen, REQUEST, rng)
    far = DefDrel(margin=-1e9).decide(seen, REQUEST, rng)
    assert isinstance(near, Placed) and isinstance(far, Placed)
    assert near.node_ids == ("fog-1", "edge-1", "cloud-2", "cloud-1")
    assert far.node_ids == ("cloud-2", "cloud-1", "fog-1", "edge-1")


def test_defdrel_sees_distance_priorities_demand_and_what_the_fog_has_left() -> None:
    calm = view(row("edge-1"), row("fog-1"), row("cloud-1"))
    full = view(row("edge-1", BUSY), row("fog-1", BUSY), row("cloud-1", BUSY))
    x = dict(zip(defdrel.INPUTS, defdrel.inputs(calm, REQUEST).tolist(), strict=True))
    assert x["distance"] == pytest.approx(np.log1p(100 * 0.01))
    np.testing.assert_array_equal(
        defdrel.inputs(calm, REQUEST)[:-1], defdrel.inputs(full, REQUEST)[:-1]
    )
    assert x["fog_free"] == 1.0 and defdrel.inputs(full, REQUEST)[-1] == 0.0
    changed = replace(
        REQUEST,
        priority=Priority.CRITICAL,
        request_bytes=10**6,
        spec=replace(SPEC, memory_mib=256, cpus=2.0, priority=Priority.LOW),
    )
    y = dict(zip(defdrel.INPUTS, defdrel.inputs(calm, changed).tolist(), strict=True))
    assert y["user_priority"] == 1.0 and y["application_priority"] == 0.0
    assert y["latency"] > x["latency"]
    assert (y["cpus"], y["memory"]) == (2.0, 1.0)


def test_defdrels_shipped_network_has_its_shape_and_answers_both_ways() -> None:
    weights = defdrel._package_weights()
    assert weights[0].shape[0] == len(defdrel.INPUTS) and weights[-1].shape == (2,)
    assert all(np.isfinite(array).all() for array in weights)
    rng = np.random.default_rng(0)
    values = np.array(
        [
            defdrel.forward(weights, rng.uniform(-1, 2, len(defdrel.INPUTS)).astype(np.float32))
            for _ in range(500)
        ]
    )
    assert 0 < (values[:, defdrel.CLOUD] > values[:, defdrel.FOG]).sum() < 500


# -- rollouts -----------------------------------------------------------------------------------

LONG = FunctionProfile(run_s=1.0, cold_start_s=0.2, rate_per_s=0.1, call_count=6_000)
SHORT_SPEC = replace(SPEC, name="short", deadline_s=0.03, priority=Priority.CRITICAL)


def crowded(rate: float) -> tuple[ClusterView, Request]:
    """A long job that would end a little earlier here, where short calls arrive at a rate."""
    short = FunctionProfile(
        run_s=0.01, cold_start_s=0.2, rate_per_s=rate, call_count=int(rate * 60_000)
    )
    warm = {F: 1, SHORT_SPEC.function_id: 1}
    rows = (row("edge-1", replace(IDLE, warm=warm)), row("cloud-1", replace(IDLE, warm=warm)))
    seen = view(*rows, profiles={F: LONG, SHORT_SPEC.function_id: short})
    return seen, replace(REQUEST, deadline_s=9.0, spec=replace(SPEC, deadline_s=9.0))


def planner(**changes: Any) -> Rollout:
    policy = Rollout(**({"samples": 32, "horizon": 16, "caution": 0.0, "trust": 1.0} | changes))
    policy._remember(replace(REQUEST, spec=SHORT_SPEC))
    return policy


def chosen(policy: Policy, seen: ClusterView, request: Request) -> str:
    decision = policy.decide(seen, request, np.random.default_rng(0))
    assert isinstance(decision, Placed)
    return decision.node_ids[0]


def test_rollouts_see_what_a_decision_does_to_those_that_follow() -> None:
    seen, request = crowded(rate=10.0)
    assert chosen(EarliestCompletion(), seen, request) == "edge-1"
    assert chosen(planner(), seen, request) == "cloud-1"
    calm, request = crowded(rate=0.001)
    assert chosen(planner(), calm, request) == "edge-1"


def test_without_followers_or_trust_a_rollout_changes_nothing_here() -> None:
    seen, request = crowded(rate=10.0)
    assert chosen(planner(horizon=0), seen, request) == "edge-1"
    assert chosen(planner(trust=0.0), seen, request) == "edge-1"


def test_the_base_scores_choice_stands_unless_the_futures_are_sure() -> None:
    seen, request = crowded(rate=10.0)
    assert chosen(planner(caution=1e6), seen, request) == "edge-1"


def test_futures_are_common_to_all_candidates() -> None:
    policy = planner(horizon=0)
    seen = view(row("edge-1"), row("edge-2"), row("edge-3"))
    seen = replace(seen, origin=None)
    ranking = rank(seen, REQUEST)
    assert isinstance(ranking, Ranking)
    costs = policy._costs(seen, REQUEST, ranking, np.arange(3), np.random.default_rng(0))
    np.testing.assert_array_equal(costs[0], costs[1])
    np.testing.assert_array_equal(costs[0], costs[2])
    assert costs[0].std() > 0.0


@pytest.mark.parametrize("length_s", [5.0, 60.0, 600.0])
def test_the_rate_is_told_before_the_profiles_window_has_passed(length_s: float) -> None:
    rng = np.random.default_rng(0)
    profiles = Profiles()
    times = np.cumsum(rng.exponential(1.0 / 20.0, size=int(20 * length_s)))
    for number, at_s in enumerate(times):
        profiles.learn(outcome(str(number), "edge-1", 0.1), 1.0, float(at_s))
    assert total_rate(list(profiles.snapshot().values())) == pytest.approx(20.0, rel=0.2)


# -- the linear program -------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.2, 0.5, 0.8])
def test_the_prices_come_near_the_linear_program(load: float) -> None:
    rng = np.random.default_rng(0)
    excess, overload = [], []
    for _ in range(40):
        m, k = int(rng.integers(2, 8)), int(rng.integers(3, 10))
        speed = rng.uniform(0.3, 1.2, k)
        run_s = np.clip(rng.lognormal(np.log(0.1), 0.8, m), 0.01, 1.0)
        room = 0.7 * speed * rng.choice([1, 2, 4], k)
        demand = rng.dirichlet(np.ones(m)) * load * room.sum()
        base_s = run_s[:, None] / speed + rng.uniform(0.0, 0.06, k)
        best = linprog(
            (demand[:, None] * base_s).ravel(),
            np.hstack([np.eye(k) * each for each in demand]),
            room,
            np.kron(np.eye(m), np.ones(k)),
            np.ones(m),
        )
        temperature_s = Probabilistic().temperature_s
        prices = node_prices(base_s, demand, room, temperature_s, float(run_s.mean()))
        shares = softmin(base_s + prices, temperature_s)
        excess.append(float((demand[:, None] * shares * base_s).sum()) / best.fun - 1.0)
        overload.append(float(np.max(demand @ shares / room)) - 1.0)
    assert np.mean(excess) < 0.08
    assert np.mean(np.maximum(overload, 0.0)) < 0.05


# -- tuning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_real", [True, False])
def test_a_search_adopts_only_what_also_wins_on_other_worlds(
    monkeypatch: pytest.MonkeyPatch, is_real: bool
) -> None:
    def cost_of(make: Any, presets: Any, seeds: range, request_count: int) -> float:
        gain = -0.1 * make().choices
        return gain if seeds[0] >= tuning.CONFIRMATION and not is_real else -gain

    monkeypatch.setattr(tuning, "cost_of", cost_of)
    seeds = range(tuning.VALIDATION, tuning.VALIDATION + 4)
    found = tuning.tune("power-of-two", trials=30, presets=["small"], seeds=seeds, request_count=1)
    best = min(tuning.TUNABLES["power-of-two"].values["choices"])
    assert found["found"]["choices"] == best
    assert (found["confirmed"] < 0.0) == is_real
    assert (found["parameters"] == found["found"]) == is_real
    assert is_real or found["parameters"] == found["defaults"]


def test_every_world_of_a_search_gets_a_policy_of_its_own() -> None:
    made = []

    def make() -> Policy:
        made.append(LinUCB(prior=0.0))
        return made[-1]

    tuning.cost_of(make, ["small"], range(3), 20)
    assert len(made) == 3


@pytest.mark.parametrize(
    ("module", "name", "flags"),
    [
        (train_defdrel, "defdrel", ["--steps", "64", "--validation-worlds", "1"]),
        (train_linucb, "linucb", ["--worlds", "1"]),
    ],
)
def test_what_ships_is_made_by_the_command_on_its_card(
    module: Any, name: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [name, "--seed", "5", "--requests", "20", "--preset", "small", *flags]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path)])
    assert module.main() == 0
    card = json.loads((tmp_path / f"{name}.json").read_text())
    assert card["seed"] == 5
    assert card["command"].startswith(f"python -m training.{name} --preset small --seed 5 ")
    shipped = Path(module.policies.__file__).parent
    assert json.loads((shipped / f"{name}.json").read_text()).keys() == card.keys()
    with (
        np.load(tmp_path / f"{name}.npz", allow_pickle=False) as made,
        np.load(shipped / f"{name}.npz", allow_pickle=False) as ours,
    ):
        assert {k: made[k].shape for k in made.files} == {k: ours[k].shape for k in ours.files}

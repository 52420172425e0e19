"""What one policy made of one simulated world, in figures."""

from collections.abc import Sequence
from typing import Self

import numpy as np

from agent.machine import NodeMachine
from envs.simulator import Simulator
from envs.world import World
from tierwise.clock import precise_s
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.decision import Decision
from tierwise.domain.function import Priority
from tierwise.domain.ids import NodeId
from tierwise.domain.outcome import Outcome
from tierwise.domain.request import Request
from tierwise.domain.topology import Tier
from tierwise.domain.view import ClusterView
from tierwise.placement.policy import Learner, Policy

Figures = dict[str, float]


def measure(policy: Policy, world: World, seed: int) -> Figures:
    """Simulate a world with a policy.

    Returns:
        `cost_s` (the objective per request, second-equivalents); `p50_s`, `p95_s`, `p99_s` of
        the latency; `missed` and `missed_<priority>` (share of requests without a result by
        their deadline); `cold` (share); `usd_per_million`; `wasted_gb_s` (memory of idle
        instances × seconds, per request); `edge`, `fog`, `cloud` (shares of what ran); `fairness`;
        `decision_us` (median wall time of a decision on this machine).
    """
    simulator = Simulator(world, seed)
    clocked, waste = clock(policy), Waste(simulator)
    simulator.on_step = waste.stepped
    outcomes = simulator.run(clocked)
    tier_of = {node.node_id: node.tier for node in world.nodes}
    latency_s = np.array([outcome.latency.total_s for outcome in outcomes])
    missed = np.array([outcome.is_missed for outcome in outcomes])
    priority = np.array([int(outcome.priority) for outcome in outcomes])
    tiers = [tier_of[outcome.node_id] for outcome in outcomes if outcome.node_id is not None]
    p50_s, p95_s, p99_s = np.percentile(latency_s, (50, 95, 99))
    figures = {
        "cost_s": mean_cost_s(outcomes),
        "p50_s": float(p50_s),
        "p95_s": float(p95_s),
        "p99_s": float(p99_s),
        "missed": float(missed.mean()),
        "cold": float(np.mean([outcome.is_cold for outcome in outcomes])),
        "usd_per_million": 1e6 * float(np.mean([outcome.money_usd for outcome in outcomes])),
        "wasted_gb_s": waste.gb_s() / len(outcomes),
        "fairness": fairness(outcomes),
        "decision_us": 1e6 * float(np.median(clocked.elapsed_s)) if clocked.elapsed_s else 0.0,
    }
    for level in Priority:
        mine = missed[priority == int(level)]
        figures[f"missed_{level.name.lower()}"] = float(mine.mean()) if len(mine) else 0.0
    for tier in Tier:
        figures[tier.label] = sum(t is tier for t in tiers) / max(1, len(tiers))
    return figures


def mean_cost_s(outcomes: Sequence[Outcome]) -> float:
    """Return the objective per request, second-equivalents."""
    return float(np.mean([DEFAULT_OBJECTIVE.cost_s(outcome) for outcome in outcomes]))


def fairness(outcomes: Sequence[Outcome]) -> float:
    """Return Jain's index over the users' nodes of the share of deadlines held; 1 is equal.

    Jain, Chiu and Hawe, 1984: (Σx)² ÷ (n·Σx²).
    """
    by_origin: dict[NodeId, list[bool]] = {}
    for outcome in outcomes:
        by_origin.setdefault(outcome.origin, []).append(not outcome.is_missed)
    held = np.array([np.mean(each) for each in by_origin.values()])
    return float(held.sum() ** 2 / max(1e-9, len(held) * (held**2).sum()))


def clock(policy: Policy) -> "Clocked":
    """Return the policy with its decisions timed; a learner still learns."""
    return ClockedLearner(policy) if isinstance(policy, Learner) else Clocked(policy)


class Clocked:
    """A policy whose decisions are timed."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.policy_id = policy.policy_id
        self.elapsed_s: list[float] = []

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return what the policy decides."""
        started_s = precise_s()
        decision = self._policy.decide(view, request, rng)
        self.elapsed_s.append(precise_s() - started_s)
        return decision


class ClockedLearner(Clocked):
    """The same for a policy that learns from outcomes."""

    _policy: Learner

    def fresh(self) -> Self:
        """Start afresh, with the same clock."""
        self._policy = self._policy.fresh()
        return self

    def learn(self, outcome: Outcome) -> None:
        """Pass an outcome on."""
        self._policy.learn(outcome)


class Waste:
    """Adds up the memory of idle instances over the simulated time."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._mib_s = 0.0
        self._since: dict[NodeId, tuple[float, int]] = {}  # when, and MiB idle from then on
        self._memory_mib = {
            function: behaviour.spec.memory_mib
            for function, behaviour in simulator.world.trace.behaviours.items()
        }

    def stepped(self, machine: NodeMachine) -> None:
        """Take note of what is idle on a node from now on."""
        now_s = self._simulator.now_s
        since_s, mib = self._since.get(machine.node.node_id, (now_s, 0))
        self._mib_s += mib * (now_s - since_s)
        idle_mib = sum(
            self._memory_mib[function] * count for function, count in machine.pool.warm.items()
        )
        self._since[machine.node.node_id] = now_s, idle_mib

    def gb_s(self) -> float:
        """Return the sum so far, GiB × seconds."""
        return self._mib_s / 1024.0

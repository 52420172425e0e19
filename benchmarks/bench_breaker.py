"""Does the circuit breaker open for policies that are bad, and stay closed for those that are not?

    python -m benchmarks.bench_breaker

*Simulated*: each policy runs through every preset; one breaker per node that takes requests watches
the calls that end there, and only watches: it takes nobody off duty, so that policies are compared
on equal traffic. What is shown is on how many of these nodes it would have opened for misses.
"""

import os
from collections import defaultdict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts its threads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks.report import make_table, show
from envs.simulator import Simulator
from envs.world import PRESETS, make_world
from tierwise.domain.decision import Decision
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.outcome import OutcomeState
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.breaker import CircuitBreaker
from tierwise.placement.policy import Policy, create

POLICIES = (
    "learned",
    "ect",
    "soft-ect",
    "probabilistic",
    "least-loaded",
    "edge-first",
    "edge-only",
)
SEEDS = (1, 2)
CALLS = 800


class Timed:
    """Notes when a policy was asked about each call."""

    def __init__(self, policy: Policy) -> None:
        self.policy_id = policy.policy_id
        self.asked_at_s: dict[RequestId, float] = {}
        self._policy = policy

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the policy's decision."""
        self.asked_at_s.setdefault(request.request_id, view.now_s)
        return self._policy.decide(view, request, rng)


def watch(name: str, preset: str, seed: int) -> tuple[int, int, list[tuple[bool, bool]]]:
    """Return nodes whose breaker opened, all nodes, and (missed, predicted) of each call."""
    policy = Timed(create(name))
    outcomes = Simulator(make_world(preset, seed, request_count=CALLS), seed).run(policy)
    ended: list[tuple[float, NodeId, bool, bool]] = []
    for outcome in outcomes:
        why = outcome.explanation
        if why is None or outcome.state not in (OutcomeState.OK, OutcomeState.EXPIRED):
            continue
        row = next(r for r in why.candidates if r.node_id == why.heuristic_choice)
        was_predicted = sum(row[1:6]) > outcome.deadline_s
        at_s = policy.asked_at_s[outcome.request_id] + outcome.latency.total_s
        ended.append((at_s, outcome.origin, outcome.is_missed, was_predicted))
    breakers: dict[NodeId, CircuitBreaker] = defaultdict(CircuitBreaker)
    for at_s, node_id, is_missed, was_predicted in sorted(ended):
        breakers[node_id].ended(
            at_s, is_missed=is_missed, was_predicted=was_predicted, by_base=False
        )
    opened = sum(breaker.opened_count > 0 for breaker in breakers.values())
    return opened, len(breakers), [(missed, predicted) for _, _, missed, predicted in ended]


def main() -> None:
    caption = (
        f"Presets {', '.join(PRESETS)}; seeds {', '.join(map(str, SEEDS))}; {CALLS} calls each. "
        "Predicted: share of calls that were predicted late on the base score's choice. "
        "edge-only sees edges only, so its prediction is of the best edge."
    )
    title = "Breakers that would have opened for misses (simulated)"
    table = make_table(title, ("policy", "nodes", "opened", "missed", "predicted"), caption)
    for name in POLICIES:
        runs = [watch(name, preset, seed) for preset in PRESETS for seed in SEEDS]
        calls = np.array([call for _, _, ended in runs for call in ended], dtype=np.float64)
        missed, predicted = calls.mean(axis=0)
        table.add_row(
            name,
            str(sum(nodes for _, nodes, _ in runs)),
            str(sum(opened for opened, _, _ in runs)),
            f"{missed:.1%}",
            f"{predicted:.1%}",
        )
    show(table)


if __name__ == "__main__":
    main()

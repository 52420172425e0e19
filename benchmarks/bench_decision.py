"""How long does one placement decision take, and where does the time go?

    python -m benchmarks.bench_decision

One thread, views of 1 to 64 feasible nodes. The rows are measured interleaved, round by round, so
that a slow moment of the machine hits all of them. The weights are random: the time of a forward
pass does not depend on them.
"""

import os
from collections.abc import Callable
from dataclasses import asdict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts its threads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks.report import at_most, interleaved, make_table, show, spread
from tierwise.cost.estimate import estimate
from tierwise.domain.function import FunctionProfile, FunctionSpec
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import LinkTable, Node, Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView
from tierwise.placement import signals
from tierwise.placement.features import BOUND, CANDIDATES_MAX, FEATURES, SCHEMA, encode
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policies.learned import Card, LearnedPolicy, Network, Price, initial
from tierwise.placement.policy import Policy
from tierwise.placement.ranking import Ranking, rank
from tierwise.placement.score import DEFAULT_WEIGHTS

SEED = 7
ROUNDS = 60
CALLS = 50  # per round and row
HIDDEN = 64
NODE_COUNTS = (1, 4, 16, 64)
TARGET_US = {1: 10.0, 16: 100.0}
STEPS = ("estimate", "signals", "encode", "forward")

SPEC = FunctionSpec(namespace="bench", name="f", version=1, code_digest="d")
REQUEST = Request(request_id=RequestId("r"), spec=SPEC, origin=NodeId("n-00"), request_bytes=50_000)


def make_view(node_count: int, rng: np.random.Generator) -> ClusterView:
    """Return a view of that many nodes, all feasible, with different loads."""
    rows = []
    for i in range(node_count):
        node = Node(
            node_id=NodeId(f"n-{i:02}"),
            tier=Tier(1 + i % 3),
            capacity=Resources(cpus=4, memory_mib=4096),
            speed=float(rng.uniform(0.25, 2.0)),
        )
        reading = NodeReading(
            sequence=1,
            free=Resources(cpus=float(rng.integers(5)), memory_mib=int(rng.integers(4096))),
            queued=int(rng.integers(4)),
            backlog_s=float(rng.exponential(0.1)),
            warm={SPEC.function_id: int(rng.integers(3))},
            eviction_price_s_per_mib=1e-4,
        )
        rows.append(NodeView(node=node, reading=reading, received_at_s=9.5))
    return ClusterView(
        now_s=10.0,
        origin=rows[0].node,
        nodes=tuple(rows),
        links=LinkTable(),
        profiles={SPEC.function_id: FunctionProfile(rate_per_s=3.0)},
    )


def make_learned(rng: np.random.Generator, *, is_deep: bool) -> LearnedPolicy:
    """Return a policy with random prices, and random weights if deep, that trusts itself."""
    network = initial(HIDDEN, rng)
    if is_deep:
        last = (rng.standard_normal(HIDDEN) * 0.1).astype(np.float32)
        network = Network(**(network.arrays() | {"w4": last}))
    prices = {
        name: Price(weight=float(weight), low=0.0, high=signals.BOUND)
        for name, weight in zip(
            signals.SIGNALS, rng.uniform(0.0, 0.3, len(signals.SIGNALS)), strict=True
        )
    }
    card = Card(
        name="bench",
        version=1,
        schema=SCHEMA,
        beta=4.0,
        lam=1.0,
        score=asdict(DEFAULT_WEIGHTS),
        low=[-BOUND] * len(FEATURES),
        high=[BOUND] * len(FEATURES),
        prices=prices,
    )
    return LearnedPolicy(network, card)


def pieces(view: ClusterView, policy: LearnedPolicy) -> dict[str, Callable[[], object]]:
    """Return the steps of one decision that are worth a column of their own."""
    ranking = rank(view, REQUEST, candidates_max=CANDIDATES_MAX)
    assert isinstance(ranking, Ranking)
    features = encode(view, REQUEST, ranking.estimates, ranking.scores)
    return {
        "estimate": lambda: estimate(view, REQUEST, view.nodes),
        "signals": lambda: signals.encode(view, REQUEST, ranking.estimates),
        "encode": lambda: encode(view, REQUEST, ranking.estimates, ranking.scores),
        "forward": lambda: policy.network.forward(features),
    }


def calls_of(policy: Policy, view: ClusterView, rng: np.random.Generator) -> Callable[[], object]:
    """Return one whole decision as a call without arguments."""
    return lambda: policy.decide(view, REQUEST, rng)


def main() -> None:
    rng = np.random.default_rng(SEED)
    deep, ect = make_learned(rng, is_deep=True), EarliestCompletion()
    learned = make_learned(rng, is_deep=False)
    calls: dict[tuple[int, str], Callable[[], object]] = {}
    for node_count in NODE_COUNTS:
        view = make_view(node_count, rng)
        calls[node_count, "ect"] = calls_of(ect, view, rng)
        calls[node_count, "learned"] = calls_of(learned, view, rng)
        calls[node_count, "deep"] = calls_of(deep, view, rng)
        if node_count > 1:
            calls |= {(node_count, name): call for name, call in pieces(view, deep).items()}
    figures = interleaved(calls, rounds=ROUNDS, count=CALLS, warm_up=2)

    caption = (
        f"Seed {SEED}; {ROUNDS} rounds of {CALLS} calls. Learned: prices "
        "alone, as shipped; deep: a network on top. Ratio: learned ÷ ect; target: for learned. The "
        "last columns are steps of deep; a sole candidate needs neither signals nor features, and "
        f"of many the best {CANDIDATES_MAX} by base score are compared."
    )
    title = "One placement decision: µs, median [10 % … 90 %] over rounds"
    table = make_table(
        title, ("nodes", "ect", "learned", "ratio", "target", "deep", *STEPS), caption
    )
    for node_count in NODE_COUNTS:
        one = {name: figures[n, name] for n, name in figures if n == node_count}
        target = TARGET_US.get(node_count)
        table.add_row(
            str(node_count),
            spread(one["ect"]),
            spread(one["learned"]),
            f"{np.median(one['learned'] / one['ect']):.1f}",
            "" if target is None else at_most(float(np.median(one["learned"])), target),
            spread(one["deep"]),
            *(f"{np.median(one[name]):.1f}" if name in one else "–" for name in STEPS),
        )
    show(table)


if __name__ == "__main__":
    main()

"""Invariants of placement over any view, sensible or not."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierwise.cost.estimate import estimate
from tierwise.domain.decision import NotPlaced, Placed
from tierwise.domain.function import FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.request import HOPS_MAX, Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, NodeState, Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView
from tierwise.placement.feasibility import feasible
from tierwise.placement.features import BOUND, FEATURES, SCHEMA, encode
from tierwise.placement.policies.learned import Card, LearnedPolicy, Network, Price
from tierwise.placement.policy import Policy, create, names
from tierwise.placement.score import base_score, sole_score
from tierwise.placement.signals import SIGNALS

SPEC = FunctionSpec(namespace="default", name="f", version=1, code_digest="d")
F = len(FEATURES)


def network(hidden: int = 16) -> Network:
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return np.asarray(rng.normal(size=shape) * 0.3, dtype=np.float32)

    return Network(
        w1=draw(F, hidden),
        b1=draw(hidden),
        w2=draw(hidden, hidden),
        b2=draw(hidden),
        w3=draw(3 * hidden, hidden),
        b3=draw(hidden),
        w4=draw(hidden),
        b4=draw(),
    )


def learned(*, lam: float = 1.0, bound: float = 8.0) -> LearnedPolicy:
    card = Card(
        name="test",
        version=1,
        schema=SCHEMA,
        beta=4.0,
        lam=lam,
        score={},
        low=[-bound] * F,
        high=[bound] * F,
        prices={name: Price(weight=0.3, low=0.0, high=50.0) for name in SIGNALS[::2]},
    )
    return LearnedPolicy(network(), card)


DRAWS = ("probabilistic@1", "soft-ect@1")  # these sample, and log with what probability
POLICIES: list[Policy] = [
    *(create(n) for n in names() if n != "learned"),
    learned(),
    learned(bound=1.0),  # falls back often
]

# Everything that can come over the wire, and some that cannot.
seconds = st.one_of(st.just(0.0), st.floats(0.0, 10.0), st.floats(0.0, 1e9))
counts = st.one_of(st.integers(0, 4), st.integers(0, 2**31))
sizes = st.one_of(st.integers(0, 4096), st.integers(0, 2**40))
tiers = st.sampled_from(Tier)
tier_sets = st.frozensets(tiers, min_size=1)
links = st.builds(
    Link,
    rtt_s=st.floats(0.0, 1e4),
    bandwidth_bytes_per_s=st.one_of(st.floats(1.0, 1e10), st.just(float("inf"))),
)
amounts = st.builds(
    Resources,
    cpus=st.one_of(st.floats(0.0, 8.0), st.floats(0.0, 1e4)),
    memory_mib=st.one_of(st.integers(0, 1024), st.integers(0, 10**9)),
    gpu_slots=st.integers(0, 1),
)
readings = st.builds(
    NodeReading,
    free=amounts,
    queued=counts,
    backlog_s=seconds,
    overtaken_s=st.just(()) | st.tuples(*[seconds] * len(Priority)),
    warm=st.one_of(st.just({}), st.fixed_dictionaries({SPEC.function_id: counts})),
    engaged=st.one_of(st.just({}), st.fixed_dictionaries({SPEC.function_id: counts})),
    eviction_price_s_per_mib=st.floats(0.0, 1e9),
)
requests = st.builds(
    Request,
    request_id=st.just(RequestId("r")),
    spec=st.builds(
        FunctionSpec,
        namespace=st.just("default"),
        name=st.just("f"),
        version=st.just(1),
        code_digest=st.just("d"),
        memory_mib=st.integers(1, 512),
        cpus=st.floats(0.0, 2.0),
        gpu_slots=st.sampled_from([0, 0, 0, 1]),
        tiers=st.one_of(st.just(frozenset(Tier)), tier_sets),
    ),
    origin=st.just(NodeId("n-0")),
    priority=st.sampled_from(Priority),
    deadline_s=st.one_of(st.floats(1e-3, 10.0), st.floats(-1e6, 1e6)),
    budget_usd=st.one_of(st.none(), st.floats(0.0, 1e-3)),
    request_bytes=sizes,
    item_count=st.integers(1, 10_000),
    data_nodes=st.sampled_from([(), (), (NodeId("n-1"), NodeId("gone"))]),
    data_bytes=sizes,
    tiers=st.one_of(st.none(), tier_sets),
    node_id=st.sampled_from([None, None, None, NodeId("n-0"), NodeId("gone")]),
    hops=st.integers(0, HOPS_MAX),
    excluded=st.sampled_from([frozenset(), frozenset({NodeId("n-0"), NodeId("n-2")})]),
)


@st.composite
def views(draw: st.DrawFn, *, nodes_min: int = 0, nodes_max: int = 20) -> ClusterView:
    count = draw(st.integers(nodes_min, nodes_max))
    rows: tuple[NodeView, ...] = tuple(
        NodeView(
            node=Node(
                node_id=NodeId(f"n-{i}"),
                tier=draw(tiers),
                capacity=draw(amounts),
                speed=draw(st.floats(1e-3, 1e3)),
            ),
            reading=draw(readings),
            state=draw(st.sampled_from([NodeState.READY, NodeState.READY, *NodeState])),
            received_at_s=draw(st.floats(-1e9, 1e3)),
            pending_s=draw(seconds),
            reachable=draw(st.sampled_from([True, True, True, False])),
        )
        for i in range(count)
    )
    has_origin = draw(st.booleans())
    profile = FunctionProfile(
        run_s=draw(seconds),
        cold_start_s=draw(seconds),
        response_bytes=draw(sizes),
        rate_per_s=draw(st.floats(0.0, 1e6)),
    )
    return ClusterView(
        now_s=draw(st.floats(0.0, 1e3)),
        origin=rows[0].node if rows and has_origin else None,
        nodes=rows,
        links=LinkTable(by_tier={(Tier.EDGE, Tier.CLOUD): draw(links)}, default=draw(links)),
        profiles={SPEC.function_id: profile} if draw(st.booleans()) else {},
    )


@given(view=views(), request=requests)
@settings(max_examples=300, deadline=None)
def test_no_policy_ever_places_on_a_masked_node(view: ClusterView, request: Request) -> None:
    candidates, masked = feasible(view, request)
    allowed = {row.node.node_id for row in candidates}
    for policy in POLICIES:
        decision = policy.decide(view, request, np.random.default_rng(0))
        if isinstance(decision, NotPlaced):
            assert {node_id for node_id, _ in decision.reasons} == {
                row.node.node_id for row in view.nodes
            }
            assert not allowed or policy.policy_id in ("edge-only@1", "cloud-only@1")
            continue
        assert len(set(decision.node_ids)) == len(decision.node_ids) >= 1
        assert set(decision.node_ids) <= allowed
        if policy.policy_id not in ("edge-only@1", "cloud-only@1"):
            assert set(decision.node_ids) == allowed
            assert decision.explanation is not None
            assert decision.explanation.masked == tuple(masked)


@given(view=views(), request=requests)
@settings(max_examples=100, deadline=None)
def test_the_same_view_request_and_seed_give_the_same_decision(
    view: ClusterView, request: Request
) -> None:
    for policy in POLICIES:
        one, two = (policy.decide(view, request, np.random.default_rng(7)) for _ in range(2))
        assert one == two


@given(view=views(), request=requests)
@settings(max_examples=150, deadline=None)
def test_an_explanation_shows_the_decision_that_was_taken(
    view: ClusterView, request: Request
) -> None:
    for policy in POLICIES:
        decision = policy.decide(view, request, np.random.default_rng(0))
        if not isinstance(decision, Placed):
            continue
        why = decision.explanation
        assert why is not None
        rows = {row.node_id: row for row in why.candidates}
        assert decision.node_ids[0] in rows
        assert set(rows) <= set(decision.node_ids)
        assert why.heuristic_choice in rows
        assert rows[why.heuristic_choice].score == min(row.score for row in why.candidates)
        assert sum(row.propensity for row in why.candidates) == pytest.approx(1.0)
        chosen = rows[decision.node_ids[0]].propensity
        if policy.policy_id in DRAWS:
            assert chosen > 0.0
        else:
            assert chosen == max(row.propensity for row in rows.values())


@given(view=views(nodes_min=1), request=requests)
@settings(max_examples=300, deadline=None)
def test_features_are_bounded_for_any_view(view: ClusterView, request: Request) -> None:
    estimates = estimate(view, request, view.nodes)
    features = encode(view, request, estimates, base_score(estimates, request))
    assert features.shape == (len(view.nodes), F)
    assert np.isfinite(features).all()
    assert np.abs(features).max() <= BOUND


@given(view=views(nodes_min=2), request=requests, data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_residual_follows_its_candidate_whatever_their_order(
    view: ClusterView, request: Request, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(view.nodes))))
    shuffled = replace(view, nodes=tuple(view.nodes[i] for i in order))
    results = []
    for each in (view, shuffled):
        estimates = estimate(each, request, each.nodes)
        features = encode(each, request, estimates, base_score(estimates, request))
        results.append((features, network().forward(features)))
    (features, residual), (features_shuffled, residual_shuffled) = results
    np.testing.assert_allclose(features_shuffled, features[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(residual_shuffled, residual[order], rtol=1e-3, atol=1e-3)


@given(view=views(), request=requests)
@settings(max_examples=200, deadline=None)
def test_with_lambda_zero_the_learned_policy_is_ect(view: ClusterView, request: Request) -> None:
    ours, theirs = (
        policy.decide(view, request, np.random.default_rng(0))
        for policy in (learned(lam=0.0), create("ect"))
    )
    if isinstance(ours, Placed) and isinstance(theirs, Placed):
        assert ours.node_ids == theirs.node_ids
    else:
        assert ours == theirs


@given(view=views(nodes_min=1), request=requests)
@settings(max_examples=200, deadline=None)
def test_the_score_of_a_sole_candidate_is_the_base_score_of_its_row(
    view: ClusterView, request: Request
) -> None:
    estimates = estimate(view, request, view.nodes)
    rows = [sole_score(terms, request) for terms in estimates.terms.tolist()]
    np.testing.assert_allclose(rows, base_score(estimates, request), rtol=1e-9)

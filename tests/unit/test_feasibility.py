"""Feasibility: hard limits mask a node, each with its reason; being busy does not."""

from dataclasses import replace
from typing import Any

import pytest

from tierwise.domain.decision import Reason
from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.request import HOPS_MAX, Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Node, NodeState, Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView
from tierwise.placement.feasibility import feasible

SPEC = FunctionSpec(namespace="default", name="f", version=1, code_digest="d")
REQUEST = Request(request_id=RequestId("r"), spec=SPEC, origin=NodeId("edge-1"))


def row(name: str, tier: Tier = Tier.EDGE, **changes: Any) -> NodeView:
    node = Node(node_id=NodeId(name), tier=tier, capacity=Resources(cpus=2, memory_mib=1024))
    return replace(NodeView(node=node, reading=NodeReading()), **changes)


def view(*rows: NodeView) -> ClusterView:
    return ClusterView(now_s=10.0, origin=rows[0].node, nodes=rows)


HERE = row("edge-1")
THERE = row("cloud-1", Tier.CLOUD)
FAR = NodeId("cloud-1")


@pytest.mark.parametrize(
    ("there", "request_changes", "reason"),
    [
        (replace(THERE, state=NodeState.DRAINING), {}, Reason.NODE_DRAINING),
        (replace(THERE, state=NodeState.LOST), {}, Reason.NODE_LOST),
        (replace(THERE, reachable=False), {}, Reason.NODE_UNREACHABLE),
        (THERE, {"tiers": frozenset({Tier.EDGE})}, Reason.WRONG_TIER),
        (THERE, {"spec": replace(SPEC, tiers=frozenset({Tier.FOG}))}, Reason.WRONG_TIER),
        (THERE, {"node_id": NodeId("edge-1")}, Reason.PINNED_ELSEWHERE),
        (THERE, {"spec": replace(SPEC, memory_mib=1025)}, Reason.TOO_LITTLE_MEMORY),
        (THERE, {"spec": replace(SPEC, cpus=2.5)}, Reason.TOO_FEW_CPUS),
        (THERE, {"spec": replace(SPEC, gpu_slots=1)}, Reason.NO_GPU),
        (THERE, {"budget_usd": 1e-12}, Reason.OVER_BUDGET),
        (THERE, {"excluded": frozenset({FAR})}, Reason.EXCLUDED),
        (THERE, {"hops": HOPS_MAX}, Reason.TOO_MANY_HOPS),
    ],
)
def test_a_hard_limit_masks_the_node_with_its_reason(
    there: NodeView, request_changes: dict[str, Any], reason: Reason
) -> None:
    candidates, masked = feasible(view(HERE, there), replace(REQUEST, **request_changes))
    assert (FAR, reason) in masked
    assert there not in candidates


def test_a_busy_suspect_node_is_still_a_candidate() -> None:
    busy = replace(
        THERE, reading=NodeReading(queued=99, backlog_s=30.0), state=NodeState.SUSPECT, pending_s=9
    )
    candidates, masked = feasible(view(HERE, busy), REQUEST)
    assert candidates == [HERE, busy]
    assert masked == []


def test_a_node_never_believes_itself_lost_or_out_of_reach() -> None:
    here = replace(HERE, state=NodeState.LOST, reachable=False)
    candidates, _ = feasible(view(here, THERE), replace(REQUEST, hops=HOPS_MAX))
    assert candidates == [here]


def test_every_node_of_the_view_is_either_a_candidate_or_masked_in_view_order() -> None:
    rows = [row(f"n-{i}", Tier(1 + i % 3)) for i in range(9)]
    candidates, masked = feasible(
        view(*rows), replace(REQUEST, tiers=frozenset({Tier.FOG, Tier.CLOUD}))
    )
    assert [c.node.node_id for c in candidates] == ["n-1", "n-2", "n-4", "n-5", "n-7", "n-8"]
    assert [node_id for node_id, _ in masked] == ["n-0", "n-3", "n-6"]


def test_an_empty_view_has_no_candidate_and_no_reason() -> None:
    assert feasible(ClusterView(now_s=0.0, origin=None, nodes=()), REQUEST) == ([], [])


def test_the_budget_compares_with_the_price_on_that_tier() -> None:
    request = replace(REQUEST, budget_usd=5e-7)  # 1.7e-7 at the edge, 1.0e-6 in the cloud
    candidates, masked = feasible(
        view(HERE, THERE), replace(request, spec=replace(SPEC, memory_mib=1024), item_count=1)
    )
    assert candidates == [HERE]
    assert masked == [(FAR, Reason.OVER_BUDGET)]


def test_what_no_waiting_removes_is_named_before_what_passes() -> None:
    gone = replace(THERE, state=NodeState.LOST, reachable=False)
    for request, reason in (
        (replace(REQUEST, spec=replace(SPEC, memory_mib=10**6)), Reason.TOO_LITTLE_MEMORY),
        (replace(REQUEST, budget_usd=0.0), Reason.OVER_BUDGET),
        (replace(REQUEST, node_id=HERE.node.node_id), Reason.PINNED_ELSEWHERE),
        (REQUEST, Reason.NODE_LOST),
    ):
        _, masked = feasible(view(HERE, gone), request)
        assert (FAR, reason) in masked

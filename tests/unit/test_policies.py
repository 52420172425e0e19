"""The built-in heuristics: the order each one prefers, and what its explanation says."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tierwise.domain.decision import Decision, Explanation, NotPlaced, Placed, Reason
from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import LinkTable, Node, NodeState, Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView
from tierwise.errors import NotFound
from tierwise.placement.policy import create, names, register

SPEC = FunctionSpec(namespace="default", name="f", version=1, code_digest="d")
F = SPEC.function_id
REQUEST = Request(request_id=RequestId("r"), spec=SPEC, origin=NodeId("edge-1"))
HEURISTICS = ["cloud-only", "ect", "edge-first", "edge-only", "least-loaded"]
FREE = NodeReading(free=Resources(cpus=2, memory_mib=1024), warm={F: 1})
BUSY = NodeReading(free=Resources(cpus=0, memory_mib=1024), backlog_s=5.0, queued=3)


def row(name: str, reading: NodeReading = FREE, **changes: Any) -> NodeView:
    node = Node(
        node_id=NodeId(name),
        tier=Tier[name.split("-")[0].upper()],
        capacity=Resources(cpus=2, memory_mib=1024),
        speed=changes.pop("speed", 1.0),
    )
    return replace(NodeView(node=node, reading=reading), **changes)


def decide(name: str, *rows: NodeView, here: str = "edge-1", **changes: Any) -> Decision:
    origin = next((r.node for r in rows if r.node.node_id == here), None)
    view = ClusterView(now_s=0.0, origin=origin, nodes=rows, links=LinkTable())
    return create(name).decide(view, replace(REQUEST, **changes), np.random.default_rng(0))


def order(decision: Decision) -> list[str]:
    assert isinstance(decision, Placed), decision
    return list(decision.node_ids)


def explanation(decision: Decision) -> Explanation:
    assert isinstance(decision, Placed)
    assert decision.explanation is not None
    return decision.explanation


def test_every_built_in_policy_is_registered_under_its_name() -> None:
    assert set(names()) >= {*HEURISTICS, "learned"}
    for name in HEURISTICS:
        assert create(name).policy_id == f"{name}@1"


def test_an_unknown_policy_is_refused_with_the_names_that_exist() -> None:
    with pytest.raises(NotFound, match="edge-first"):
        create("psychic")


def test_a_taken_name_cannot_be_registered_again() -> None:
    names()
    with pytest.raises(ValueError, match="registered already"):
        register("ect", lambda: create("ect"))


@pytest.mark.parametrize("name", HEURISTICS)
def test_without_nodes_nothing_is_placed(name: str) -> None:
    assert decide(name) == NotPlaced(reasons=())


@pytest.mark.parametrize("name", HEURISTICS)
def test_with_every_node_masked_each_has_its_reason(name: str) -> None:
    rows = [row("edge-1"), row("fog-1"), row("cloud-1")]
    decision = decide(name, *(replace(r, state=NodeState.DRAINING) for r in rows))
    own = {"cloud-only": Tier.CLOUD, "edge-only": Tier.EDGE}.get(name)  # others it never uses
    assert decision == NotPlaced(
        reasons=tuple(
            (
                r.node.node_id,
                Reason.NODE_DRAINING if own in (None, r.node.tier) else Reason.WRONG_TIER,
            )
            for r in rows
        )
    )


@pytest.mark.parametrize("name", HEURISTICS)
def test_a_sole_candidate_is_placed_with_its_terms_and_the_masked_nodes(name: str) -> None:
    tiers = frozenset({Tier.CLOUD if name == "cloud-only" else Tier.EDGE})
    decision = decide(name, row("edge-1"), row("cloud-1"), tiers=tiers)
    chosen, other = ("cloud-1", "edge-1") if name == "cloud-only" else ("edge-1", "cloud-1")
    assert order(decision) == [chosen]
    why = explanation(decision)
    assert why.masked == ((other, Reason.WRONG_TIER),)
    assert why.heuristic_choice == chosen
    assert [c.node_id for c in why.candidates] == [chosen]
    assert why.candidates[0].run_s == pytest.approx(0.05)
    assert why.candidates[0].score > 0.05
    assert why.candidates[0].propensity == 1.0


@pytest.mark.parametrize("name", HEURISTICS)
def test_the_explanation_of_a_sole_candidate_agrees_with_that_of_many(name: str) -> None:
    tiers = ["cloud-1", "cloud-2"] if name == "cloud-only" else ["edge-1", "edge-2"]
    many = explanation(decide(name, *(row(n) for n in tiers), deadline_s=0.01))
    for one in many.candidates:
        sole = explanation(
            decide(name, *(row(n) for n in tiers), deadline_s=0.01, node_id=one.node_id)
        )
        assert sole.candidates[0][1:9] == pytest.approx(one[1:9])


@pytest.mark.parametrize("name", HEURISTICS)
def test_a_heuristic_is_certain_of_its_first_choice(name: str) -> None:
    rows = (row("edge-1"), row("edge-2"), row("cloud-1"), row("cloud-2"))
    decision = decide(name, *rows)
    chances = {c.node_id: c.propensity for c in explanation(decision).candidates}
    first = order(decision)[0]
    assert chances == {node_id: float(node_id == first) for node_id in chances}


def test_ect_orders_by_base_score_and_says_so() -> None:
    decision = decide("ect", row("edge-1", BUSY), row("cloud-1"), row("edge-2", BUSY, pending_s=9))
    assert order(decision) == ["cloud-1", "edge-1", "edge-2"]
    why = explanation(decision)
    scores = {c.node_id: c.score for c in why.candidates}
    assert sorted(scores, key=lambda n: scores[n]) == order(decision)
    assert why.heuristic_choice == "cloud-1"


def test_edge_only_prefers_the_edge_that_took_the_request_even_when_it_is_busy() -> None:
    decision = decide("edge-only", row("edge-0"), row("edge-1", BUSY), row("cloud-1"))
    assert order(decision) == ["edge-1", "edge-0"]


def test_edge_only_takes_the_edge_that_is_free_first_when_asked_elsewhere() -> None:
    rows = (row("edge-0", BUSY), row("edge-1"), row("cloud-1"))
    assert order(decide("edge-only", *rows, here="cloud-1")) == ["edge-1", "edge-0"]


def test_cloud_only_never_uses_an_edge_while_the_cloud_is_allowed() -> None:
    down = row("cloud-1", reachable=False)
    decision = decide("cloud-only", row("edge-1"), down)
    assert decision == NotPlaced(
        reasons=(
            (NodeId("edge-1"), Reason.WRONG_TIER),
            (NodeId("cloud-1"), Reason.NODE_UNREACHABLE),
        )
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"spec": replace(SPEC, tiers=frozenset({Tier.EDGE}))},
        {"tiers": frozenset({Tier.EDGE})},
        {"spec": replace(SPEC, tiers=frozenset({Tier.EDGE})), "tiers": frozenset(Tier)},
        {"node_id": NodeId("edge-1")},
    ],
)
def test_cloud_only_lets_a_function_run_where_its_author_insists(changes: dict[str, Any]) -> None:
    assert order(decide("cloud-only", row("edge-1"), row("cloud-1"), **changes)) == ["edge-1"]


def test_edge_first_stays_here_while_a_cpu_is_free() -> None:
    rows = (row("edge-1", replace(FREE, warm={})), row("fog-1"), row("cloud-1"))
    assert order(decide("edge-first", *rows))[0] == "edge-1"


def test_edge_first_stays_here_while_the_function_is_warm() -> None:
    warm = replace(BUSY, warm={F: 1})
    assert order(decide("edge-first", row("edge-1", warm), row("fog-1")))[0] == "edge-1"


def test_edge_first_offloads_to_the_next_tier_up_then_sideways_then_waits_here() -> None:
    rows = (row("edge-1", BUSY), row("edge-2"), row("cloud-1"), row("fog-1"))
    decision = decide("edge-first", *rows)
    assert order(decision) == ["fog-1", "cloud-1", "edge-2", "edge-1"]


def test_edge_first_counts_a_peer_it_has_just_sent_work_to_as_busy() -> None:
    rows = (row("edge-1", BUSY), row("fog-1", pending_s=0.1), row("fog-2"))
    assert order(decide("edge-first", *rows)) == ["fog-2", "edge-1", "fog-1"]


def test_least_loaded_prefers_the_faster_of_two_idle_nodes() -> None:
    rows = (row("fog-1"), row("fog-2", speed=4.0))
    assert order(decide("least-loaded", *rows)) == ["fog-2", "fog-1"]


def test_least_loaded_does_not_see_cold_starts() -> None:
    cold = replace(FREE, warm={})
    rows = (row("fog-1"), row("fog-2", cold, speed=1.1))
    assert order(decide("least-loaded", *rows))[0] == "fog-2"
    assert order(decide("ect", *rows))[0] == "fog-1"

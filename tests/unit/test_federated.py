"""Federated placement: the cost of a round, the search, and brute force as the yardstick."""

from dataclasses import replace

import numpy as np
import pytest

from tierwise.domain.decision import NotPlaced, Reason
from tierwise.domain.function import FunctionProfile, FunctionSpec
from tierwise.domain.ids import NodeId
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Channel, Link, LinkTable, Node, NodeState, Tier
from tierwise.domain.view import ClusterView, NodeReading, NodeView
from tierwise.placement.federated import optimum, place
from tierwise.placement.federated_round import Client, Plan, Problem, Round, _received
from training.federated import Case, draw, rivals

MERGE = FunctionSpec(
    namespace="f", name="merge", version=1, code_digest="x", tiers=frozenset((Tier.FOG, Tier.CLOUD))
)


def node(name: str, tier: Tier, speed: float = 1.0) -> Node:
    return Node(
        node_id=NodeId(name), tier=tier, capacity=Resources(cpus=4, memory_mib=4096), speed=speed
    )


def small(size: int = 1_000_000, **changes: object) -> Case:
    """Two edges at each of two fogs; slow paths from them to the cloud, where the root is."""
    nodes = [node("cloud-1", Tier.CLOUD)]
    nodes += [node(f"fog-{i}", Tier.FOG, 0.5) for i in (1, 2)]
    nodes += [node(f"edge-{i}", Tier.EDGE, 0.4) for i in (1, 2, 3, 4)]
    near = Link(rtt_s=0.004, bandwidth_bytes_per_s=1e7)
    far = Link(rtt_s=0.1, bandwidth_bytes_per_s=4e5)
    pairs = {
        (NodeId(f"edge-{i}"), NodeId(f"fog-{j}")): near if (i + 1) // 2 == j else far
        for i in (1, 2, 3, 4)
        for j in (1, 2)
    }
    up = Link(rtt_s=0.1, bandwidth_bytes_per_s=1e7)
    pairs |= {(NodeId(f"fog-{i}"), NodeId("cloud-1")): up for i in (1, 2)}
    edges = [NodeId(f"edge-{i}") for i in (1, 2, 3, 4)]
    wanted = Round(
        clients=tuple(Client(node_id=each, update_bytes=size, ready_s=1.0) for each in edges),
        aggregate=MERGE,
        root=NodeId("cloud-1"),
        aggregate_bytes=size,
    )
    view = ClusterView(
        now_s=0.0,
        origin=None,
        nodes=tuple(
            NodeView(node=n, reading=NodeReading(free=n.capacity, warm={MERGE.function_id: 1}))
            for n in nodes
        ),
        links=LinkTable(by_pair=pairs, default=far),
        profiles={MERGE.function_id: FunctionProfile(run_s=0.01)},
    )
    return Case(view, replace(wanted, **changes))  # type: ignore[arg-type]


def plan(found: Plan | NotPlaced) -> Plan:
    assert isinstance(found, Plan)
    return found


def with_row(view: ClusterView, name: str, **changes: object) -> ClusterView:
    rows = tuple(
        replace(row, **changes) if row.node.node_id == name else row  # type: ignore[arg-type]
        for row in view.nodes
    )
    return replace(view, nodes=rows)


def test_uploads_share_an_ingress_as_messages_share_a_channel() -> None:
    link = Link(rtt_s=0.02, bandwidth_bytes_per_s=1e6)
    ready_s = np.array([0.5, 0.0, 0.1, 2.0])
    size = np.array([3e5, 2e5, 4e5, 1e5])
    found = _received(ready_s, np.full(4, 0.01), 0.01 + size / 1e6, size / 1e6)
    channel = Channel(link)
    for i in np.argsort(ready_s):
        assert found[i] == pytest.approx(ready_s[i] + channel.delay_s(int(size[i]), ready_s[i]))


def test_a_rounds_cost_is_what_hand_and_pencil_say() -> None:
    case = small()
    problem = Problem.of(case.view, case.wanted)
    assert isinstance(problem, Problem)
    sole, usd = problem.outlook(problem.all_to(0))
    assert sole == pytest.approx(1.0 + 0.05 + 4 * 2.5 + 4 * 0.01)  # four uploads in a row
    assert usd > 0.0
    both, _ = problem.outlook(np.array([1, 1, 2, 2]))
    at_fogs = 1.0 + 0.002 + 2 * 0.1 + 2 * 0.01 / 0.5
    assert both == pytest.approx(at_fogs + 0.05 + 2 * 0.1 + 2 * 0.01)


def test_updates_are_merged_near_their_clients_if_the_way_to_the_root_is_slow() -> None:
    case = small()
    found = plan(place(case.view, case.wanted))
    assert {a.node_id: a.clients for a in found.aggregators} == {
        "fog-1": ("edge-1", "edge-2"),
        "fog-2": ("edge-3", "edge-4"),
    }
    assert found.ended_s < 0.7 * min(alone.ended_s for alone in found.candidates)
    assert [alone.cost_s for alone in found.candidates] == sorted(
        alone.cost_s for alone in found.candidates
    )
    assert {alone.node_id for alone in found.candidates if alone.is_chosen} == {"fog-1", "fog-2"}
    assert dict(found.masked) == {f"edge-{i}": Reason.WRONG_TIER for i in (1, 2, 3, 4)}


def test_a_busy_or_drained_fog_is_passed_over() -> None:
    case = small()
    busy = with_row(case.view, "fog-1", reading=NodeReading(backlog_s=60.0))
    drained = with_row(case.view, "fog-1", state=NodeState.DRAINING)
    for view in (busy, drained):
        chosen = {a.node_id for a in plan(place(view, case.wanted)).aggregators}
        assert "fog-1" not in chosen


def test_a_root_that_may_not_aggregate_is_told_with_reasons() -> None:
    case = small()
    found = place(with_row(case.view, "cloud-1", state=NodeState.LOST), case.wanted)
    assert isinstance(found, NotPlaced)
    assert dict(found.reasons)[NodeId("cloud-1")] is Reason.NODE_LOST
    nowhere = place(replace(case.view, nodes=()), replace(case.wanted, clients=case.wanted.clients))
    assert isinstance(nowhere, NotPlaced) and nowhere.reasons


def test_a_client_that_nobody_knows_and_a_round_of_nobody_are_refused() -> None:
    case = small()
    stranger = Client(node_id=NodeId("edge-9"), update_bytes=1, ready_s=0.0)
    with pytest.raises(ValueError, match="'edge-9'"):
        place(case.view, replace(case.wanted, clients=(stranger,)))
    with pytest.raises(ValueError, match="at least one client"):
        place(case.view, replace(case.wanted, clients=()))


def test_the_search_finds_the_best_plan_of_small_cases_or_nearly() -> None:
    regrets = []
    for preset in ("city", "random", "factory"):
        for seed in range(12):
            case = draw(preset, seed, 4)
            if case is None:
                continue
            found, best = plan(place(case.view, case.wanted)), plan(optimum(case.view, case.wanted))
            assert found.cost_s >= best.cost_s - 1e-9
            assert found.cost_s <= min(found.nearest_cost_s, *rivals(case).values()) + 1e-9
            regrets.append(found.cost_s / best.cost_s - 1.0)
    assert len(regrets) > 20
    assert np.mean(regrets) < 0.002 and max(regrets) < 0.03


def test_every_client_has_one_aggregator_and_there_are_not_too_many() -> None:
    for seed in range(6):
        case = draw("city", seed, 12)
        assert case is not None
        for limit in (1, 2, 4):
            wanted = replace(case.wanted, aggregators_max=limit)
            found = plan(place(case.view, wanted))
            sent = [client for a in found.aggregators for client in a.clients]
            assert sorted(sent) == sorted(client.node_id for client in wanted.clients)
            assert 1 <= len(found.aggregators) <= limit
            assert found == place(case.view, wanted)  # the same question, the same answer


def test_more_aggregators_never_cost_more() -> None:
    case = small()
    costs = [
        plan(place(case.view, replace(case.wanted, aggregators_max=limit))).cost_s
        for limit in (1, 2, 3)
    ]
    assert costs == sorted(costs, reverse=True)


def test_too_many_cases_are_not_tried_one_by_one() -> None:
    case = draw("city", 1, 12)
    assert case is not None
    with pytest.raises(ValueError, match="too many to try"):
        optimum(case.view, case.wanted)

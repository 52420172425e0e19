"""Aggregators move when that pays, and stay when it does not; who takes part, and where."""

from dataclasses import replace

import pytest

from scheduler.workloads.federated_sites import (
    Attendance,
    find_sites,
    sampled,
)
from tests.unit.federated_builders import CLOUD, EDGES, FOG, MERGE, job, view
from tierwise.domain.federated import FederatedClient, JobProgress, Topology
from tierwise.domain.function import FunctionProfile
from tierwise.domain.ids import NodeId
from tierwise.domain.topology import Link, LinkTable, NodeState, Tier
from tierwise.domain.view import ClusterView
from tierwise.placement.federated import place
from tierwise.placement.federated_moves import MARGIN, ROUNDS_MAX, Revision, revise
from tierwise.placement.federated_round import Client, Plan, Round
from training.federated import draw

SECOND = NodeId("fog-2")


def two_fogs(near: NodeId, cold_start_s: float = 0.0) -> ClusterView:
    """Return the cluster with a second fog; only one of the two is near the edges."""
    base = view()
    first = next(row for row in base.nodes if row.node.node_id == FOG)
    second = replace(first, node=replace(first.node, node_id=SECOND))
    cold = replace(second, reading=replace(second.reading, warm={}))
    link = Link(rtt_s=0.004, bandwidth_bytes_per_s=1e7)
    far = Link(rtt_s=0.1, bandwidth_bytes_per_s=4e5)
    return replace(
        base,
        nodes=(*base.nodes, cold),
        links=LinkTable(by_pair={(edge, near): link for edge in EDGES}, default=far),
        profiles={MERGE.function_id: FunctionProfile(run_s=0.001, cold_start_s=cold_start_s)},
    )


def wanted(size: int = 1_000_000) -> Round:
    return Round(
        clients=tuple(Client(node_id=edge, update_bytes=size, ready_s=1.0) for edge in EDGES),
        aggregate=MERGE,
        root=CLOUD,
        aggregate_bytes=size,
    )


def revised(cluster: ClusterView, current: list[NodeId], rounds_left: int) -> Revision:
    found = revise(cluster, wanted(), current, rounds_left)
    assert isinstance(found, Revision)
    return found


def test_the_first_time_is_no_move_and_as_good_as_the_search() -> None:
    found = revised(two_fogs(FOG), [], 10)
    plan = place(two_fogs(FOG), wanted())
    assert isinstance(plan, Plan)
    assert not found.is_moved and set(found.aggregators) == {FOG}


def test_aggregators_move_to_where_the_clients_are_near_if_enough_rounds_are_left() -> None:
    cluster = two_fogs(SECOND, cold_start_s=20.0)
    current = [FOG] * 4
    long = revised(cluster, current, 100)
    assert long.is_moved and set(long.aggregators) == {SECOND}
    assert long.gain_s * ROUNDS_MAX > MARGIN * long.price_s and long.price_s > 20.0
    short = revised(cluster, current, 1)
    assert not short.is_moved and set(short.aggregators) == {FOG}
    assert short.gain_s == pytest.approx(long.gain_s)


def test_a_gain_that_hardly_pays_moves_nothing() -> None:
    cluster = two_fogs(SECOND)
    gain_s = revised(cluster, [FOG] * 4, 100).gain_s
    dear = two_fogs(SECOND, cold_start_s=gain_s * ROUNDS_MAX)
    assert not revised(dear, [FOG] * 4, 100).is_moved


def test_aggregators_that_are_gone_are_replaced_whatever_it_costs() -> None:
    cluster = two_fogs(FOG, cold_start_s=1e6)
    rows = tuple(
        replace(row, state=NodeState.LOST) if row.node.node_id == FOG else row
        for row in cluster.nodes
    )
    found = revised(replace(cluster, nodes=rows), [FOG] * 4, 1)
    assert found.is_moved and FOG not in found.aggregators


def test_what_stays_does_not_swing_with_the_noise_of_readings() -> None:
    cluster = two_fogs(FOG)
    current = list(revised(cluster, [], 50).aggregators)
    moves = 0
    for backlog_s in (0.0, 0.05, 0.0, 0.1, 0.0, 0.2):
        rows = tuple(
            replace(row, reading=replace(row.reading, backlog_s=backlog_s))
            if row.node.node_id == FOG
            else row
            for row in cluster.nodes
        )
        found = revised(replace(cluster, nodes=rows), current, 50)
        moves += found.is_moved
        current = list(found.aggregators)
    assert moves == 0


def test_a_revision_is_never_dearer_than_staying() -> None:
    """On drawn clusters: from any aggregator to what is proposed, over the rounds that are left."""
    for seed in range(12):
        case = draw("city", seed, 5)
        if case is None:
            continue
        fogs = [row.node.node_id for row in case.view.nodes if row.node.tier is Tier.FOG]
        current = [fogs[seed % len(fogs)]] * len(case.wanted.clients)
        found = revise(case.view, case.wanted, current, 10)
        assert isinstance(found, Revision)
        if found.is_moved:
            assert found.gain_s * 10 > found.price_s
        else:
            assert found.aggregators == tuple(current)


# -- who takes part -----------------------------------------------------------------------------


def test_a_sample_is_of_the_seed_and_the_round_and_of_nothing_else() -> None:
    clients = [FederatedClient(client=f"c{i}", node_id=EDGES[0]) for i in range(40)]
    first = sampled(clients, 10, 1, 1)
    assert first == sampled(list(reversed(clients)), 10, 1, 1)
    assert len({each.client for each in first}) == 10
    assert first != sampled(clients, 10, 1, 2) and first != sampled(clients, 10, 2, 1)
    everybody = {each.client for n in range(40) for each in sampled(clients, 10, 1, n)}
    assert len(everybody) == 40


def test_a_client_rests_longer_with_every_failure_and_is_forgiven_at_once() -> None:
    attendance = Attendance()
    client = FederatedClient(client="c1", node_id=EDGES[0])
    rests = []
    number = 1
    for _ in range(5):
        attendance.failed("c1", number)
        start = number
        while not attendance.rested([client], number + 1):
            number += 1
        rests.append(number - start)
        number += 1
    assert rests == [0, 1, 3, 7, 8]
    attendance.answered("c1", 1.0)
    assert attendance.rested([client], number)
    attendance.failed("c1", number)
    assert attendance.rested([client], number + 1)


def test_a_flat_job_is_merged_at_its_root_and_a_root_is_found_if_none_is_named() -> None:
    spec, progress = job(), JobProgress(round_count=2)
    sites = find_sites(spec, MERGE, progress, spec.clients, view(), Attendance())
    assert not isinstance(sites, str)
    assert sites.root == CLOUD and [each.node_id for each in sites.aggregators] == [CLOUD]
    named = replace(spec, topology=Topology(root=FOG))
    sites = find_sites(named, MERGE, progress, spec.clients, view(), Attendance())
    assert not isinstance(sites, str) and sites.root == FOG
    away = find_sites(
        named, MERGE, progress, spec.clients, view(fog_1=NodeState.LOST), Attendance()
    )
    assert isinstance(away, str) and "fog-1 may not aggregate" in away


def test_every_client_of_a_hierarchy_sends_to_one_aggregator() -> None:
    spec = job(topology=Topology(root=CLOUD, is_hierarchical=True))
    many = tuple(FederatedClient(client=f"c{i:02}", node_id=EDGES[i % 4]) for i in range(13))
    spec = replace(spec, clients=many)
    sites = find_sites(spec, MERGE, JobProgress(round_count=2), many, view(), Attendance())
    assert not isinstance(sites, str)
    sent = sorted(client for site in sites.aggregators for client in site.clients)
    assert sent == [each.client for each in many]
    assert sites.aggregators[-1].node_id == CLOUD
    assert sites.association == dict.fromkeys(EDGES, FOG)


def test_clients_of_nodes_that_never_joined_do_not_disturb_the_placement() -> None:
    spec = job()
    stranger = FederatedClient(client="x", node_id=NodeId("edge-99"))
    found = find_sites(
        spec, MERGE, JobProgress(round_count=2), (*spec.clients, stranger), view(), Attendance()
    )
    assert not isinstance(found, str)
    none = find_sites(spec, MERGE, JobProgress(round_count=2), (stranger,), view(), Attendance())
    assert none == "no client's node has joined"

"""Simulated worlds: arrivals, stages, presets and shifts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from envs.arrivals import FLASH, bursty, diurnal, flash
from envs.simulator import Simulator
from envs.topology import ACCESS, access_links, distance, draw_positions
from envs.traces import Mix, make_trace
from envs.world import NAMED, Shift, make_world
from tierwise.domain.outcome import OutcomeState
from tierwise.domain.topology import LinkTable, Tier
from tierwise.placement.policy import create


@pytest.mark.parametrize("pattern", ["bursty", "diurnal", "flash"])
def test_every_pattern_keeps_the_mean_rate_and_the_order(pattern: str) -> None:
    rates = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        times = {
            "bursty": lambda r=rng: bursty(r, 10.0, 3000, 3.0),
            "diurnal": lambda r=rng: diurnal(r, 10.0, 3000),
            "flash": lambda r=rng: flash(r, 10.0, 3000)[0],
        }[pattern]()
        assert len(times) == 3000
        assert (np.diff(times) >= 0.0).all()
        rates.append(3000 / times[-1])
    assert np.mean(rates) == pytest.approx(10.0, rel=0.12)


def test_a_flash_crowd_comes_in_its_window_at_three_times_the_rate() -> None:
    times, is_inside = flash(np.random.default_rng(1), 10.0, 20_000)
    length = 2000.0
    inside_s = (FLASH[1] - FLASH[0]) * length
    assert is_inside.sum() / inside_s == pytest.approx(30.0, rel=0.05)
    assert times[is_inside].min() >= FLASH[0] * length
    assert times[is_inside].max() <= FLASH[1] * length


def test_chains_follow_their_first_request_and_everything_ends() -> None:
    world = make_world("city", 3, request_count=200)
    assert world.trace.stages
    simulator = Simulator(world, 3)
    outcomes = simulator.run(create("ect"))
    assert Counter(o.request_id for o in outcomes).most_common(1)[0][1] == 1
    assert len(outcomes) == world.trace.request_count > 200
    order = [o.request_id for o in outcomes]
    for request_id, arrival, _ in simulator.schedule.planned():
        if arrival.stage:
            for index, _ in enumerate(world.trace.stages[arrival.stage].then):
                assert order.index(f"s{arrival.stage:05}-{index + 1}") > order.index(request_id)


def test_a_federated_round_waits_for_its_slowest_client() -> None:
    base = make_world("campus", 5, request_count=60)
    mix = Mix(load=0.2, function_count=4, request_count=60, round_count=2)
    trace = make_trace(np.random.default_rng(2), list(base.nodes), mix)
    clients = [a for a in trace.arrivals if a.is_pinned]
    edges = {node.node_id for node in base.nodes if node.tier is Tier.EDGE}
    assert Counter(a.data_node for a in clients) == Counter(dict.fromkeys(edges, 2))
    simulator = Simulator(replace(base, trace=trace), 5)
    outcomes = simulator.run(create("ect"))
    where = {o.request_id: o.node_id for o in outcomes if o.state is OutcomeState.OK}
    ended = [o.request_id for o in outcomes]
    for request_id, arrival, _ in simulator.schedule.planned():
        if arrival.is_pinned:
            assert where[request_id] == arrival.data_node
            assert ended.index(f"s{arrival.stage:05}-1") > ended.index(request_id)


def test_a_request_is_as_heavy_under_one_policy_as_under_another() -> None:
    world = make_world("heterogeneous", 8, request_count=120)
    speed = {node.node_id: node.speed for node in world.nodes}
    work = []
    for name in ("cloud-only", "edge-only"):
        outcomes = Simulator(world, 8).run(create(name))
        ok = [o for o in outcomes if o.state is OutcomeState.OK and o.item_count == 1]
        work.append({o.request_id: o.latency.run_s * speed[o.node_id or ""] for o in ok})
    plain = {r for r, a, _ in Simulator(world, 8).schedule.planned() if a.data_node is None}
    both = plain & work[0].keys() & work[1].keys()
    assert len(both) > 20
    for request_id in both:
        assert work[0][request_id] == pytest.approx(work[1][request_id])


@pytest.mark.parametrize("preset", NAMED)
def test_a_preset_is_what_its_seed_says(preset: str) -> None:
    assert make_world(preset, 4) == make_world(preset, 4)
    assert make_world(preset, 4).trace.arrivals != make_world(preset, 5).trace.arrivals


def test_shifts_do_what_they_say() -> None:
    plain = make_world("campus", 2, request_count=200)
    more = make_world("campus", 2, request_count=200, shift=Shift(node_factor=3))
    assert len(more.nodes) == 3 * len(plain.nodes)
    stale = make_world("campus", 2, shift=Shift(heartbeat_interval_s=5.0))
    assert stale.heartbeat_interval_s == 5.0
    busy = make_world("campus", 2, request_count=200, shift=Shift(load_factor=2.0))
    ratio = plain.trace.arrivals[-1].at_s / busy.trace.arrivals[-1].at_s
    assert ratio == pytest.approx(2.0, rel=0.3)
    new = make_world("campus", 2, shift=Shift(has_new_device=True))
    assert min(n.speed for n in new.nodes) < min(n.speed for n in plain.nodes)
    far = make_world("campus", 2, shift=Shift(rtt_factor=3.0))
    edge, cloud = far.nodes[-1], far.nodes[0]
    assert far.links.between(edge, cloud).rtt_s == pytest.approx(
        3.0 * plain.links.between(edge, cloud).rtt_s
    )
    assert make_world("campus", 2, shift=Shift(crash_interval_s=3.0)).faults.crash_interval_s == 3.0


def test_in_a_city_the_own_zones_fog_is_the_nearest() -> None:
    world = make_world("city", 6)
    for edge in (n for n in world.nodes if n.tier is Tier.EDGE):
        fogs = [n for n in world.nodes if n.tier is Tier.FOG]
        nearest = min(fogs, key=lambda n: world.links.between(edge, n).rtt_s)
        assert nearest.zone == edge.zone


def test_in_a_random_region_the_nearest_fog_has_the_shortest_round_trip() -> None:
    rng = np.random.default_rng(3)
    nodes = draw_positions(rng, make_world("city", 6).nodes)
    links = LinkTable(by_pair=access_links(rng, nodes, ACCESS[0], 72.0, 1.0))
    fogs = [node for node in nodes if node.tier is Tier.FOG]
    for edge in (node for node in nodes if node.tier is Tier.EDGE):
        by_rtt = sorted(fogs, key=lambda fog: links.between(edge, fog).rtt_s)
        apart = [distance(edge, fog) or 0.0 for fog in by_rtt]
        assert apart == sorted(apart)
        assert by_rtt[0].zone == edge.zone


def test_a_join_waits_for_all_of_its_branches() -> None:
    base = make_world("campus", 5, request_count=60)
    mix = Mix(load=0.2, function_count=4, request_count=60, chain_share=0.5, join_share=1.0)
    trace = make_trace(np.random.default_rng(2), list(base.nodes), mix)
    joins = {number: stage for number, stage in trace.stages.items() if stage.size > 1}
    assert len(joins) > 10
    simulator = Simulator(replace(base, trace=trace), 5)
    ended = [o.request_id for o in simulator.run(create("ect"))]
    assert len(ended) == trace.request_count
    branches = [(r, a.stage) for r, a, _ in simulator.schedule.planned() if a.stage in joins]
    assert len(branches) == sum(stage.size for stage in joins.values())
    for request_id, stage in branches:
        assert ended.index(f"s{stage:05}-1") > ended.index(request_id)

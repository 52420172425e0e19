"""Recorded calls become a scenario: built with the classes that a live cluster's records pass."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs import scenario
from envs.simulator import Simulator
from envs.world import Shift, World, make_world
from tierwise.domain.function import Priority
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.topology import Tier
from tierwise.errors import InvalidArgument
from tierwise.placement.policy import create
from tierwise.sdk.operator import record
from tierwise.v1 import call_pb2, cluster_pb2, function_pb2
from tierwise.wire import convert
from training.dataset import to_world
from training.records import load

ROOT = Path(__file__).parents[2]
BEGAN_UNIX_S = 1.7e9


def write_records(folder: Path, world: World, calls: list[tuple[Outcome, float]]) -> None:
    """Write what `tierwise get … -o json` would print of calls and when they ended."""
    functions = [b.spec for b in world.trace.behaviours.values()]
    rows: dict[str, Any] = {
        "calls": [
            record(call_pb2.Call(outcome=convert.outcome_to_pb(o), ended_unix_s=ended_s))
            for o, ended_s in calls
        ],
        "nodes": [
            record(cluster_pb2.NodeInfo(node=convert.node_to_pb(node))) for node in world.nodes
        ],
        "functions": [
            record(function_pb2.GetFunctionResponse(spec=convert.spec_to_pb(spec)))
            for spec in functions
        ],
        "links": record(convert.links_to_pb(world.links)),
    }
    for kind, value in rows.items():
        (folder / f"{kind}.json").write_text(json.dumps(value))


def rebuilt(folder: Path) -> World:
    files = [folder / f"{kind}.json" for kind in ("calls", "nodes", "functions", "links")]
    world, _ = to_world(load(*files), heartbeat_interval_s=0.5)
    return world


def test_a_run_that_was_recorded_can_be_simulated_again(tmp_path: Path) -> None:
    """The same cluster, arrivals and run times: only cold starts and jitter are drawn anew."""
    found = []
    for seed in range(4):
        world = make_world("campus", seed, request_count=300, shift=Shift(load=0.15))
        simulator = Simulator(world, seed)
        at_s = {name: arrival.at_s for name, arrival, _ in simulator.schedule.planned()}
        outcomes = simulator.run(create("ect"))
        ended = [(o, BEGAN_UNIX_S + at_s[o.request_id] + o.latency.total_s) for o in outcomes]
        write_records(tmp_path, world, ended[::-1])  # newest first
        again = rebuilt(tmp_path)
        assert again.links == world.links
        assert [n.node_id for n in again.nodes] == [n.node_id for n in world.nodes]
        assert again.trace.behaviours.keys() == {a.function for a in world.trace.arrivals}
        gaps = np.diff([a.at_s for a in world.trace.arrivals])
        assert np.diff([a.at_s for a in again.trace.arrivals]) == pytest.approx(gaps, abs=1e-5)
        second = Simulator(again, seed + 100).run(create("ect"))
        for run in (outcomes, second):
            latency_s = [o.latency.total_s for o in run]
            found.append((*np.percentile(latency_s, (50, 95)), np.mean([o.is_cold for o in run])))
    recorded, simulated = np.array(found[::2]), np.array(found[1::2])
    p50, p95, cold = (simulated / recorded).mean(axis=0)  # one world alone varies by 5 to 15 %
    assert p50 == pytest.approx(1.0, abs=0.1)
    assert p95 == pytest.approx(1.0, abs=0.25)
    assert cold == pytest.approx(1.0, abs=0.25)


def outcome(**changes: Any) -> Outcome:
    base = Outcome(
        request_id="r1",  # type: ignore[arg-type]
        function_id="sim/f0@1",  # type: ignore[arg-type]
        state=OutcomeState.OK,
        origin="edge-1",  # type: ignore[arg-type]
        node_id="edge-2",  # type: ignore[arg-type]
        latency=LatencySplit(queue_s=0.1, transfer_s=0.02, run_s=0.5, return_s=0.01),
        deadline_s=0.7,
        request_bytes=500,
        response_bytes=900,
        memory_mib=96,
    )
    return replace(base, **changes)


def test_calls_arrive_when_they_came_and_run_as_long_as_they_did(tmp_path: Path) -> None:
    world = make_world("small", 1, request_count=5)
    never_ran = outcome(
        state=OutcomeState.UNPLACEABLE, node_id=None, latency=LatencySplit(queue_s=0.3)
    )
    calls = [
        (outcome(), 100.63),
        (outcome(item_count=4, priority=Priority.CRITICAL), 101.63),
        (never_ran, 103.3),
        (outcome(origin="", lease=7), 104.63),
        (outcome(state=OutcomeState.CANCELLED), 105.0),
        (outcome(origin="gone-1"), 106.0),
    ]
    write_records(tmp_path, world, calls)
    files = [tmp_path / f"{kind}.json" for kind in ("calls", "nodes", "functions", "links")]
    again, summary = to_world(load(*files))
    one, many, lost, durable = again.trace.arrivals
    assert [a.at_s for a in (one, many, lost, durable)] == pytest.approx([0.0, 1.0, 3.0, 4.0])
    speed = next(n.speed for n in world.nodes if n.node_id == "edge-2")
    assert one.run_s == pytest.approx(0.5 * speed)
    assert (many.item_count, many.priority, many.deadline_s) == (4, Priority.CRITICAL, 0.7)
    assert (lost.run_s, durable.is_durable, durable.origin) == (0.0, True, "edge-2")
    assert (summary.call_count, summary.drawn_count) == (4, 1)
    assert sum(summary.left_out.values()) == 2
    ran = Simulator(again, 1).run(create("edge-only"))
    assert ran[0].latency.run_s == pytest.approx(0.5 * speed / 0.4, rel=0.01)
    (behaviour,) = again.trace.behaviours.values()
    declared = next(b.spec for b in world.trace.behaviours.values() if b.spec.name == "f0")
    assert behaviour.spec == declared


def test_without_declarations_the_calls_themselves_tell_memory_and_deadline(tmp_path: Path) -> None:
    world = make_world("small", 1, request_count=5)
    write_records(tmp_path, world, [(outcome(priority=Priority.HIGH), 10.0)])
    again, _ = to_world(load(tmp_path / "calls.json", tmp_path / "nodes.json", None, None))
    spec = again.trace.behaviours["sim/f0@1"].spec  # type: ignore[index]
    assert (spec.memory_mib, spec.deadline_s, spec.priority) == (96, 0.7, Priority.HIGH)
    assert again.links.by_tier == {}


def test_the_command_writes_a_scenario_that_can_be_read(tmp_path: Path) -> None:
    world = make_world("small", 1, request_count=5)
    write_records(tmp_path, world, [(outcome(), 10.0), (outcome(), 11.0)])
    command = [sys.executable, "-m", "training.dataset", "--out", str(tmp_path / "s.toml")]
    command += ["--calls", str(tmp_path / "calls.json"), "--nodes", str(tmp_path / "nodes.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "2 calls of 1 functions" in done.stderr and "no --links" in done.stderr
    again = scenario.read(tmp_path / "s.toml")
    assert again.trace.request_count == 2
    assert {n.tier for n in again.nodes} == {n.tier for n in world.nodes} >= {Tier.EDGE}


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("calls", "[{}]", "missing required field `outcome`"),
        ("calls", "{", "calls.json"),
        ("calls", "[]", "no call is left of 0"),
        ("nodes", '[{"node": {"node_id": "a", "tier": "moon", "capacity": {}}}]', "cpus"),
        (
            "nodes",
            '[{"node": {"node_id": "a", "tier": "moon", "capacity": {"cpus":1, "memory_mib":1}}}]',
            "'moon' is no tier",
        ),
    ],
)
def test_wrong_records_are_refused(kind: str, content: str, message: str, tmp_path: Path) -> None:
    write_records(tmp_path, make_world("small", 1, request_count=5), [(outcome(), 10.0)])
    (tmp_path / f"{kind}.json").write_text(content)
    with pytest.raises(InvalidArgument, match=message):
        to_world(load(tmp_path / "calls.json", tmp_path / "nodes.json", None, None))

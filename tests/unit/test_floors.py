"""Floors, bursts, keep-alive and quarantine: events in, commands out."""

from dataclasses import replace

import pytest

from agent.machine import NodeMachine
from agent.quarantine import FIRST_S, FORGET_S, LONGEST_S, WINDOW_S, Quarantine
from tierwise.domain.command import AskPolicy, NodeCommand, Reply, StartInstance, StopInstance
from tierwise.domain.decision import Placed, Reason
from tierwise.domain.event import (
    Arrived,
    CatalogueReceived,
    Decided,
    DrainAsked,
    InstanceFailed,
    InstanceStarted,
    KeepAliveSet,
    RunFinished,
    Ticked,
)
from tierwise.domain.function import Catalogue, FunctionSpec
from tierwise.domain.ids import FunctionId, NodeId, PolicyId, RequestId
from tierwise.domain.outcome import OutcomeState
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import PYTHON_LABEL, Node, Tier

HERE = NodeId("edge-1")
NODE = Node(
    node_id=HERE,
    tier=Tier.EDGE,
    capacity=Resources(cpus=4, memory_mib=512),
    labels=((PYTHON_LABEL, "3.11"),),
)


def spec(name: str = "f", **changes: object) -> FunctionSpec:
    base = FunctionSpec(namespace="default", name=name, version=1, code_digest="d", memory_mib=128)
    return replace(base, **changes)  # type: ignore[arg-type]


def catalogue(*specs: FunctionSpec) -> CatalogueReceived:
    return CatalogueReceived(catalogue=Catalogue(functions={s.function_id: s for s in specs}))


def starts(commands: list[NodeCommand]) -> list[StartInstance]:
    return [c for c in commands if isinstance(c, StartInstance)]


def up(machine: NodeMachine, commands: list[NodeCommand], now_s: float) -> None:
    for start in starts(commands):
        machine.step(InstanceStarted(instance_id=start.instance_id, cold_start_s=0.1), now_s)


def call(
    machine: NodeMachine, name: str, function: FunctionSpec, now_s: float, **placed: object
) -> list[NodeCommand]:
    request = Request(request_id=RequestId(name), spec=function, origin=HERE)
    out = machine.step(Arrived(request=request), now_s)
    if not any(isinstance(c, AskPolicy) for c in out):
        return out
    decision = Placed(node_ids=(HERE,), **placed)  # type: ignore[arg-type]
    return machine.step(
        Decided(request_id=request.request_id, decision=decision, policy_id=PolicyId("p@1")), now_s
    )


def finish(machine: NodeMachine, name: str, now_s: float, **changes: object) -> list[NodeCommand]:
    instance = next(i for i in machine.pool.instances() if i.request_id == name)
    event = RunFinished(instance_id=instance.instance_id, request_id=RequestId(name), run_s=0.1)
    return machine.step(replace(event, **changes), now_s)  # type: ignore[arg-type]


def test_a_floor_is_started_with_the_catalogue_and_outlives_its_keep_alive() -> None:
    machine = NodeMachine(NODE)
    out = machine.step(catalogue(spec(instances_min=2, keep_alive_s=1.0)), 0.0)
    assert len(starts(out)) == 2
    up(machine, out, 0.1)
    assert machine.step(Ticked(), 100.0) == []
    assert machine.reading(100.0).reserved_mib == 256
    assert machine.reading(100.0).free.memory_mib == 256


def test_only_what_is_beyond_the_floor_goes_when_its_time_is_over() -> None:
    machine = NodeMachine(NODE)
    function = spec(instances_min=1, keep_alive_s=1.0)
    up(machine, machine.step(catalogue(function), 0.0), 0.1)
    call(machine, "a", function, 0.2)
    up(machine, call(machine, "b", function, 0.2), 0.3)
    finish(machine, "a", 0.4)
    finish(machine, "b", 0.4)
    out = machine.step(Ticked(), 10.0)
    assert [type(c) for c in out] == [StopInstance]
    assert len(machine.pool) == 1


def test_a_floor_is_not_evicted_for_another_function() -> None:
    machine = NodeMachine(NODE)
    up(machine, machine.step(catalogue(spec(instances_min=3)), 0.0), 0.1)
    assert len(starts(call(machine, "small", spec("small"), 1.0))) == 1
    out = call(machine, "large", spec("large", memory_mib=256), 1.0)
    [reply] = [c for c in out if isinstance(c, Reply)]
    assert reply.outcome.error_code == "infeasible"
    assert "too little memory" in reply.outcome.message


def test_a_floor_that_cannot_start_is_tried_again_with_growing_pauses() -> None:
    machine = NodeMachine(NODE)
    out = machine.step(catalogue(spec(instances_min=1)), 0.0)
    tried_at_s = []
    now_s = 0.0
    while now_s < 20.0:
        for start in starts(out):
            tried_at_s.append(now_s)
            machine.step(
                InstanceFailed(
                    instance_id=start.instance_id, error_code="start_failed", message="no"
                ),
                now_s,
            )
        now_s += 0.05
        out = machine.step(Ticked(), now_s)
    assert 4 <= len(tried_at_s) <= 6


def test_the_newest_version_has_the_floor_and_a_drained_node_starts_none() -> None:
    machine = NodeMachine(NODE)
    old, new = spec(instances_min=1), spec(instances_min=1, version=2)
    out = machine.step(catalogue(old, new), 0.0)
    assert [s.spec.version for s in starts(out)] == [2]
    drained = NodeMachine(NODE)
    drained.step(DrainAsked(is_on=True), 0.0)
    assert not starts(drained.step(catalogue(new), 0.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"tiers": frozenset({Tier.CLOUD})},
        {"memory_mib": 4096},
        {"cpus": 64.0},
        {"gpu_slots": 1},
        {"python_version": "3.7"},
    ],
)
def test_a_floor_that_this_node_may_not_host_is_not_its_own(changes: dict[str, object]) -> None:
    assert not starts(NodeMachine(NODE).step(catalogue(spec(instances_min=1, **changes)), 0.0))


def test_no_more_instances_start_in_a_second_than_the_burst_cap() -> None:
    machine = NodeMachine(NODE)
    function = spec(memory_mib=16, burst_max=2)
    begun = [len(starts(call(machine, f"r{n}", function, 0.0))) for n in range(4)]
    assert begun == [1, 1, 0, 0]
    assert len(starts(machine.step(Ticked(), 0.3))) == 0
    assert len(starts(machine.step(Ticked(), 0.51))) == 1
    assert len(starts(machine.step(Ticked(), 1.02))) == 1


def test_keep_alive_is_the_authors_until_somebody_sets_it() -> None:
    machine = NodeMachine(NODE)
    function = spec(keep_alive_s=100.0)
    up(machine, call(machine, "a", function, 0.0), 0.0)
    finish(machine, "a", 1.0)
    assert machine.step(Ticked(), 50.0) == []
    machine.step(KeepAliveSet(function_id=function.function_id, keep_alive_s=10.0), 50.0)
    assert [type(c) for c in machine.step(Ticked(), 50.1)] == [StopInstance]


def test_a_policy_sets_the_keep_alive_with_its_decision() -> None:
    machine = NodeMachine(NODE)
    up(machine, call(machine, "a", spec(), 0.0, keep_alive_s=2.0), 0.0)
    finish(machine, "a", 1.0)
    assert machine.step(Ticked(), 2.9) == []
    assert [type(c) for c in machine.step(Ticked(), 3.1)] == [StopInstance]


def died(machine: NodeMachine, name: str, now_s: float) -> list[NodeCommand]:
    return finish(
        machine,
        name,
        now_s,
        is_instance_alive=False,
        error_code="function_died",
        message="it died",
        failed_item_count=1,
    )


def test_two_deaths_put_a_function_out_and_send_away_what_waits() -> None:
    machine = NodeMachine(NODE)
    function = spec(instances_max=1)
    up(machine, call(machine, "a", function, 0.0), 0.0)
    died(machine, "a", 1.0)
    up(machine, call(machine, "b", function, 2.0), 2.0)
    call(machine, "waits", function, 2.0)
    replies = {
        c.outcome.request_id: c.outcome for c in died(machine, "b", 3.0) if isinstance(c, Reply)
    }
    assert "not run on this node for 10 s" in replies[RequestId("b")].message
    assert replies[RequestId("waits")].state is OutcomeState.UNPLACEABLE
    assert "edge-1: quarantined" in replies[RequestId("waits")].message
    assert 9.0 < machine.retry_after_s(function.function_id, 3.5) <= 10.0
    later = call(machine, "c", function, 3.0 + FIRST_S + 0.1)
    assert len(starts(later)) == 1
    other = call(machine, "d", spec("other"), 4.0)
    assert len(starts(other)) == 1


def test_a_new_version_of_a_function_that_is_out_runs_at_once() -> None:
    machine = NodeMachine(NODE)
    for name in ("a", "b"):
        up(machine, call(machine, name, spec(), 0.0), 0.0)
        died(machine, name, 1.0)
    assert not starts(call(machine, "c", spec(), 2.0))
    assert starts(call(machine, "d", spec(version=2), 2.0))


def test_a_host_refuses_what_is_out_with_its_reason() -> None:
    machine = NodeMachine(NODE)
    for name in ("a", "b"):
        up(machine, call(machine, name, spec(), 0.0), 0.0)
        died(machine, name, 1.0)
    request = Request(request_id=RequestId("x"), spec=spec(), origin=NodeId("far"), hops=1)
    [reply] = machine.step(Arrived(request=request), 2.0)
    assert isinstance(reply, Reply)
    assert reply.outcome.reason is Reason.QUARANTINED


def test_a_host_refuses_code_of_another_python() -> None:
    machine = NodeMachine(NODE)
    request = Request(
        request_id=RequestId("x"), spec=spec(python_version="3.12"), origin=NodeId("far"), hops=1
    )
    [reply] = machine.step(Arrived(request=request), 2.0)
    assert isinstance(reply, Reply)
    assert reply.outcome.reason is Reason.WRONG_PYTHON


def test_time_in_quarantine_grows_is_bounded_and_is_forgotten() -> None:
    quarantine, name = Quarantine(), FunctionId("default/f@1")
    assert not quarantine.died(name, 0.0)
    assert quarantine.died(name, 1.0)
    now_s, last_s = 1.0, quarantine.left_s(name, 1.0)
    assert last_s == FIRST_S
    for _ in range(12):
        now_s += last_s + 1.0
        assert quarantine.left_s(name, now_s) == 0.0
        assert quarantine.died(name, now_s)  # one more is enough
        left_s = quarantine.left_s(name, now_s)
        assert last_s <= left_s <= LONGEST_S
        last_s = left_s
    assert last_s == LONGEST_S
    assert not quarantine.died(name, now_s + FORGET_S + LONGEST_S + 1.0)


def test_deaths_far_apart_are_not_counted_together() -> None:
    quarantine, name = Quarantine(), FunctionId("default/f@1")
    for number in range(5):
        assert not quarantine.died(name, number * (WINDOW_S + 1.0))


def test_overload_says_when_to_come_again() -> None:
    machine = NodeMachine(NODE, queue_max=2)
    function = spec(instances_max=1)
    for number in range(4):
        call(machine, f"r{number}", function, 0.0)
    assert 0.05 <= machine.retry_after_s(function.function_id, 0.0) <= 5.0


def test_a_call_that_is_late_waits_behind_one_that_can_still_be_in_time() -> None:
    machine = NodeMachine(NODE)
    function = spec(instances_max=1)
    up(machine, call(machine, "runs", function, 0.0), 0.0)
    call(machine, "late", function, 0.1)
    call(machine, "fresh", function, 1.5)
    finish(machine, "runs", 2.0)
    assert [i.request_id for i in machine.pool.instances()] == ["fresh"]
    finish(machine, "fresh", 2.1)
    assert [i.request_id for i in machine.pool.instances()] == ["late"]

"""NodeMachine: what a reading says of the wait, and when another instance is started."""

from agent.machine import NodeMachine
from agent.outlook import PATIENCE
from tests.unit.test_node_machine import (
    EDGE,
    decided,
    finished,
    node,
    request,
    spec,
    started,
    warm,
)
from tierwise.cost.estimate import ENGAGED_SHARE, estimate, wait_of
from tierwise.domain.command import NodeCommand, RunOn, StartInstance
from tierwise.domain.event import Arrived, CatalogueReceived, Ticked
from tierwise.domain.function import Catalogue, FunctionProfile, FunctionSpec, Priority
from tierwise.domain.resources import Resources
from tierwise.domain.view import ClusterView, NodeReading, NodeView

RUN_S, COLD_S = 0.1, 0.3
OTHER = spec("g")


def machine_that_knows(cpus: float = 1) -> NodeMachine:
    """Return a node that knows how long `f` and `g` run and start."""
    machine = NodeMachine(node(cpus=cpus, memory=4096))
    profile = FunctionProfile(run_s=RUN_S, cold_start_s=COLD_S)
    functions = {each.function_id: each for each in (spec(), OTHER)}
    catalogue = Catalogue(
        revision=1, functions=functions, profiles=dict.fromkeys(functions, profile)
    )
    machine.step(CatalogueReceived(catalogue=catalogue), 0.0)
    return machine


def call(
    machine: NodeMachine,
    name: str,
    now_s: float,
    priority: Priority = Priority.NORMAL,
    function: FunctionSpec | None = None,
) -> list[NodeCommand]:
    machine.step(Arrived(request=request(name, function, priority=priority)), now_s)
    return machine.step(decided(name, EDGE), now_s)


def test_a_request_waits_only_for_what_it_does_not_overtake() -> None:
    machine = machine_that_knows()
    warm(machine, spec())
    for index, priority in enumerate((Priority.NORMAL, Priority.LOW, Priority.LOW, Priority.HIGH)):
        call(machine, f"r{index}", 1.0, priority)  # the first one runs
    reading = machine.reading(1.0)
    waits_s = [round(wait_of(reading, priority), 6) for priority in Priority]
    assert waits_s == [0.4, 0.2, 0.2, 0.1]


def test_the_backlog_shrinks_as_the_running_call_goes_on_and_is_nothing_on_a_free_node() -> None:
    machine = machine_that_knows()
    instance = warm(machine, spec())
    assert machine.reading(0.5).backlog_s == 0.0
    call(machine, "r", 1.0)
    assert abs(machine.reading(1.04).backlog_s - 0.06) < 1e-9
    machine.step(finished(instance, "r"), 1.1)
    assert machine.reading(1.1).backlog_s == 0.0


def test_starts_under_way_and_to_come_count_in_the_backlog() -> None:
    machine = machine_that_knows()
    call(machine, "r", 1.0)  # starts an instance, which takes the CPU
    backlog_s = machine.reading(1.1).backlog_s
    # What is left of the start, and the run of the call that waits for it with its own start.
    assert abs(backlog_s - (COLD_S - 0.1 + RUN_S + COLD_S)) < 1e-9
    machine.step(started("edge-1-1"), 1.3)
    assert abs(machine.reading(1.3).backlog_s - RUN_S) < 1e-9


def test_a_reading_counts_instances_that_start_and_run() -> None:
    machine = machine_that_knows(cpus=4)
    function = spec().function_id
    assert machine.reading(0.0).engaged == {}
    call(machine, "r", 1.0)
    assert machine.reading(1.0).engaged == {function: 1}
    machine.step(started("edge-1-1"), 1.3)
    reading = machine.reading(1.3)
    assert (reading.warm, reading.engaged) == ({}, {function: 1})
    machine.step(finished("edge-1-1", "r"), 1.4)
    assert reading.engaged == {function: 1}  # a reading does not change afterwards
    reading = machine.reading(1.4)
    assert (reading.warm, reading.engaged) == ({function: 1}, {})


def test_no_instance_is_started_while_one_should_soon_be_free() -> None:
    machine = machine_that_knows(cpus=2)
    instance = warm(machine, spec())
    call(machine, "a", 1.0)
    assert RUN_S < PATIENCE * COLD_S
    assert call(machine, "b", 1.0) == []  # a CPU is free, but `a` ends long before a start would
    [run] = [c for c in machine.step(finished(instance, "a"), 1.1) if isinstance(c, RunOn)]
    assert run.request_id == "b"


def test_more_requests_than_instances_that_come_free_start_another() -> None:
    machine = machine_that_knows(cpus=3)
    warm(machine, spec())
    call(machine, "a", 1.0)
    call(machine, "b", 1.0)
    assert [type(c) for c in call(machine, "c", 1.0)] == [StartInstance]


def test_a_run_that_takes_far_longer_than_expected_is_not_waited_for() -> None:
    machine = machine_that_knows(cpus=2)
    warm(machine, spec())
    call(machine, "a", 1.0)
    assert call(machine, "b", 1.0) == []
    assert machine.step(Ticked(), 1.0 + 1.9 * RUN_S) == []
    [start] = machine.step(Ticked(), 1.0 + 2.1 * RUN_S)
    assert isinstance(start, StartInstance)


def test_another_functions_runs_keep_nobody_from_starting() -> None:
    machine = machine_that_knows(cpus=2)
    warm(machine, OTHER)
    call(machine, "a", 1.0, function=OTHER)
    assert [type(c) for c in call(machine, "b", 1.0)] == [StartInstance]


def test_a_running_instance_makes_a_cold_start_less_likely() -> None:
    here = node(cpus=2)
    function = spec().function_id
    free = Resources(cpus=1, memory_mib=512)

    def cold_start_s(**counts: dict[object, int]) -> float:
        reading = NodeReading(free=free, **counts)  # type: ignore[arg-type]
        view = ClusterView(
            now_s=0.0,
            origin=here,
            nodes=(NodeView(node=here, reading=reading),),
            profiles={function: FunctionProfile(run_s=RUN_S, cold_start_s=COLD_S)},
        )
        return float(estimate(view, request("r"), view.nodes).column("cold_start_s")[0])

    assert cold_start_s() == COLD_S
    assert cold_start_s(engaged={function: 1}) == ENGAGED_SHARE * COLD_S
    assert cold_start_s(warm={function: 1}, engaged={function: 1}) == 0.0

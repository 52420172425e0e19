"""NodeMachine: events in, commands out."""

from dataclasses import replace

from agent.beliefs import UNREACHABLE_FOR_S
from agent.machine import RECALL_S, NodeMachine
from tierwise.domain.command import (
    AskPolicy,
    CancelAt,
    Forward,
    KillRun,
    Reply,
    ReplyAgain,
    Report,
    RunOn,
    StartInstance,
    StopInstance,
)
from tierwise.domain.decision import NotPlaced, Placed, Reason
from tierwise.domain.event import (
    Arrived,
    CancelAsked,
    CatalogueReceived,
    Decided,
    DrainAsked,
    InstanceDied,
    InstanceFailed,
    InstanceStarted,
    PeerFailed,
    PeerReplied,
    PeerSeen,
    RunFinished,
    Ticked,
    ViewReceived,
)
from tierwise.domain.function import Catalogue, FunctionSpec, Priority
from tierwise.domain.ids import InstanceId, NodeId, PolicyId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, NodeState, Tier
from tierwise.domain.view import NodeReading

EDGE = NodeId("edge-1")
CLOUD = NodeId("cloud-1")


def node(name: str = EDGE, tier: Tier = Tier.EDGE, *, cpus: float = 1, memory: int = 512) -> Node:
    return Node(node_id=NodeId(name), tier=tier, capacity=Resources(cpus=cpus, memory_mib=memory))


def spec(name: str = "f", **changes: object) -> FunctionSpec:
    base = FunctionSpec(namespace="default", name=name, version=1, code_digest="d")
    return replace(base, **changes)  # type: ignore[arg-type]


def request(name: str, function: FunctionSpec | None = None, **changes: object) -> Request:
    base = Request(request_id=RequestId(name), spec=function or spec(), origin=EDGE)
    return replace(base, **changes)  # type: ignore[arg-type]


def decided(name: str, *nodes: str) -> Decided:
    return Decided(
        request_id=RequestId(name),
        decision=Placed(node_ids=tuple(NodeId(n) for n in nodes)),
        policy_id=PolicyId("test@1"),
    )


def finished(instance: str, name: str, **changes: object) -> RunFinished:
    base = RunFinished(instance_id=InstanceId(instance), request_id=RequestId(name), run_s=0.1)
    return replace(base, **changes)  # type: ignore[arg-type]


def started(instance: str, cold_start_s: float = 0.2) -> InstanceStarted:
    return InstanceStarted(instance_id=InstanceId(instance), cold_start_s=cold_start_s)


def with_cloud(machine: NodeMachine, now_s: float = 0.0, **changes: object) -> NodeMachine:
    """Tell the machine of a cloud node 40 ms away."""
    links = LinkTable(
        by_tier={
            (Tier.EDGE, Tier.CLOUD): Link(rtt_s=0.04, bandwidth_bytes_per_s=1e9),
            (Tier.CLOUD, Tier.EDGE): Link(rtt_s=0.04, bandwidth_bytes_per_s=1e9),
        }
    )
    peer = PeerSeen(
        node=node(CLOUD, Tier.CLOUD, cpus=4, memory=4096),
        state=NodeState.READY,
        reading=NodeReading(sequence=1),
        age_s=0.1,
    )
    peer = replace(peer, **changes)  # type: ignore[arg-type]
    machine.step(ViewReceived(peers=(peer,), links=links, is_full=True), now_s)
    return machine


def warm(machine: NodeMachine, function: FunctionSpec, now_s: float = 0.0) -> str:
    """Leave one idle instance of `function` and return its id."""
    name = f"warm-{function.name}"
    machine.step(Arrived(request=request(name, function)), now_s)
    commands = machine.step(decided(name, EDGE), now_s)
    instance = next(c.instance_id for c in commands if isinstance(c, StartInstance))
    machine.step(started(instance), now_s)
    machine.step(finished(instance, name), now_s)
    return instance


def host_outcome(name: str, state: OutcomeState, **changes: object) -> PeerReplied:
    """Return the cloud's answer to a forwarded request."""
    there = Outcome(
        request_id=RequestId(name),
        function_id=spec().function_id,
        state=state,
        origin=EDGE,
        node_id=None,
    )
    outcome = replace(there, **changes)  # type: ignore[arg-type]
    return PeerReplied(request_id=RequestId(name), node_id=CLOUD, outcome=outcome)


def away(machine: NodeMachine, timeout_s: float = 1.0) -> NodeMachine:
    """Send the request `r`, which came at 1.0, to the cloud at 1.1."""
    with_cloud(machine)
    machine.step(Arrived(request=request("r", timeout_s=timeout_s)), 1.0)
    machine.step(decided("r", CLOUD), 1.1)
    return machine


def outcome_of(commands: list[object]) -> Outcome:
    return next(c.outcome for c in commands if isinstance(c, Reply))


def test_a_users_request_asks_the_policy_with_an_exact_row_for_this_node() -> None:
    machine = NodeMachine(node())
    [ask] = machine.step(Arrived(request=request("r")), 1.0)
    assert isinstance(ask, AskPolicy)
    assert ask.view.origin == machine.node
    assert ask.view.nodes[0].received_at_s == 1.0


def test_a_cold_call_starts_an_instance_runs_and_accounts_for_the_wait() -> None:
    machine = NodeMachine(node())
    machine.step(Arrived(request=request("r")), 0.0)
    assert machine.step(decided("r", EDGE), 0.0) == [
        StartInstance(instance_id=InstanceId("edge-1-1"), spec=spec())
    ]
    assert machine.step(started("edge-1-1"), 0.2) == [
        RunOn(
            instance_id=InstanceId("edge-1-1"),
            request_id=RequestId("r"),
            timeout_s=59.8,
            memory_mib=256,
        )
    ]
    commands = machine.step(finished("edge-1-1", "r"), 0.3)
    outcome = outcome_of(commands)
    assert outcome.state is OutcomeState.OK
    assert outcome.is_cold
    assert outcome.latency.cold_start_s == 0.2
    assert abs(outcome.latency.total_s - 0.3) < 1e-9
    assert Report(outcome=outcome) in commands


def test_a_warm_instance_is_reused_without_a_start() -> None:
    machine = NodeMachine(node())
    instance = warm(machine, spec())
    machine.step(Arrived(request=request("r")), 1.0)
    [run] = machine.step(decided("r", EDGE), 1.0)
    assert isinstance(run, RunOn)
    assert run.instance_id == instance
    assert not outcome_of(machine.step(finished(instance, "r"), 1.1)).is_cold


def test_requests_beyond_the_cpus_wait_and_the_higher_priority_goes_first() -> None:
    machine = NodeMachine(node())
    instance = warm(machine, spec())
    for name, priority in (("a", Priority.LOW), ("b", Priority.LOW), ("c", Priority.CRITICAL)):
        machine.step(Arrived(request=request(name, priority=priority)), 1.0)
        machine.step(decided(name, EDGE), 1.0)
    commands = machine.step(finished(instance, "a"), 1.1)
    assert [c.request_id for c in commands if isinstance(c, RunOn)] == ["c"]


def test_a_full_queue_makes_the_owner_try_the_next_candidate() -> None:
    machine = with_cloud(NodeMachine(node(), queue_max=1))
    warm(machine, spec())
    for name in ("running", "queued"):
        machine.step(Arrived(request=request(name)), 1.0)
        machine.step(decided(name, EDGE), 1.0)
    machine.step(Arrived(request=request("r")), 1.0)
    [forward] = machine.step(decided("r", EDGE, CLOUD), 1.0)
    assert isinstance(forward, Forward)
    assert forward.node_id == CLOUD
    assert forward.request.hops == 1


def test_a_full_queue_makes_a_host_refuse_and_say_why() -> None:
    machine = NodeMachine(node(), queue_max=1)
    instance = warm(machine, spec())
    for name in ("running", "queued"):
        machine.step(Arrived(request=request(name, hops=1)), 1.0)
    [reply] = machine.step(Arrived(request=request("r", hops=1)), 1.0)
    assert isinstance(reply, Reply)
    assert reply.outcome.state is OutcomeState.REFUSED
    assert reply.outcome.reason is Reason.QUEUE_FULL
    machine.step(finished(instance, "running"), 1.1)
    assert machine.step(Arrived(request=request("r", hops=1)), 1.2) == []  # it may come back


def test_a_forwarded_call_carries_what_is_left_of_its_time() -> None:
    machine = with_cloud(NodeMachine(node()))
    machine.step(Arrived(request=request("r", deadline_s=1.0, timeout_s=5.0)), 1.0)
    [forward] = machine.step(decided("r", CLOUD), 1.5)
    assert isinstance(forward, Forward)
    assert (forward.request.deadline_s, forward.request.timeout_s) == (0.5, 4.5)


def test_a_forwarded_result_splits_the_time_outside_the_host_into_both_ways() -> None:
    machine = with_cloud(NodeMachine(node()))
    machine.step(Arrived(request=request("r")), 1.0)
    machine.step(decided("r", CLOUD), 1.0)
    there = Outcome(
        request_id=RequestId("r"),
        function_id=spec().function_id,
        state=OutcomeState.OK,
        origin=EDGE,
        node_id=CLOUD,
        latency=LatencySplit(run_s=0.1),
    )
    commands = machine.step(
        PeerReplied(request_id=RequestId("r"), node_id=CLOUD, outcome=there), 1.14
    )
    latency = outcome_of(commands).latency
    assert abs(latency.transfer_s - 0.02) < 1e-9
    assert abs(latency.return_s - 0.02) < 1e-9
    assert abs(latency.total_s - 0.14) < 1e-9


def test_a_refusal_sends_the_call_to_the_next_candidate_and_is_remembered() -> None:
    machine = with_cloud(NodeMachine(node()))
    warm(machine, spec())
    machine.step(Arrived(request=request("r")), 1.0)
    machine.step(decided("r", CLOUD, EDGE), 1.0)
    refusal = Outcome(
        request_id=RequestId("r"),
        function_id=spec().function_id,
        state=OutcomeState.REFUSED,
        origin=EDGE,
        node_id=None,
        reason=Reason.QUEUE_FULL,
    )
    [run] = machine.step(
        PeerReplied(request_id=RequestId("r"), node_id=CLOUD, outcome=refusal), 1.1
    )
    assert isinstance(run, RunOn)
    outcome = outcome_of(machine.step(finished(run.instance_id, "r"), 1.2))
    assert outcome.tried == ((CLOUD, Reason.QUEUE_FULL),)


def test_a_dead_peer_is_left_alone_for_a_while_and_the_call_goes_on() -> None:
    machine = with_cloud(NodeMachine(node()))
    warm(machine, spec())
    machine.step(Arrived(request=request("r")), 1.0)
    machine.step(decided("r", CLOUD, EDGE), 1.0)
    [run] = machine.step(PeerFailed(request_id=RequestId("r"), node_id=CLOUD), 1.1)
    assert isinstance(run, RunOn)
    assert [row.reachable for row in machine.view(1.2).nodes] == [False, True]
    machine.step(Ticked(), 1.1 + UNREACHABLE_FOR_S)
    assert all(row.reachable for row in machine.view(4.0).nodes)


def test_when_every_candidate_failed_the_caller_learns_each_reason() -> None:
    machine = with_cloud(NodeMachine(node()))
    machine.step(Arrived(request=request("r")), 1.0)
    machine.step(decided("r", CLOUD), 1.0)
    outcome = outcome_of(machine.step(PeerFailed(request_id=RequestId("r"), node_id=CLOUD), 1.1))
    assert outcome.state is OutcomeState.UNPLACEABLE
    assert "cloud-1: node unreachable" in outcome.message


def unplaced(machine: NodeMachine, *reasons: Reason, **changes: object) -> Outcome:
    """Return how a request ends for which the policy finds no node."""
    machine.step(Arrived(request=request("r", **changes)), 1.0)
    masked = tuple((NodeId(f"n-{index}"), reason) for index, reason in enumerate(reasons))
    decision = NotPlaced(reasons=masked)
    event = Decided(request_id=RequestId("r"), decision=decision, policy_id=PolicyId("test@1"))
    outcome = outcome_of(machine.step(event, 1.0))
    assert outcome.explanation is not None
    assert outcome.explanation.masked == masked
    assert outcome.tried == ()  # nobody was asked
    return outcome


def test_a_request_that_no_node_may_run_ends_at_once_with_reasons() -> None:
    outcome = unplaced(NodeMachine(node()), Reason.NO_GPU, Reason.NODE_LOST)
    assert outcome.state is OutcomeState.UNPLACEABLE
    assert outcome.error_code == "unplaceable"
    assert "n-0: no gpu, n-1: node lost" in outcome.message


def test_a_request_that_no_waiting_helps_is_not_to_be_sent_again() -> None:
    permanent = [reason for reason in Reason if reason.is_permanent]
    outcome = unplaced(NodeMachine(node()), *permanent)
    assert outcome.error_code == "infeasible"
    assert "no node can ever run default/f@1 as it is asked for: n-0: wrong tier" in outcome.message
    assert unplaced(NodeMachine(node())).error_code == "unplaceable"  # nodes may yet join


def test_a_pin_to_a_node_that_nobody_knows_is_not_found() -> None:
    pinned = NodeId("nowhere")
    outcome = unplaced(NodeMachine(node()), Reason.PINNED_ELSEWHERE, node_id=pinned)
    assert outcome.error_code == "not_found"
    assert outcome.message.startswith("there is no node 'nowhere'")
    there = unplaced(with_cloud(NodeMachine(node())), Reason.WRONG_TIER, node_id=CLOUD)
    assert there.error_code == "infeasible"


def test_memory_for_a_new_function_comes_from_the_cheapest_idle_instance() -> None:
    machine = NodeMachine(node(memory=512))
    rare, often = spec("rare"), spec("often")
    for _ in range(1):
        victim = warm(machine, rare)
    keep = warm(machine, often)
    for index in range(5):
        machine.step(Arrived(request=request(f"o{index}", often)), 1.0)
        machine.step(decided(f"o{index}", EDGE), 1.0)
        machine.step(finished(keep, f"o{index}"), 1.0)
    machine.step(Arrived(request=request("new", spec("new"))), 1.0)
    commands = machine.step(decided("new", EDGE), 1.0)
    assert commands[0] == StopInstance(instance_id=InstanceId(victim))
    assert isinstance(commands[1], StartInstance)


def test_an_idle_instance_outlives_its_keep_alive_by_no_tick() -> None:
    machine = NodeMachine(node())
    instance = warm(machine, spec(keep_alive_s=10.0))
    assert machine.step(Ticked(), 9.9) == []
    assert machine.step(Ticked(), 10.0) == [StopInstance(instance_id=InstanceId(instance))]
    assert len(machine.pool) == 0


def test_a_queued_request_expires_and_frees_its_place() -> None:
    machine = NodeMachine(node())
    warm(machine, spec())
    for name in ("running", "late"):
        machine.step(Arrived(request=request(name, timeout_s=2.0)), 1.0)
        machine.step(decided(name, EDGE), 1.0)
    outcome = outcome_of(machine.step(Ticked(), 3.0))
    assert (outcome.request_id, outcome.error_code) == ("late", "deadline_exceeded")
    assert machine.reading(3.0).queued == 0


def test_a_request_that_arrives_with_no_time_left_never_runs() -> None:
    machine = NodeMachine(node())
    outcome = outcome_of(machine.step(Arrived(request=request("r", timeout_s=0.0)), 1.0))
    assert outcome.state is OutcomeState.EXPIRED


def test_a_failed_start_costs_exactly_one_request() -> None:
    machine = NodeMachine(node())
    for name in ("a", "b"):
        machine.step(Arrived(request=request(name)), 1.0)
        machine.step(decided(name, EDGE), 1.0)
    failed = InstanceFailed(
        instance_id=InstanceId("edge-1-1"), error_code="start_failed", message="no module"
    )
    commands = machine.step(failed, 1.1)
    assert outcome_of(commands).request_id == "a"
    assert [c for c in commands if isinstance(c, StartInstance)]  # b gets its own attempt


def test_a_dead_worker_gives_back_its_memory_and_its_call_fails() -> None:
    machine = NodeMachine(node())
    instance = warm(machine, spec())
    machine.step(Arrived(request=request("r")), 1.0)
    machine.step(decided("r", EDGE), 1.0)
    outcome = outcome_of(
        machine.step(
            finished(instance, "r", is_instance_alive=False, error_code="function_died"), 1.1
        )
    )
    assert outcome.error_code == "function_died"
    assert machine.pool.free == machine.node.capacity


def test_an_idle_worker_that_died_is_forgotten() -> None:
    machine = NodeMachine(node())
    instance = warm(machine, spec())
    machine.step(InstanceDied(instance_id=InstanceId(instance)), 1.0)
    assert machine.pool.free == machine.node.capacity


def test_cancelling_works_in_every_phase() -> None:
    machine = with_cloud(NodeMachine(node()))
    instance = warm(machine, spec())
    for name, target in (("running", EDGE), ("queued", EDGE), ("away", CLOUD)):
        machine.step(Arrived(request=request(name)), 1.0)
        machine.step(decided(name, target), 1.0)
    cancel = [CancelAsked(request_id=RequestId(n)) for n in ("running", "queued", "away")]
    assert machine.step(cancel[0], 1.1) == [
        KillRun(instance_id=InstanceId(instance), request_id=RequestId("running"))
    ]
    assert outcome_of(machine.step(cancel[1], 1.1)).state is OutcomeState.CANCELLED
    away = machine.step(cancel[2], 1.1)
    assert away == [CancelAt(node_id=CLOUD, request_id=RequestId("away"))]
    there = host_outcome("away", OutcomeState.CANCELLED, error_code="cancelled")
    assert outcome_of(machine.step(there, 1.15)).state is OutcomeState.CANCELLED
    killed = finished(instance, "running", is_instance_alive=False, error_code="cancelled")
    assert outcome_of(machine.step(killed, 1.2)).state is OutcomeState.CANCELLED
    assert list(machine.tickets()) == []


def test_a_duplicate_of_a_finished_request_repeats_the_answer_and_runs_nothing() -> None:
    machine = NodeMachine(node())
    instance = warm(machine, spec())
    machine.step(Arrived(request=request("r", hops=1)), 1.0)
    assert machine.step(Arrived(request=request("r", hops=1)), 1.0) == []
    machine.step(finished(instance, "r"), 1.1)
    assert machine.step(Arrived(request=request("r", hops=1)), 1.2) == [
        ReplyAgain(request_id=RequestId("r"))
    ]


def test_a_newer_lease_of_finished_work_runs_again() -> None:
    machine = NodeMachine(node())
    instance = warm(machine, spec())
    machine.step(Arrived(request=request("w", lease=1)), 1.0)
    machine.step(finished(instance, "w"), 1.1)
    [run] = machine.step(Arrived(request=request("w", lease=2)), 1.2)
    assert isinstance(run, RunOn)
    assert outcome_of(machine.step(finished(instance, "w"), 1.3)).lease == 2


def test_a_draining_node_finishes_what_it_has_and_takes_nothing_new() -> None:
    machine = NodeMachine(node())
    instance = warm(machine, spec())
    machine.step(Arrived(request=request("old")), 1.0)
    machine.step(decided("old", EDGE), 1.0)
    machine.step(DrainAsked(is_on=True), 1.1)
    [reply] = machine.step(Arrived(request=request("new", hops=1)), 1.2)
    assert isinstance(reply, Reply)
    assert reply.outcome.reason is Reason.NODE_DRAINING
    assert outcome_of(machine.step(finished(instance, "old"), 1.3)).state is OutcomeState.OK


def test_work_sent_to_a_peer_counts_until_its_next_reading() -> None:
    machine = with_cloud(NodeMachine(node()))
    machine.step(Arrived(request=request("r")), 1.0)
    machine.step(decided("r", CLOUD), 1.0)
    cloud = machine.view(1.0).nodes[0]
    assert cloud.pending_s > 0.0
    with_cloud(machine, 1.5, reading=NodeReading(sequence=2))
    assert machine.view(1.5).nodes[0].pending_s == 0.0


def test_an_older_reading_never_replaces_a_newer_one() -> None:
    machine = with_cloud(NodeMachine(node()), reading=NodeReading(sequence=5, running=3))
    with_cloud(machine, 1.0, reading=NodeReading(sequence=4, running=9))
    assert machine.view(1.0).nodes[0].reading.running == 3


def test_nodes_missing_from_a_full_view_are_forgotten_but_never_this_one() -> None:
    machine = with_cloud(NodeMachine(node()))
    machine.step(ViewReceived(peers=(), is_full=True), 1.0)
    assert [row.node.node_id for row in machine.view(1.0).nodes] == [EDGE]


def test_instances_of_a_deleted_function_are_stopped() -> None:
    machine = NodeMachine(node())
    instance = warm(machine, spec())
    commands = machine.step(CatalogueReceived(catalogue=Catalogue()), 1.0)
    assert commands == [StopInstance(instance_id=InstanceId(instance))]


def test_a_function_never_has_more_instances_than_it_allows() -> None:
    machine = NodeMachine(node(cpus=4, memory=4096))
    function = spec(instances_max=2)
    starts = []
    for index in range(4):
        machine.step(Arrived(request=request(str(index), function)), 1.0)
        commands = machine.step(decided(str(index), EDGE), 1.0)
        starts += [c for c in commands if isinstance(c, StartInstance)]
    assert len(starts) == 2


# -- calls that are cut short -------------------------------------------------------------------


RECALL = CancelAt(node_id=CLOUD, request_id=RequestId("r"))
RAN_THERE = {
    "node_id": CLOUD,
    "latency": LatencySplit(cold_start_s=0.2, run_s=0.6),
    "memory_mib": 256,
    "money_usd": 1e-6,
    "error_code": "cancelled",
}


def test_a_call_that_is_cut_short_elsewhere_is_split_and_billed_as_its_host_says() -> None:
    machine = away(NodeMachine(node()))
    assert machine.step(Ticked(), 2.0) == [RECALL]
    assert machine.step(Ticked(), 2.01) == []  # asked once
    outcome = outcome_of(machine.step(host_outcome("r", OutcomeState.CANCELLED, **RAN_THERE), 2.05))
    assert outcome.state is OutcomeState.EXPIRED
    assert outcome.error_code == "deadline_exceeded"
    assert (outcome.node_id, outcome.memory_mib) == (CLOUD, 256)
    assert outcome.money_usd >= 1e-6
    assert (outcome.latency.run_s, outcome.latency.cold_start_s) == (0.6, 0.2)
    assert abs(outcome.latency.total_s - 1.05) < 1e-9
    assert "it ran 0.6 s on cloud-1" in outcome.message


def test_a_call_that_its_caller_cancels_is_billed_too() -> None:
    machine = away(NodeMachine(node()))
    assert machine.step(CancelAsked(request_id=RequestId("r")), 1.5) == [RECALL]
    assert machine.step(CancelAsked(request_id=RequestId("r")), 1.5) == []
    outcome = outcome_of(machine.step(host_outcome("r", OutcomeState.CANCELLED, **RAN_THERE), 1.9))
    assert (outcome.state, outcome.node_id) == (OutcomeState.CANCELLED, CLOUD)
    assert outcome.money_usd >= 1e-6


def test_a_call_that_waited_elsewhere_says_that_it_never_ran() -> None:
    for recall in (True, False):  # the host may see first that the time is over
        machine = away(NodeMachine(node()))
        if recall:
            machine.step(Ticked(), 2.0)
        waited = host_outcome("r", OutcomeState.EXPIRED, latency=LatencySplit(queue_s=0.9))
        outcome = outcome_of(machine.step(waited, 2.0))
        assert (outcome.state, outcome.node_id) == (OutcomeState.EXPIRED, None)
        assert "its time of 1 s was over after 1 s, before it ran on cloud-1" in outcome.message
        assert outcome.latency.run_s == 0.0


def test_a_result_that_was_on_its_way_when_the_time_was_over_is_delivered() -> None:
    machine = away(NodeMachine(node()))
    machine.step(Ticked(), 2.0)
    outcome = outcome_of(machine.step(host_outcome("r", OutcomeState.OK, node_id=CLOUD), 2.02))
    assert outcome.state is OutcomeState.OK


def test_a_host_that_does_not_answer_holds_nobody_up_and_is_not_said_to_have_been_idle() -> None:
    broken = PeerFailed(request_id=RequestId("r"), node_id=CLOUD)
    for event in (Ticked(), broken):
        machine = away(NodeMachine(node()))
        machine.step(Ticked(), 2.0)
        assert machine.step(Ticked(), 1.9 + RECALL_S) == []
        outcome = outcome_of(machine.step(event, 2.0 + RECALL_S))
        assert outcome.state is OutcomeState.EXPIRED
        assert "while it was on cloud-1, which did not say whether it ran" in outcome.message
        assert outcome.money_usd == 0.0
        assert list(machine.tickets()) == []


def test_a_run_here_that_outlives_its_caller_is_killed_billed_and_called_expired() -> None:
    for by_tick in (True, False):  # the runtime's own timer may be first
        machine = NodeMachine(node())
        instance = warm(machine, spec())
        machine.step(Arrived(request=request("r", timeout_s=1.0)), 1.0)
        machine.step(decided("r", EDGE), 1.0)
        code = "function_timed_out"
        if by_tick:
            kill = KillRun(instance_id=InstanceId(instance), request_id=RequestId("r"))
            assert machine.step(Ticked(), 2.0) == [kill]
            assert machine.step(Ticked(), 2.01) == []
            code = "cancelled"
        end = finished(instance, "r", is_instance_alive=False, error_code=code)
        outcome = outcome_of(machine.step(end, 2.0))
        assert (outcome.state, outcome.error_code) == (OutcomeState.EXPIRED, "deadline_exceeded")
        assert (outcome.node_id, outcome.latency.run_s) == (EDGE, 1.0)
        assert outcome.money_usd > 0.0
        assert "of which it ran 1 s on edge-1" in outcome.message


def test_a_run_that_outlives_the_functions_own_time_is_the_functions_failure() -> None:
    machine = NodeMachine(node())
    instance = warm(machine, spec(timeout_s=0.5))
    machine.step(Arrived(request=request("r", spec(timeout_s=0.5))), 1.0)
    machine.step(decided("r", EDGE), 1.0)
    end = finished(instance, "r", is_instance_alive=False, error_code="function_timed_out")
    outcome = outcome_of(machine.step(end, 1.5))
    assert (outcome.state, outcome.error_code) == (OutcomeState.FAILED, "function_timed_out")


def sized(memory_mib: int, name: str = "auto") -> FunctionSpec:
    return spec(name, is_memory_auto=True, memory_mib=memory_mib)


def run_here(machine: NodeMachine, name: str, function: FunctionSpec, now_s: float) -> list[object]:
    machine.step(Arrived(request=request(name, function)), now_s)
    return list(machine.step(decided(name, EDGE), now_s))


def test_a_warm_instance_takes_the_size_of_the_call_that_it_runs() -> None:
    machine = NodeMachine(node(memory=1024))
    instance = warm(machine, sized(400))
    assert machine.pool.free.memory_mib == 624
    [run] = run_here(machine, "small", sized(64), 1.0)
    assert isinstance(run, RunOn)
    assert run.instance_id == instance
    assert run.memory_mib == 64
    assert machine.pool.free.memory_mib == 960
    machine.step(finished(instance, "small"), 2.0)
    [run] = run_here(machine, "large", sized(1000), 3.0)
    assert isinstance(run, RunOn)
    assert run.memory_mib == 1000
    assert machine.pool.free.memory_mib == 24


def test_of_several_warm_instances_the_smallest_that_fits_is_taken() -> None:
    machine = NodeMachine(node(cpus=4, memory=2048))
    names = {}
    for size_mib in (64, 512, 128):
        name = f"r{size_mib}"
        commands = run_here(machine, name, sized(size_mib), 0.0)
        names[size_mib] = next(c.instance_id for c in commands if isinstance(c, StartInstance))
        machine.step(started(names[size_mib]), 0.0)
    for size_mib, instance in names.items():
        machine.step(finished(instance, f"r{size_mib}"), 0.5)
    [run] = run_here(machine, "r", sized(100), 1.0)
    assert isinstance(run, RunOn)
    assert run.instance_id == names[128]
    [run] = run_here(machine, "r2", sized(1000), 1.0)
    assert isinstance(run, RunOn)
    assert run.instance_id == names[512]


def test_an_instance_that_must_grow_evicts_others_and_waits_if_that_is_too_little() -> None:
    machine = NodeMachine(node(cpus=2, memory=512))
    other = warm(machine, spec("other", memory_mib=200))
    mine = warm(machine, sized(100))
    commands = run_here(machine, "r", sized(400), 1.0)
    assert StopInstance(instance_id=InstanceId(other)) in commands
    run = next(c for c in commands if isinstance(c, RunOn))
    assert run.instance_id == mine
    assert run_here(machine, "r2", sized(200), 1.0) == []  # 112 are free, nothing is idle
    [*_, run2] = machine.step(finished(mine, "r"), 2.0)
    assert isinstance(run2, RunOn)
    assert run2.memory_mib == 200


def test_a_call_out_of_memory_runs_once_more_at_double_and_both_are_billed() -> None:
    machine = NodeMachine(node(tier=Tier.CLOUD, memory=1024))
    [start, *_] = run_here(machine, "r", sized(100), 0.0)
    assert isinstance(start, StartInstance)
    machine.step(started(start.instance_id), 0.0)
    died = finished(
        start.instance_id,
        "r",
        is_out_of_memory=True,
        is_instance_alive=False,
        error_code="function_out_of_memory",
    )
    commands = machine.step(died, 2.0)
    assert not any(isinstance(c, Reply) for c in commands)
    start = next(c for c in commands if isinstance(c, StartInstance))
    assert start.spec.memory_mib == 200
    [run] = machine.step(started(start.instance_id), 2.0)
    assert isinstance(run, RunOn)
    assert run.memory_mib == 200
    outcome = outcome_of(list(machine.step(finished(start.instance_id, "r"), 5.0)))
    assert outcome.state is OutcomeState.OK
    assert outcome.memory_mib == 200
    assert outcome.retried_gb_s == 100 / 1024 * 2.0
    once = replace(request("x", sized(200)))
    single = NodeMachine(node(tier=Tier.CLOUD, memory=1024))
    [start, *_] = run_here(single, "x", once.spec, 0.0)
    single.step(started(start.instance_id), 0.0)  # type: ignore[union-attr]
    alone = outcome_of(list(single.step(finished(start.instance_id, "x"), 3.0)))  # type: ignore[union-attr]
    assert outcome.money_usd > 1.2 * alone.money_usd


def test_a_second_time_out_of_memory_is_the_end_and_so_is_a_declared_size() -> None:
    machine = NodeMachine(node(memory=4096))
    for function, attempts in ((sized(100), [100, 200]), (spec("fixed", memory_mib=100), [100])):
        commands = run_here(machine, function.name, function, 0.0)
        seen = []
        while True:
            start = next((c for c in commands if isinstance(c, StartInstance)), None)
            if start is None:
                break
            seen.append(start.spec.memory_mib)
            machine.step(started(start.instance_id), 0.0)
            died = finished(
                start.instance_id,
                function.name,
                is_out_of_memory=True,
                is_instance_alive=False,
                error_code="function_out_of_memory",
            )
            commands = list(machine.step(died, 1.0))
        assert seen == attempts
        assert outcome_of(commands).error_code == "function_out_of_memory"


def test_the_retry_takes_at_most_what_the_node_has_and_nothing_if_that_is_no_more() -> None:
    machine = NodeMachine(node(memory=150))
    [start, *_] = run_here(machine, "r", sized(100), 0.0)
    assert isinstance(start, StartInstance)
    machine.step(started(start.instance_id), 0.0)
    ran_out = finished(start.instance_id, "r", is_out_of_memory=True, error_code="x")
    [run] = machine.step(ran_out, 1.0)  # the process caught it: the instance lives and grows
    assert isinstance(run, RunOn)
    assert run.memory_mib == 150
    full = NodeMachine(node(memory=100))
    [start, *_] = run_here(full, "r", sized(100), 0.0)
    assert isinstance(start, StartInstance)
    full.step(started(start.instance_id), 0.0)
    commands = full.step(finished(start.instance_id, "r", is_out_of_memory=True), 1.0)
    assert any(isinstance(c, Reply) for c in commands)


def test_small_calls_of_others_do_not_starve_one_whose_warm_instance_cannot_grow() -> None:
    machine = NodeMachine(node(cpus=4, memory=512))
    warm(machine, sized(50))
    [start, *_] = run_here(machine, "long", spec("long", memory_mib=300), 1.0)
    assert isinstance(start, StartInstance)
    machine.step(started(start.instance_id), 1.0)
    assert run_here(machine, "large", sized(400), 2.0) == []
    assert run_here(machine, "small", spec("small", memory_mib=100), 2.1) == []  # it is behind
    commands = machine.step(finished(start.instance_id, "long"), 2.2)
    first = next(c for c in commands if isinstance(c, RunOn))
    assert first.request_id == "large"

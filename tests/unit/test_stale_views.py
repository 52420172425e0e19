"""NodeMachine: what is believed of peers, how it is corrected, and refusals of stale proposals."""

from dataclasses import replace

from agent.machine import STALE_MAX, NodeMachine
from tests.unit.test_node_machine import (
    CLOUD,
    EDGE,
    decided,
    finished,
    node,
    request,
    spec,
    started,
    with_cloud,
)
from tierwise.domain.command import AskPolicy, Forward, NodeCommand, Reply, StartInstance
from tierwise.domain.decision import Reason
from tierwise.domain.event import Arrived, PeerReplied
from tierwise.domain.ids import RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.view import ClusterView, NodeReading, NodeView


def answer(state: OutcomeState, name: str = "r", reason: Reason | None = None) -> Outcome:
    return Outcome(
        request_id=RequestId(name),
        function_id=spec().function_id,
        state=state,
        origin=EDGE,
        node_id=CLOUD,
        latency=LatencySplit(run_s=0.1),
        reason=reason,
    )


def replied(outcome: Outcome, reading: NodeReading | None = None) -> PeerReplied:
    return PeerReplied(
        request_id=outcome.request_id, node_id=CLOUD, outcome=outcome, reading=reading
    )


def row(view: ClusterView, name: str) -> NodeView:
    return next(row for row in view.nodes if row.node.node_id == name)


def sent_to_cloud(name: str = "r") -> tuple[NodeMachine, Forward]:
    machine = with_cloud(NodeMachine(node()))
    machine.step(Arrived(request=request(name)), 1.0)
    [forward] = machine.step(decided(name, CLOUD, EDGE), 1.0)
    assert isinstance(forward, Forward)
    return machine, forward


def test_an_answer_brings_the_peers_newest_reading() -> None:
    machine, _ = sent_to_cloud()
    machine.step(
        replied(answer(OutcomeState.OK), NodeReading(sequence=9, queued=3, backlog_s=0.7)), 1.2
    )
    assert row(machine.view(1.2), CLOUD).reading.backlog_s == 0.7
    assert row(machine.view(1.2), CLOUD).pending_s == 0.0


def test_an_older_reading_changes_nothing() -> None:
    machine, _ = sent_to_cloud()
    machine.step(replied(answer(OutcomeState.OK), NodeReading(sequence=0, backlog_s=0.7)), 1.2)
    assert row(machine.view(1.2), CLOUD).reading.backlog_s == 0.0


def test_what_is_still_on_its_way_when_a_reading_is_taken_stays_pending() -> None:
    machine, _ = sent_to_cloud()
    machine.step(Arrived(request=request("late")), 1.19)
    machine.step(decided("late", CLOUD, EDGE), 1.19)  # there at 1.21, the reading is of 1.18
    both_s = row(machine.view(1.19), CLOUD).pending_s
    machine.step(replied(answer(OutcomeState.OK), NodeReading(sequence=9)), 1.2)
    assert 0.0 < row(machine.view(1.2), CLOUD).pending_s < both_s


def busy_host(queue_length: int) -> NodeMachine:
    """Return a node with one CPU whose queue holds so many requests of 50 ms."""
    machine = NodeMachine(node())
    for index in range(queue_length + 1):
        name = f"q{index}"
        machine.step(Arrived(request=request(name)), 0.0)
        for command in machine.step(decided(name, EDGE), 0.0):
            if isinstance(command, StartInstance):
                machine.step(started(command.instance_id), 0.0)
    return machine


def proposed(machine: NodeMachine, expected_wait_s: float | None) -> list[NodeCommand]:
    asked = replace(
        request("p"), origin=CLOUD, hops=1, deadline_s=0.2, expected_wait_s=expected_wait_s
    )
    return machine.step(Arrived(request=asked), 0.0)


def test_a_host_that_is_busier_than_believed_refuses_and_says_how_busy_it_is() -> None:
    [reply] = proposed(busy_host(4), expected_wait_s=0.0)
    assert isinstance(reply, Reply)
    assert reply.outcome.state is OutcomeState.REFUSED
    assert reply.outcome.reason is Reason.STALE_VIEW
    assert reply.reading is not None
    assert reply.reading.queued == 4
    assert reply.reading.backlog_s > 0.15


def test_a_host_takes_what_the_sender_knew_would_wait() -> None:
    assert not proposed(busy_host(4), expected_wait_s=0.3)


def test_a_sender_without_a_choice_is_not_refused_for_being_late() -> None:
    assert not proposed(busy_host(4), expected_wait_s=None)


def test_a_stale_decision_is_taken_again_with_the_time_that_is_left_and_the_new_reading() -> None:
    machine, forward = sent_to_cloud()
    assert forward.request.expected_wait_s == 0.0
    refusal = answer(OutcomeState.REFUSED, reason=Reason.STALE_VIEW)
    [ask] = machine.step(replied(refusal, NodeReading(sequence=9, backlog_s=2.0)), 1.04)
    assert isinstance(ask, AskPolicy)
    assert row(ask.view, CLOUD).reading.backlog_s == 2.0
    assert abs(ask.request.deadline_s - (request("r").deadline_s - 0.04)) < 1e-9
    commands = machine.step(decided("r", EDGE, CLOUD), 1.04)
    assert isinstance(commands[0], StartInstance)


def test_no_request_is_decided_for_ever() -> None:
    machine, _ = sent_to_cloud()
    refusal = answer(OutcomeState.REFUSED, reason=Reason.STALE_VIEW)
    forwards = []
    for count in range(STALE_MAX):
        now_s = 1.04 + 0.04 * count
        [ask] = machine.step(replied(refusal, NodeReading(sequence=9 + count)), now_s)
        assert isinstance(ask, AskPolicy)
        [forward] = machine.step(decided("r", CLOUD, EDGE), now_s)
        assert isinstance(forward, Forward)
        forwards.append(forward.request.expected_wait_s)
    assert forwards[-1] is None, "the last proposal may not be refused for being late"
    commands = machine.step(replied(refusal), 2.0)  # a host that refuses all the same
    assert isinstance(commands[0], StartInstance), "the next candidate, without another question"
    assert commands[0].spec == spec()
    assert finished(commands[0].instance_id, "r").run_s > 0.0

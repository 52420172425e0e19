"""ControlPlane: events in, commands out."""

from dataclasses import replace

import numpy as np
import pytest

from scheduler.machine import LOSSES_MAX, LOST_AFTER, UNPLACED_S_MAX, ControlPlane
from tierwise.domain.command import (
    AskPolicy,
    CancelAt,
    ControlCommand,
    DeadLetter,
    Delay,
    Dispatch,
    NodeChanged,
    Record,
    TellDrain,
)
from tierwise.domain.decision import NotPlaced, Placed, Reason
from tierwise.domain.event import (
    CancelAsked,
    ControlEvent,
    Decided,
    HeartbeatReceived,
    NodeDrainAsked,
    NodeRemembered,
    NodeRemoved,
    SessionClosed,
    SessionOpened,
    Submitted,
    Ticked,
    WorkFinished,
)
from tierwise.domain.function import FunctionSpec, Priority
from tierwise.domain.ids import NodeId, PolicyId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Node, NodeState, Tier
from tierwise.domain.view import NodeReading
from tierwise.placement.policy import create

A, B = NodeId("a"), NodeId("b")
ECT = create("ect")
SPEC = FunctionSpec(namespace="default", name="f", version=1, code_digest="d", retries_max=1)


def node(name: NodeId) -> Node:
    return Node(node_id=name, tier=Tier.FOG, capacity=Resources(cpus=1, memory_mib=512))


def work(name: str) -> Submitted:
    return Submitted(request=Request(request_id=RequestId(name), spec=SPEC, origin=A))


def outcome(name: str, lease: int, **changes: object) -> Outcome:
    base = Outcome(
        request_id=RequestId(name),
        function_id=SPEC.function_id,
        state=OutcomeState.OK,
        origin=A,
        node_id=A,
        lease=lease,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def finished(name: str, lease: int, where: NodeId = A, **changes: object) -> WorkFinished:
    return WorkFinished(node_id=where, outcome=outcome(name, lease, **changes))


def place(plane: ControlPlane, name: str, where: NodeId, now_s: float) -> list[ControlCommand]:
    return plane.step(
        Decided(
            request_id=RequestId(name),
            decision=Placed(node_ids=(where,)),
            policy_id=PolicyId("p"),
        ),
        now_s,
    )


def leased(now_s: float = 0.0) -> ControlPlane:
    """A plane with nodes a and b, and work w leased to a."""
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), now_s)
    plane.step(SessionOpened(node=node(B)), now_s)
    plane.step(work("w"), now_s)
    place(plane, "w", A, now_s)
    return plane


def test_work_waits_until_there_is_a_node_then_is_leased_once() -> None:
    plane = ControlPlane()
    assert plane.step(work("w"), 0.0) == []
    commands = plane.step(SessionOpened(node=node(A)), 1.0)
    assert [type(c) for c in commands] == [NodeChanged, AskPolicy]
    [dispatch] = place(plane, "w", A, 1.0)
    assert isinstance(dispatch, Dispatch)
    assert (dispatch.node_id, dispatch.request.lease) == (A, 1)


def test_a_result_is_recorded_once_however_often_it_comes() -> None:
    plane = leased()
    assert plane.step(finished("w", 1), 1.0) == [Record(outcome=outcome("w", 1))]
    assert plane.step(finished("w", 1), 1.1) == []


def test_a_result_of_an_old_lease_does_not_count() -> None:
    plane = leased()
    plane.step(Ticked(), LOST_AFTER)
    plane.step(HeartbeatReceived(node_id=B, reading=NodeReading(sequence=1)), 12.0)
    plane.step(Ticked(), 12.0)
    place(plane, "w", B, 12.0)
    assert plane.step(finished("w", 1), 13.0) == []
    assert plane.step(finished("w", 2, B), 14.0) != []


def test_a_failed_worker_is_retried_with_a_delay_and_then_dead_lettered() -> None:
    plane = leased()
    died = {"state": OutcomeState.FAILED, "error_code": "function_died", "message": "gone"}
    [delay] = plane.step(finished("w", 1, **died), 1.0)
    assert isinstance(delay, Delay)
    assert delay.attempt_count == 1
    assert isinstance(plane.step(Ticked(), 5.0)[-1], AskPolicy)
    place(plane, "w", A, 5.0)
    [dead] = plane.step(finished("w", 2, **died), 6.0)
    assert isinstance(dead, DeadLetter)
    assert dead.outcome.message == "gone"


def test_an_error_of_the_function_itself_is_a_result_not_a_retry() -> None:
    plane = leased()
    raised = {"state": OutcomeState.FAILED, "error_code": "function_raised"}
    assert isinstance(plane.step(finished("w", 1, **raised), 1.0)[0], Record)


def test_a_refusal_goes_to_another_node_at_once_and_not_back() -> None:
    plane = leased()
    refused = {"state": OutcomeState.REFUSED, "reason": Reason.QUEUE_FULL}
    [ask] = plane.step(finished("w", 1, **refused), 1.0)
    assert isinstance(ask, AskPolicy)
    assert A in ask.request.excluded


def test_a_node_that_reconnects_keeps_the_work_that_it_still_holds() -> None:
    plane = leased()
    plane.step(SessionClosed(node_id=A), 1.0)
    plane.step(SessionOpened(node=node(A), leases=((RequestId("w"), 1),)), 2.0)
    assert isinstance(plane.step(finished("w", 1), 3.0)[0], Record)


def test_work_that_a_restarted_node_has_forgotten_is_retried() -> None:
    plane = leased()
    commands = plane.step(SessionOpened(node=node(A), leases=()), 2.0)
    assert any(isinstance(c, Delay) for c in commands)


def test_work_that_keeps_losing_its_node_is_given_up_in_the_end() -> None:
    plane = leased()
    dead: list[ControlCommand] = []
    for attempt in range(LOSSES_MAX + 1):
        now_s = 100.0 * (attempt + 1)
        commands = plane.step(SessionOpened(node=node(A)), now_s)
        dead += [c for c in commands if isinstance(c, DeadLetter)]
        plane.step(Ticked(), now_s + 50.0)
        place(plane, "w", A, now_s + 50.0)
    assert len(dead) == 1
    assert plane.job_count == 0


def test_silence_makes_a_node_suspect_and_then_lost_and_a_heartbeat_brings_it_back() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), 0.0)
    assert plane.step(Ticked(), 2.9) == []
    assert plane.step(Ticked(), 3.0) == [NodeChanged(node_id=A, state=NodeState.SUSPECT)]
    assert plane.step(Ticked(), 10.0) == [NodeChanged(node_id=A, state=NodeState.LOST)]
    back = plane.step(HeartbeatReceived(node_id=A, reading=NodeReading(sequence=9)), 500.0)
    assert back == [NodeChanged(node_id=A, state=NodeState.READY)]


def test_waiting_work_that_is_cancelled_is_recorded_as_cancelled() -> None:
    plane = ControlPlane()
    plane.step(work("w"), 0.0)
    [record] = plane.step(CancelAsked(request_id=RequestId("w")), 1.0)
    assert isinstance(record, Record)
    assert record.outcome.state is OutcomeState.CANCELLED


def test_running_work_that_is_cancelled_is_stopped_where_it_runs() -> None:
    plane = leased()
    cancel = CancelAsked(request_id=RequestId("w"))
    assert plane.step(cancel, 1.0) == [CancelAt(node_id=A, request_id=RequestId("w"))]
    assert plane.step(cancel, 1.1) == []


def test_no_node_gets_more_work_than_keeps_it_busy() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), 0.0)
    dispatched = 0
    for index in range(50):
        commands = plane.step(work(f"w{index:02}"), 0.0)
        while any(isinstance(c, AskPolicy) for c in commands):
            ask = next(c for c in commands if isinstance(c, AskPolicy))
            commands = place(plane, ask.request.request_id, A, 0.0)
            dispatched += sum(isinstance(c, Dispatch) for c in commands)
    assert dispatched == 8


def test_unplaceable_work_waits_and_says_why() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), 0.0)
    plane.step(work("w"), 0.0)
    [delay] = plane.step(
        Decided(
            request_id=RequestId("w"),
            decision=NotPlaced(reasons=((A, Reason.NO_GPU),)),
            policy_id=PolicyId("p"),
        ),
        0.0,
    )
    assert isinstance(delay, Delay)
    assert "a: no gpu" in delay.message


def test_draining_is_told_to_the_node_and_told_again_when_it_reconnects() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), 0.0)
    commands = plane.step(NodeDrainAsked(node_id=A, is_on=True), 1.0)
    assert TellDrain(node_id=A, is_on=True) in commands
    assert TellDrain(node_id=A, is_on=True) in plane.step(SessionOpened(node=node(A)), 2.0)


def ask_of(commands: list[ControlCommand]) -> AskPolicy:
    [ask] = [c for c in commands if isinstance(c, AskPolicy)]
    return ask


def not_placed(name: str, *reasons: tuple[NodeId, Reason]) -> Decided:
    return Decided(
        request_id=RequestId(name),
        decision=NotPlaced(reasons=reasons),
        policy_id=PolicyId("p"),
    )


def test_urgent_work_overtakes_what_waits() -> None:
    plane = ControlPlane()
    plane.step(work("patient"), 0.0)
    urgent = work("urgent")
    request = replace(urgent.request, priority=Priority.CRITICAL)
    plane.step(replace(urgent, request=request), 0.0)
    ask = ask_of(plane.step(SessionOpened(node=node(A)), 1.0))
    assert ask.request.request_id == "urgent"


def test_the_result_of_a_lost_node_counts_while_nobody_else_has_the_work() -> None:
    plane = leased()
    plane.step(HeartbeatReceived(node_id=B, reading=NodeReading(sequence=1)), 9.0)
    assert any(isinstance(c, Delay) for c in plane.step(Ticked(), LOST_AFTER))
    assert plane.step(finished("w", 1), 10.1) == [Record(outcome=outcome("w", 1))]
    assert plane.job_count == 0


def test_a_node_that_returns_with_its_work_after_it_was_lost_keeps_it() -> None:
    plane = leased()
    plane.step(HeartbeatReceived(node_id=B, reading=NodeReading(sequence=1)), 9.0)
    plane.step(Ticked(), LOST_AFTER)
    commands = plane.step(SessionOpened(node=node(A), leases=((RequestId("w"), 1),)), 10.1)
    assert not any(isinstance(c, AskPolicy | Dispatch) for c in commands)
    assert not any(isinstance(c, AskPolicy) for c in plane.step(Ticked(), 12.0))
    assert isinstance(plane.step(finished("w", 1), 13.0)[0], Record)


def test_a_result_of_a_node_that_never_had_the_lease_does_not_count() -> None:
    plane = leased()
    assert plane.step(finished("w", 1, where=B), 1.0) == []
    assert plane.job_count == 1


def test_work_that_a_connected_node_claims_is_not_given_out_again_after_a_restart() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(B)), 0.0)
    plane.step(SessionOpened(node=node(A), leases=((RequestId("w"), 3),)), 0.0)
    assert plane.step(replace(work("w"), lease=3), 0.1) == []
    assert isinstance(plane.step(finished("w", 3), 1.0)[0], Record)


def test_a_stale_claim_is_worth_nothing() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A), leases=((RequestId("w"), 2),)), 0.0)
    ask_of(plane.step(replace(work("w"), lease=3), 0.1))


def test_work_for_a_full_node_waits_for_that_node_and_does_not_count_as_unplaceable() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), 0.0)
    for index in range(8):
        plane.step(work(f"w{index}"), 0.0)
        place(plane, f"w{index}", A, 0.0)
    plane.step(SessionOpened(node=node(B)), 0.0)
    ask = ask_of(plane.step(work("pinned"), 0.0))
    assert ask.request.excluded == {A}
    answer = not_placed("pinned", (A, Reason.EXCLUDED), (B, Reason.PINNED_ELSEWHERE))
    assert plane.step(answer, 0.0) == []
    assert plane.step(Ticked(), 5000.0) != []  # nodes are lost by now, the work is not
    assert plane.job(RequestId("pinned")) is not None

    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), 0.0)
    for index in range(8):
        plane.step(work(f"w{index}"), 0.0)
        place(plane, f"w{index}", A, 0.0)
    plane.step(SessionOpened(node=node(B)), 0.0)
    plane.step(work("pinned"), 0.0)
    plane.step(answer, 0.0)
    commands = plane.step(finished("w0", 1), 1.0)
    assert ask_of(commands).request.request_id == "pinned"
    assert A not in ask_of(commands).request.excluded


def test_work_that_nobody_could_take_is_tried_at_once_when_a_node_comes() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), 0.0)
    plane.step(work("w"), 0.0)
    for now_s in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0):
        plane.step(HeartbeatReceived(node_id=A, reading=NodeReading(sequence=1)), now_s)
        plane.step(Ticked(), now_s)
        plane.step(not_placed("w", (A, Reason.NO_GPU)), now_s)
    assert ask_of(plane.step(SessionOpened(node=node(B)), 16.1)).request.request_id == "w"


def test_work_that_nobody_can_take_for_an_hour_is_dead_lettered_with_the_reason() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), 0.0)
    plane.step(work("w"), 0.0)
    plane.step(not_placed("w", (A, Reason.NO_GPU)), 0.0)
    now_s = UNPLACED_S_MAX + 1.0
    plane.step(HeartbeatReceived(node_id=A, reading=NodeReading(sequence=1)), now_s)
    ask_of(plane.step(Ticked(), now_s))
    [dead] = plane.step(not_placed("w", (A, Reason.NO_GPU)), now_s)
    assert isinstance(dead, DeadLetter)
    assert (dead.outcome.error_code, dead.outcome.state) == ("infeasible", OutcomeState.FAILED)
    assert "no gpu" in dead.outcome.message


def test_a_second_attempt_avoids_the_node_of_the_first_unless_there_is_no_other() -> None:
    plane = leased()
    died = {"state": OutcomeState.FAILED, "error_code": "function_died", "message": "gone"}
    plane.step(finished("w", 1, **died), 1.0)
    assert ask_of(plane.step(Ticked(), 2.0)).request.excluded == {A}
    reasons = ((A, Reason.EXCLUDED), (B, Reason.NO_GPU))
    assert ask_of(plane.step(not_placed("w", *reasons), 2.0)).request.excluded == frozenset()


def test_work_that_expired_in_the_queue_of_a_node_is_not_a_failed_attempt() -> None:
    plane = leased()
    expired = {"state": OutcomeState.EXPIRED, "error_code": "deadline_exceeded"}
    [delay] = plane.step(finished("w", 1, **expired), 1.0)
    assert isinstance(delay, Delay)
    assert delay.attempt_count == 0


def test_cancelled_work_that_the_node_refuses_meanwhile_is_cancelled() -> None:
    plane = leased()
    plane.step(CancelAsked(request_id=RequestId("w")), 1.0)
    [record] = plane.step(finished("w", 1, state=OutcomeState.REFUSED), 1.1)
    assert isinstance(record, Record)
    assert record.outcome.state is OutcomeState.CANCELLED


def test_a_node_that_is_drained_before_it_connects_takes_no_work() -> None:
    plane = ControlPlane()
    plane.step(NodeDrainAsked(node_id=A, is_on=True), 0.0)
    commands = plane.step(SessionOpened(node=node(A)), 1.0)
    assert commands == [
        TellDrain(node_id=A, is_on=True),
        NodeChanged(node_id=A, state=NodeState.DRAINING),
    ]


def test_equal_histories_give_equal_commands() -> None:
    def history() -> list[ControlCommand]:
        plane = leased()
        died = {"state": OutcomeState.FAILED, "error_code": "function_died"}
        out = plane.step(finished("w", 1, **died), 1.0)
        for name in ("z", "y", "x"):
            out += plane.step(work(name), 1.5)
        return out + plane.step(Ticked(), 3.0) + plane.step(Ticked(), 20.0)

    assert history() == history()


class History:
    """Random events against a plane, with nodes that forget, repeat, delay and die."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.plane = ControlPlane()
        self.now_s = 0.0
        self.names = [NodeId(name) for name in "abc"]
        self.open: set[NodeId] = set()
        self.held: dict[NodeId, dict[RequestId, int]] = {name: {} for name in self.names}
        self.late: list[tuple[NodeId, RequestId, int]] = []
        self.leases: dict[RequestId, int] = {}
        self.submitted: list[RequestId] = []
        self.ended: list[RequestId] = []
        self.sequence = 0

    def feed(self, event: ControlEvent) -> None:
        events = [event]
        while events:
            for command in self.plane.step(events.pop(0), self.now_s):
                match command:
                    case AskPolicy(request=request, view=view):
                        decision = ECT.decide(view, request, self.rng)
                        decided = Decided(
                            request_id=request.request_id,
                            decision=decision,
                            policy_id=ECT.policy_id,
                        )
                        events.insert(0, decided)
                    case Dispatch(node_id=node_id, request=request):
                        assert node_id in self.open
                        assert request.lease == self.leases.get(request.request_id, 0) + 1
                        self.leases[request.request_id] = request.lease
                        if self.rng.random() < 0.9:  # else it is lost on the way
                            self.held[node_id][request.request_id] = request.lease
                        assert len(self.plane._backlog.leased_to(node_id)) <= 8
                    case Record(outcome=outcome) | DeadLetter(outcome=outcome):
                        self.ended.append(outcome.request_id)
                    case CancelAt(node_id=node_id, request_id=request_id):
                        lease = self.held[node_id].pop(request_id, None)
                        if lease is not None:
                            self.finish(node_id, request_id, lease, state=OutcomeState.CANCELLED)

    def finish(self, where: NodeId, name: RequestId, lease: int, **changes: object) -> None:
        self.late.append((where, name, lease))
        result = replace(outcome(name, lease, **changes), node_id=where)
        self.feed(WorkFinished(node_id=where, outcome=result))

    def beat(self) -> None:
        for name in sorted(self.open):
            self.sequence += 1
            reading = NodeReading(sequence=self.sequence, free=Resources(cpus=1, memory_mib=512))
            self.feed(HeartbeatReceived(node_id=name, reading=reading))
        self.feed(Ticked())

    def connect(self, name: NodeId) -> None:
        self.open.add(name)
        self.feed(SessionOpened(node=node(name), leases=tuple(self.held[name].items())))

    def random_event(self) -> None:
        rng = self.rng
        name = self.names[rng.integers(3)]
        self.now_s += float(rng.exponential(0.5))
        draw = rng.random()
        if draw < 0.35:
            request_id = RequestId(f"w{len(self.submitted)}")
            self.submitted.append(request_id)
            self.feed(work(request_id))
        elif draw < 0.65 and self.held[name] and name in self.open:
            request_id = sorted(self.held[name])[0]
            lease = self.held[name].pop(request_id)
            code = rng.choice(["", "function_raised", "function_died", "overloaded"])
            states = {"": OutcomeState.OK, "overloaded": OutcomeState.REFUSED}
            state = states.get(code, OutcomeState.FAILED)
            self.finish(name, request_id, lease, state=state, error_code=str(code))
        elif draw < 0.7 and self.late:
            self.finish(*self.late[rng.integers(len(self.late))])  # once more
        elif draw < 0.75 and self.submitted:
            cancelled = self.submitted[rng.integers(len(self.submitted))]
            self.feed(CancelAsked(request_id=cancelled))
        elif draw < 0.8 and name in self.open:
            self.open.discard(name)
            self.feed(SessionClosed(node_id=name))
            if rng.random() < 0.5:
                self.held[name].clear()  # its process died
        elif draw < 0.9 and name not in self.open:
            self.connect(name)
        elif draw < 0.93:
            self.feed(NodeDrainAsked(node_id=name, is_on=bool(rng.random() < 0.5)))
        elif draw < 0.95:
            self.now_s += 11.0  # nobody was heard for a while
            self.feed(Ticked())
        else:
            self.beat()


@pytest.mark.parametrize("seed", range(200))
def test_every_piece_of_work_ends_exactly_once_whatever_happens(seed: int) -> None:
    history = History(seed)
    for _ in range(300):
        history.random_event()
    for name in history.names:  # then all is well, and everything must come to its end
        history.feed(NodeDrainAsked(node_id=name, is_on=False))
        history.connect(name)
    for _ in range(2000):
        if history.plane.job_count == 0:
            break
        history.now_s += 0.9
        history.beat()
        for name in history.names:
            for request_id, lease in list(history.held[name].items()):
                del history.held[name][request_id]
                history.finish(name, request_id, lease)
            if history.rng.random() < 0.05:  # work that was lost on the way comes to light
                history.connect(name)
    assert history.plane.job_count == 0
    assert sorted(history.ended) == sorted(history.submitted), f"seed {seed}"


def test_a_node_that_returns_with_an_old_lease_does_not_get_the_work_back() -> None:
    plane = leased()
    plane.step(HeartbeatReceived(node_id=B, reading=NodeReading(sequence=1)), 9.0)
    plane.step(Ticked(), LOST_AFTER)
    ask_of(plane.step(Ticked(), 11.0))
    place(plane, "w", B, 11.0)
    died = {"state": OutcomeState.FAILED, "error_code": "function_died", "message": "gone"}
    plane.step(finished("w", 2, B, **died), 11.1)
    plane.step(SessionOpened(node=node(A), leases=((RequestId("w"), 1),)), 11.2)
    assert plane.step(finished("w", 1), 11.3) == []
    assert ask_of(plane.step(Ticked(), 13.0)).request.request_id == "w"


# -- work whose submitter gives up ---------------------------------------------------------------


def limited(name: str, ends_in_s: float) -> Submitted:
    return replace(work(name), ends_in_s=ends_in_s)


def test_waiting_work_ends_when_its_submitter_gives_up() -> None:
    plane = ControlPlane()
    plane.step(limited("w", 5.0), 1.0)
    assert plane.step(Ticked(), 5.9) == []
    [record] = plane.step(Ticked(), 6.0)
    assert isinstance(record, Record)
    assert record.outcome.state is OutcomeState.EXPIRED
    assert record.outcome.error_code == "deadline_exceeded"
    assert "before a node had run it; allow a longer timeout" in record.outcome.message
    assert plane.job_count == 0
    assert plane.step(SessionOpened(node=node(A)), 7.0)[1:] == []


def test_a_node_is_told_how_much_time_is_left_and_bills_what_it_ran() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), 0.0)
    plane.step(limited("w", 5.0), 1.0)
    [dispatch] = place(plane, "w", A, 2.0)
    assert isinstance(dispatch, Dispatch)
    assert dispatch.request.timeout_s == 4.0
    plane.step(HeartbeatReceived(node_id=A, reading=NodeReading(sequence=1)), 5.5)
    cancel = CancelAt(node_id=A, request_id=RequestId("w"))
    assert plane.step(Ticked(), 6.0) == [cancel]
    assert plane.step(Ticked(), 6.1) == []
    ran = finished("w", 1, state=OutcomeState.CANCELLED, latency=LatencySplit(run_s=3.5))
    [record] = plane.step(replace(ran, outcome=replace(ran.outcome, money_usd=1e-6)), 6.1)
    assert isinstance(record, Record)
    assert record.outcome.state is OutcomeState.EXPIRED
    assert "after it had run 3.5 s on a" in record.outcome.message
    assert record.outcome.money_usd == 1e-6


def test_work_whose_time_is_over_is_not_tried_again() -> None:
    for late in (
        finished("w", 1, state=OutcomeState.EXPIRED, error_code="deadline_exceeded"),
        finished("w", 1, state=OutcomeState.FAILED, error_code="function_died"),
        SessionOpened(node=node(A)),  # it has forgotten the work
    ):
        plane = ControlPlane()
        plane.step(SessionOpened(node=node(A)), 0.0)
        plane.step(limited("w", 5.0), 1.0)
        place(plane, "w", A, 2.0)
        [record] = [c for c in plane.step(late, 6.0) if isinstance(c, Record)]
        assert record.outcome.state is OutcomeState.EXPIRED


def test_running_work_that_is_cancelled_is_billed() -> None:
    plane = leased()
    plane.step(CancelAsked(request_id=RequestId("w")), 1.0)
    ran = finished("w", 1, state=OutcomeState.CANCELLED, money_usd=1e-6, error_code="cancelled")
    [record] = plane.step(ran, 1.1)
    assert isinstance(record, Record)
    assert (record.outcome.state, record.outcome.money_usd) == (OutcomeState.CANCELLED, 1e-6)


# -- nodes that are away -------------------------------------------------------------------------


def test_a_node_that_says_goodbye_is_lost_at_once_and_its_work_goes_elsewhere() -> None:
    plane = leased()
    commands = plane.step(SessionClosed(node_id=A, has_left=True), 1.0)
    assert commands[0] == NodeChanged(node_id=A, state=NodeState.LOST)
    assert [type(c) for c in commands[1:]] == [Delay]
    commands = plane.step(Ticked(), 2.0)
    assert [type(c) for c in commands] == [AskPolicy]
    again = NodeChanged(node_id=A, state=NodeState.LOST)
    assert again not in plane.step(Ticked(), LOST_AFTER)


def test_a_node_that_joined_before_a_restart_is_listed_until_it_returns_or_is_removed() -> None:
    plane = ControlPlane()
    assert plane.step(NodeRemembered(node=node(A), age_s=1.0), 100.0) == []
    assert plane.step(NodeRemembered(node=node(B), age_s=500.0), 100.0) == []
    plane.step(work("w"), 100.0)
    states = {peer.node.node_id: (peer.state, peer.age_s) for peer in plane.peers(100.0)}
    assert states == {A: (NodeState.SUSPECT, 1.0), B: (NodeState.LOST, 500.0)}
    [changed] = plane.step(Ticked(), 99.0 + LOST_AFTER)
    assert changed == NodeChanged(node_id=A, state=NodeState.LOST)
    commands = plane.step(SessionOpened(node=node(A)), 200.0)
    assert [type(c) for c in commands] == [NodeChanged, AskPolicy]
    plane.step(NodeRemembered(node=node(A), age_s=500.0), 200.0)  # it is there, and known better
    plane.step(NodeRemoved(node_id=B), 200.0)
    assert [peer.state for peer in plane.peers(200.0)] == [NodeState.READY]

"""Everything one node decides: admission, routing, slots, warm instances, offline mode.

Pure. The node that a user reaches *owns* the request: it asks the policy, runs the request here or
forwards it, tries the next candidate when one refuses, and answers. A node that receives a request
from a peer or from the scheduler is a *host*: it re-checks what it can do now, and runs or refuses.

    user ─Arrived─► AskPolicy ─Decided─┬─► queue ─► StartInstance? ─► RunOn ─RunFinished─► Reply
                                       └─► Forward ─PeerReplied / PeerFailed─► Reply or next

When the caller gives up on a request that runs elsewhere, its host is told to stop and asked what
it ran, for a call that is cut short has its split and its bill too.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import assert_never

from agent import endings
from agent.beliefs import Beliefs
from agent.floors import Floors
from agent.outlook import Outlook
from agent.pool import Instance, InstancePool, InstanceState
from agent.quarantine import Quarantine
from agent.ticket import Phase, Ticket
from agent.waiting import WaitingLine
from tierwise.cost.estimate import predict_wait_s, wait_of
from tierwise.domain.command import (
    AskPolicy,
    CancelAt,
    Forward,
    KillRun,
    NodeCommand,
    Reply,
    ReplyAgain,
    Report,
    RunOn,
    StartInstance,
    StopInstance,
)
from tierwise.domain.decision import Explanation, NotPlaced, Placed, Reason
from tierwise.domain.event import (
    Arrived,
    CancelAsked,
    CatalogueReceived,
    Decided,
    DrainAsked,
    InstanceDied,
    InstanceFailed,
    InstanceStarted,
    KeepAliveSet,
    NodeEvent,
    PeerFailed,
    PeerReplied,
    PricesReceived,
    RunFinished,
    Ticked,
    ViewReceived,
)
from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import FunctionId, NodeId, RequestId
from tierwise.domain.outcome import Outcome, OutcomeState
from tierwise.domain.request import HOPS_MAX, TRIES_MAX, Request
from tierwise.domain.topology import Link, Node, NodeState
from tierwise.domain.view import ClusterView, NodeReading
from tierwise.placement.feasibility import hard_limit

STALE_MAX = 3  # decisions on stale views that are taken back, per request
STALE_MARGIN_S = 0.01  # a node may be busier by this much, and this share of the deadline
STALE_SHARE = 0.1
RECALL_S = 1.0  # how long a host may take to say what it ran of a call that was stopped
RETRY_AFTER_S_MIN, RETRY_AFTER_S_MAX = 0.05, 5.0
RETRY_BACKLOG_SHARE = 0.1  # by then so much of the queue has gone
ANSWERED_MAX = 4096  # finished requests that are remembered against duplicates


class NodeMachine:
    """The state of one node. `step` is the only way to change it."""

    def __init__(
        self,
        node: Node,
        *,
        queue_max: int = 256,
        first_sequence: int = 0,
    ) -> None:
        self.node = node
        self.is_draining = False
        self.pool = InstancePool(node.node_id, node.capacity)
        self._queue_max = queue_max
        self._tickets: dict[RequestId, Ticket] = {}
        self._line = WaitingLine()
        self._running: dict[RequestId, Ticket] = {}
        self._answered: OrderedDict[tuple[RequestId, int], None] = OrderedDict()
        self._beliefs = Beliefs(node)
        self._outlook = Outlook(node, self.pool, self._line, self._running, self._beliefs)
        self._floors = Floors(node)
        self._quarantine = Quarantine()
        self._sequence = first_sequence
        self._ticket_count = 0

    def step(self, event: NodeEvent, now_s: float) -> list[NodeCommand]:
        """Apply one event and return what the shell must do, in order.

        Args:
            event: What happened.
            now_s: Monotonic time of this node; never smaller than in the step before.
        """
        out: list[NodeCommand] = []
        self.pool.now_s = now_s
        match event:
            case Arrived():
                self._arrive(event, now_s, out)
            case Decided():
                self._decided(event, now_s, out)
            case RunFinished():
                self._finished(event, now_s, out)
            case InstanceStarted():
                instance = self.pool.get(event.instance_id)
                if instance is not None and instance.state is InstanceState.STARTING:
                    instance.cold_start_s = event.cold_start_s
                    self._floors.started(instance.spec.function_id)
                    self.pool.release(instance, now_s)
                    self._pump(now_s, out)
            case InstanceFailed():
                self._start_failed(event, now_s, out)
            case InstanceDied():
                instance = self.pool.get(event.instance_id)
                if instance is not None and instance.state is InstanceState.IDLE:
                    self.pool.remove(event.instance_id)
                    self._pump(now_s, out)
            case PeerReplied():
                self._peer_replied(event, now_s, out)
            case PeerFailed():
                self._peer_failed(event, now_s, out)
            case CancelAsked():
                self._cancel(event.request_id, now_s, out)
            case CatalogueReceived():
                for instance in self.pool.instances():
                    is_idle = instance.state is InstanceState.IDLE
                    if is_idle and instance.spec.function_id not in event.catalogue.functions:
                        self._stop(instance, out)
                self._beliefs.learn(event.catalogue.profiles)
                self._floors.replace(event.catalogue)
                self._keep_floors(now_s, out)
            case KeepAliveSet():
                self.pool.set_keep_alive(event.function_id, event.keep_alive_s)
            case ViewReceived():
                self._beliefs.received(event, now_s)
            case PricesReceived():
                self._beliefs.prices = event.prices
            case DrainAsked():
                self.is_draining = event.is_on
            case Ticked():
                self._tick(now_s, out)
            case _:
                assert_never(event)
        return out

    def reading(self, now_s: float) -> NodeReading:
        """Return this node's next heartbeat reading; each has a higher sequence number."""
        self._sequence += 1
        return self._reading_now(now_s).standing_still()

    def view(self, now_s: float) -> ClusterView:
        """Return what this node believes of the cluster; its own row is exact.

        The own row's `warm` follows the pool: read the view before the next step.
        """
        state = NodeState.DRAINING if self.is_draining else NodeState.READY
        self._beliefs.put_own(self._reading_now(now_s), state, now_s)
        return self._beliefs.view(now_s)

    def path_to(self, node_id: NodeId) -> tuple[Node, Link] | None:
        """Return a peer and the link to it, or None if it is unknown."""
        return self._beliefs.path_to(node_id)

    def tickets(self) -> Iterator[Ticket]:
        """Yield the unfinished requests, oldest first."""
        yield from self._tickets.values()

    # -- arriving and deciding ------------------------------------------------------------------

    def _arrive(self, event: Arrived, now_s: float, out: list[NodeCommand]) -> None:
        request = event.request
        known = self._tickets.get(request.request_id)
        if known is not None:
            if request.lease > known.request.lease:  # the scheduler leased it here once more
                known.request = replace(known.request, lease=request.lease)
            return
        if (request.request_id, request.lease) in self._answered:
            out.append(ReplyAgain(request_id=request.request_id))
            return
        self._ticket_count += 1
        ticket = Ticket(request, now_s, self._ticket_count, event.transfer_s)
        self._tickets[request.request_id] = ticket
        if request.timeout_s <= 0.0:
            self._expire(ticket, now_s, out)
        elif ticket.is_host:
            reason = self._admit(ticket, now_s, out)
            if reason is not None:
                self._refuse(ticket, reason, now_s, out)
        else:
            out.append(AskPolicy(request=request, view=self.view(now_s)))

    def _decided(self, event: Decided, now_s: float, out: list[NodeCommand]) -> None:
        ticket = self._tickets.get(event.request_id)
        if ticket is None or ticket.phase is not Phase.ASKED:
            return
        ticket.policy_id = event.policy_id
        match event.decision:
            case Placed() as placed:
                ticket.explanation = placed.explanation
                if placed.keep_alive_s is not None:
                    function = ticket.request.spec.function_id
                    self.pool.set_keep_alive(function, placed.keep_alive_s)
                ticket.next_nodes = list(placed.node_ids[:TRIES_MAX])
                self._try_next(ticket, now_s, out)
            case NotPlaced() as not_placed:
                ticket.explanation = Explanation(
                    policy_id=event.policy_id,
                    candidates=(),
                    masked=not_placed.reasons,
                    heuristic_choice=None,
                )
                self._give_up(ticket, now_s, out)
            case _:
                assert_never(event.decision)

    def _try_next(self, ticket: Ticket, now_s: float, out: list[NodeCommand]) -> None:
        """Run or forward to the next candidate that does not refuse at once."""
        while ticket.next_nodes:
            node_id = ticket.next_nodes.pop(0)
            if node_id == self.node.node_id:
                reason = self._admit(ticket, now_s, out)
            else:
                reason = self._forward(ticket, node_id, now_s, out)
            if reason is None:
                return
            ticket.tried.append((node_id, reason))
        self._give_up(ticket, now_s, out)

    def _forward(
        self, ticket: Ticket, node_id: NodeId, now_s: float, out: list[NodeCommand]
    ) -> Reason | None:
        row = self._beliefs.row(node_id)
        request = ticket.request
        if row is None or not row.reachable:
            return Reason.NODE_UNREACHABLE
        if request.hops + 1 > HOPS_MAX:
            return Reason.TOO_MANY_HOPS
        elapsed_s = now_s - ticket.arrived_at_s
        if elapsed_s >= request.timeout_s:
            return Reason.EXPIRED
        ticket.phase = Phase.FORWARDED
        has_others = bool(ticket.next_nodes) and ticket.stale_count < STALE_MAX
        expected_wait_s = predict_wait_s(row, now_s, request.priority) if has_others else None
        self._beliefs.sent(ticket, row, now_s)
        out.append(
            Forward(
                node_id=node_id,
                request=replace(
                    request,
                    hops=request.hops + 1,
                    deadline_s=request.deadline_s - elapsed_s,
                    timeout_s=request.timeout_s - elapsed_s,
                    expected_wait_s=expected_wait_s,
                ),
            )
        )
        return None

    # -- running here ---------------------------------------------------------------------------

    def _admit(self, ticket: Ticket, now_s: float, out: list[NodeCommand]) -> Reason | None:
        """Queue the request here, or return why not."""
        spec = ticket.request.spec
        if self.is_draining:
            return Reason.NODE_DRAINING
        if (reason := hard_limit(self.node, spec, self.pool.reserved_mib)) is not None:
            return reason
        if self._quarantine.left_s(spec.function_id, now_s):
            return Reason.QUARANTINED
        if len(self._line) >= self._queue_max:
            return Reason.QUEUE_FULL
        if ticket.request.expected_wait_s is not None and self._is_stale(ticket.request, now_s):
            return Reason.STALE_VIEW
        ticket.node_id = self.node.node_id
        ticket.work_s = self._beliefs.expected_s(ticket.request) / self.node.speed
        ticket.start_s = 0.0
        if not self.pool.count(spec.function_id):
            ticket.start_s = self._outlook.start_s(spec.function_id)
        self.pool.note_arrival(spec.function_id, now_s)
        self._line.join(ticket)
        self._pump(now_s, out)
        return None

    def _is_stale(self, request: Request, now_s: float) -> bool:
        """Return whether this node is much busier than the sender believed."""
        margin_s = STALE_MARGIN_S + STALE_SHARE * max(0.0, request.deadline_s)
        wait_s = wait_of(*self._outlook.backlog_s(now_s), request.priority)
        return wait_s > (request.expected_wait_s or 0.0) + margin_s

    def _pump(self, now_s: float, out: list[NodeCommand]) -> None:
        """Give queued requests to idle instances and start missing ones, in queue order.

        A request that must wait for CPU or memory blocks those behind it (no starvation); one
        that only waits for an instance of its own function lets them pass. None is started while
        enough of them should come free within the time that two starts take.
        """
        line, pool = self._line, self.pool
        while (ticket := line.next(now_s)) is not None:
            spec = ticket.request.spec
            function = spec.function_id
            if ticket.ends_at_s <= now_s:
                line.leave(ticket)
                self._expire(ticket, now_s, out)
                continue
            if not pool.has_cpu_for(spec):
                break
            taken = pool.take_idle(spec, ticket.request.request_id, now_s)
            if taken is not None:
                instance, evicted = taken
                out.extend(StopInstance(instance_id=old.instance_id) for old in evicted)
                line.leave(ticket)
                self._run(ticket, instance, now_s, out)
            elif self._outlook.coming_count(function, now_s) < line.count_of(function):
                if self._start(spec, now_s, out):
                    continue
                if pool.free.memory_mib < spec.memory_mib and not pool.may_free(spec):
                    break
        line.restore()

    def _keep_floors(self, now_s: float, out: list[NodeCommand]) -> None:
        """Start what `instances_min` asks for, as far as there is room for it now."""
        if self.is_draining:
            return
        for spec in self._floors.wanted(now_s):
            is_out = self._quarantine.left_s(spec.function_id, now_s) > 0.0
            while self.pool.count(spec.function_id) < spec.instances_min and not is_out:
                if not self.pool.has_cpu_for(spec) or not self._start(spec, now_s, out):
                    break

    def _start(self, spec: FunctionSpec, now_s: float, out: list[NodeCommand]) -> bool:
        """Start an instance if there is room for it; return whether there was."""
        started = self.pool.start(spec, now_s)
        if started is None:
            return False
        new, evicted = started
        out.extend(StopInstance(instance_id=old.instance_id) for old in evicted)
        out.append(StartInstance(instance_id=new.instance_id, spec=spec))
        return True

    def _died(
        self, event: RunFinished, function: FunctionId, now_s: float, out: list[NodeCommand]
    ) -> RunFinished:
        """Count a death; if the function is put out by it, say so and send elsewhere what waits."""
        if not self._quarantine.died(function, now_s):
            return event
        left_s = self._quarantine.left_s(function, now_s)
        for ticket in list(self._tickets.values()):
            if ticket.phase is not Phase.QUEUED or ticket.request.spec.function_id != function:
                continue
            self._line.leave(ticket)
            if ticket.is_host:
                self._refuse(ticket, Reason.QUARANTINED, now_s, out)
            else:
                ticket.phase = Phase.ASKED
                ticket.tried.append((self.node.node_id, Reason.QUARANTINED))
                self._try_next(ticket, now_s, out)
        return replace(event, message=f"{event.message}; {endings.put_out(left_s)}")

    def retry_after_s(self, function: FunctionId, now_s: float) -> float:
        """Return when a caller that was turned away should come again."""
        soon_s = RETRY_BACKLOG_SHARE * self._outlook.backlog_s(now_s)[0]
        soon_s = min(RETRY_AFTER_S_MAX, max(RETRY_AFTER_S_MIN, soon_s))
        return max(soon_s, self._quarantine.left_s(function, now_s))

    def _run(
        self, ticket: Ticket, instance: Instance, now_s: float, out: list[NodeCommand]
    ) -> None:
        ticket.start_on(instance, now_s)
        self._running[ticket.request.request_id] = ticket
        out.append(
            RunOn(
                instance_id=instance.instance_id,
                request_id=ticket.request.request_id,
                timeout_s=min(ticket.request.spec.timeout_s, ticket.ends_at_s - now_s),
                memory_mib=ticket.request.spec.memory_mib,
            )
        )

    def _finished(self, event: RunFinished, now_s: float, out: list[NodeCommand]) -> None:
        instance = self.pool.get(event.instance_id)
        if instance is None or instance.request_id != event.request_id:
            return
        if event.is_instance_alive:
            self.pool.release(instance, now_s)
        else:
            self.pool.remove(event.instance_id)
        ticket = self._running.pop(event.request_id)
        larger_mib = ticket.larger_mib(self.node.capacity.memory_mib, now_s)
        if event.is_out_of_memory and larger_mib:
            endings.charge(ticket, event, now_s, self.node, self._beliefs.prices)
            ticket.request = ticket.request.with_memory(larger_mib)
            self._line.join(ticket)
            self._pump(now_s, out)
            return
        if event.error_code == "function_died" and not event.is_instance_alive:
            event = self._died(event, instance.spec.function_id, now_s, out)
        outcome = endings.ran(ticket, event, now_s, self.node, self._beliefs.prices)
        self._finish(ticket, outcome, now_s, out)
        self._pump(now_s, out)

    def _start_failed(self, event: InstanceFailed, now_s: float, out: list[NodeCommand]) -> None:
        instance = self.pool.remove(event.instance_id)
        if instance is None:
            return
        function = instance.spec.function_id
        self._floors.failed(function, now_s)
        waiting = [t for t in self._tickets.values() if t.phase is Phase.QUEUED]
        oldest = next((t for t in waiting if t.request.spec.function_id == function), None)
        if oldest is not None:  # each failed start costs one request: no loop of starts
            self._line.leave(oldest)
            outcome = endings.not_started(
                oldest, now_s, self.node.node_id, event.error_code, event.message
            )
            self._finish(oldest, outcome, now_s, out)
        self._pump(now_s, out)

    # -- answers of peers -----------------------------------------------------------------------

    def _peer_replied(self, event: PeerReplied, now_s: float, out: list[NodeCommand]) -> None:
        ticket = self._forwarded(event.request_id, event.node_id)
        if ticket is None:
            return
        self._beliefs.settle(ticket)
        if event.reading is not None:
            self._beliefs.heard(event.node_id, event.reading, now_s)
        there = event.outcome
        is_recalled = ticket.phase is Phase.RECALLED
        if there.state is OutcomeState.REFUSED and not is_recalled:
            ticket.tried.append((event.node_id, there.reason or Reason.QUEUE_FULL))
            ticket.phase = Phase.ASKED
            if there.reason is Reason.STALE_VIEW and ticket.stale_count < STALE_MAX:
                self._ask_again(ticket, now_s, out)
            else:
                self._try_next(ticket, now_s, out)
            return
        row = self._beliefs.row(event.node_id)
        peer = row.node if row is not None else self.node
        latency = self._beliefs.forwarded_latency(ticket, there, now_s)
        way = (self.node, peer)
        outcome = endings.answered(ticket, there, latency, way, self._beliefs.prices)
        has_won = there.state is OutcomeState.OK and not ticket.is_cancelled
        if there.state is OutcomeState.EXPIRED or (is_recalled and not has_won):
            outcome = endings.stopped(ticket, outcome, now_s)
        self._finish(ticket, outcome, now_s, out)

    def _ask_again(self, ticket: Ticket, now_s: float, out: list[NodeCommand]) -> None:
        """Decide once more: the refusal has brought the reading that the decision lacked."""
        ticket.stale_count += 1
        request = ticket.request
        elapsed_s = now_s - ticket.arrived_at_s
        left = replace(
            request,
            deadline_s=request.deadline_s - elapsed_s,
            timeout_s=request.timeout_s - elapsed_s,
        )
        out.append(AskPolicy(request=left, view=self.view(now_s)))

    def _peer_failed(self, event: PeerFailed, now_s: float, out: list[NodeCommand]) -> None:
        self._beliefs.failed(event.node_id, now_s)
        ticket = self._forwarded(event.request_id, event.node_id)
        if ticket is None:
            return
        self._beliefs.settle(ticket)
        if ticket.phase is Phase.RECALLED:
            self._finish(ticket, endings.unanswered(ticket, now_s), now_s, out)
            return
        ticket.tried.append((event.node_id, Reason.NODE_UNREACHABLE))
        ticket.failure_count += 1
        ticket.phase = Phase.ASKED
        if ticket.failure_count > ticket.request.spec.retries_max:
            ticket.next_nodes.clear()
        self._try_next(ticket, now_s, out)

    def _forwarded(self, request_id: RequestId, node_id: NodeId) -> Ticket | None:
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.node_id != node_id:
            return None
        return ticket if ticket.phase in (Phase.FORWARDED, Phase.RECALLED) else None

    def _recall(self, ticket: Ticket, now_s: float, out: list[NodeCommand]) -> None:
        """Have the host stop a forwarded request; its answer, or a while, ends the request."""
        assert ticket.node_id is not None
        self._beliefs.settle(ticket)
        ticket.phase = Phase.RECALLED
        ticket.recall_ends_at_s = now_s + RECALL_S
        out.append(CancelAt(node_id=ticket.node_id, request_id=ticket.request.request_id))

    # -- ends -----------------------------------------------------------------------------------

    def _cancel(self, request_id: RequestId, now_s: float, out: list[NodeCommand]) -> None:
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.is_cancelled:
            return
        ticket.is_cancelled = True
        if ticket.phase is Phase.RUNNING and ticket.instance is not None:
            out.append(KillRun(instance_id=ticket.instance.instance_id, request_id=request_id))
            return
        if ticket.phase is Phase.FORWARDED:
            self._recall(ticket, now_s, out)
        if ticket.phase is Phase.RECALLED:
            return
        if ticket.phase is Phase.QUEUED:
            self._line.leave(ticket)
        self._finish(ticket, endings.cancelled(ticket, now_s), now_s, out)

    def _expire(self, ticket: Ticket, now_s: float, out: list[NodeCommand]) -> None:
        self._finish(ticket, endings.expired(ticket, now_s, self.node.node_id), now_s, out)

    def _refuse(self, ticket: Ticket, reason: Reason, now_s: float, out: list[NodeCommand]) -> None:
        del self._tickets[ticket.request.request_id]
        outcome = endings.refused(ticket, reason, now_s, self.node.node_id)
        out.append(self._reply(ticket, outcome, now_s))

    def _give_up(self, ticket: Ticket, now_s: float, out: list[NodeCommand]) -> None:
        """No candidate is left."""
        if any(reason is Reason.EXPIRED for _, reason in ticket.tried):
            self._expire(ticket, now_s, out)
        else:
            pin = ticket.request.node_id
            is_pin_known = pin is None or self._beliefs.row(pin) is not None
            outcome = endings.untaken(ticket, now_s, is_pin_known=is_pin_known)
            self._finish(ticket, outcome, now_s, out)

    def _finish(
        self, ticket: Ticket, outcome: Outcome, now_s: float, out: list[NodeCommand]
    ) -> None:
        request = ticket.request
        del self._tickets[request.request_id]
        self._answered[request.request_id, request.lease] = None
        if len(self._answered) > ANSWERED_MAX:
            self._answered.popitem(last=False)
        out.append(self._reply(ticket, outcome, now_s))
        if not ticket.is_host:
            out.append(Report(outcome=outcome))

    def _reply(self, ticket: Ticket, outcome: Outcome, now_s: float) -> Reply:
        is_for_peer = ticket.request.hops > 0
        return Reply(outcome=outcome, reading=self.reading(now_s) if is_for_peer else None)

    # -- time and readings ----------------------------------------------------------------------

    def _tick(self, now_s: float, out: list[NodeCommand]) -> None:
        for instance in self.pool.stale(now_s):
            self._stop(instance, out)
        self._keep_floors(now_s, out)
        self._beliefs.forgive(now_s)
        for ticket in [t for t in self._tickets.values() if t.over_at_s <= now_s]:
            self._time_over(ticket, now_s, out)
        self._pump(now_s, out)

    def _time_over(self, ticket: Ticket, now_s: float, out: list[NodeCommand]) -> None:
        """The caller has given up, or the host that should stop has not answered in time."""
        if ticket.phase is Phase.FORWARDED:
            ticket.is_late = True
            self._recall(ticket, now_s, out)
        elif ticket.phase is Phase.RECALLED:
            self._finish(ticket, endings.unanswered(ticket, now_s), now_s, out)
        elif ticket.phase is Phase.QUEUED:
            self._line.leave(ticket)
            self._expire(ticket, now_s, out)
        elif ticket.instance is not None and not ticket.is_late:
            ticket.is_late = True
            instance_id = ticket.instance.instance_id
            out.append(KillRun(instance_id=instance_id, request_id=ticket.request.request_id))

    def _stop(self, instance: Instance, out: list[NodeCommand]) -> None:
        self.pool.remove(instance.instance_id)
        out.append(StopInstance(instance_id=instance.instance_id))

    def _reading_now(self, now_s: float) -> NodeReading:
        backlog_s, overtaken_s = self._outlook.backlog_s(now_s)
        return NodeReading(
            sequence=self._sequence,
            free=self.pool.free,
            running=len(self._running),
            queued=len(self._line),
            backlog_s=backlog_s,
            overtaken_s=overtaken_s,
            warm=MappingProxyType(self.pool.warm),
            engaged=MappingProxyType(self.pool.engaged),
            eviction_price_s_per_mib=self.pool.eviction_price_s_per_mib(now_s),
            reserved_mib=self.pool.reserved_mib,
        )

"""Everything one node decides: admission, routing, slots, warm instances, offline mode.

Pure. The node that a user reaches *owns* the request: it asks the policy, runs the request here or
forwards it, tries the next candidate when one refuses, and answers. A node that receives a request
from a peer or from the scheduler is a *host*: it re-checks what it can do now, and runs or refuses.

    user ─Arrived─► AskPolicy ─Decided─┬─► queue ─► StartInstance? ─► RunOn ─RunFinished─► Reply
                                       └─► Forward ─PeerReplied / PeerFailed─► Reply or next
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from heapq import heappop, heappush
from types import MappingProxyType
from typing import assert_never

from agent.pool import Instance, InstancePool, InstanceState
from tierwise.cost.energy import call_j
from tierwise.cost.estimate import DEFAULT_PRICES
from tierwise.cost.money import PriceTable
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
from tierwise.domain.decision import Explanation, NotPlaced, Placed, Reason, summary
from tierwise.domain.event import (
    Arrived,
    CancelAsked,
    CatalogueReceived,
    Decided,
    DrainAsked,
    InstanceDied,
    InstanceFailed,
    InstanceStarted,
    NodeEvent,
    PeerFailed,
    PeerReplied,
    RunFinished,
    Ticked,
    ViewReceived,
)
from tierwise.domain.ids import NO_POLICY, FunctionId, NodeId, PolicyId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.request import HOPS_MAX, TRIES_MAX, Request
from tierwise.domain.topology import Link, Node, NodeState
from tierwise.domain.view import ClusterView, NodeReading, NodeView, ViewTable

UNREACHABLE_FOR_S = 2.0  # how long a peer that failed is left alone
ANSWERED_MAX = 4096  # finished requests that are remembered against duplicates
SCAN_MAX = 32  # queued requests looked at behind one that must wait for its own function


class Phase(Enum):
    """Where an unfinished request stands on this node."""

    ASKED = 1
    FORWARDED = 2
    QUEUED = 3
    RUNNING = 4


@dataclass(slots=True)
class Ticket:
    """An unfinished request."""

    request: Request
    arrived_at_s: float
    sequence: int
    transfer_s: float = 0.0
    phase: Phase = Phase.ASKED
    next_nodes: list[NodeId] = field(default_factory=list)
    tried: list[tuple[NodeId, Reason]] = field(default_factory=list)
    failure_count: int = 0
    node_id: NodeId | None = None
    sent_at_s: float = 0.0
    sent_sequence: int = -1  # of the reading that the peer's pending_s was added to
    sent_s: float = 0.0  # what was added
    run_at_s: float = 0.0
    cold_start_s: float = 0.0
    is_cold: bool = False
    is_cancelled: bool = False
    instance: Instance | None = None
    explanation: Explanation | None = None
    policy_id: PolicyId = NO_POLICY

    @property
    def is_host(self) -> bool:
        """Return whether somebody else placed the request here."""
        return self.request.hops > 0 or self.request.lease > 0

    @property
    def ends_at_s(self) -> float:
        """Return when the caller gives up."""
        return self.arrived_at_s + self.request.timeout_s


class NodeMachine:
    """The state of one node. `step` is the only way to change it."""

    def __init__(
        self,
        node: Node,
        *,
        queue_max: int = 256,
        prices: PriceTable = DEFAULT_PRICES,
        first_sequence: int = 0,
    ) -> None:
        self.node = node
        self.is_draining = False
        self.pool = InstancePool(node.node_id, node.capacity)
        self._prices = prices
        self._queue_max = queue_max
        self._tickets: dict[RequestId, Ticket] = {}
        self._queue: list[tuple[int, float, int, RequestId]] = []
        self._queued: dict[FunctionId, int] = {}
        self._queued_count = 0
        self._queued_s = 0.0
        self._running: dict[RequestId, Ticket] = {}
        self._answered: OrderedDict[tuple[RequestId, int], None] = OrderedDict()
        self._unreachable: dict[NodeId, float] = {}
        self._table = ViewTable(node)
        self._table.put(NodeView(node=node, reading=NodeReading(free=node.capacity)))
        self._sequence = first_sequence
        self._ticket_count = 0

    def step(self, event: NodeEvent, now_s: float) -> list[NodeCommand]:
        """Apply one event and return what the shell must do, in order.

        Args:
            event: What happened.
            now_s: Monotonic time of this node; never smaller than in the step before.
        """
        out: list[NodeCommand] = []
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
                self._table.profiles = event.catalogue.profiles or self._table.profiles
            case ViewReceived():
                self._view_received(event, now_s)
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
        return replace(self._reading_now(now_s), warm=dict(self.pool.warm))

    def view(self, now_s: float) -> ClusterView:
        """Return what this node believes of the cluster; its own row is exact.

        The own row's `warm` follows the pool: read the view before the next step.
        """
        self._table.put(
            NodeView(
                node=self.node,
                reading=self._reading_now(now_s),
                state=NodeState.DRAINING if self.is_draining else NodeState.READY,
                received_at_s=now_s,
            )
        )
        return self._table.view(now_s)

    def path_to(self, node_id: NodeId) -> tuple[Node, Link] | None:
        """Return a peer and the link to it, or None if it is unknown."""
        row = self._table.get(node_id)
        return None if row is None else (row.node, self._table.links.between(self.node, row.node))

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
                ticket.next_nodes = list(placed.node_ids[:TRIES_MAX])
                self._try_next(ticket, now_s, out)
            case NotPlaced() as not_placed:
                ticket.tried.extend(not_placed.reasons)
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
        row = self._table.get(node_id)
        request = ticket.request
        if row is None or not row.reachable:
            return Reason.NODE_UNREACHABLE
        if request.hops + 1 > HOPS_MAX:
            return Reason.TOO_MANY_HOPS
        elapsed_s = now_s - ticket.arrived_at_s
        if elapsed_s >= request.timeout_s:
            return Reason.EXPIRED
        ticket.phase = Phase.FORWARDED
        ticket.node_id = node_id
        ticket.sent_at_s = now_s
        ticket.sent_sequence = row.reading.sequence
        ticket.sent_s = (
            self._expected_s(request) / row.node.speed / max(1.0, row.node.capacity.cpus)
        )
        self._table.change(node_id, pending_s=row.pending_s + ticket.sent_s)
        out.append(
            Forward(
                node_id=node_id,
                request=replace(
                    request,
                    hops=request.hops + 1,
                    deadline_s=request.deadline_s - elapsed_s,
                    timeout_s=request.timeout_s - elapsed_s,
                ),
            )
        )
        return None

    # -- running here ---------------------------------------------------------------------------

    def _admit(self, ticket: Ticket, now_s: float, out: list[NodeCommand]) -> Reason | None:
        """Queue the request here, or return why not."""
        spec = ticket.request.spec
        capacity = self.node.capacity
        if self.is_draining:
            return Reason.NODE_DRAINING
        if spec.memory_mib > capacity.memory_mib:
            return Reason.TOO_LITTLE_MEMORY
        if spec.cpus > capacity.cpus:
            return Reason.TOO_FEW_CPUS
        if spec.gpu_slots > capacity.gpu_slots:
            return Reason.NO_GPU
        if self._queued_count >= self._queue_max:
            return Reason.QUEUE_FULL
        ticket.phase = Phase.QUEUED
        ticket.node_id = self.node.node_id
        ticket.sent_s = self._expected_s(ticket.request) / self.node.speed
        self.pool.note_arrival(spec.function_id, now_s)
        self._enqueue(ticket)
        self._pump(now_s, out)
        return None

    def _enqueue(self, ticket: Ticket) -> None:
        request = ticket.request
        heappush(
            self._queue,
            (
                -int(request.priority),
                ticket.arrived_at_s + request.deadline_s,
                ticket.sequence,
                request.request_id,
            ),
        )
        function = request.spec.function_id
        self._queued[function] = self._queued.get(function, 0) + 1
        self._queued_count += 1
        self._queued_s += ticket.sent_s

    def _leave_queue(self, ticket: Ticket) -> None:
        """Take the ticket off the counters; its heap entry is skipped when it surfaces."""
        function = ticket.request.spec.function_id
        self._queued[function] -= 1
        if self._queued[function] == 0:
            del self._queued[function]
        self._queued_count -= 1
        self._queued_s = max(0.0, self._queued_s - ticket.sent_s) if self._queued_count else 0.0

    def _pump(self, now_s: float, out: list[NodeCommand]) -> None:
        """Give queued requests to idle instances and start missing ones, in queue order.

        A request that must wait for CPU or memory blocks those behind it (no starvation); one
        that only waits for an instance of its own function lets them pass.
        """
        held: list[tuple[int, float, int, RequestId]] = []
        queue = self._queue
        while queue and len(held) < SCAN_MAX:
            entry = queue[0]
            ticket = self._tickets.get(entry[3])
            if ticket is None or ticket.phase is not Phase.QUEUED or ticket.sequence != entry[2]:
                heappop(queue)
                continue
            if ticket.ends_at_s <= now_s:
                heappop(queue)
                self._leave_queue(ticket)
                self._expire(ticket, now_s, out)
                continue
            spec = ticket.request.spec
            function = spec.function_id
            if not self.pool.has_cpu_for(spec):
                break
            instance = self.pool.take_idle(function, ticket.request.request_id)
            if instance is not None:
                heappop(queue)
                self._leave_queue(ticket)
                self._run(ticket, instance, now_s, out)
                continue
            if self.pool.starting_count(function) < self._queued[function]:
                started = self.pool.start(spec, now_s)
                if started is not None:
                    new, evicted = started
                    out.extend(StopInstance(instance_id=old.instance_id) for old in evicted)
                    out.append(StartInstance(instance_id=new.instance_id, spec=spec))
                elif self.pool.free.memory_mib < spec.memory_mib and not self._has_own(function):
                    break
            held.append(heappop(queue))
        for entry in held:
            heappush(queue, entry)

    def _has_own(self, function: FunctionId) -> bool:
        return any(i.spec.function_id == function for i in self.pool.instances())

    def _run(
        self, ticket: Ticket, instance: Instance, now_s: float, out: list[NodeCommand]
    ) -> None:
        ticket.phase = Phase.RUNNING
        ticket.instance = instance
        ticket.run_at_s = now_s
        if instance.run_count == 1:
            waited_s = now_s - ticket.arrived_at_s
            ticket.is_cold = waited_s > 0.0
            ticket.cold_start_s = min(waited_s, instance.cold_start_s)
        self._running[ticket.request.request_id] = ticket
        out.append(
            RunOn(
                instance_id=instance.instance_id,
                request_id=ticket.request.request_id,
                timeout_s=min(ticket.request.spec.timeout_s, ticket.ends_at_s - now_s),
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
        run_s = now_s - ticket.run_at_s
        state = OutcomeState.FAILED if event.error_code else OutcomeState.OK
        if ticket.is_cancelled:
            state = OutcomeState.CANCELLED
        spec = ticket.request.spec
        self._finish(
            ticket,
            self._outcome(
                ticket,
                state,
                now_s,
                node_id=self.node.node_id,
                latency=LatencySplit(
                    queue_s=ticket.run_at_s - ticket.arrived_at_s - ticket.cold_start_s,
                    transfer_s=ticket.transfer_s,
                    cold_start_s=ticket.cold_start_s,
                    run_s=run_s,
                ),
                failed_item_count=event.failed_item_count,
                memory_mib=spec.memory_mib,
                peak_memory_mib=event.peak_memory_mib,
                response_bytes=event.response_bytes,
                money_usd=self._prices.call_usd(
                    self.node.tier,
                    memory_mib=spec.memory_mib,
                    billed_s=run_s,
                    moved_bytes=0,
                    gpu_slots=spec.gpu_slots,
                    item_count=ticket.request.item_count,
                ),
                energy_j=call_j(self.node.tier, cpus=spec.cpus, run_s=run_s, moved_bytes=0),
                is_cold=ticket.is_cold,
                error_code="cancelled" if ticket.is_cancelled else event.error_code,
                message=event.message,
            ),
            out,
        )
        self._pump(now_s, out)

    def _start_failed(self, event: InstanceFailed, now_s: float, out: list[NodeCommand]) -> None:
        instance = self.pool.remove(event.instance_id)
        if instance is None:
            return
        function = instance.spec.function_id
        waiting = [t for t in self._tickets.values() if t.phase is Phase.QUEUED]
        oldest = next((t for t in waiting if t.request.spec.function_id == function), None)
        if oldest is not None:  # each failed start costs one request: no loop of starts
            self._leave_queue(oldest)
            outcome = self._outcome(
                oldest,
                OutcomeState.FAILED,
                now_s,
                node_id=self.node.node_id,
                error_code=event.error_code,
                message=event.message,
            )
            self._finish(oldest, outcome, out)
        self._pump(now_s, out)

    # -- answers of peers -----------------------------------------------------------------------

    def _peer_replied(self, event: PeerReplied, now_s: float, out: list[NodeCommand]) -> None:
        ticket = self._forwarded(event.request_id, event.node_id)
        if ticket is None:
            return
        self._settle_pending(ticket)
        there = event.outcome
        if there.state is OutcomeState.REFUSED:
            ticket.tried.append((event.node_id, there.reason or Reason.QUEUE_FULL))
            ticket.phase = Phase.ASKED
            self._try_next(ticket, now_s, out)
            return
        row = self._table.get(event.node_id)
        tier = row.node.tier if row is not None else self.node.tier
        moved_bytes = ticket.request.request_bytes + there.response_bytes
        self._finish(
            ticket,
            replace(
                there,
                request_id=ticket.request.request_id,
                origin=self.node.node_id,
                node_id=event.node_id,
                latency=self._forwarded_latency(ticket, there, now_s),
                deadline_s=ticket.request.deadline_s,
                money_usd=there.money_usd
                + self._prices.call_usd(
                    tier, memory_mib=0, billed_s=0.0, moved_bytes=moved_bytes, item_count=0
                ),
                energy_j=there.energy_j + call_j(tier, cpus=0, run_s=0, moved_bytes=moved_bytes),
                tried=tuple(ticket.tried),
                policy_id=ticket.policy_id,
                explanation=ticket.explanation,
            ),
            out,
        )

    def _forwarded_latency(self, ticket: Ticket, there: Outcome, now_s: float) -> LatencySplit:
        """Split what the host did not account for into the way there and the way back.

        The two clocks differ, so only durations are compared; the parts are in proportion to
        what the link should need for each direction.
        """
        split = there.latency
        inside_s = split.queue_s + split.cold_start_s + split.run_s
        outside_s = max(0.0, now_s - ticket.sent_at_s - inside_s)
        row = self._table.get(ticket.node_id) if ticket.node_id is not None else None
        share = 0.5
        if row is not None:
            link = self._table.links.between(self.node, row.node)
            there_s = link.transfer_s(ticket.request.request_bytes)
            total_s = there_s + link.transfer_s(there.response_bytes)
            share = there_s / total_s if total_s > 0.0 else 0.5
        return LatencySplit(
            queue_s=split.queue_s + ticket.sent_at_s - ticket.arrived_at_s,
            transfer_s=outside_s * share,
            cold_start_s=split.cold_start_s,
            run_s=split.run_s,
            return_s=outside_s * (1.0 - share),
        )

    def _peer_failed(self, event: PeerFailed, now_s: float, out: list[NodeCommand]) -> None:
        if event.node_id in self._table:
            self._unreachable[event.node_id] = now_s + UNREACHABLE_FOR_S
            self._table.change(event.node_id, reachable=False)
        ticket = self._forwarded(event.request_id, event.node_id)
        if ticket is None:
            return
        self._settle_pending(ticket)
        ticket.tried.append((event.node_id, Reason.NODE_UNREACHABLE))
        ticket.failure_count += 1
        ticket.phase = Phase.ASKED
        if ticket.failure_count > ticket.request.spec.retries_max:
            ticket.next_nodes.clear()
        self._try_next(ticket, now_s, out)

    def _forwarded(self, request_id: RequestId, node_id: NodeId) -> Ticket | None:
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.phase is not Phase.FORWARDED or ticket.node_id != node_id:
            return None
        return ticket

    def _settle_pending(self, ticket: Ticket) -> None:
        """Take the request off the peer's pending work, unless a newer reading has done so."""
        row = self._table.get(ticket.node_id) if ticket.node_id is not None else None
        if row is not None and row.reading.sequence == ticket.sent_sequence:
            self._table.change(row.node.node_id, pending_s=max(0.0, row.pending_s - ticket.sent_s))

    # -- ends -----------------------------------------------------------------------------------

    def _cancel(self, request_id: RequestId, now_s: float, out: list[NodeCommand]) -> None:
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.is_cancelled:
            return
        ticket.is_cancelled = True
        if ticket.phase is Phase.RUNNING and ticket.instance is not None:
            out.append(KillRun(instance_id=ticket.instance.instance_id, request_id=request_id))
            return
        if ticket.phase is Phase.FORWARDED and ticket.node_id is not None:
            self._settle_pending(ticket)
            out.append(CancelAt(node_id=ticket.node_id, request_id=request_id))
        elif ticket.phase is Phase.QUEUED:
            self._leave_queue(ticket)
        outcome = self._outcome(
            ticket, OutcomeState.CANCELLED, now_s, error_code="cancelled", message="cancelled"
        )
        self._finish(ticket, outcome, out)

    def _expire(self, ticket: Ticket, now_s: float, out: list[NodeCommand]) -> None:
        waited_s = now_s - ticket.arrived_at_s
        where = ticket.node_id or self.node.node_id
        outcome = self._outcome(
            ticket,
            OutcomeState.EXPIRED,
            now_s,
            error_code="deadline_exceeded",
            message=(
                f"its time of {ticket.request.timeout_s:.3g} s was over after {waited_s:.3g} s, "
                f"before it ran on {where}; allow a longer timeout"
            ),
        )
        self._finish(ticket, outcome, out)

    def _refuse(self, ticket: Ticket, reason: Reason, now_s: float, out: list[NodeCommand]) -> None:
        del self._tickets[ticket.request.request_id]
        outcome = self._outcome(
            ticket,
            OutcomeState.REFUSED,
            now_s,
            reason=reason,
            error_code="overloaded" if reason is Reason.QUEUE_FULL else "unplaceable",
            message=f"{self.node.node_id} refused: {reason.label}",
        )
        out.append(Reply(outcome=outcome))

    def _give_up(self, ticket: Ticket, now_s: float, out: list[NodeCommand]) -> None:
        """No candidate is left."""
        reasons = {reason for _, reason in ticket.tried}
        if Reason.EXPIRED in reasons:
            self._expire(ticket, now_s, out)
            return
        if ticket.failure_count > ticket.request.spec.retries_max:
            code, state = "unavailable", OutcomeState.FAILED
        else:
            state = OutcomeState.UNPLACEABLE
            code = "overloaded" if Reason.QUEUE_FULL in reasons else "unplaceable"
        outcome = self._outcome(
            ticket,
            state,
            now_s,
            error_code=code,
            message=f"no node took {ticket.request.function_id}: {summary(ticket.tried)}",
        )
        self._finish(ticket, outcome, out)

    def _finish(self, ticket: Ticket, outcome: Outcome, out: list[NodeCommand]) -> None:
        request = ticket.request
        del self._tickets[request.request_id]
        self._answered[request.request_id, request.lease] = None
        if len(self._answered) > ANSWERED_MAX:
            self._answered.popitem(last=False)
        out.append(Reply(outcome=outcome))
        if not ticket.is_host:
            out.append(Report(outcome=outcome))

    def _outcome(
        self,
        ticket: Ticket,
        state: OutcomeState,
        now_s: float,
        *,
        node_id: NodeId | None = None,
        latency: LatencySplit | None = None,
        failed_item_count: int = 0,
        memory_mib: int = 0,
        peak_memory_mib: float = 0.0,
        response_bytes: int = 0,
        money_usd: float = 0.0,
        energy_j: float = 0.0,
        is_cold: bool = False,
        error_code: str = "",
        message: str = "",
        reason: Reason | None = None,
    ) -> Outcome:
        request = ticket.request
        return Outcome(
            request_id=request.request_id,
            function_id=request.spec.function_id,
            state=state,
            origin=request.origin,
            node_id=node_id,
            latency=latency or LatencySplit(queue_s=now_s - ticket.arrived_at_s),
            deadline_s=request.deadline_s,
            priority=request.priority,
            item_count=request.item_count,
            failed_item_count=failed_item_count,
            memory_mib=memory_mib,
            peak_memory_mib=peak_memory_mib,
            request_bytes=request.request_bytes,
            response_bytes=response_bytes,
            money_usd=money_usd,
            energy_j=energy_j,
            is_cold=is_cold,
            error_code=error_code,
            message=message,
            reason=reason,
            tried=tuple(ticket.tried),
            policy_id=ticket.policy_id,
            explanation=ticket.explanation,
            lease=request.lease,
        )

    # -- time and beliefs -----------------------------------------------------------------------

    def _tick(self, now_s: float, out: list[NodeCommand]) -> None:
        for instance in self.pool.stale(now_s):
            self._stop(instance, out)
        for node_id, until_s in list(self._unreachable.items()):
            if until_s <= now_s:
                del self._unreachable[node_id]
                self._table.change(node_id, reachable=True)
        for ticket in [t for t in self._tickets.values() if t.ends_at_s <= now_s]:
            if ticket.phase is Phase.FORWARDED and ticket.node_id is not None:
                self._settle_pending(ticket)
                out.append(CancelAt(node_id=ticket.node_id, request_id=ticket.request.request_id))
                self._expire(ticket, now_s, out)
            elif ticket.phase is Phase.QUEUED:
                self._leave_queue(ticket)
                self._expire(ticket, now_s, out)
        self._pump(now_s, out)

    def _stop(self, instance: Instance, out: list[NodeCommand]) -> None:
        self.pool.remove(instance.instance_id)
        out.append(StopInstance(instance_id=instance.instance_id))

    def _view_received(self, event: ViewReceived, now_s: float) -> None:
        here = self.node.node_id
        if event.links is not None:
            self._table.links = event.links
        if event.profiles is not None:
            self._table.profiles = {**self._table.profiles, **event.profiles}
        for peer in event.peers:
            node_id = peer.node.node_id
            if node_id == here:
                continue
            row = self._table.get(node_id)
            if row is None or row.node != peer.node:
                self._table.put(
                    NodeView(
                        node=peer.node,
                        reading=peer.reading,
                        state=peer.state,
                        received_at_s=now_s - peer.age_s,
                    )
                )
                continue
            self._table.heard(node_id, peer.reading, now_s, peer.age_s)
            self._table.change(node_id, state=peer.state)
        if event.is_full:
            named = {peer.node.node_id for peer in event.peers} | {here}
            for row in self._table.rows():
                if row.node.node_id not in named:
                    self._table.remove(row.node.node_id)

    def _reading_now(self, now_s: float) -> NodeReading:
        return NodeReading(
            sequence=self._sequence,
            free=self.pool.free,
            running=len(self._running),
            queued=self._queued_count,
            backlog_s=self._backlog_s(now_s),
            warm=MappingProxyType(self.pool.warm),
            eviction_price_s_per_mib=self.pool.eviction_price_s_per_mib(now_s),
        )

    def _backlog_s(self, now_s: float) -> float:
        """Estimate seconds until a CPU is free for a request that is queued now."""
        cpus = self.node.capacity.cpus
        if self._queued_count == 0 and self.pool.free.cpus >= min(1.0, cpus):
            return 0.0
        work_s = self._queued_s
        for ticket in self._running.values():
            work_s += max(0.0, ticket.sent_s - (now_s - ticket.run_at_s))
        return work_s / max(1.0, cpus)

    def _expected_s(self, request: Request) -> float:
        """Return the expected run time on a node of speed 1.0."""
        profile = self._table.profiles.get(request.spec.function_id)
        run_s = profile.run_s if profile is not None else 0.05
        return run_s * request.item_count

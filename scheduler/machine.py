"""Everything the control plane decides: who is alive, where durable work goes, when it is retried.

Pure. Durable work runs at least once; its result is recorded once, because every attempt carries a
higher lease and only the newest lease's result counts.

    Submitted ─► waiting ─AskPolicy/Decided─► leased ─WorkFinished─► Record | DeadLetter
                    ▲                            │
                    └── delayed, parked ◄── refused, failed platform, node lost, nodes full
"""

import hashlib
from dataclasses import replace
from typing import assert_never

from scheduler.backlog import Backlog, Job, Phase
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
from tierwise.domain.decision import NotPlaced, Placed, Reason, is_hopeless, summary
from tierwise.domain.event import (
    CancelAsked,
    CatalogueReceived,
    ControlEvent,
    Decided,
    HeartbeatReceived,
    NodeDrainAsked,
    NodeRemembered,
    NodeRemoved,
    PeerSeen,
    SessionClosed,
    SessionOpened,
    Submitted,
    Ticked,
    WorkFinished,
)
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.request import TRIES_MAX, Request
from tierwise.domain.topology import LinkTable, Node, NodeState
from tierwise.domain.view import ClusterView, NodeReading, NodeView, ViewTable

SUSPECT_AFTER = 3.0  # missed heartbeat intervals
LOST_AFTER = 10.0
RETRY_FIRST_S = 0.2
RETRY_MAX_S = 30.0
LOSSES_MAX = 8  # times that work may lose its node before it is given up
BUDGET_TRY_COUNT = 6  # work whose budget is spent tries again as after so many failures
UNPLACED_S_MAX = 3600.0  # how long no node may take it before it is given up
MIN_TIMEOUT_S = 1e-3  # on the wire 0 means the function's own
WINDOW_MAX = 10_000  # jobs that the shell keeps here; the rest waits in the store
IN_FLIGHT_PER_CPU = 4  # leases that keep a node busy without flooding it
IN_FLIGHT_EXTRA = 4
# Failures of the platform rather than of the function: another attempt may succeed.
RETRIED_CODES = frozenset(
    {"function_died", "unavailable", "start_failed", "overloaded", "unplaceable", "internal"}
)


class ControlPlane:
    """The state of the scheduler. `step` is the only way to change it."""

    def __init__(
        self, *, heartbeat_interval_s: float = 1.0, links: LinkTable | None = None
    ) -> None:
        self._interval_s = heartbeat_interval_s
        self.table = ViewTable()
        if links is not None:
            self.table.links = links
        self._connected: set[NodeId] = set()
        self._heard_at_s: dict[NodeId, float] = {}
        self._draining: set[NodeId] = set()
        self._backlog = Backlog()
        self._asked: RequestId | None = None
        # What connected nodes say they hold and is not known here (yet), with the lease.
        self._claims: dict[NodeId, dict[RequestId, int]] = {}

    @property
    def job_count(self) -> int:
        """Return how many pieces of work are unfinished here."""
        return len(self._backlog.jobs)

    @property
    def room(self) -> int:
        """Return how many more pieces of work should be submitted now; never negative."""
        return max(0, WINDOW_MAX - len(self._backlog.jobs))

    def job(self, request_id: RequestId) -> Job | None:
        """Return an unfinished piece of work, or None."""
        return self._backlog.jobs.get(request_id)

    def is_draining(self, node_id: NodeId) -> bool:
        """Return whether the operator drains a node."""
        return node_id in self._draining

    def view(self, now_s: float) -> ClusterView:
        """Return what the control plane believes of the cluster."""
        return self.table.view(now_s)

    def peers(self, now_s: float) -> tuple[PeerSeen, ...]:
        """Return every node as agents are told of it."""
        return tuple(
            PeerSeen(
                node=row.node,
                state=row.state,
                reading=row.reading,
                age_s=max(0.0, now_s - row.received_at_s),
            )
            for row in self.table.rows()
        )

    def step(self, event: ControlEvent, now_s: float) -> list[ControlCommand]:
        """Apply one event and return what the shell must do, in order.

        Args:
            event: What happened.
            now_s: Monotonic time; never smaller than in the step before.
        """
        out: list[ControlCommand] = []
        match event:
            case HeartbeatReceived():
                self._heartbeat(event, now_s, out)
            case Submitted():
                self._submitted(event, now_s)
            case Decided():
                self._decided(event, now_s, out)
            case WorkFinished():
                self._work_finished(event, now_s, out)
            case SessionOpened():
                self._session_opened(event, now_s, out)
            case SessionClosed():
                self._session_closed(event, now_s, out)
            case NodeRemembered():
                self._remembered(event, now_s)
            case CancelAsked():
                self._cancel(event.request_id, out)
            case CatalogueReceived():
                self.table.profiles = event.catalogue.profiles
            case NodeRemoved():
                self._removed(event.node_id, now_s, out)
            case NodeDrainAsked():
                self._drain(event, out)
            case Ticked():
                self._tick(now_s, out)
            case _:
                assert_never(event)
        self._pump(now_s, out)
        return out

    # -- nodes ----------------------------------------------------------------------------------

    def _session_opened(
        self, event: SessionOpened, now_s: float, out: list[ControlCommand]
    ) -> None:
        node_id = event.node.node_id
        row = self.table.get(node_id)
        reading = row.reading if row is not None else _first_reading(event.node)
        state = self._alive_state(node_id)
        self.table.put(NodeView(node=event.node, reading=reading, state=state, received_at_s=now_s))
        self._connected.add(node_id)
        self._heard_at_s[node_id] = now_s
        if state is NodeState.DRAINING:
            out.append(TellDrain(node_id=node_id, is_on=True))
        out.append(NodeChanged(node_id=node_id, state=state))
        held = dict(event.leases)
        self._claims[node_id] = {}
        for request_id, lease in event.leases:
            job = self._backlog.jobs.get(request_id)
            if job is None:
                self._claims[node_id][request_id] = lease
            else:
                self._adopt(job, lease, node_id)
        for job in self._backlog.leased_to(node_id):
            if held.get(job.request.request_id) != job.lease:
                self._lost(job, now_s, out)  # it died with an earlier life of the node
        self._backlog.wake_unplaced()

    def _adopt(self, job: Job, lease: int, node_id: NodeId) -> None:
        """Leave work with the node that still holds its newest lease.

        After a restart of the scheduler the node that had it is not known, so who claims it has it.
        """
        if job.lease == lease and job.phase is not Phase.LEASED and job.node_id in (None, node_id):
            self._backlog.lease(job, node_id)

    def _session_closed(
        self, event: SessionClosed, now_s: float, out: list[ControlCommand]
    ) -> None:
        node_id = event.node_id
        self._connected.discard(node_id)
        self._claims.pop(node_id, None)
        if event.has_left:
            self._set_state(node_id, NodeState.LOST, out)
            self._lose_all(node_id, now_s, out)
        else:
            self._set_state(node_id, NodeState.SUSPECT, out)
            self._backlog.unpark(node_id)

    def _remembered(self, event: NodeRemembered, now_s: float) -> None:
        """List a node that is not back yet; it has as long as any to send a heartbeat."""
        node = event.node
        if node.node_id in self.table:
            return
        heard_at_s = now_s - event.age_s
        is_lost = event.age_s >= LOST_AFTER * self._interval_s
        self.table.put(
            NodeView(
                node=node,
                reading=_first_reading(node),
                state=NodeState.LOST if is_lost else NodeState.SUSPECT,
                received_at_s=heard_at_s,
            )
        )
        self._heard_at_s[node.node_id] = heard_at_s

    def _heartbeat(self, event: HeartbeatReceived, now_s: float, out: list[ControlCommand]) -> None:
        node_id = event.node_id
        if node_id not in self._connected:
            return
        self.table.heard(node_id, event.reading, now_s)
        self._heard_at_s[node_id] = now_s
        if self._state(node_id) in (NodeState.SUSPECT, NodeState.LOST):
            self._set_state(node_id, self._alive_state(node_id), out)
            self._backlog.wake_unplaced()

    def _tick(self, now_s: float, out: list[ControlCommand]) -> None:
        for node_id, heard_at_s in sorted(self._heard_at_s.items()):
            missed = (now_s - heard_at_s) / self._interval_s
            state = self._state(node_id)
            if missed >= LOST_AFTER and state is not NodeState.LOST:
                self._set_state(node_id, NodeState.LOST, out)
                self._lose_all(node_id, now_s, out)
            elif missed >= SUSPECT_AFTER and state is NodeState.READY:
                self._set_state(node_id, NodeState.SUSPECT, out)
        for job in self._backlog.overdue(now_s):
            if job.phase is Phase.LEASED and job.node_id is not None:
                # Its node has the same limit, and says what it ran.
                out.append(CancelAt(node_id=job.node_id, request_id=job.request.request_id))
            else:
                self._end_expired(job, None, out)
        self._backlog.wake_due(now_s)

    def _drain(self, event: NodeDrainAsked, out: list[ControlCommand]) -> None:
        """Drain a node, or take it back; one that is not known yet is drained when it comes."""
        node_id = event.node_id
        (self._draining.add if event.is_on else self._draining.discard)(node_id)
        if node_id not in self._connected:
            return
        out.append(TellDrain(node_id=node_id, is_on=event.is_on))
        self._set_state(node_id, self._alive_state(node_id), out)
        if event.is_on:
            self._backlog.unpark(node_id)
        else:
            self._backlog.wake_unplaced()

    def _removed(self, node_id: NodeId, now_s: float, out: list[ControlCommand]) -> None:
        self._connected.discard(node_id)
        self._claims.pop(node_id, None)
        self._heard_at_s.pop(node_id, None)
        self._draining.discard(node_id)
        self._lose_all(node_id, now_s, out)
        self.table.remove(node_id)
        out.append(NodeChanged(node_id=node_id, state=NodeState.LOST))

    def _lose_all(self, node_id: NodeId, now_s: float, out: list[ControlCommand]) -> None:
        for job in self._backlog.leased_to(node_id):
            self._lost(job, now_s, out)
        self._backlog.unpark(node_id)

    def _state(self, node_id: NodeId) -> NodeState:
        row = self.table.get(node_id)
        return NodeState.LOST if row is None else row.state

    def _alive_state(self, node_id: NodeId) -> NodeState:
        return NodeState.DRAINING if node_id in self._draining else NodeState.READY

    def _set_state(self, node_id: NodeId, state: NodeState, out: list[ControlCommand]) -> None:
        if node_id in self.table and self._state(node_id) is not state:
            self.table.change(node_id, state=state)
            out.append(NodeChanged(node_id=node_id, state=state))

    # -- placing work ---------------------------------------------------------------------------

    def _submitted(self, event: Submitted, now_s: float) -> None:
        request_id = event.request.request_id
        if request_id in self._backlog.jobs:
            return
        job = self._backlog.add(
            event.request,
            lease=event.lease,
            failure_count=event.attempt_count,
            ends_at_s=None if event.ends_in_s is None else now_s + event.ends_in_s,
        )
        for node_id, claimed in self._claims.items():
            lease = claimed.pop(request_id, 0)
            if lease and lease == event.lease:
                self._adopt(job, lease, node_id)

    def _pump(self, now_s: float, out: list[ControlCommand]) -> None:
        """Ask where the next waiting work should go.

        One question at a time, for each answer changes what the next one should see.
        """
        if self._asked is not None:
            return
        for node_id in self._backlog.parked_nodes():
            self._backlog.unpark(node_id, self._room_on(node_id))
        job = self._backlog.next_waiting()
        if job is None:
            return
        rows = self.table.rows()
        busy = {row.node.node_id for row in rows if not self._room_on(row.node.node_id)}
        if len(busy) == len(rows):
            return  # a result, a heartbeat or a session will bring us back
        self._backlog.ask(job)
        self._asked = job.request.request_id
        excluded = frozenset(busy | job.refused_by | job.failed_on)
        request = replace(job.request, excluded=excluded)
        out.append(AskPolicy(request=request, view=self.view(now_s)))

    def _room_on(self, node_id: NodeId) -> int:
        """Return how many more leases a node may hold now; 0 if it cannot be reached."""
        row = self.table.get(node_id)
        if row is None or node_id not in self._connected:
            return 0
        cpus = max(1.0, row.node.capacity.cpus)
        most = int(IN_FLIGHT_PER_CPU * cpus + IN_FLIGHT_EXTRA)
        return max(0, most - self._backlog.leased_count(node_id))

    def _decided(self, event: Decided, now_s: float, out: list[ControlCommand]) -> None:
        if self._asked == event.request_id:
            self._asked = None
        job = self._backlog.jobs.get(event.request_id)
        if job is None or job.phase is not Phase.ASKED:
            return
        match event.decision:
            case Placed() as placed:
                self._dispatch(job, placed.node_ids[0], now_s, out)
            case NotPlaced() as not_placed:
                self._not_placed(job, not_placed, now_s, out)
            case _:
                assert_never(event.decision)

    def _dispatch(self, job: Job, node_id: NodeId, now_s: float, out: list[ControlCommand]) -> None:
        job.lease += 1
        timeout_s = job.request.timeout_s
        if job.ends_at_s is not None:
            timeout_s = max(MIN_TIMEOUT_S, job.ends_at_s - now_s)
        job.request = replace(job.request, lease=job.lease, timeout_s=timeout_s)
        self._backlog.lease(job, node_id)
        row = self.table.get(node_id)
        if row is not None:
            profile = self.view(0.0).profile(job.request.function_id)
            run_s = profile.run_s * job.request.item_count / row.node.speed
            cpus = max(1.0, row.node.capacity.cpus)
            self.table.change(node_id, pending_s=row.pending_s + run_s / cpus)
        out.append(Dispatch(node_id=node_id, request=job.request, attempt_count=job.failure_count))

    def _not_placed(
        self, job: Job, decision: NotPlaced, now_s: float, out: list[ControlCommand]
    ) -> None:
        """Wait for room on a node that could take it; failing that, for better times."""
        if job.failed_on:  # better where it failed before than nowhere
            job.failed_on.clear()
            self._backlog.wait(job)
            return
        full = [
            node_id
            for node_id, reason in decision.reasons
            if reason is Reason.EXCLUDED
            and node_id not in job.refused_by
            and node_id in self._connected
        ]
        if full:
            self._backlog.park(job, full)
            return
        if any(reason is Reason.BUDGET_SPENT for _, reason in decision.reasons):
            # It waits as long as that takes: until the budget is raised, or its day is over.
            message = "its budget of the day is spent: it waits until that is raised or over"
            self._delay(job, BUDGET_TRY_COUNT, message, now_s, out, is_unplaced=True)
            return
        job.refused_by.clear()
        code = "infeasible" if is_hopeless(decision.reasons) else "unplaceable"
        message = f"no node can take it: {summary(decision.reasons)}"
        self._not_now(job, message, now_s, out, code=code)

    def _not_now(
        self,
        job: Job,
        message: str,
        now_s: float,
        out: list[ControlCommand],
        *,
        code: str = "unplaceable",
    ) -> None:
        """No node takes it at present, which is nobody's failure: try later, for an hour.

        Also if no node there is could ever take it: another may join.
        """
        if job.unplaced_since_s is None:
            job.unplaced_since_s = now_s
        job.unplaced_count += 1
        if now_s - job.unplaced_since_s > UNPLACED_S_MAX:
            self._give_up(job, code, message, out)
        else:
            self._delay(job, job.unplaced_count, message, now_s, out, is_unplaced=True)

    # -- how work ends --------------------------------------------------------------------------

    def _work_finished(self, event: WorkFinished, now_s: float, out: list[ControlCommand]) -> None:
        outcome = event.outcome
        job = self._backlog.jobs.get(outcome.request_id)
        if job is None or outcome.lease != job.lease or event.node_id != job.node_id:
            return  # an old lease: somebody else has the work, or it has ended
        is_retried = (
            outcome.state in (OutcomeState.REFUSED, OutcomeState.EXPIRED, OutcomeState.UNPLACEABLE)
            or outcome.error_code in RETRIED_CODES
        )
        is_over = job.ends_at_s is not None and job.ends_at_s <= now_s
        if job.is_cancelled and outcome.state is not OutcomeState.OK:
            self._end_cancelled(job, outcome, out)
        elif is_over and (is_retried or outcome.state is OutcomeState.CANCELLED):
            self._end_expired(job, outcome, out)
        elif not is_retried:
            # Also from a node that was given up: its lease is the newest, nobody else has it.
            self._backlog.remove(job)
            out.append(Record(outcome=outcome))
        elif job.phase is Phase.LEASED:
            job.last = outcome
            self._retry(job, event.node_id, outcome, now_s, out)

    def _retry(
        self, job: Job, node_id: NodeId, outcome: Outcome, now_s: float, out: list[ControlCommand]
    ) -> None:
        if outcome.state is OutcomeState.REFUSED:
            job.refused_by.add(node_id)
            if len(job.refused_by) < TRIES_MAX:
                self._backlog.wait(job)
            else:
                job.refused_by.clear()
                self._not_now(job, outcome.message, now_s, out)
        elif outcome.state in (OutcomeState.EXPIRED, OutcomeState.UNPLACEABLE):
            self._not_now(job, outcome.message, now_s, out)  # it never ran
        else:
            job.failure_count += 1
            job.unplaced_since_s = None
            job.failed_on.add(node_id)
            if job.failure_count > job.request.spec.retries_max:
                self._give_up(job, outcome.error_code, outcome.message, out)
            else:
                self._delay(job, job.failure_count, outcome.message, now_s, out)

    def _lost(self, job: Job, now_s: float, out: list[ControlCommand]) -> None:
        """The node that held this work is gone, or has forgotten it."""
        job.loss_count += 1
        job.unplaced_since_s = None
        message = f"node {job.node_id} was lost while it held this work"
        if job.is_cancelled:
            self._end_cancelled(job, None, out)
        elif job.ends_at_s is not None and job.ends_at_s <= now_s:
            self._end_expired(job, None, out)
        elif job.loss_count > LOSSES_MAX:
            self._give_up(job, "unavailable", message, out)
        else:
            self._delay(job, job.loss_count, message, now_s, out)

    def _delay(
        self,
        job: Job,
        try_count: int,
        message: str,
        now_s: float,
        out: list[ControlCommand],
        *,
        is_unplaced: bool = False,
    ) -> None:
        request_id = job.request.request_id
        wait_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(try_count - 1, 10))
        wait_s *= 0.75 + 0.5 * _spread(request_id, job.lease)
        self._backlog.delay(job, now_s + wait_s, is_unplaced=is_unplaced)
        out.append(
            Delay(
                request_id=request_id,
                attempt_count=job.failure_count,
                retry_in_s=wait_s,
                message=message,
            )
        )

    def _give_up(self, job: Job, code: str, message: str, out: list[ControlCommand]) -> None:
        self._backlog.remove(job)
        outcome = job.last or _outcome(job, OutcomeState.FAILED, code, message)
        out.append(
            DeadLetter(
                request_id=job.request.request_id,
                outcome=replace(
                    outcome,
                    state=OutcomeState.FAILED,
                    reason=None,
                    error_code=code,
                    message=message,
                    lease=job.lease,
                ),
            )
        )

    def _cancel(self, request_id: RequestId, out: list[ControlCommand]) -> None:
        job = self._backlog.jobs.get(request_id)
        if job is None or job.is_cancelled:
            return
        job.is_cancelled = True
        if job.phase is Phase.LEASED and job.node_id is not None:
            out.append(CancelAt(node_id=job.node_id, request_id=request_id))
        else:
            self._end_cancelled(job, None, out)

    def _end_cancelled(self, job: Job, outcome: Outcome | None, out: list[ControlCommand]) -> None:
        self._end_early(job, outcome, OutcomeState.CANCELLED, "cancelled", "cancelled", out)

    def _end_expired(self, job: Job, outcome: Outcome | None, out: list[ControlCommand]) -> None:
        where = "before a node had run it"
        if outcome is not None and outcome.latency.run_s > 0.0:
            where = f"after it had run {outcome.latency.run_s:.3g} s on {job.node_id}"
        message = f"its time was over {where}; allow a longer timeout"
        self._end_early(job, outcome, OutcomeState.EXPIRED, "deadline_exceeded", message, out)

    def _end_early(
        self,
        job: Job,
        outcome: Outcome | None,
        state: OutcomeState,
        code: str,
        message: str,
        out: list[ControlCommand],
    ) -> None:
        """Nobody wants the result any more; what its node ran of it until then is billed."""
        self._backlog.remove(job)
        if self._asked == job.request.request_id:
            self._asked = None
        if outcome is None:
            outcome = replace(_outcome(job, state, code, message), node_id=None)
        changed = replace(outcome, state=state, error_code=code, message=message, reason=None)
        out.append(Record(outcome=changed))


def _first_reading(node: Node) -> NodeReading:
    """Return what is assumed of a node before its first heartbeat: it is idle."""
    return NodeReading(free=node.capacity)


def _outcome(job: Job, state: OutcomeState, code: str, message: str) -> Outcome:
    request: Request = job.request
    return Outcome(
        request_id=request.request_id,
        function_id=request.function_id,
        state=state,
        origin=request.origin,
        node_id=job.node_id,
        latency=LatencySplit(),
        deadline_s=request.deadline_s,
        priority=request.priority,
        item_count=request.item_count,
        error_code=code,
        message=message,
        lease=job.lease,
    )


def _spread(request_id: RequestId, lease: int) -> float:
    """Return a number in [0, 1) that differs between requests but not between replays."""
    digest = hashlib.blake2b(f"{request_id}/{lease}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") / 2**32

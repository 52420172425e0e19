"""Everything the control plane decides: who is alive, where durable work goes, when it is retried.

Pure. Durable work runs at least once; its result is recorded once, because every attempt carries a
higher lease and only the newest lease's result counts.

    Submitted ─► waiting ─AskPolicy/Decided─► leased ─WorkFinished─► Record | DeadLetter
                    ▲                            │
                    └── delayed ◄── refused, failed platform, node lost
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import assert_never

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
from tierwise.domain.decision import NotPlaced, Placed, summary
from tierwise.domain.event import (
    CancelAsked,
    CatalogueReceived,
    ControlEvent,
    Decided,
    HeartbeatReceived,
    NodeDrainAsked,
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
UNPLACED_MAX = 200  # times that no node may be feasible before it is given up
# Failures of the platform rather than of the function: another attempt may succeed.
RETRIED_CODES = frozenset(
    {"function_died", "unavailable", "start_failed", "overloaded", "unplaceable", "internal"}
)


class Phase(Enum):
    """Where a piece of durable work stands."""

    WAITING = 1
    ASKED = 2
    LEASED = 3
    DELAYED = 4


@dataclass(slots=True)
class Job:
    """One unfinished piece of durable work."""

    request: Request
    lease: int
    phase: Phase = Phase.WAITING
    failure_count: int = 0
    loss_count: int = 0
    unplaced_count: int = 0
    refused_by: set[NodeId] = field(default_factory=set)
    node_id: NodeId | None = None
    retry_at_s: float = 0.0
    is_cancelled: bool = False
    last: Outcome | None = None


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
        self._jobs: dict[RequestId, Job] = {}
        self._waiting: deque[RequestId] = deque()
        self._delayed: set[RequestId] = set()
        self._leased: dict[NodeId, set[RequestId]] = {}
        self._asked: RequestId | None = None

    @property
    def job_count(self) -> int:
        """Return how many pieces of work are unfinished here."""
        return len(self._jobs)

    def job(self, request_id: RequestId) -> Job | None:
        """Return an unfinished piece of work, or None."""
        return self._jobs.get(request_id)

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
                self._submitted(event)
            case Decided():
                self._decided(event, now_s, out)
            case WorkFinished():
                self._work_finished(event, now_s, out)
            case SessionOpened():
                self._session_opened(event, now_s, out)
            case SessionClosed():
                self._connected.discard(event.node_id)
                self._set_state(event.node_id, NodeState.SUSPECT, out)
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
        self.table.put(
            NodeView(node=event.node, reading=reading, received_at_s=now_s)
        )
        self._connected.add(node_id)
        self._heard_at_s[node_id] = now_s
        if node_id in self._draining:
            out.append(TellDrain(node_id=node_id, is_on=True))
            self.table.change(node_id, state=NodeState.DRAINING)
        out.append(NodeChanged(node_id=node_id, state=self._state(node_id)))
        held = dict(event.leases)
        for request_id, lease in event.leases:
            self._adopt(request_id, lease, node_id)
        for request_id in sorted(self._leased.get(node_id, ())):
            if held.get(request_id) != self._jobs[request_id].lease:
                self._lost(request_id, now_s, out)  # it died with an earlier life of the node

    def _adopt(self, request_id: RequestId, lease: int, node_id: NodeId) -> None:
        """After a restart of the scheduler, leave work with the node that still holds it."""
        job = self._jobs.get(request_id)
        if job is not None and job.lease == lease and job.phase in (Phase.WAITING, Phase.DELAYED):
            self._delayed.discard(request_id)
            job.phase = Phase.LEASED
            job.node_id = node_id
            self._leased.setdefault(node_id, set()).add(request_id)

    def _heartbeat(
        self, event: HeartbeatReceived, now_s: float, out: list[ControlCommand]
    ) -> None:
        if event.node_id not in self._connected:
            return
        self.table.heard(event.node_id, event.reading, now_s)
        self._heard_at_s[event.node_id] = now_s
        if self._state(event.node_id) in (NodeState.SUSPECT, NodeState.LOST):
            self._set_state(event.node_id, self._alive_state(event.node_id), out)

    def _tick(self, now_s: float, out: list[ControlCommand]) -> None:
        for node_id, heard_at_s in sorted(self._heard_at_s.items()):
            missed = (now_s - heard_at_s) / self._interval_s
            state = self._state(node_id)
            if missed >= LOST_AFTER and state is not NodeState.LOST:
                self._set_state(node_id, NodeState.LOST, out)
                for request_id in sorted(self._leased.get(node_id, ())):
                    self._lost(request_id, now_s, out)
            elif missed >= SUSPECT_AFTER and state is NodeState.READY:
                self._set_state(node_id, NodeState.SUSPECT, out)
        for request_id in sorted(self._delayed):
            job = self._jobs[request_id]
            if job.retry_at_s <= now_s:
                self._wait(job)

    def _drain(self, event: NodeDrainAsked, out: list[ControlCommand]) -> None:
        if event.node_id not in self.table:
            return
        (self._draining.add if event.is_on else self._draining.discard)(event.node_id)
        out.append(TellDrain(node_id=event.node_id, is_on=event.is_on))
        if event.node_id in self._connected:
            self._set_state(event.node_id, self._alive_state(event.node_id), out)

    def _removed(self, node_id: NodeId, now_s: float, out: list[ControlCommand]) -> None:
        self._connected.discard(node_id)
        self._heard_at_s.pop(node_id, None)
        self._draining.discard(node_id)
        for request_id in sorted(self._leased.get(node_id, ())):
            self._lost(request_id, now_s, out)
        self._leased.pop(node_id, None)
        self.table.remove(node_id)
        out.append(NodeChanged(node_id=node_id, state=NodeState.LOST))

    def _state(self, node_id: NodeId) -> NodeState:
        row = self.table.get(node_id)
        return NodeState.LOST if row is None else row.state

    def _alive_state(self, node_id: NodeId) -> NodeState:
        return NodeState.DRAINING if node_id in self._draining else NodeState.READY

    def _set_state(self, node_id: NodeId, state: NodeState, out: list[ControlCommand]) -> None:
        if node_id in self.table and self._state(node_id) is not state:
            self.table.change(node_id, state=state)
            out.append(NodeChanged(node_id=node_id, state=state))

    # -- work -----------------------------------------------------------------------------------

    def _submitted(self, event: Submitted) -> None:
        request_id = event.request.request_id
        if request_id not in self._jobs:
            self._jobs[request_id] = Job(
                event.request, event.lease, failure_count=event.attempt_count
            )
            self._waiting.append(request_id)

    def _wait(self, job: Job) -> None:
        self._delayed.discard(job.request.request_id)
        job.phase = Phase.WAITING
        self._waiting.append(job.request.request_id)

    def _pump(self, now_s: float, out: list[ControlCommand]) -> None:
        """Ask where the next waiting work should go; one question at a time, for each answer
        changes what the next one should see.
        """
        while self._waiting and self._asked is None:
            job = self._jobs.get(self._waiting[0])
            if job is None or job.phase is not Phase.WAITING:
                self._waiting.popleft()
                continue
            busy = {
                row.node.node_id
                for row in self.table.rows()
                if row.node.node_id not in self._connected or self._is_full(row.node)
            }
            if len(busy) == len(self.table.rows()):
                return  # a result, a heartbeat or a session will bring us back
            self._waiting.popleft()
            job.phase = Phase.ASKED
            self._asked = job.request.request_id
            excluded = frozenset(busy | job.refused_by)
            out.append(
                AskPolicy(request=replace(job.request, excluded=excluded), view=self.view(now_s))
            )

    def _is_full(self, node: Node) -> bool:
        """Return whether a node holds as much leased work as keeps it busy for a while."""
        return len(self._leased.get(node.node_id, ())) >= 4 * max(1.0, node.capacity.cpus) + 4

    def _decided(self, event: Decided, now_s: float, out: list[ControlCommand]) -> None:
        if self._asked == event.request_id:
            self._asked = None
        job = self._jobs.get(event.request_id)
        if job is None or job.phase is not Phase.ASKED:
            return
        match event.decision:
            case Placed() as placed:
                self._dispatch(job, placed.node_ids[0], out)
            case NotPlaced() as not_placed:
                job.unplaced_count += 1
                job.refused_by.clear()
                message = f"no node can take it: {summary(not_placed.reasons)}"
                if job.unplaced_count > UNPLACED_MAX:
                    self._give_up(job, "unplaceable", message, out)
                else:
                    self._delay(job, job.unplaced_count, message, now_s, out)
            case _:
                assert_never(event.decision)

    def _dispatch(self, job: Job, node_id: NodeId, out: list[ControlCommand]) -> None:
        job.lease += 1
        job.phase = Phase.LEASED
        job.node_id = node_id
        job.request = replace(job.request, lease=job.lease)
        self._leased.setdefault(node_id, set()).add(job.request.request_id)
        row = self.table.get(node_id)
        if row is not None:
            run_s = self.view(0.0).profile(job.request.function_id).run_s * job.request.item_count
            cpus = max(1.0, row.node.capacity.cpus)
            self.table.change(node_id, pending_s=row.pending_s + run_s / row.node.speed / cpus)
        out.append(
            Dispatch(node_id=node_id, request=job.request, attempt_count=job.failure_count)
        )

    def _work_finished(
        self, event: WorkFinished, now_s: float, out: list[ControlCommand]
    ) -> None:
        outcome = event.outcome
        job = self._jobs.get(outcome.request_id)
        if job is None or job.phase is not Phase.LEASED or outcome.lease != job.lease:
            return  # an old lease: somebody else has the work, or it has ended
        self._unlease(job)
        job.last = outcome
        if outcome.state is OutcomeState.REFUSED and not job.is_cancelled:
            job.refused_by.add(event.node_id)
            if len(job.refused_by) < TRIES_MAX:
                self._wait(job)
            else:
                job.refused_by.clear()
                job.unplaced_count += 1
                self._delay(job, job.unplaced_count, outcome.message, now_s, out)
        elif outcome.error_code in RETRIED_CODES and not job.is_cancelled:
            job.failure_count += 1
            if job.failure_count > job.request.spec.retries_max:
                self._give_up(job, outcome.error_code, outcome.message, out)
            else:
                self._delay(job, job.failure_count, outcome.message, now_s, out)
        else:
            del self._jobs[outcome.request_id]
            out.append(Record(outcome=outcome))

    def _lost(self, request_id: RequestId, now_s: float, out: list[ControlCommand]) -> None:
        """The node that held this work is gone, or has forgotten it."""
        job = self._jobs[request_id]
        where = job.node_id
        self._unlease(job)
        job.loss_count += 1
        message = f"node {where} was lost while it held this work"
        if job.is_cancelled:
            self._end_cancelled(job, out)
        elif job.loss_count > LOSSES_MAX:
            self._give_up(job, "unavailable", message, out)
        else:
            self._delay(job, job.loss_count, message, now_s, out)

    def _unlease(self, job: Job) -> None:
        if job.node_id is not None:
            self._leased.get(job.node_id, set()).discard(job.request.request_id)

    def _delay(
        self, job: Job, try_count: int, message: str, now_s: float, out: list[ControlCommand]
    ) -> None:
        request_id = job.request.request_id
        wait_s = min(RETRY_MAX_S, RETRY_FIRST_S * 2.0 ** min(try_count - 1, 10))
        wait_s *= 0.75 + 0.5 * _spread(request_id, job.lease)
        job.phase = Phase.DELAYED
        job.retry_at_s = now_s + wait_s
        self._delayed.add(request_id)
        out.append(
            Delay(
                request_id=request_id,
                attempt_count=job.failure_count,
                retry_in_s=wait_s,
                message=message,
            )
        )

    def _give_up(self, job: Job, code: str, message: str, out: list[ControlCommand]) -> None:
        del self._jobs[job.request.request_id]
        outcome = job.last or _outcome(job, OutcomeState.FAILED, code, message)
        out.append(
            DeadLetter(
                request_id=job.request.request_id,
                outcome=replace(outcome, error_code=code, message=message, lease=job.lease),
            )
        )

    def _cancel(self, request_id: RequestId, out: list[ControlCommand]) -> None:
        job = self._jobs.get(request_id)
        if job is None or job.is_cancelled:
            return
        job.is_cancelled = True
        if job.phase is Phase.LEASED and job.node_id is not None:
            out.append(CancelAt(node_id=job.node_id, request_id=request_id))
        else:
            self._end_cancelled(job, out)

    def _end_cancelled(self, job: Job, out: list[ControlCommand]) -> None:
        request_id = job.request.request_id
        del self._jobs[request_id]
        self._delayed.discard(request_id)
        if self._asked == request_id:
            self._asked = None
        out.append(Record(outcome=_outcome(job, OutcomeState.CANCELLED, "cancelled", "cancelled")))


def _first_reading(node: Node) -> NodeReading:
    """Return what is assumed of a node before its first heartbeat: it is idle."""
    return NodeReading(free=node.capacity)


def _outcome(job: Job, state: OutcomeState, code: str, message: str) -> Outcome:
    request = job.request
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

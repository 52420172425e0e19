"""Unfinished durable work and the order in which it wants a node. Pure, like the machine above it.

waiting   next in line: highest priority first, then oldest
parked    the nodes that could take it hold all they may; one of them must end something first
delayed   tried again at a time
leased    on a node
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heappush

from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.outcome import Outcome
from tierwise.domain.request import Request


class Phase(Enum):
    """Where a piece of durable work stands."""

    WAITING = 1
    ASKED = 2
    LEASED = 3
    DELAYED = 4
    PARKED = 5


@dataclass(slots=True)
class Job:
    """One unfinished piece of durable work.

    `lease` is the highest fencing token given out; `node_id` the node that got it, also after it
    was lost. `turn` counts changes of phase: what a queue holds of an older turn is void.
    """

    request: Request
    lease: int
    sequence: int
    ends_at_s: float | None = None  # when its submitter gives up
    phase: Phase = Phase.WAITING
    turn: int = 0
    failure_count: int = 0
    loss_count: int = 0
    unplaced_count: int = 0
    unplaced_since_s: float | None = None
    refused_by: set[NodeId] = field(default_factory=set)
    failed_on: set[NodeId] = field(default_factory=set)
    node_id: NodeId | None = None
    is_cancelled: bool = False
    last: Outcome | None = None


_Entry = tuple[int, int, RequestId, int]  # −priority, sequence, id, turn


class Backlog:
    """The queues behind the control plane. Every job is in exactly one phase."""

    def __init__(self) -> None:
        self.jobs: dict[RequestId, Job] = {}
        self._job_count = 0
        self._waiting: list[_Entry] = []
        self._parked: dict[NodeId, list[_Entry]] = {}
        self._delayed: list[tuple[float, int, RequestId, int]] = []
        self._ending: list[tuple[float, int, RequestId]] = []
        self._unplaced: dict[RequestId, None] = {}  # delayed because no node is feasible
        self._leased: dict[NodeId, set[RequestId]] = {}

    def add(
        self, request: Request, *, lease: int, failure_count: int, ends_at_s: float | None = None
    ) -> Job:
        """Take in a job; it waits."""
        self._job_count += 1
        job = Job(request, lease, self._job_count, ends_at_s, failure_count=failure_count)
        self.jobs[request.request_id] = job
        if ends_at_s is not None:
            heappush(self._ending, (ends_at_s, job.sequence, request.request_id))
        self.wait(job)
        return job

    def remove(self, job: Job) -> None:
        """Forget a job that has ended."""
        self._enter(job, Phase.ASKED)
        del self.jobs[job.request.request_id]

    def wait(self, job: Job) -> None:
        """Put a job in line."""
        self._enter(job, Phase.WAITING)
        heappush(self._waiting, _entry(job))

    def ask(self, job: Job) -> None:
        """Note that the policy is being asked."""
        self._enter(job, Phase.ASKED)

    def park(self, job: Job, nodes: Iterable[NodeId]) -> None:
        """Hold a job back until one of `nodes` has room."""
        self._enter(job, Phase.PARKED)
        for node_id in nodes:
            parked = self._parked.setdefault(node_id, [])
            heappush(parked, _entry(job))
            if len(parked) > 2 * len(self.jobs) + 64:  # void entries of other nodes' turns
                parked[:] = [entry for entry in parked if self._valid(entry, Phase.PARKED)]
                heapify(parked)

    def delay(self, job: Job, until_s: float, *, is_unplaced: bool) -> None:
        """Hold a job back until a time, or, if it `is_unplaced`, until a node turns up."""
        self._enter(job, Phase.DELAYED)
        request_id = job.request.request_id
        heappush(self._delayed, (until_s, job.sequence, request_id, job.turn))
        if is_unplaced:
            self._unplaced[request_id] = None

    def lease(self, job: Job, node_id: NodeId) -> None:
        """Note that a node has the job."""
        self._enter(job, Phase.LEASED)
        job.node_id = node_id
        self._leased.setdefault(node_id, set()).add(job.request.request_id)

    def next_waiting(self) -> Job | None:
        """Return the job whose turn it is, without taking it out of the line."""
        while self._waiting:
            job = self._valid(self._waiting[0], Phase.WAITING)
            if job is not None:
                return job
            heappop(self._waiting)
        return None

    def leased_count(self, node_id: NodeId) -> int:
        """Return how many jobs a node has."""
        return len(self._leased.get(node_id, ()))

    def leased_to(self, node_id: NodeId) -> list[Job]:
        """Return the jobs that a node has, by id."""
        return [self.jobs[request_id] for request_id in sorted(self._leased.get(node_id, ()))]

    def parked_nodes(self) -> list[NodeId]:
        """Return the nodes that jobs are parked for."""
        return sorted(self._parked)

    def unpark(self, node_id: NodeId, count_max: int | None = None) -> None:
        """Put the first `count_max` jobs parked for a node back in line; None means all."""
        parked = self._parked.get(node_id, [])
        count = 0
        while parked and (count_max is None or count < count_max):
            job = self._valid(heappop(parked), Phase.PARKED)
            if job is not None:
                self.wait(job)
                count += 1
        if not parked:
            self._parked.pop(node_id, None)

    def wake_due(self, now_s: float) -> None:
        """Put delayed jobs whose time has come back in line."""
        while self._delayed and self._delayed[0][0] <= now_s:
            _, sequence, request_id, turn = heappop(self._delayed)
            job = self._valid((0, sequence, request_id, turn), Phase.DELAYED)
            if job is not None:
                self.wait(job)

    def wake_unplaced(self) -> None:
        """Put jobs that no node could take back in line: there is another node."""
        for request_id in list(self._unplaced):
            self.wait(self.jobs[request_id])

    def overdue(self, now_s: float) -> list[Job]:
        """Return the jobs whose submitter has given up since the last time this was asked."""
        found = []
        while self._ending and self._ending[0][0] <= now_s:
            _, sequence, request_id = heappop(self._ending)
            job = self.jobs.get(request_id)
            if job is not None and job.sequence == sequence:
                found.append(job)
        return found

    def _valid(self, entry: _Entry, phase: Phase) -> Job | None:
        job = self.jobs.get(entry[2])
        if (
            job is None
            or job.phase is not phase
            or job.turn != entry[3]
            or job.sequence != entry[1]
        ):
            return None
        return job

    def _enter(self, job: Job, phase: Phase) -> None:
        if job.phase is Phase.LEASED and job.node_id is not None:
            held = self._leased.get(job.node_id, set())
            held.discard(job.request.request_id)
            if not held:
                self._leased.pop(job.node_id, None)
        self._unplaced.pop(job.request.request_id, None)
        job.phase = phase
        job.turn += 1


def _entry(job: Job) -> _Entry:
    return (-int(job.request.priority), job.sequence, job.request.request_id, job.turn)

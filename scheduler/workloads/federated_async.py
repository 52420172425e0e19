"""Asynchronous rounds: clients work without waiting for each other, updates gather in a buffer.

Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation" (AISTATS 2022): so many
clients are at work at any time; when the buffer has K updates they are added to the newest model,
each as its difference from what its client had begun with, and weighed by its staleness. A round
here is one buffer. A client that has answered in a round begins again in the next one, with the
newest model; one that is slow is not cut off, its update goes into a later buffer. If nobody is at
work any more, or the deadline is over, a buffer is taken as full as it is.
"""

from collections.abc import Sequence
from dataclasses import replace

from scheduler.workloads.federated_calls import Stage
from scheduler.workloads.federated_events import CallEnded, Command, Save, Submit
from scheduler.workloads.federated_planner import JobPlanner
from scheduler.workloads.federated_running import Running, answered
from scheduler.workloads.federated_sites import find_sites, sampled, states_of
from tierwise.domain.federated import (
    FederatedClient,
    JobState,
    RoundRecord,
    RoundState,
    UpdateRecord,
    UpdateState,
)
from tierwise.domain.ids import NodeId
from tierwise.domain.topology import NodeState
from tierwise.domain.view import ClusterView
from tierwise.functions.fl.aggregate import staleness_weight

CLOSED_AGAIN = 8  # rounds


class BufferPlanner(JobPlanner):
    """Plans one buffer after the other. What is under way goes from each into the next."""

    _carried: tuple[UpdateRecord, ...] = ()  # under way, or come while the last was aggregated
    _ready: frozenset[str] = frozenset()  # nodes
    _failed: frozenset[int] = frozenset()  # rounds
    _closed: int = -1  # rounds up to this one have been ended in the cache; −1: not known

    def _start(self, view: ClusterView, now_s: float, out: list[Command]) -> None:
        spec, number = self._spec, self.progress.round + 1
        self._see(view)
        carried = [self._aged(each) for each in self._carried]
        carried = [
            each for each in carried if each.state in (UpdateState.ASKED, UpdateState.COUNTED)
        ]
        if not carried and not self._idle(number, set()):
            self._wait("waiting for clients: none can be asked", now_s, out)
            return
        sites = find_sites(spec, self._merge, self.progress, spec.clients, view, self._attendance)
        if isinstance(sites, str):
            self._wait(f"waiting: {sites}", now_s, out)
            return
        record = RoundRecord(
            round=number,
            started_unix_s=now_s + self._unix_offset_s,
            base_round=self.progress.base_round,
            base_node=self.progress.base_node or spec.initial_node,
            root=sites.root,
            updates=tuple(carried),
            aggregators=sites.aggregators,
            wanted_count=self._buffer_count,
            quorum=1,
            planned_cost_s=sites.cost_s,
        )
        self._carried = ()
        self.progress = replace(self.progress, message="", round=number, root=sites.root)
        out.append(Save(progress=self.progress, record=record))
        self._close_rounds(carried, sites.root, out)
        self._open(record, now_s, now_s + spec.pace.deadline_s, out)

    def _ask(self, running: Running, now_s: float, out: list[Command]) -> None:
        self._ask_clients(running, running.unanswered(), now_s, out)
        self._go(running, now_s, out)

    def _client_ended(
        self, client: str, event: CallEnded, asked_at_s: float, now_s: float, out: list[Command]
    ) -> None:
        running = self._running
        if running is None or client not in running.updates:
            self._carried = tuple(
                self._judged(each, event, now_s - asked_at_s) if each.client == client else each
                for each in self._carried
            )
            return
        update = running.updates[client]
        if update.state is UpdateState.ASKED:
            running.updates[client] = self._judged(update, event, now_s - asked_at_s)
        if running.is_collecting and not running.unopened:
            self._go(running, now_s, out)

    def _time_is_over(self, running: Running, now_s: float, out: list[Command]) -> None:
        if running.counted():
            self._close(running, now_s, out)
        else:
            self._fail(running, "no update came before the deadline", now_s, out)

    def _plan_stages(self, running: Running) -> list[Stage]:
        exponent = self._spec.strategy.parameter("exponent")
        counted = running.counted()
        weights = [staleness_weight(each.staleness, exponent) for each in counted]
        return self._calls.buffer(running.record, weights)

    def _look(self, running: Running, view: ClusterView, now_s: float, out: list[Command]) -> None:
        self._see(view)
        super()._look(running, view, now_s, out)
        if self._running is running and running.is_collecting and not running.unopened:
            self._go(running, now_s, out)

    def _aggregate(self, running: Running, now_s: float, out: list[Command]) -> None:
        """Aggregate the buffer; what is under way belongs to the next one."""
        self._carried = tuple(running.unanswered())
        for update in self._carried:
            del running.updates[update.client]
        self._ask_clients(running, self._carried, now_s, out)
        super()._aggregate(running, now_s, out)

    def _given_up(
        self, running: Running, state: RoundState, now_s: float, out: list[Command]
    ) -> RoundRecord:
        self._carried = ()
        self._failed |= {running.record.round}
        return super()._given_up(running, state, now_s, out)

    def _finish(self, state: JobState, message: str, out: list[Command]) -> None:
        super()._finish(state, message, out)
        self._carried = ()
        if self.progress.root is not None:
            self._close_rounds((), self.progress.root, out)

    # -- inside ---------------------------------------------------------------------------------

    @property
    def _buffer_count(self) -> int:
        return min(int(self._spec.strategy.parameter("buffer")), len(self._spec.clients))

    def _go(self, running: Running, now_s: float, out: list[Command]) -> None:
        """Take the buffer if it is full, or nothing else will come; else keep clients at work."""
        if len(running.counted()) >= self._buffer_count:
            self._close(running, now_s, out)
            return
        at_work = len(running.unanswered())
        limit = int(self._spec.strategy.parameter("concurrency")) or len(self._spec.clients)
        idle = self._idle(running.record.round, set(running.updates))
        chosen = sampled(idle, max(0, limit - at_work), self._spec.pace.seed, running.record.round)
        if not chosen and not at_work:
            self._time_is_over(running, now_s, out)
            return
        if not chosen:
            return
        for each in chosen:
            running.updates[each.client] = UpdateRecord(
                client=each.client,
                node_id=each.node_id,
                asked_round=running.record.round,
                base_round=running.record.base_round,
            )
        out.append(Save(progress=self.progress, record=running.snapshot()))
        asked = [running.updates[each.client] for each in chosen]
        self._ask_clients(running, asked, now_s, out)

    def _close_rounds(
        self, carried: Sequence[UpdateRecord], root: NodeId, out: list[Command]
    ) -> None:
        """End the rounds in which nobody is at work any more; the cache may let them go then."""
        newest = self.progress.base_round
        if self._closed < 0:  # after a restart; what was closed before is closed again
            self._closed = max(0, newest - CLOSED_AGAIN)
        at_work = (each.asked_round for each in carried if each.state is UpdateState.ASKED)
        until = min([newest, *(number - 1 for number in at_work)])
        out.extend(
            Submit(call=self._calls.close(number, root, number, root))
            for number in range(self._closed + 1, until + 1)
            if number not in self._failed
        )
        self._closed = max(self._closed, until)

    def _judged(self, update: UpdateRecord, event: CallEnded, elapsed_s: float) -> UpdateRecord:
        found = self._aged(answered(update, event, elapsed_s))
        if found.state is UpdateState.COUNTED:
            self._attendance.answered(found.client, elapsed_s)
        else:
            self._attendance.failed(found.client, self.progress.round)
        return found

    def _aged(self, update: UpdateRecord) -> UpdateRecord:
        """Return an update with its staleness now; one that is too stale does not count."""
        staleness = self.progress.base_round - update.base_round
        update = replace(update, staleness=staleness)
        if update.state is UpdateState.COUNTED and staleness > self._spec.strategy.parameter(
            "staleness_max"
        ):
            words = f"{staleness} aggregates have been made since it began"
            return replace(update, state=UpdateState.LATE, message=words)
        return update

    def _see(self, view: ClusterView) -> None:
        states = states_of(view)
        self._ready = frozenset(n for n, state in states.items() if state is NodeState.READY)

    def _idle(self, number: int, taken: set[str]) -> list[FederatedClient]:
        """Return who can be asked in a round: each client once."""
        there = [each for each in self._spec.clients if each.node_id in self._ready]
        able = self._attendance.rested(there, number) or there
        taken = taken | {client for client, _ in self._busy.values()}
        return [each for each in able if each.client not in taken]

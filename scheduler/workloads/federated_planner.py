"""What all federated jobs have in common: how rounds are opened, aggregated, judged, how they end.

    start ─► opening ─► collecting ─► aggregating ─► judging ─► done ─► start …
               │            │ quorum       │
               └────────────┴── missed ────┴─► failed ─► start, under the next number

Pure, and small enough to begin anywhere: a scheduler that was started again gives the planner the
round that was written last, which asks for the same calls again, under the same ids. So every
answer that had come before comes again, and nothing runs twice that has ended once.

A round that fails is not repeated under its number, for what its clients have sent would then be
taken for answers to the new one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import assert_never

from scheduler.workloads.federated_calls import Calls, Stage
from scheduler.workloads.federated_events import (
    CallEnded,
    Cancel,
    Command,
    Event,
    OpenRound,
    ResumeAsked,
    RoundOpened,
    Save,
    StopAsked,
    Submit,
    Ticked,
)
from scheduler.workloads.federated_running import Running, on_way
from scheduler.workloads.federated_sites import Attendance, states_of
from tierwise.domain.federated import (
    JobProgress,
    JobSpec,
    JobState,
    RoundRecord,
    RoundState,
    UpdateRecord,
    UpdateState,
)
from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import RequestId
from tierwise.domain.topology import NodeState
from tierwise.domain.view import ClusterView

WAIT_S = 1.0  # between looks at the nodes
OPEN_AGAIN_S = 2.0  # a node that does not answer is told once more
REPLAY_S = 5.0  # after a restart, answers of before come in within this time
BACKOFF_FIRST_S = 0.5  # doubles with every round that fails
BACKOFF_MAX_S = 30.0


class JobPlanner(ABC):
    """Plans one job. `step` is the only way to change it."""

    def __init__(
        self,
        spec: JobSpec,
        merge: FunctionSpec,
        progress: JobProgress,
        *,
        uid: str,
        unix_offset_s: float,
        current: RoundRecord | None = None,
    ) -> None:
        """Begin, or go on.

        Args:
            spec: The job.
            merge: Its aggregate function.
            progress: How far it was.
            uid: Tells the job from others that had its name before.
            unix_offset_s: What the clock of people is ahead of `now_s`.
            current: The round that was under way, as it was saved.
        """
        self._spec = spec
        self._merge = merge
        self._calls = Calls(spec, uid)
        self._unix_offset_s = unix_offset_s
        self._attendance = Attendance()
        self._running: Running | None = None
        self._resumed = current
        # Calls of clients that have not ended: of whom, and since when.
        self._busy: dict[RequestId, tuple[str, float]] = {}
        self.progress = progress
        self.due_s: float | None = 0.0  # when a tick is wanted; None: not before something happens

    @property
    def record(self) -> RoundRecord | None:
        """Return the round under way as it stands."""
        return None if self._running is None else self._running.snapshot()

    @property
    def is_searching(self) -> bool:
        """Return whether the next tick begins a round for which aggregators may be looked for."""
        return self._running is None and self._spec.topology.is_hierarchical

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Apply one event and return what the shell must do, in order.

        Args:
            event: What happened.
            now_s: Monotonic time; never smaller than in the step before.
        """
        out: list[Command] = []
        match event:
            case Ticked():
                self._tick(event.view, now_s, out)
            case RoundOpened():
                self._opened(event, now_s, out)
            case CallEnded():
                self._ended(event, now_s, out)
            case StopAsked():
                self._stop(now_s, out)
            case ResumeAsked():
                self._resume(event, now_s, out)
            case _:
                assert_never(event)
        return out

    # -- what differs ---------------------------------------------------------------------------

    @abstractmethod
    def _start(self, view: ClusterView, now_s: float, out: list[Command]) -> None:
        """Begin the next round, or `_wait`."""

    @abstractmethod
    def _ask(self, running: Running, now_s: float, out: list[Command]) -> None:
        """Submit the calls of clients: the round is open everywhere."""

    @abstractmethod
    def _client_ended(
        self, client: str, event: CallEnded, asked_at_s: float, now_s: float, out: list[Command]
    ) -> None:
        """Take the answer of a client, also of one that is late."""

    @abstractmethod
    def _time_is_over(self, running: Running, now_s: float, out: list[Command]) -> None:
        """Stop collecting."""

    @abstractmethod
    def _plan_stages(self, running: Running) -> list[Stage]:
        """Return how what has come is aggregated."""

    # -- a round begins -------------------------------------------------------------------------

    def _tick(self, view: ClusterView, now_s: float, out: list[Command]) -> None:
        self.due_s = None
        if self.progress.state is not JobState.RUNNING:
            return
        running = self._running
        if self._resumed is not None:
            record, self._resumed = self._resumed, None
            self._go_on(record, now_s, out)
        elif running is not None:
            self._look(running, view, now_s, out)
        elif self.progress.done_count >= self.progress.round_count:
            self._finish(JobState.SUCCEEDED, "", out)
        else:
            self._start(view, now_s, out)

    def _wait(self, message: str, now_s: float, out: list[Command]) -> None:
        """Look again in a moment; say why once."""
        self.due_s = now_s + WAIT_S
        if message != self.progress.message:
            self.progress = replace(self.progress, message=message)
            out.append(Save(progress=self.progress))

    def _open(
        self, record: RoundRecord, now_s: float, ends_at_s: float, out: list[Command]
    ) -> Running:
        self._running = running = Running(
            record=record,
            updates={each.client: each for each in record.updates},
            opened_at_s=now_s,
            ends_at_s=ends_at_s,
            unopened={site.node_id for site in record.aggregators},
        )
        self._tell_sites(running, now_s, out)
        return running

    def _tell_sites(self, running: Running, now_s: float, out: list[Command]) -> None:
        """Tell aggregators of the round, those that have not answered again after a while."""
        if running.told_at_s is None or now_s >= running.told_at_s + OPEN_AGAIN_S:
            running.told_at_s = now_s
            for site in running.record.aggregators:
                if site.node_id in running.unopened:
                    manifest = self._calls.manifest(running.record, site)
                    source = running.record.base_node
                    told = OpenRound(node_id=site.node_id, manifest=manifest, base_node=source)
                    out.append(told)
        self._wake(running, now_s)

    def _opened(self, event: RoundOpened, now_s: float, out: list[Command]) -> None:
        running = self._running
        if (
            running is None
            or event.round != running.record.round
            or event.node_id not in running.unopened
        ):
            return
        if event.error_code:
            message = f"{event.node_id} did not open the round: {event.message}"
            self._fail(running, message, now_s, out)
            return
        running.unopened.discard(event.node_id)
        if running.unopened:
            return
        running.opened_at_s = now_s
        if running.is_collecting:
            self._ask(running, now_s, out)
        else:  # taken up again after it was closed
            self._aggregate(running, now_s, out)

    def _go_on(self, record: RoundRecord, now_s: float, out: list[Command]) -> None:
        """Take up a round where it was left: everything is told and asked once more."""
        elapsed_s = now_s + self._unix_offset_s - record.started_unix_s
        left_s = max(REPLAY_S, self._spec.pace.deadline_s - elapsed_s)
        self._open(record, now_s, now_s + left_s, out)

    def _look(self, running: Running, view: ClusterView, now_s: float, out: list[Command]) -> None:
        states = states_of(view)
        is_late = now_s >= running.ends_at_s
        for site in running.record.aggregators:
            is_lost = states.get(site.node_id, NodeState.LOST) is NodeState.LOST
            # Others may aggregate in the next round; but nobody else has the root's model.
            if is_lost and (is_late or site.node_id != running.record.root):
                self._fail(running, f"the aggregator {site.node_id} was lost", now_s, out)
                return
        if running.unopened and is_late:
            names = ", ".join(sorted(running.unopened))
            self._fail(running, f"{names} did not open the round in time", now_s, out)
        elif running.unopened:
            self._tell_sites(running, now_s, out)
        elif running.is_collecting and is_late:
            self._time_is_over(running, now_s, out)
        else:
            self._wake(running, now_s)

    # -- it collects and aggregates -------------------------------------------------------------

    def _ended(self, event: CallEnded, now_s: float, out: list[Command]) -> None:
        asked = self._busy.pop(event.call_id, None)
        if asked is not None:
            self._client_ended(asked[0], event, asked[1], now_s, out)
        elif self._running is not None and event.call_id in self._running.pending:
            self._step_ended(self._running, event, now_s, out)

    def _close(self, running: Running, now_s: float, out: list[Command]) -> None:
        """Aggregate what there is; which that is, is written first."""
        collect_s = now_s - running.opened_at_s
        running.record = replace(running.record, state=RoundState.AGGREGATING, collect_s=collect_s)
        running.record = running.snapshot()
        out.append(Save(progress=self.progress, record=running.record))
        self._aggregate(running, now_s, out)

    def _aggregate(self, running: Running, now_s: float, out: list[Command]) -> None:
        running.closed_at_s = now_s
        running.stages = self._plan_stages(running)
        self._next_stage(running, now_s, out)

    def _next_stage(self, running: Running, now_s: float, out: list[Command]) -> None:
        calls: Stage = []
        if running.stages:
            calls = running.stages.pop(0)
        elif running.evaluation is None and (call := self._calls.evaluation(running.record)):
            running.evaluation = call.call_id
            calls = [call]
        if not calls:
            self._done(running, now_s, out)
            return
        running.pending = {call.call_id for call in calls}
        out.extend(Submit(call=call) for call in calls)
        self._wake(running, now_s)

    def _step_ended(
        self, running: Running, event: CallEnded, now_s: float, out: list[Command]
    ) -> None:
        running.pending.discard(event.call_id)
        if event.call_id == running.evaluation:
            running.judge(event)
        elif event.error_code:
            self._fail(running, f"the aggregation failed: {event.message}", now_s, out)
            return
        else:
            running.take_receipt(event)
        if not running.pending:
            self._next_stage(running, now_s, out)

    # -- it ends --------------------------------------------------------------------------------

    def _done(self, running: Running, now_s: float, out: list[Command]) -> None:
        record = replace(
            running.snapshot(),
            state=RoundState.DONE,
            ended_unix_s=now_s + self._unix_offset_s,
            aggregate_s=now_s - running.closed_at_s,
        )
        is_adam = self._spec.strategy.name == "fedadam"
        self.progress = replace(
            self.progress,
            message="",
            done_count=self.progress.done_count + 1,
            base_round=record.round,
            base_node=record.root,
            failure_count=0,
            moment_round=record.round if is_adam else 0,
        )
        self._running = None
        self.due_s = now_s
        out.append(Save(progress=self.progress, record=record))
        if self.progress.done_count >= self.progress.round_count:
            out.extend(Submit(call=call) for call in self._calls.endings(record, on_way(record)))

    def _fail(self, running: Running, message: str, now_s: float, out: list[Command]) -> None:
        """Give a round up; the next number takes its place, if there have not been too many."""
        record = self._given_up(running, RoundState.FAILED, now_s, out)
        record = replace(record, message=message)
        count = self.progress.failure_count + 1
        skipped = 1 if self._spec.pace.is_skipping else 0
        self.progress = replace(
            self.progress,
            message=f"round {record.round} failed: {message}",
            failure_count=count,
            done_count=self.progress.done_count + skipped,
        )
        out.append(Save(progress=self.progress, record=record))
        if count > self._spec.pace.failures_max:
            words = f"{count} rounds in a row have failed, the last: {message}"
            self._finish(JobState.FAILED, words, out)
        else:
            self.due_s = now_s + min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** (count - 1))

    def _given_up(
        self, running: Running, state: RoundState, now_s: float, out: list[Command]
    ) -> RoundRecord:
        """Cancel what a round still waits for; return what remains of it."""
        self._running = None
        for update in running.unanswered():
            running.updates[update.client] = replace(update, state=UpdateState.LATE)
        out.extend(Cancel(call_id=call_id) for call_id in sorted({*self._busy, *running.pending}))
        record = running.record
        opened = [s.node_id for s in record.aggregators if s.node_id not in running.unopened]
        out.extend(Submit(call=call) for call in self._calls.endings(record, opened))
        ended_unix_s = now_s + self._unix_offset_s
        return replace(running.snapshot(), state=state, ended_unix_s=ended_unix_s)

    def _finish(self, state: JobState, message: str, out: list[Command]) -> None:
        self.due_s = None
        self.progress = replace(self.progress, state=state, message=message)
        out.append(Save(progress=self.progress))
        out.extend(Cancel(call_id=call_id) for call_id in sorted(self._busy))

    def _stop(self, now_s: float, out: list[Command]) -> None:
        if self.progress.state is not JobState.RUNNING:
            return
        record, self._resumed = self._resumed, None
        if record is not None:
            record = replace(record, state=RoundState.STOPPED)
        if self._running is not None:
            record = self._given_up(self._running, RoundState.STOPPED, now_s, out)
        self.due_s = None
        self.progress = replace(self.progress, state=JobState.STOPPED, message="stopped")
        out.append(Save(progress=self.progress, record=record))

    def _resume(self, event: ResumeAsked, now_s: float, out: list[Command]) -> None:
        count = event.round_count or self.progress.round_count
        is_running = self.progress.state is JobState.RUNNING
        if is_running and count == self.progress.round_count:
            return
        self.progress = replace(
            self.progress,
            state=JobState.RUNNING,
            message=self.progress.message if is_running else "",
            round_count=count,
            failure_count=self.progress.failure_count if is_running else 0,
        )
        if self._running is None:
            self.due_s = now_s
        out.append(Save(progress=self.progress))

    # -- inside ---------------------------------------------------------------------------------

    def _ask_clients(
        self, running: Running, updates: Iterable[UpdateRecord], now_s: float, out: list[Command]
    ) -> None:
        """Submit the calls of clients that are not known to be under way."""
        for update in updates:
            call = self._calls.client(running.record, update)
            if call.call_id not in self._busy:
                self._busy[call.call_id] = update.client, now_s
                out.append(Submit(call=call))

    def _wake(self, running: Running, now_s: float) -> None:
        """Look at the nodes once a second, and at the deadline."""
        self.due_s = now_s + WAIT_S
        if running.is_collecting:
            self.due_s = min(self.due_s, max(now_s, running.ends_at_s))

"""Synchronous rounds: ask some clients, wait for enough of them, aggregate.

More clients may be asked than a round wants, and it waits no longer than its deadline: then it goes
on with what came, if that is a quorum. An update counts only if the cache took it: one that broke
the rules is quarantined, one that comes after its round has closed is left where it is. Clients
whose calls are still under way, or whose nodes are away, are not asked; they are again when they
are back. Over-commitment and deadlines are those of Bonawitz et al. ("Towards Federated Learning at
Scale: System Design", MLSys 2019, section 2.2).
"""

from dataclasses import replace
from math import ceil

from scheduler.workloads.federated_async import BufferPlanner
from scheduler.workloads.federated_calls import Stage, robust_quorum
from scheduler.workloads.federated_events import CallEnded, Cancel, Command, Save, Submit
from scheduler.workloads.federated_planner import JobPlanner
from scheduler.workloads.federated_running import Running, answered, on_way
from scheduler.workloads.federated_sites import find_sites, sampled, states_of
from tierwise.domain.federated import (
    JobProgress,
    JobSpec,
    RoundRecord,
    RoundState,
    UpdateRecord,
    UpdateState,
)
from tierwise.domain.function import FunctionSpec
from tierwise.domain.topology import NodeState
from tierwise.domain.view import ClusterView

REVISE_S = 5.0  # between looks for better aggregators: the search takes up to a second


class RoundPlanner(JobPlanner):
    """Plans one round after the other."""

    _last: RoundRecord | None = None  # the newest that is done
    _planned_cost_s = 0.0
    _revise_at_s = float("-inf")

    def _start(self, view: ClusterView, now_s: float, out: list[Command]) -> None:
        spec, number = self._spec, self.progress.round + 1
        states = states_of(view)
        busy = {client for client, _ in self._busy.values()}
        there = [
            each
            for each in spec.clients
            if states.get(each.node_id) is NodeState.READY and each.client not in busy
        ]
        quorum = max(spec.quorum, robust_quorum(spec))
        rested = self._attendance.rested(there, number)
        able = rested if len(rested) >= quorum else there
        if len(able) < quorum:
            message = (
                f"waiting for clients: {len(able)} of {len(spec.clients)} can be asked, a round "
                f"needs {quorum}"
            )
            self._wait(message, now_s, out)
            return
        count = ceil(spec.wanted_count * (1.0 + spec.pace.over_commit))
        asked = sampled(able, count, spec.pace.seed, number)
        may_move = now_s >= self._revise_at_s
        sites = find_sites(
            spec, self._merge, self.progress, asked, view, self._attendance, may_move=may_move
        )
        if isinstance(sites, str):
            self._wait(f"waiting: {sites}", now_s, out)
            return
        if sites.cost_s:
            self._planned_cost_s, self._revise_at_s = sites.cost_s, now_s + REVISE_S
        base_round = self.progress.base_round
        record = RoundRecord(
            round=number,
            started_unix_s=now_s + self._unix_offset_s,
            base_round=base_round,
            base_node=self.progress.base_node or spec.initial_node,
            root=sites.root,
            updates=tuple(
                UpdateRecord(
                    client=each.client,
                    node_id=each.node_id,
                    asked_round=number,
                    base_round=base_round,
                )
                for each in asked
            ),
            aggregators=sites.aggregators,
            wanted_count=min(spec.wanted_count, len(asked)),
            quorum=quorum,
            planned_cost_s=self._planned_cost_s,
            is_moved=sites.is_moved,
        )
        self.progress = replace(
            self.progress,
            message="",
            round=number,
            root=sites.root,
            association=sites.association,
        )
        out.append(Save(progress=self.progress, record=record))
        last = self._last
        if last is not None and last.round == base_round:  # aggregators that have moved away
            here = {site.node_id for site in record.aggregators}
            away = [node_id for node_id in on_way(last) if node_id not in here]
            out.extend(Submit(call=call) for call in self._calls.endings(last, away))
        self._open(record, now_s, now_s + spec.pace.deadline_s, out)

    def _ask(self, running: Running, now_s: float, out: list[Command]) -> None:
        self._ask_clients(running, running.unanswered(), now_s, out)

    def _client_ended(
        self, client: str, event: CallEnded, asked_at_s: float, now_s: float, out: list[Command]
    ) -> None:
        running = self._running
        if running is None or not running.is_collecting:
            return
        update = running.updates.get(client)
        expected = self._calls.call_id(running.record.round, "client", client)
        if update is None or event.call_id != expected:
            return  # of an earlier round: now it may be asked again
        answer = answered(update, event, now_s - asked_at_s)
        running.updates[client] = answer
        if answer.state is UpdateState.COUNTED:
            self._attendance.answered(client, answer.elapsed_s)
        else:
            self._attendance.failed(client, running.record.round)
        is_enough = len(running.counted()) >= running.record.wanted_count
        if is_enough or not running.unanswered():
            self._time_is_over(running, now_s, out)

    def _time_is_over(self, running: Running, now_s: float, out: list[Command]) -> None:
        """Go on with what is there, if it is enough; the rest is late."""
        count, quorum = len(running.counted()), running.record.quorum
        if count < quorum:
            words = [f"{u.client}: {u.message}" for u in running.updates.values() if u.message]
            why = f" ({'; '.join(words[:3])})" if words else ""
            self._fail(running, f"{count} of {quorum} updates counted{why}", now_s, out)
            return
        for update in running.unanswered():
            running.updates[update.client] = replace(update, state=UpdateState.LATE)
            call_id = self._calls.call_id(running.record.round, "client", update.client)
            out.append(Cancel(call_id=call_id))
        self._close(running, now_s, out)

    def _done(self, running: Running, now_s: float, out: list[Command]) -> None:
        super()._done(running, now_s, out)
        self._last = replace(running.record, state=RoundState.DONE)

    def _plan_stages(self, running: Running) -> list[Stage]:
        return self._calls.aggregation(running.record, self.progress)


def planner_of(
    spec: JobSpec,
    merge: FunctionSpec,
    progress: JobProgress,
    *,
    uid: str,
    unix_offset_s: float,
    current: RoundRecord | None = None,
) -> JobPlanner:
    """Return the planner of a job; arguments as in `JobPlanner`."""
    kind = BufferPlanner if spec.strategy.name == "fedbuff" else RoundPlanner
    return kind(spec, merge, progress, uid=uid, unix_offset_s=unix_offset_s, current=current)

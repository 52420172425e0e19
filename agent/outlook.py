"""What a node expects of its own next moments: when CPUs and instances come free. Pure."""

from collections.abc import Mapping

from agent.beliefs import Beliefs
from agent.pool import InstancePool
from agent.ticket import Ticket
from agent.waiting import WaitingLine
from tierwise.domain.ids import FunctionId, RequestId
from tierwise.domain.topology import Node

PATIENCE = 2.0  # cold starts that a request waits for an instance that runs: a start takes a CPU


class Outlook:
    """Reckons with what runs, starts and waits; changes none of it."""

    def __init__(
        self,
        node: Node,
        pool: InstancePool,
        line: WaitingLine,
        running: Mapping[RequestId, Ticket],
        beliefs: Beliefs,
    ) -> None:
        self._node = node
        self._pool = pool
        self._line = line
        self._running = running
        self._beliefs = beliefs

    def backlog_s(self, now_s: float) -> tuple[float, tuple[float, ...]]:
        """Estimate `NodeReading.backlog_s` and `NodeReading.overtaken_s`."""
        cpus = self._node.capacity.cpus
        if not self._line and self._pool.free.cpus >= min(1.0, cpus):
            return 0.0, ()
        work_s = 0.0
        for ticket in self._running.values():
            work_s += max(0.0, ticket.work_s - (now_s - ticket.run_at_s))
        for instance in self._pool.starting():
            start_s = self._beliefs.cold_start_s(instance.spec.function_id) / self._node.speed
            work_s += max(0.0, start_s - (now_s - instance.started_at_s))
        low_s, normal_s, high_s, critical_s = self._line.work_s
        servers = max(1.0, cpus)
        overtaken_s = (0.0, low_s, low_s + normal_s, low_s + normal_s + high_s)
        backlog_s = (work_s + overtaken_s[3] + critical_s) / servers
        return backlog_s, tuple([each_s / servers for each_s in overtaken_s])

    def coming_count(self, function: FunctionId, now_s: float) -> int:
        """Return how many instances should soon be free: they start, or their run is nearly over.

        A run that takes twice as long as expected says nothing any more of its end.
        """
        count = self._pool.starting_count(function)
        if self._pool.engaged.get(function, 0) > count:
            soon_s = PATIENCE * self._beliefs.cold_start_s(function) / self._node.speed
            for ticket in self._running.values():
                if ticket.request.spec.function_id == function:
                    left_s = ticket.work_s - (now_s - ticket.run_at_s)
                    count += -ticket.work_s <= left_s < soon_s
        return count

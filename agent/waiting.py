"""The requests that wait on a node, most urgent first. Pure."""

from heapq import heapify, heappop, heappush

from agent.ticket import Phase, Ticket
from tierwise.domain.ids import FunctionId

SCAN_MAX = 32  # tickets looked at behind one that must wait for its own function
SLACK = 256  # tickets that have left and may stay in the heap
LATE_SHARE = 0.1  # of its deadline: with less to spare, the way back makes a call late

_Entry = tuple[int, bool, float, int, Ticket]  # −priority, late, deadline, arrival


class WaitingLine:
    """A heap of tickets by priority, then deadline, then arrival; the late ones come last.

    Of equal priority, a ticket that cannot meet its deadline any more waits behind those that can:
    else, under overload, each would be served just after its own.

    A ticket that leaves stays in the heap until it surfaces or too many have left: leaving costs
    O(1) on average. Between `next` and `restore` the tickets that were shown are set aside.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._shown: list[_Entry] = []
        self._counts: dict[FunctionId, int] = {}
        self._count = 0
        self.work_s = [0.0, 0.0, 0.0, 0.0]  # expected CPU time of all that wait, by priority

    def __len__(self) -> int:
        return self._count

    def count_of(self, function: FunctionId) -> int:
        """Return how many requests wait for `function`."""
        return self._counts.get(function, 0)

    def join(self, ticket: Ticket) -> None:
        """Let a ticket wait."""
        request = ticket.request
        ticket.phase = Phase.QUEUED
        ends_s = ticket.arrived_at_s + request.deadline_s
        entry = (-int(request.priority), False, ends_s, ticket.sequence, ticket)
        heappush(self._heap, entry)
        function = request.spec.function_id
        self._counts[function] = self._counts.get(function, 0) + 1
        self._count += 1
        self.work_s[int(request.priority) - 1] += ticket.work_s + ticket.start_s

    def leave(self, ticket: Ticket) -> None:
        """Take a waiting ticket out; what becomes of it is the caller's to say."""
        function = ticket.request.spec.function_id
        ticket.phase = Phase.ENDED
        self._counts[function] -= 1
        if self._counts[function] == 0:
            del self._counts[function]
        self._count -= 1
        level = int(ticket.request.priority) - 1
        left_s = self.work_s[level] - ticket.work_s - ticket.start_s
        self.work_s[level] = max(0.0, left_s) if self._count else 0.0
        if len(self._heap) > 2 * self._count + SLACK:
            self._heap = [entry for entry in self._heap if entry[-1].phase is Phase.QUEUED]
            heapify(self._heap)

    def next(self, now_s: float) -> Ticket | None:
        """Return the most urgent ticket not shown since `restore`; None after SCAN_MAX."""
        heap = self._heap
        while heap and len(self._shown) < SCAN_MAX:
            entry = heappop(heap)
            priority, is_late, ends_s, sequence, ticket = entry
            if ticket.phase is not Phase.QUEUED:
                continue
            slack_s = ends_s - ticket.work_s - now_s
            if not is_late and slack_s < LATE_SHARE * ticket.request.deadline_s:
                heappush(heap, (priority, True, ends_s, sequence, ticket))
                continue
            self._shown.append(entry)
            return ticket
        return None

    def restore(self) -> None:
        """Put back what was shown and still waits."""
        for entry in self._shown:
            if entry[-1].phase is Phase.QUEUED:
                heappush(self._heap, entry)
        self._shown.clear()

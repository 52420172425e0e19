"""Which nodes hold which rounds, as the scheduler's views say. Pure.

What is read here is about a heartbeat old. Whoever follows it must be ready to hear that the object
is not there.
"""

from collections.abc import Iterator

from tierwise.domain.cache import HeldRounds
from tierwise.domain.event import ViewReceived
from tierwise.domain.ids import NodeId
from tierwise.domain.topology import NodeState


class HolderIndex:
    """What the other nodes hold."""

    def __init__(self, here: NodeId) -> None:
        self._here = here
        self._held: dict[NodeId, dict[tuple[str, str], HeldRounds]] = {}  # by namespace and job
        self._states: dict[NodeId, NodeState] = {}

    def received(self, view: ViewReceived) -> None:
        """Take over what the scheduler says of the peers."""
        for peer in view.peers:
            node_id = peer.node.node_id
            self._states[node_id] = peer.state
            if peer.held is not None and node_id != self._here:
                self._held[node_id] = {(held.namespace, held.job): held for held in peer.held}
        if view.is_full:
            named = {peer.node.node_id for peer in view.peers}
            for node_id in [known for known in self._states if known not in named]:
                del self._states[node_id]
                self._held.pop(node_id, None)

    def holders(self, namespace: str, job: str, number: int | None = None) -> list[NodeId]:
        """Return the nodes that hold something of a round, or of the job, the best first.

        Those that answer come before those that are lost, and the node that took the objects
        before those that have copies.
        """
        found = [
            (self._states.get(node_id) is NodeState.LOST, held.is_copy, node_id)
            for node_id, held in self._of_job(namespace, job)
            if number is None or number in held.rounds
        ]
        return [node_id for _, _, node_id in sorted(found)]

    def newest(self, namespace: str, job: str) -> tuple[int, int, list[NodeId]] | None:
        """Return the newest round of a job elsewhere.

        Returns:
            The newest that has ended or has every update, −1 for none; the newest of all; and who
            holds the first, or else the second, the best first.
        """
        rows = [held for _, held in self._of_job(namespace, job) if held.rounds]
        if not rows:
            return None
        done = max(held.newest_done for held in rows)
        newest = max(held.rounds[-1] for held in rows)
        holders = self.holders(namespace, job, done if done >= 0 else newest)
        return (done, newest, holders) if holders else None

    def owner(self, namespace: str, job: str) -> str:
        """Return whose job it is; empty if nobody is known to hold any of it."""
        return next((held.owner for _, held in self._of_job(namespace, job) if held.owner), "")

    def is_lost(self, node_id: NodeId) -> bool:
        """Return whether the scheduler has given a node up."""
        return self._states.get(node_id) is NodeState.LOST

    def others(self) -> list[NodeId]:
        """Return the other nodes that should answer."""
        lost = NodeState.LOST
        return sorted(n for n, state in self._states.items() if n != self._here and state != lost)

    def _of_job(self, namespace: str, job: str) -> Iterator[tuple[NodeId, HeldRounds]]:
        for node_id, rows in self._held.items():
            if (held := rows.get((namespace, job))) is not None:
                yield node_id, held

"""What the caches of the nodes hold, as their heartbeats say. Pure."""

from tierwise.domain.cache import HeldRounds
from tierwise.domain.ids import NodeId


class Holdings:
    """The newest word of each node. What a node that is away held stays known: it may come back."""

    def __init__(self) -> None:
        self._by_node: dict[NodeId, tuple[HeldRounds, ...]] = {}
        self._news: set[NodeId] = set()

    def told(self, node_id: NodeId, held: tuple[HeldRounds, ...]) -> None:
        """Take over all that a node holds."""
        if self._by_node.get(node_id) != held:
            self._by_node[node_id] = held
            self._news.add(node_id)

    def remove(self, node_id: NodeId) -> None:
        """Forget a node."""
        self._by_node.pop(node_id, None)
        self._news.discard(node_id)

    def of(self, node_id: NodeId) -> tuple[HeldRounds, ...]:
        """Return what a node holds; nothing if it has not said."""
        return self._by_node.get(node_id, ())

    def take_news(self) -> set[NodeId]:
        """Return the nodes whose holdings have changed since the last time."""
        news, self._news = self._news, set()
        return news

    def holders(self, namespace: str, job: str, number: int) -> list[NodeId]:
        """Return the nodes that hold something of a round; those that took it before copies."""
        found = [
            (held.is_copy, node_id)
            for node_id, rows in self._by_node.items()
            for held in rows
            if held.namespace == namespace and held.job == job and number in held.rounds
        ]
        return [node_id for _, node_id in sorted(found)]

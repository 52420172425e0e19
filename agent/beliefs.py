"""What a node believes of the cluster: readings of its peers, and what it has sent them. Pure."""

from collections.abc import Mapping

from agent.ticket import Ticket
from tierwise.domain.event import ViewReceived
from tierwise.domain.function import FunctionProfile
from tierwise.domain.ids import FunctionId, NodeId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome
from tierwise.domain.prices import PriceTable
from tierwise.domain.request import Request
from tierwise.domain.topology import Link, Node, NodeState
from tierwise.domain.view import ClusterView, NodeReading, NodeView, ViewTable

UNREACHABLE_FOR_S = 2.0  # how long a peer that failed is left alone
UNKNOWN_RUN_S = 0.05  # expected run time of a function of which nothing is known


class Beliefs:
    """The view table of one node, kept current between heartbeats by its own sendings."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._unreachable: dict[NodeId, float] = {}
        # Per peer, what was sent: when it should be there, and its run time ÷ CPUs.
        self._flying: dict[NodeId, dict[RequestId, tuple[float, float]]] = {}
        self._table = ViewTable(node)
        self.put_own(NodeReading(free=node.capacity), NodeState.READY, 0.0)

    @property
    def prices(self) -> PriceTable:
        """Return what calls cost."""
        return self._table.prices

    @prices.setter
    def prices(self, prices: PriceTable) -> None:
        self._table.prices = prices

    def put_own(self, reading: NodeReading, state: NodeState, now_s: float) -> None:
        """Set the node's own row, which is exact."""
        self._table.put(
            NodeView(node=self._node, reading=reading, state=state, received_at_s=now_s)
        )

    def view(self, now_s: float) -> ClusterView:
        """Return a snapshot at `now_s`."""
        return self._table.view(now_s)

    def row(self, node_id: NodeId) -> NodeView | None:
        """Return what is believed of a node, or None if it is unknown."""
        return self._table.get(node_id)

    def path_to(self, node_id: NodeId) -> tuple[Node, Link] | None:
        """Return a peer and the link to it, or None if it is unknown."""
        row = self._table.get(node_id)
        return None if row is None else (row.node, self._table.links.between(self._node, row.node))

    def learn(self, profiles: Mapping[FunctionId, FunctionProfile]) -> None:
        """Replace the function profiles, unless there are none."""
        self._table.profiles = profiles or self._table.profiles

    def expected_s(self, request: Request) -> tuple[float, float]:
        """Return the expected run time and cold start on a node of speed 1.0."""
        profile = self._table.profiles.get(request.spec.function_id)
        if profile is None:
            return UNKNOWN_RUN_S * request.item_count, 0.0
        return profile.run_s * request.item_count, profile.cold_start_s

    def cold_start_s(self, function: FunctionId) -> float:
        """Return the expected cold start on a node of speed 1.0; 0 if nothing is known."""
        profile = self._table.profiles.get(function)
        return 0.0 if profile is None else profile.cold_start_s

    def received(self, event: ViewReceived, now_s: float) -> None:
        """Take over what the scheduler says of the peers; the own row is known better here."""
        table = self._table
        here = self._node.node_id
        if event.links is not None:
            table.links = event.links
        if event.profiles is not None:
            table.profiles = {**table.profiles, **event.profiles}
        for peer in event.peers:
            node_id = peer.node.node_id
            if node_id == here:
                continue
            row = table.get(node_id)
            if row is None or (row.node is not peer.node and row.node != peer.node):
                table.put(
                    NodeView(
                        node=peer.node,
                        reading=peer.reading,
                        state=peer.state,
                        received_at_s=now_s - peer.age_s,
                    )
                )
                continue
            if peer.reading is not row.reading or peer.state is not row.state:
                self.heard(node_id, peer.reading, now_s, peer.age_s, state=peer.state)
        if event.is_full:
            named = {peer.node.node_id for peer in event.peers} | {here}
            for row in table.rows():
                if row.node.node_id not in named:
                    table.remove(row.node.node_id)
                    self._flying.pop(row.node.node_id, None)

    # -- what was sent --------------------------------------------------------------------------

    def heard(
        self,
        node_id: NodeId,
        reading: NodeReading,
        now_s: float,
        age_s: float = 0.0,
        *,
        state: NodeState | None = None,
    ) -> None:
        """Take over a reading, if it is newer than the one held.

        What was sent there and cannot have arrived when it was taken stays pending.
        """
        if not self._table.heard(node_id, reading, now_s, age_s, state=state):
            return
        flying = self._flying.get(node_id)
        path = self.path_to(node_id)
        if not flying or path is None:
            return
        taken_s = now_s - age_s - path[1].rtt_s / 2.0
        for request_id in [key for key, (there_s, _) in flying.items() if there_s <= taken_s]:
            del flying[request_id]
        pending_s = sum(work_s for _, work_s in flying.values())
        if pending_s > 0.0:
            self._table.change(node_id, pending_s=pending_s)

    def sent(self, ticket: Ticket, row: NodeView, now_s: float) -> None:
        """Add a request to its peer's pending work, until a reading counts it or it ends."""
        node = row.node
        request = ticket.request
        ticket.node_id = node.node_id
        ticket.sent_at_s = now_s
        run_s, _ = self.expected_s(request)
        work_s = run_s / node.speed / max(1.0, node.capacity.cpus)
        link = self._table.links.between(self._node, node)
        there_s = now_s + link.transfer_s(request.request_bytes)
        flying = self._flying.setdefault(node.node_id, {})
        flying[request.request_id] = (there_s, work_s)
        self._table.change(node.node_id, pending_s=row.pending_s + work_s)

    def settle(self, ticket: Ticket) -> None:
        """Take a request that has ended off the peer's pending work, if it is still there."""
        row = self._table.get(ticket.node_id) if ticket.node_id is not None else None
        if row is None:
            return
        _, work_s = self._flying.get(row.node.node_id, {}).pop(
            ticket.request.request_id, (0.0, 0.0)
        )
        if work_s > 0.0:
            self._table.change(row.node.node_id, pending_s=max(0.0, row.pending_s - work_s))

    def failed(self, node_id: NodeId, now_s: float) -> None:
        """Leave a peer alone for a while."""
        if node_id in self._table:
            self._unreachable[node_id] = now_s + UNREACHABLE_FOR_S
            self._table.change(node_id, reachable=False)

    def forgive(self, now_s: float) -> None:
        """Consider peers again whose time alone is over."""
        for node_id, until_s in list(self._unreachable.items()):
            if until_s <= now_s:
                del self._unreachable[node_id]
                self._table.change(node_id, reachable=True)

    def forwarded_latency(self, ticket: Ticket, there: Outcome, now_s: float) -> LatencySplit:
        """Split what the host did not account for into the way there and the way back.

        The two clocks differ, so only durations are compared; the parts are in proportion to
        what the link should need for each direction.
        """
        split = there.latency
        inside_s = split.queue_s + split.cold_start_s + split.run_s
        outside_s = max(0.0, now_s - ticket.sent_at_s - inside_s)
        path = self.path_to(ticket.node_id) if ticket.node_id is not None else None
        share = 0.5
        if path is not None:
            _, link = path
            there_s = link.transfer_s(ticket.request.request_bytes)
            total_s = there_s + link.transfer_s(there.response_bytes)
            share = there_s / total_s if total_s > 0.0 else 0.5
        return LatencySplit(
            queue_s=split.queue_s + ticket.sent_at_s - ticket.arrived_at_s,
            transfer_s=outside_s * share,
            cold_start_s=split.cold_start_s,
            run_s=split.run_s,
            return_s=outside_s * (1.0 - share),
        )

"""What waits to be written to one agent. A slow agent gets the newest state, not all states."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from tierwise.v1 import node_pb2, types_pb2

QUEUE_MAX = 20_000  # messages that may not be merged; an agent this far behind is cut off


class Outbox:
    """Bounded: catalogue, policy, billing and view have one place each; there the newest wins."""

    def __init__(self) -> None:
        self.is_closed = False
        self._queue: deque[node_pb2.SessionResponse] = deque()
        self._catalogue: types_pb2.Catalogue | None = None
        self._policy: node_pb2.PolicyAssignment | None = None
        self._billing: node_pb2.Billing | None = None
        self._view: _PendingView | None = None
        self._wake = asyncio.Event()

    def put(self, message: node_pb2.SessionResponse) -> None:
        """Queue a message of which none may be left out; they stay in order.

        If too many wait, the session ends: the agent reconnects and is told the present state.
        """
        if len(self._queue) >= QUEUE_MAX:
            self.close()
        if not self.is_closed:
            self._queue.append(message)
            self._wake.set()

    def put_catalogue(self, catalogue: types_pb2.Catalogue) -> None:
        """Queue a catalogue; one that still waits is replaced."""
        self._catalogue = catalogue
        self._wake.set()

    def put_policy(self, assignment: node_pb2.PolicyAssignment) -> None:
        """Queue a policy assignment; one that still waits is replaced."""
        self._policy = assignment
        self._wake.set()

    def put_billing(self, billing: node_pb2.Billing) -> None:
        """Queue prices and spent budgets; those that still wait are replaced."""
        self._billing = billing
        self._wake.set()

    def put_view(self, view: node_pb2.View) -> None:
        """Queue a view; it is merged into one that still waits."""
        if self._view is None:
            self._view = _PendingView(view)
        else:
            self._view.merge(view)
        self._wake.set()

    def close(self) -> None:
        """End the session; what waits is not sent."""
        self.is_closed = True
        self._wake.set()

    async def write_to(self, write: Callable[[node_pb2.SessionResponse], Awaitable[None]]) -> None:
        """Write what comes, until closed. State goes before work that may need it."""
        while not self.is_closed:
            message = self._next()
            if message is not None:
                await write(message)
            else:
                self._wake.clear()
                await self._wake.wait()

    def _next(self) -> node_pb2.SessionResponse | None:
        if self._queue and self._queue[0].WhichOneof("body") == "welcome":
            return self._queue.popleft()
        if self._catalogue is not None:
            catalogue, self._catalogue = self._catalogue, None
            return node_pb2.SessionResponse(catalogue=catalogue)
        if self._policy is not None:
            policy, self._policy = self._policy, None
            return node_pb2.SessionResponse(policy=policy)
        if self._billing is not None:
            billing, self._billing = self._billing, None
            return node_pb2.SessionResponse(billing=billing)
        if self._view is not None:
            view, self._view = self._view, None
            return node_pb2.SessionResponse(view=view.to_pb())
        return self._queue.popleft() if self._queue else None


class _PendingView:
    """Several views in one: the newest word on each node and function."""

    def __init__(self, view: node_pb2.View) -> None:
        self._first = view  # shared between sessions: never changed
        self._merged: node_pb2.View | None = None
        self._peers: dict[str, node_pb2.PeerView] = {}

    def merge(self, view: node_pb2.View) -> None:
        if self._merged is None:
            self._merged = node_pb2.View(is_full=self._first.is_full)
            self._add(self._first)
        if view.is_full:
            self._peers.clear()
        self._add(view)

    def to_pb(self) -> node_pb2.View:
        if self._merged is None:
            return self._first
        self._merged.peers.extend(self._peers.values())
        return self._merged

    def _add(self, view: node_pb2.View) -> None:
        assert self._merged is not None
        for peer in view.peers:
            before = self._peers.get(peer.node.node_id)
            if before is not None and before.is_held_known and not peer.is_held_known:
                newer = node_pb2.PeerView()
                newer.CopyFrom(peer)  # it is shared between sessions
                newer.held.extend(before.held)
                newer.is_held_known = True
                peer = newer
            self._peers[peer.node.node_id] = peer
        self._merged.is_full = self._merged.is_full or view.is_full
        if view.HasField("links"):
            self._merged.links.CopyFrom(view.links)
        for name, profile in view.profiles.items():
            self._merged.profiles[name].CopyFrom(profile)

"""Sessions: the streams over which agents report, and are told what to know and do."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from scheduler.dispatch import Dispatcher
from tierwise.clock import monotonic_s
from tierwise.domain.event import HeartbeatReceived, SessionClosed, SessionOpened, ViewReceived
from tierwise.domain.ids import NodeId, RequestId
from tierwise.errors import InvalidArgument, PermissionDenied, TierwiseError
from tierwise.v1 import node_pb2, node_pb2_grpc, types_pb2
from tierwise.wire import convert
from tierwise.wire.identity import Role, peer_identity

log = structlog.get_logger()

QUEUE_MAX = 20_000  # messages waiting for one agent; beyond it the session is ended
VIEW_INTERVAL_S = 0.2
HELLO_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Session:
    """One connected agent."""

    node_id: NodeId
    version: str
    policy_id: str
    host: types_pb2.HostReading = field(default_factory=types_pb2.HostReading)
    outgoing: deque[node_pb2.SessionResponse] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    is_replaced: bool = False

    def send(self, message: node_pb2.SessionResponse) -> None:
        """Queue a message; an agent that reads too slowly loses its session, not the messages."""
        if len(self.outgoing) >= QUEUE_MAX:
            self.is_replaced = True
        else:
            self.outgoing.append(message)
        self.wake.set()


class Sessions(node_pb2_grpc.NodeServiceServicer):
    """Serves NodeService and is the NodeSide of the dispatcher."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        heartbeat_interval_s: float,
        catalogue: Callable[[], types_pb2.Catalogue],
        assignment: Callable[[], node_pb2.PolicyAssignment],
        revoked: Callable[[], list[str]],
        on_calls: Callable[[NodeId, list[node_pb2.CallReport], int], None],
        on_result: Callable[[NodeId, types_pb2.InvocationResult], None],
    ) -> None:
        """Serve sessions.

        Args:
            dispatcher: Is fed with what agents report.
            heartbeat_interval_s: Told to agents.
            catalogue: Gives the present catalogue.
            assignment: Gives the policy that agents should use.
            revoked: Gives the identities that agents must refuse.
            on_calls: Takes the call reports of a heartbeat and how many were dropped.
            on_result: Takes results of durable work.
        """
        self._dispatcher = dispatcher
        self._interval_s = heartbeat_interval_s
        self._catalogue = catalogue
        self._assignment = assignment
        self._revoked = revoked
        self._on_calls = on_calls
        self._on_result = on_result
        self._sessions: dict[NodeId, Session] = {}
        self._is_changed = asyncio.Event()

    # -- for the rest of the scheduler ----------------------------------------------------------

    def get(self, node_id: str) -> Session | None:
        """Return the open session of a node, or None."""
        return self._sessions.get(NodeId(node_id))

    def dispatch(self, node_id: NodeId, invocation: types_pb2.Invocation) -> None:
        """Send leased work; if the session is gone the lease is retried when the node is lost."""
        self._send(node_id, node_pb2.SessionResponse(dispatch=invocation))

    def cancel(self, node_id: NodeId, request_id: RequestId) -> None:
        """Tell a node to stop a piece of work."""
        cancel = node_pb2.CancelWork(request_id=request_id)
        self._send(node_id, node_pb2.SessionResponse(cancel=cancel))

    def drain(self, node_id: NodeId, *, is_on: bool) -> None:
        """Tell a node to drain, or to take work again."""
        self._send(node_id, node_pb2.SessionResponse(drain=node_pb2.Drain(is_on=is_on)))

    def acknowledge(self, node_id: NodeId, request_id: str, lease: int) -> None:
        """Tell a node that a result is on disk here."""
        ack = node_pb2.WorkAck(request_id=request_id, lease=lease)
        self._send(node_id, node_pb2.SessionResponse(work_ack=ack))

    def changed(self) -> None:
        """Note that the view has changed; it goes out within VIEW_INTERVAL_S."""
        self._is_changed.set()

    def broadcast(self, message: node_pb2.SessionResponse) -> None:
        """Send the same to every connected agent."""
        for session in self._sessions.values():
            session.send(message)

    def end(self, node_id: str) -> None:
        """End a session because its node was removed."""
        session = self._sessions.get(NodeId(node_id))
        if session is not None:
            session.is_replaced = True
            session.wake.set()

    async def broadcast_views_forever(self) -> None:
        """Send the whole view when something changed, at most five times a second."""
        while True:
            await self._is_changed.wait()
            self._is_changed.clear()
            if self._sessions:
                self.broadcast(self._view())
            await asyncio.sleep(VIEW_INTERVAL_S)

    # -- the stream -----------------------------------------------------------------------------

    async def Session(
        self, request_iterator: AsyncIterator[node_pb2.SessionRequest], context: Any
    ) -> None:
        identity = peer_identity(context)
        if identity.role is not Role.NODE:
            raise PermissionDenied(f"{identity.uri} is no node")
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await anext(request_iterator)
        if first.WhichOneof("body") != "hello":
            raise InvalidArgument("the first message of a session must be hello")
        node = convert.node_from_pb(first.hello.node)
        if node.node_id != identity.name:
            raise PermissionDenied(f"{identity.uri} cannot open a session for {node.node_id}")
        session = Session(node.node_id, first.hello.version, first.hello.policy_id)
        older = self._sessions.get(node.node_id)
        if older is not None:
            older.is_replaced = True
            older.wake.set()
        self._sessions[node.node_id] = session
        self._greet(session)
        leases = tuple((RequestId(x.request_id), x.lease) for x in first.hello.leases)
        self._dispatcher.feed(SessionOpened(node=node, leases=leases))
        log.info("session.opened", node_id=node.node_id, address=node.address)
        writer = asyncio.ensure_future(self._write(session, context))
        reader = asyncio.ensure_future(self._read(session, request_iterator))
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
            if self._sessions.get(node.node_id) is session:
                del self._sessions[node.node_id]
                self._dispatcher.feed(SessionClosed(node_id=node.node_id))
            log.info("session.closed", node_id=node.node_id)

    def _greet(self, session: Session) -> None:
        welcome = node_pb2.Welcome(
            heartbeat_interval_s=self._interval_s, revoked_identities=self._revoked()
        )
        session.send(node_pb2.SessionResponse(welcome=welcome))
        session.send(node_pb2.SessionResponse(catalogue=self._catalogue()))
        session.send(node_pb2.SessionResponse(policy=self._assignment()))
        session.send(self._view())

    async def _write(self, session: Session, context: Any) -> None:
        while not session.is_replaced:
            while session.outgoing:
                await context.write(session.outgoing.popleft())
            session.wake.clear()
            if not session.outgoing and not session.is_replaced:
                await session.wake.wait()

    async def _read(
        self, session: Session, request_iterator: AsyncIterator[node_pb2.SessionRequest]
    ) -> None:
        async for message in request_iterator:
            try:
                self._receive(session, message)
            except TierwiseError as error:
                log.warning("session.bad_message", node_id=session.node_id, cause=str(error))

    def _receive(self, session: Session, message: node_pb2.SessionRequest) -> None:
        match message.WhichOneof("body"):
            case "heartbeat":
                beat = message.heartbeat
                session.host = beat.host
                session.policy_id = beat.policy_id
                reading = convert.reading_from_pb(beat.reading)
                self._dispatcher.feed(HeartbeatReceived(node_id=session.node_id, reading=reading))
                self.changed()
                if beat.calls or beat.dropped_call_count:
                    self._on_calls(session.node_id, list(beat.calls), beat.dropped_call_count)
            case "work_result":
                self._on_result(session.node_id, message.work_result)
            case _:
                raise InvalidArgument("a session carries heartbeats and results after its hello")

    def _view(self) -> node_pb2.SessionResponse:
        plane = self._dispatcher.plane
        view = ViewReceived(
            peers=plane.peers(monotonic_s()),
            links=plane.table.links,
            profiles=dict(plane.table.profiles),
            is_full=True,
        )
        return node_pb2.SessionResponse(view=convert.view_to_pb(view))

    def _send(self, node_id: NodeId, message: node_pb2.SessionResponse) -> None:
        session = self._sessions.get(node_id)
        if session is not None:
            session.send(message)

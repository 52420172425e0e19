"""Sessions: the streams over which agents report, and are told what to know and do."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import structlog

from scheduler.dispatch import Dispatcher
from scheduler.holdings import Holdings
from scheduler.outbox import Outbox
from tierwise.clock import monotonic_s
from tierwise.domain.cache import RoundManifest
from tierwise.domain.event import (
    HeartbeatReceived,
    PeerSeen,
    SessionClosed,
    SessionOpened,
    ViewReceived,
)
from tierwise.domain.function import FunctionProfile
from tierwise.domain.ids import FunctionId, NodeId, RequestId
from tierwise.domain.topology import NodeState
from tierwise.errors import DeadlineExceeded, InvalidArgument, PermissionDenied, TierwiseError
from tierwise.v1 import function_pb2, node_pb2, node_pb2_grpc, types_pb2
from tierwise.wire import convert
from tierwise.wire.convert_cache import held_from_pb, manifest_to_pb
from tierwise.wire.identity import Role, peer_identity

log = structlog.get_logger()

VIEW_INTERVAL_S = 0.2
HELLO_TIMEOUT_S = 10.0
LEASES_MAX = 20_000  # that one agent may claim
POLICIES_MAX = 8  # on duty on one node
ENVIRONMENTS_MAX = 256  # that one node may tell of


class NodeSession:
    """One connected agent."""

    def __init__(self, node_id: NodeId, hello: node_pb2.Hello) -> None:
        self.node_id = node_id
        self.version = hello.version
        self.policy_id = hello.policy_id
        self.host = types_pb2.HostReading()
        self.policies: Sequence[types_pb2.PolicyHealth] = ()
        self.environments: dict[str, node_pb2.EnvironmentReading] = {}  # by requirements
        self.has_left = False
        self.outbox = Outbox()


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
        on_opened: Callable[[NodeId], None],
        on_beat: Callable[[NodeId, node_pb2.Heartbeat], None],
        billing: Callable[[], node_pb2.Billing],
        on_result: Callable[[NodeId, types_pb2.InvocationResult], None],
    ) -> None:
        """Serve sessions.

        Args:
            dispatcher: Is fed with what agents report.
            heartbeat_interval_s: Told to agents.
            catalogue: Gives the present catalogue.
            assignment: Gives the policy that agents should use.
            revoked: Gives the identities that agents must refuse.
            on_opened: Is told that a node has connected.
            on_beat: Takes the call reports of a heartbeat, and what idled.
            billing: Gives prices and spent budgets as agents get them.
            on_result: Takes results of durable work.
        """
        self._dispatcher = dispatcher
        self._interval_s = heartbeat_interval_s
        self._catalogue = catalogue
        self._assignment = assignment
        self._revoked = revoked
        self._on_opened = on_opened
        self._on_beat = on_beat
        self._billing = billing
        self._on_result = on_result
        self._sessions: dict[NodeId, NodeSession] = {}
        self.holdings = Holdings()
        self.on_round_opened: Callable[[NodeId, node_pb2.RoundOpened], None] = lambda node, _: None
        self._is_changed = asyncio.Event()
        # What agents were told last, to tell them only what is new.
        self._told_peers: dict[NodeId, tuple[NodeState, int]] = {}
        self._told_profiles: dict[FunctionId, FunctionProfile] = {}

    # -- for the rest of the scheduler ----------------------------------------------------------

    def get(self, node_id: str) -> NodeSession | None:
        """Return the open session of a node, or None."""
        return self._sessions.get(NodeId(node_id))

    def health(self) -> Iterator[tuple[NodeId, types_pb2.PolicyHealth]]:
        """Yield how policies do on each connected node."""
        for node_id, session in self._sessions.items():
            for health in session.policies:
                yield node_id, health

    def environments(self, requirements_digest: str) -> list[function_pb2.NodeEnvironment]:
        """Return how far each connected node is with the environment of some requirements."""
        found = []
        for node_id, session in sorted(self._sessions.items()):
            reading = session.environments.get(requirements_digest)
            if reading is not None:
                found.append(
                    function_pb2.NodeEnvironment(
                        node_id=node_id, state=reading.state, message=reading.message
                    )
                )
        return found

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

    def open_round(
        self, node_id: NodeId, manifest: RoundManifest, base_node: NodeId | None = None
    ) -> bool:
        """Have a node's cache open a round; return whether the node is connected.

        `on_round_opened` hears what became of it. Idempotent: send it again after a lost session.
        `base_node` has the base, if that is known.
        """
        pb = manifest_to_pb(manifest)
        pb.base_node = base_node or ""
        self._send(node_id, node_pb2.SessionResponse(open_round=pb))
        return node_id in self._sessions

    def acknowledge(self, node_id: NodeId, request_id: str, lease: int) -> None:
        """Tell a node that a result is on disk here, or counts no more."""
        ack = node_pb2.WorkAck(request_id=request_id, lease=lease)
        self._send(node_id, node_pb2.SessionResponse(work_ack=ack))

    def changed(self) -> None:
        """Note that the view has changed; it goes out within VIEW_INTERVAL_S."""
        self._is_changed.set()

    def catalogue_changed(self) -> None:
        """Queue the new catalogue for every connected agent."""
        catalogue = self._catalogue()
        for session in self._sessions.values():
            session.outbox.put_catalogue(catalogue)

    def policy_changed(self) -> None:
        """Queue the new policy assignment for every connected agent."""
        assignment = self._assignment()
        for session in self._sessions.values():
            session.outbox.put_policy(assignment)

    def billing_changed(self) -> None:
        """Queue prices and spent budgets for every connected agent."""
        billing = self._billing()
        for session in self._sessions.values():
            session.outbox.put_billing(billing)

    def acknowledge_reports(self, node_id: NodeId, number: int) -> None:
        """Tell a node that its call reports up to a number are on disk here."""
        ack = node_pb2.ReportsAck(report_sequence=number)
        self._send(node_id, node_pb2.SessionResponse(reports_ack=ack))

    def node_removed(self, node_id: NodeId) -> None:
        """End the session of a removed node; the others refuse it from now on."""
        session = self._sessions.pop(node_id, None)
        if session is not None:
            session.outbox.close()
        self.holdings.remove(node_id)
        self.revocations_changed()
        self.changed()

    def revocations_changed(self) -> None:
        """Tell every agent whom to refuse."""
        for session in self._sessions.values():
            session.outbox.put(node_pb2.SessionResponse(welcome=self._welcome()))

    def close(self) -> None:
        """End every session: the daemon stops."""
        for session in self._sessions.values():
            session.outbox.close()

    async def broadcast_views_forever(self) -> None:
        """Send what changed, at most five times a second; everything if a node is gone."""
        while True:
            await self._is_changed.wait()
            self._is_changed.clear()
            self._broadcast_view()
            await asyncio.sleep(VIEW_INTERVAL_S)

    # -- the stream -----------------------------------------------------------------------------

    async def Session(  # type: ignore[override]  # grpc.aio also takes coroutines that write
        self, request_iterator: AsyncIterator[node_pb2.SessionRequest], context: Any
    ) -> None:
        hello = await _hello(request_iterator)
        node = convert.node_from_pb(hello.node)
        identity = peer_identity(context)
        if identity.role is not Role.NODE or node.node_id != identity.name:
            raise PermissionDenied(f"{identity.uri} cannot open a session for {node.node_id}")
        if len(hello.leases) > LEASES_MAX:
            raise InvalidArgument(f"hello.leases: at most {LEASES_MAX}")
        session = NodeSession(node.node_id, hello)
        older = self._sessions.get(node.node_id)
        if older is not None:
            older.outbox.close()
        self._sessions[node.node_id] = session
        self._greet(session)
        leases = tuple((RequestId(x.request_id), x.lease) for x in hello.leases)
        self._dispatcher.feed(SessionOpened(node=node, leases=leases))
        if not self._dispatcher.plane.is_draining(node.node_id):
            self.drain(node.node_id, is_on=False)  # it may have missed that it was taken back
        self._on_opened(node.node_id)
        log.info("session.opened", node_id=node.node_id, address=node.address)
        try:
            await self._serve(session, request_iterator, context)
        finally:
            session.outbox.close()
            if self._sessions.get(node.node_id) is session:  # not replaced, not removed
                del self._sessions[node.node_id]
                closed = SessionClosed(node_id=node.node_id, has_left=session.has_left)
                self._dispatcher.feed(closed)
            log.info("session.closed", node_id=node.node_id, has_left=session.has_left)

    async def _serve(
        self,
        session: NodeSession,
        request_iterator: AsyncIterator[node_pb2.SessionRequest],
        context: Any,
    ) -> None:
        """Read and write until either side ends."""
        tasks = [
            asyncio.ensure_future(session.outbox.write_to(context.write)),
            asyncio.ensure_future(self._read(session, request_iterator)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    log.warning("session.broken", node_id=session.node_id, cause=repr(ended))

    async def _read(
        self, session: NodeSession, request_iterator: AsyncIterator[node_pb2.SessionRequest]
    ) -> None:
        async for message in request_iterator:
            if session.outbox.is_closed:
                return  # replaced or removed: what it still says does not count
            try:
                self._receive(session, message)
            except TierwiseError as error:
                log.warning("session.bad_message", node_id=session.node_id, cause=str(error))

    def _receive(self, session: NodeSession, message: node_pb2.SessionRequest) -> None:
        match message.WhichOneof("body"):
            case "heartbeat":
                beat = message.heartbeat
                session.host = beat.host
                session.policy_id = beat.policy_id
                session.policies = beat.policies[:POLICIES_MAX]
                if told := beat.environments[:ENVIRONMENTS_MAX]:  # all of them, or no news
                    session.environments = {r.requirements_digest: r for r in told}
                if beat.is_held_known:
                    self.holdings.told(session.node_id, held_from_pb(beat.held))
                reading = convert.reading_from_pb(beat.reading)
                self._dispatcher.feed(HeartbeatReceived(node_id=session.node_id, reading=reading))
                self.changed()
                self._on_beat(session.node_id, beat)
            case "work_result":
                self._on_result(session.node_id, message.work_result)
            case "round_opened":
                self.on_round_opened(session.node_id, message.round_opened)
            case "goodbye":
                session.has_left = True
                session.outbox.close()
            case _:
                raise InvalidArgument("a session carries heartbeats and results after its hello")

    # -- what agents are told -------------------------------------------------------------------

    def _greet(self, session: NodeSession) -> None:
        plane = self._dispatcher.plane
        outbox = session.outbox
        outbox.put(node_pb2.SessionResponse(welcome=self._welcome()))
        outbox.put_catalogue(self._catalogue())
        outbox.put_policy(self._assignment())
        outbox.put_billing(self._billing())
        view = ViewReceived(
            peers=tuple(map(self._with_held, plane.peers(monotonic_s()))),
            links=plane.table.links,
            profiles=dict(plane.table.profiles),
            is_full=True,
        )
        outbox.put_view(convert.view_to_pb(view))

    def _welcome(self) -> node_pb2.Welcome:
        return node_pb2.Welcome(
            heartbeat_interval_s=self._interval_s, revoked_identities=self._revoked()
        )

    def _with_held(self, peer: PeerSeen) -> PeerSeen:
        return replace(peer, held=self.holdings.of(peer.node.node_id))

    def _broadcast_view(self) -> None:
        plane = self._dispatcher.plane
        peers = plane.peers(monotonic_s())
        news = self.holdings.take_news()
        now = {peer.node.node_id: _version(peer) for peer in peers}
        is_full = not now.keys() >= self._told_peers.keys()
        profiles = plane.table.profiles
        view = ViewReceived(
            peers=tuple(
                self._with_held(peer) if is_full or peer.node.node_id in news else peer
                for peer in peers
                if is_full
                or peer.node.node_id in news
                or self._told_peers.get(peer.node.node_id) != _version(peer)
            ),
            profiles={
                key: profile
                for key, profile in profiles.items()
                if self._told_profiles.get(key) is not profile
            },
            is_full=is_full,
        )
        self._told_peers, self._told_profiles = now, dict(profiles)
        if not self._sessions or not (view.peers or view.profiles or is_full):
            return
        pb = convert.view_to_pb(view)
        for session in self._sessions.values():
            session.outbox.put_view(pb)

    def _send(self, node_id: NodeId, message: node_pb2.SessionResponse) -> None:
        session = self._sessions.get(node_id)
        if session is not None:
            session.outbox.put(message)


async def _hello(request_iterator: AsyncIterator[node_pb2.SessionRequest]) -> node_pb2.Hello:
    """Return the first message of a session."""
    try:
        async with asyncio.timeout(HELLO_TIMEOUT_S):
            first = await anext(request_iterator, None)
    except TimeoutError:
        raise DeadlineExceeded(f"no hello within {HELLO_TIMEOUT_S:g} s") from None
    if first is None or first.WhichOneof("body") != "hello":
        raise InvalidArgument("the first message of a session must be hello")
    return first.hello


def _version(peer: PeerSeen) -> tuple[NodeState, int]:
    """Return what tells one belief about a node from the next."""
    return peer.state, peer.reading.sequence

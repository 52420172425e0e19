"""The operator's side of the control plane: nodes, tokens, joining."""

import asyncio
from importlib.metadata import version
from typing import Any

import structlog
from sqlalchemy import Connection, delete, select

from scheduler.authority import Authority
from scheduler.dispatch import Dispatcher
from scheduler.inventory import Sessions
from scheduler.store.store import Store
from scheduler.store.tables import drains, nodes
from tierwise.clock import monotonic_s
from tierwise.domain.event import NodeDrainAsked, NodeRemoved, PeerSeen
from tierwise.domain.ids import NodeId, is_name
from tierwise.errors import AlreadyExists, InvalidArgument, NotFound
from tierwise.v1 import cluster_pb2, cluster_pb2_grpc, join_pb2, join_pb2_grpc, types_pb2
from tierwise.wire import convert
from tierwise.wire.identity import Identity, Role, peer_identity

log = structlog.get_logger()

TOKEN_TTL_S = 3600.0
_ROLE_BY_PB = {
    cluster_pb2.ROLE_NODE: Role.NODE,
    cluster_pb2.ROLE_USER: Role.USER,
    cluster_pb2.ROLE_ADMIN: Role.ADMIN,
}
_PB_BY_ROLE = {role: pb for pb, role in _ROLE_BY_PB.items()}


class ClusterGateway(cluster_pb2_grpc.ClusterServiceServicer):
    """Serves ClusterService."""

    def __init__(
        self, store: Store, dispatcher: Dispatcher, sessions: Sessions, authority: Authority
    ) -> None:
        """Serve; nodes that were drained before the restart stay so."""
        self._store = store
        self._dispatcher = dispatcher
        self._sessions = sessions
        self._authority = authority
        for node_id in store.read_now(lambda c: c.scalars(select(drains.c.node_id)).all()):
            dispatcher.feed(NodeDrainAsked(node_id=NodeId(node_id), is_on=True))

    async def ListNodes(
        self, request: cluster_pb2.ListNodesRequest, context: Any
    ) -> cluster_pb2.ListNodesResponse:
        return cluster_pb2.ListNodesResponse(nodes=self._nodes())

    async def GetView(
        self, request: cluster_pb2.GetViewRequest, context: Any
    ) -> cluster_pb2.GetViewResponse:
        table = self._dispatcher.plane.table
        return cluster_pb2.GetViewResponse(
            nodes=self._nodes(),
            links=convert.links_to_pb(table.links),
            profiles={str(k): convert.profile_to_pb(v) for k, v in table.profiles.items()},
        )

    async def DrainNode(
        self, request: cluster_pb2.DrainNodeRequest, context: Any
    ) -> cluster_pb2.DrainNodeResponse:
        node_id = NodeId(request.node_id)
        self._known(node_id)

        def store(connection: Connection) -> None:
            connection.execute(delete(drains).where(drains.c.node_id == node_id))
            if request.is_on:
                connection.execute(drains.insert().values(node_id=node_id))

        asked = NodeDrainAsked(node_id=node_id, is_on=request.is_on)
        await self._store.write(store, on_stored=lambda _: self._dispatcher.feed(asked))
        log.info("node.drain_asked", node_id=node_id, is_on=request.is_on)
        return cluster_pb2.DrainNodeResponse(
            node=next(n for n in self._nodes() if n.node.node_id == node_id)
        )

    async def RemoveNode(
        self, request: cluster_pb2.RemoveNodeRequest, context: Any
    ) -> cluster_pb2.RemoveNodeResponse:
        node_id = NodeId(request.node_id)
        if not is_name(node_id):
            raise InvalidArgument(f"{node_id!r} is no node name")
        identity = Identity(Role.NODE, node_id)
        if not self._authority.is_known(identity):
            self._known(node_id)
        self._authority.revoke(identity)
        self._dispatcher.feed(NodeRemoved(node_id=node_id))
        self._sessions.node_removed(node_id)

        def forget(connection: Connection) -> None:
            for table in (drains, nodes):
                connection.execute(delete(table).where(table.c.node_id == node_id))

        await self._store.write(forget)
        log.info("node.removed", node_id=node_id, by=peer_identity(context).uri)
        return cluster_pb2.RemoveNodeResponse()

    async def CreateToken(
        self, request: cluster_pb2.CreateTokenRequest, context: Any
    ) -> cluster_pb2.CreateTokenResponse:
        role = _ROLE_BY_PB.get(request.role)
        if role is None:
            raise InvalidArgument("role: a token is for a node, a user or an admin")
        token, record = await asyncio.to_thread(
            self._authority.create_token, role, request.name, request.ttl_s or TOKEN_TTL_S
        )
        return cluster_pb2.CreateTokenResponse(token=token, expires_unix_s=record.expires_unix_s)

    async def ListTokens(
        self, request: cluster_pb2.ListTokensRequest, context: Any
    ) -> cluster_pb2.ListTokensResponse:
        return cluster_pb2.ListTokensResponse(
            tokens=[
                cluster_pb2.TokenInfo(
                    token_id=record.token_id,
                    role=_PB_BY_ROLE[record.role],
                    name=record.name,
                    expires_unix_s=record.expires_unix_s,
                    is_used=record.is_used,
                )
                for record in self._authority.tokens()
            ]
        )

    async def GetIdentity(
        self, request: cluster_pb2.GetIdentityRequest, context: Any
    ) -> cluster_pb2.GetIdentityResponse:
        identity = peer_identity(context)
        return cluster_pb2.GetIdentityResponse(
            identity=identity.uri,
            role=_PB_BY_ROLE.get(identity.role, cluster_pb2.ROLE_UNSPECIFIED),
            version=version("tierwise"),
            cluster_id=self._authority.cluster_id,
        )

    def _nodes(self) -> list[cluster_pb2.NodeInfo]:
        return [self._node(peer) for peer in self._dispatcher.plane.peers(monotonic_s())]

    def _node(self, peer: PeerSeen) -> cluster_pb2.NodeInfo:
        session = self._sessions.get(peer.node.node_id)
        return cluster_pb2.NodeInfo(
            node=convert.node_to_pb(peer.node),
            state=types_pb2.NodeState.ValueType(peer.state),
            reading=convert.reading_to_pb(peer.reading),
            host=session.host if session is not None else None,
            age_s=peer.age_s,
            policy_id=session.policy_id if session is not None else "",
            version=session.version if session is not None else "",
            policies=session.policies if session is not None else (),
        )

    def _known(self, node_id: NodeId) -> None:
        if node_id not in self._dispatcher.plane.table:
            raise NotFound(
                f"there is no node {node_id!r}; `tierwise get nodes` lists those there are"
            )


class JoinGateway(join_pb2_grpc.JoinServiceServicer):
    """Serves JoinService, on its own port."""

    def __init__(self, authority: Authority, sessions: Sessions, scheduler_address: str) -> None:
        self._authority = authority
        self._sessions = sessions
        self._scheduler_address = scheduler_address

    async def Join(self, request: join_pb2.JoinRequest, context: Any) -> join_pb2.JoinResponse:
        if self._sessions.get(request.name) is not None:
            raise AlreadyExists(
                f"a node named {request.name!r} is connected: choose another name, or stop that one"
            )
        identity = self._authority.redeem(request.token, request.name)
        certificate = self._authority.sign(request.signing_request, identity)
        self._sessions.revocations_changed()  # a removed node that joins again is welcome
        log.info("identity.issued", identity=identity.uri)
        return join_pb2.JoinResponse(
            certificate=certificate,
            authority=self._authority.certificate,
            identity=identity.uri,
            scheduler_address=self._scheduler_address,
        )

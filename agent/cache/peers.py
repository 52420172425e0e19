"""Connections to the caches of other nodes, with link emulation where that is switched on.

They are apart from the streams of calls, which must not wait behind large objects.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from agent.cache.tasks import Tasks
from agent.machine import NodeMachine
from tierwise.clock import monotonic_s
from tierwise.domain.cache import ObjectInfo, ObjectKey
from tierwise.domain.ids import NodeId
from tierwise.domain.prices import link_class
from tierwise.domain.topology import Channel, Link
from tierwise.errors import Unavailable
from tierwise.v1 import cache_pb2, cache_pb2_grpc
from tierwise.wire import memfd
from tierwise.wire.channel import is_connected, secure_channel
from tierwise.wire.convert_cache import (
    durability_from_pb,
    info_from_pb,
    key_to_pb,
    metadata_from_bytes,
)
from tierwise.wire.errors import error_from_rpc
from tierwise.wire.identity import Credentials, node_dns_name
from tierwise.wire.memfd import Memfd

ASK_TIMEOUT_S = 10.0
MOVE_TIMEOUT_S = 300.0
CONNECT_TIMEOUT_S = 3.0  # a node that is gone must not hold up who could ask another


@dataclass(slots=True)
class _Peer:
    address: str
    channel: grpc.aio.Channel
    stub: Any  # CacheServiceStub; its types are those of blocking calls
    out: Channel
    back: Channel
    link_class: str


@dataclass(slots=True)
class CachePeers:
    """The way to other caches. Connections open on first use and close with the agent."""

    machine: NodeMachine
    credentials: Credentials
    emulate: bool = False
    seed: int = 0
    moved_bytes: dict[str, int] = field(default_factory=dict)  # by link class, both directions
    _peers: dict[NodeId, _Peer] = field(default_factory=dict)
    _closing: Tasks = field(default_factory=Tasks)
    _rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed + 1)  # the calls' streams draw from `seed`

    def link(self, node_id: NodeId) -> Link | None:
        """Return the link to a node, or None if it is unknown."""
        path = self.machine.path_to(node_id)
        return None if path is None else path[1]

    async def ask(self, node_id: NodeId, method: str, request: Any) -> Any:
        """Call an RPC of one message each way.

        Raises:
            TierwiseError: What the node answered; Unavailable if it cannot be reached.
        """
        peer = await self._ready(node_id)
        try:
            answer = await getattr(peer.stub, method)(request, timeout=ASK_TIMEOUT_S)
        except grpc.RpcError as failure:
            raise error_from_rpc(failure) from None
        await self._pace(peer.out, request.ByteSize())
        await self._pace(peer.back, answer.ByteSize())
        return answer

    async def stream(
        self, node_id: NodeId, request: cache_pb2.GetRequest
    ) -> AsyncIterator[cache_pb2.GetResponse]:
        """Yield the answers to a Get as they come.

        Raises:
            TierwiseError: What the node answered; Unavailable if it cannot be reached.
        """
        peer = await self._ready(node_id)
        delay_s = 0.0
        try:
            async for response in peer.stub.Get(request, timeout=MOVE_TIMEOUT_S):
                self._count(peer, len(response.chunk))
                if self.emulate:
                    delay_s = self._delay_s(peer.back, len(response.chunk))
                yield response
        except grpc.RpcError as failure:
            raise error_from_rpc(failure) from None
        await asyncio.sleep(delay_s)

    async def get(self, node_id: NodeId, key: ObjectKey, caller: str) -> tuple[Memfd, ObjectInfo]:
        """Return an object of another cache, in a file of our own.

        Raises:
            TierwiseError: What the node answered; Unavailable if it is away or breaks off.
        """
        request = cache_pb2.GetRequest(key=key_to_pb(key), is_forwarded=True, caller=caller)
        head: cache_pb2.ObjectHead | None = None
        fd, size_bytes = memfd.create(), 0
        try:
            async for response in self.stream(node_id, request):
                if response.HasField("head"):
                    head = response.head
                    continue
                left = memoryview(response.chunk)
                size_bytes += len(left)
                while left:
                    left = left[os.write(fd, left) :]
            if head is None or size_bytes != head.size_bytes:
                raise Unavailable(f"{key} came incomplete from {node_id}", retry_after_s=0.5)
        except BaseException:
            os.close(fd)
            raise
        return memfd.seal(fd), info_from_head(head, key, node_id)

    async def put(
        self,
        node_id: NodeId,
        head: cache_pb2.ObjectHead,
        chunks: AsyncIterator[Any],
    ) -> ObjectInfo:
        """Send an object to another cache.

        Raises:
            TierwiseError: What the node answered; Unavailable if it cannot be reached.
        """
        response = await self.relay(node_id, head, chunks)
        return info_from_pb(response.object)

    async def relay(
        self, node_id: NodeId, head: cache_pb2.ObjectHead, chunks: AsyncIterator[Any]
    ) -> cache_pb2.PutResponse:
        """Send an object to another cache and return its answer as it is.

        Raises:
            TierwiseError: What the node answered, or `chunks` raised.
        """
        peer = await self._ready(node_id)
        failed: list[BaseException] = []
        delay_s = 0.0

        async def requests() -> AsyncIterator[cache_pb2.PutRequest]:
            nonlocal delay_s
            yield cache_pb2.PutRequest(head=head)
            try:
                async for chunk in chunks:
                    self._count(peer, len(chunk))
                    if self.emulate:
                        delay_s = self._delay_s(peer.out, len(chunk))
                    yield cache_pb2.PutRequest(chunk=bytes(chunk))
            except Exception as error:  # gRPC would only say that the stream broke
                failed.append(error)
                raise
            await asyncio.sleep(delay_s)

        try:
            response: cache_pb2.PutResponse = await peer.stub.Put(
                requests(), timeout=MOVE_TIMEOUT_S
            )
        except grpc.RpcError as failure:
            raise (failed[0] if failed else error_from_rpc(failure)) from None
        return response

    async def close(self) -> None:
        """Close every connection; what is in flight fails."""
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            await peer.channel.close()
        await self._closing.close()

    async def _ready(self, node_id: NodeId) -> _Peer:
        """Return the connection to a node once it stands.

        Raises:
            Unavailable: It is unknown, or does not answer.
        """
        peer = self._peer(node_id)
        if not await is_connected(peer.channel, CONNECT_TIMEOUT_S):
            raise Unavailable(
                f"the cache of {node_id} does not answer at {peer.address}", retry_after_s=1.0
            )
        return peer

    def _peer(self, node_id: NodeId) -> _Peer:
        path = self.machine.path_to(node_id)
        if path is None or not path[0].address:
            raise Unavailable(f"no way to the cache of {node_id} is known here", retry_after_s=1.0)
        node, link = path
        peer = self._peers.get(node_id)
        if peer is not None and peer.address == node.address:
            peer.out.link = peer.back.link = link
            return peer
        if peer is not None:
            self._closing.start_unattended(peer.channel.close())
        channel = secure_channel(node.address, self.credentials, node_dns_name(node_id))
        stub = cache_pb2_grpc.CacheServiceStub(channel)
        way = link_class(self.machine.node.tier, node.tier)
        peer = _Peer(node.address, channel, stub, Channel(link), Channel(link), way)
        self._peers[node_id] = peer
        return peer

    def _count(self, peer: _Peer, size_bytes: int) -> None:
        self.moved_bytes[peer.link_class] = self.moved_bytes.get(peer.link_class, 0) + size_bytes

    async def _pace(self, channel: Channel, size_bytes: int) -> None:
        if self.emulate:
            await asyncio.sleep(self._delay_s(channel, size_bytes))

    def _delay_s(self, channel: Channel, size_bytes: int) -> float:
        return channel.delay_s(size_bytes, monotonic_s(), float(self._rng.random()))


def info_from_head(head: cache_pb2.ObjectHead, key: ObjectKey, node_id: NodeId) -> ObjectInfo:
    """Return what the head of an answer says of an object."""
    return ObjectInfo(
        key=key,
        size_bytes=head.size_bytes,
        digest=head.digest,
        durability=durability_from_pb(head.durability),
        node_ids=(node_id,),
        metadata=metadata_from_bytes(head.metadata),
    )

"""The gRPC side of a node's cache: users and other nodes bring objects, read and ask here.

What this node does not hold it gets, or passes on, once: to the node that the index names.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import structlog

from agent.cache.holders import HolderIndex
from agent.cache.overview import Caller, Overview
from agent.cache.own import OwnRounds
from agent.cache.peers import CachePeers
from agent.cache.reach import ANYWHERE, HOLDERS_TRIED_MAX, Reach
from agent.cache.replication import Replicator
from agent.cache.rights import CLUSTER, Rights
from agent.cache.store import CacheStore
from tierwise.domain.cache import Durability, IncomingHead, ObjectInfo, ObjectKey, RoundManifest
from tierwise.domain.ids import NodeId
from tierwise.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    TierwiseError,
    Unavailable,
)
from tierwise.v1 import cache_pb2, cache_pb2_grpc
from tierwise.wire import checks
from tierwise.wire.compression import Decoder
from tierwise.wire.convert_cache import (
    CHUNK_BYTES,
    durability_from_pb,
    info_to_pb,
    key_from_pb,
    key_to_pb,
    manifest_from_pb,
    manifest_to_pb,
    metadata_from_bytes,
    metadata_to_bytes,
)
from tierwise.wire.identity import Role

log = structlog.get_logger()

FIRST_MESSAGE_S = 30.0
DRAIN_S_MAX, DRAIN_BYTES_MAX = 5.0, 256 << 20
SIZE_MAX = 1 << 40


class CacheIngress(cache_pb2_grpc.CacheServiceServicer):
    """Serves CacheService."""

    def __init__(
        self,
        store: CacheStore,
        own: OwnRounds,
        index: HolderIndex,
        peers: CachePeers,
        reach: Reach,
        rights: Rights,
        replicator: Replicator,
        overview: Overview,
        node_id: NodeId,
        on_opened: Callable[[], None],
    ) -> None:
        """Serve.

        Args:
            store: This node's.
            own: The rounds that are this node's.
            index: Who holds what this node does not.
            peers: The way there.
            reach: Reads what lies elsewhere, and opens rounds.
            rights: Who may touch what.
            replicator: Copies what was taken.
            overview: Answers about jobs as a whole.
            node_id: This node.
            on_opened: Is told that this node holds other rounds than before.
        """
        self._store = store
        self._own = own
        self._index = index
        self._peers = peers
        self._reach = reach
        self._rights = rights
        self._replicator = replicator
        self._overview = overview
        self._here = node_id
        self._on_opened = on_opened

    # -- rounds ---------------------------------------------------------------------------------

    async def OpenRound(
        self, request: cache_pb2.OpenRoundRequest, context: Any
    ) -> cache_pb2.OpenRoundResponse:
        caller = Caller(context)
        manifest = manifest_from_pb(request.manifest)
        if not caller.is_node:
            is_admin = caller.identity.role is Role.ADMIN
            self._rights.check_owner(caller.uri, manifest.namespace, manifest.job)
            owner = self._rights.owner(manifest.namespace, manifest.job) or caller.uri
            manifest = replace(
                manifest,
                owner=(manifest.owner or owner) if is_admin else caller.uri,
                home=self._here,
            )
            elsewhere = self._elsewhere(manifest.namespace, manifest.job, manifest.round)
            if elsewhere:
                return await self._open_at(elsewhere[0], manifest)
        await self.open(manifest)
        return cache_pb2.OpenRoundResponse()

    async def open(self, manifest: RoundManifest, *, base_node: NodeId = ANYWHERE) -> None:
        """Open a round here, for a user, the scheduler or the node that is its home."""
        known = self._own.manifest(manifest.namespace, manifest.job, manifest.round)
        await self._reach.open(manifest, base_node=base_node)
        if known is None:
            self._on_opened()

    async def _open_at(
        self, node_id: NodeId, manifest: RoundManifest
    ) -> cache_pb2.OpenRoundResponse:
        asked = replace(manifest, home=node_id)
        request = cache_pb2.OpenRoundRequest(manifest=manifest_to_pb(asked))
        answer: cache_pb2.OpenRoundResponse = await self._peers.ask(node_id, "OpenRound", request)
        return answer

    # -- objects --------------------------------------------------------------------------------

    async def Put(
        self, request_iterator: AsyncIterator[cache_pb2.PutRequest], context: Any
    ) -> cache_pb2.PutResponse:
        try:
            return await self._put(request_iterator, context)
        finally:
            # A client whose write fails does not hear why: gRPC says "Internal error from Core".
            await _drain(request_iterator)

    async def _put(
        self, request_iterator: AsyncIterator[cache_pb2.PutRequest], context: Any
    ) -> cache_pb2.PutResponse:
        head = await _head(request_iterator)
        caller = Caller(context, head.writer)
        key = key_from_pb(head.key)
        if not caller.is_node:
            head.is_replica = False
            head.writer = caller.uri
            elsewhere = self._elsewhere(key.namespace, key.job, key.round)
            if elsewhere:
                return await self._pass_on(elsewhere, head, _chunks(request_iterator))
        return await self._take(head, key, caller, _chunks(request_iterator))

    async def _take(
        self,
        head: cache_pb2.ObjectHead,
        key: ObjectKey,
        caller: Caller,
        chunks: AsyncIterator[bytes],
    ) -> cache_pb2.PutResponse:
        incoming = IncomingHead(
            key=key,
            size_bytes=checks.integer(head.size_bytes, "size_bytes", 0, SIZE_MAX),
            digest=checks.digest(head.digest, "digest"),
            metadata=metadata_from_bytes(head.metadata),
            durability=durability_from_pb(head.durability),
            is_replica=head.is_replica,
        )
        if head.is_replica:
            writer = self._replica_writer(key, caller)
        else:
            writer = self._rights.writer(key, caller.uri, caller.identity)
        if incoming.durability is Durability.REPLICATED:
            self._replicator.check(key)
        base = None
        if head.HasField("relative_to"):
            other = key_from_pb(head.relative_to, "relative_to")
            file, _ = await self._reach.read(other, caller.uri)
            base = np.frombuffer(file.view(), np.float32)
        decoder = Decoder(head.encoding, base)
        info = await self._own.take(incoming, writer, _decoded(decoder, chunks))
        if head.is_replica:
            self._store.mark_replicated(key, [caller.identity.name])
        else:
            info = await self._replicated(info, incoming.durability)
        return cache_pb2.PutResponse(object=info_to_pb(info))

    def _replica_writer(self, key: ObjectKey, caller: Caller) -> str:
        """Return the cluster's name for a copy, if it comes from a node that may send copies.

        Raises:
            FailedPrecondition: It does not.
        """
        manifest = self._own.manifest(key.namespace, key.job, key.round)
        if manifest is not None:
            named = (manifest.home, *manifest.replica_nodes)
            if caller.identity.name not in named:
                raise FailedPrecondition(
                    f"{caller.identity.uri} is not among the nodes that hold {key}"
                )
        return CLUSTER

    async def _replicated(self, info: ObjectInfo, wanted: Durability) -> ObjectInfo:
        """Wait for a copy elsewhere, if that was asked for."""
        if info.quarantined or wanted is not Durability.REPLICATED:
            return info
        await self._replicator.copied(info.key)
        return self._store.info(info.key) or info

    async def _pass_on(
        self, holders: list[NodeId], head: cache_pb2.ObjectHead, chunks: AsyncIterator[bytes]
    ) -> cache_pb2.PutResponse:
        """Pass an object on to the first holder that answers."""
        failure: TierwiseError | None = None
        for node_id in holders[:HOLDERS_TRIED_MAX]:
            started = _Started(chunks)
            try:
                return await self._peers.relay(node_id, head, started.read())
            except Unavailable as error:
                failure = error
                if started.has_begun:  # what has been read cannot be sent again
                    break
        raise failure or Unavailable("no node that holds the round answers", retry_after_s=1.0)

    async def Get(
        self, request: cache_pb2.GetRequest, context: Any
    ) -> AsyncIterator[cache_pb2.GetResponse]:
        caller = Caller(context, request.caller)
        key = key_from_pb(request.key)
        self._rights.check_read(caller.uri, key)
        may_ask = not caller.is_node
        if not self._own.is_here(key) and may_ask:
            async for response in self._pass_through(key, caller, request.is_head_only):
                yield response
            return
        if caller.uri == CLUSTER:  # a node that refills asks nobody in turn
            view, info = await self._store.view(key)
        else:
            view, info = await self._own.sound(key, self._store.view)
        yield cache_pb2.GetResponse(head=_head_of(info))
        if not request.is_head_only:
            for start in range(0, view.nbytes, CHUNK_BYTES):
                yield cache_pb2.GetResponse(chunk=bytes(view[start : start + CHUNK_BYTES]))

    async def _pass_through(
        self, key: ObjectKey, caller: Caller, is_head_only: bool
    ) -> AsyncIterator[cache_pb2.GetResponse]:
        """Yield what the first holder answers that has the object; else what the store has."""
        request = cache_pb2.GetRequest(is_forwarded=True, caller=caller.uri)
        request.key.CopyFrom(key_to_pb(key))
        request.is_head_only = is_head_only
        failure: TierwiseError | None = None
        for node_id in self._reach.holders(key)[:HOLDERS_TRIED_MAX]:
            has_begun = False
            try:
                async for response in self._peers.stream(node_id, request):
                    has_begun = True
                    yield response
                return
            except (NotFound, Unavailable) as error:
                failure = error
                if has_begun:
                    raise
        try:
            view, info = await self._store.view(key)
        except NotFound as error:
            raise failure or error from None
        yield cache_pb2.GetResponse(head=_head_of(info))
        if not is_head_only:
            for start in range(0, view.nbytes, CHUNK_BYTES):
                yield cache_pb2.GetResponse(chunk=bytes(view[start : start + CHUNK_BYTES]))

    # -- reading about them ---------------------------------------------------------------------

    async def ListObjects(
        self, request: cache_pb2.ListObjectsRequest, context: Any
    ) -> cache_pb2.ListObjectsResponse:
        return await self._overview.objects(request, Caller(context, request.caller))

    async def AskStatistics(
        self, request: cache_pb2.AskStatisticsRequest, context: Any
    ) -> cache_pb2.AskStatisticsResponse:
        return await self._overview.ask(request, Caller(context, request.caller))

    async def ForgetJob(
        self, request: cache_pb2.ForgetJobRequest, context: Any
    ) -> cache_pb2.ForgetJobResponse:
        response = await self._overview.forget(request, Caller(context, request.caller))
        self._on_opened()
        return response

    def _elsewhere(self, namespace: str, job: str, number: int) -> list[NodeId]:
        """Return which nodes hold a round that this one does not."""
        if self._own.manifest(namespace, job, number) is not None:
            return []
        return self._index.holders(namespace, job, number)


class _Started:
    """Notes whether anything was read."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self.has_begun = False
        self._chunks = chunks

    async def read(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            self.has_begun = True
            yield chunk


async def _head(messages: AsyncIterator[cache_pb2.PutRequest]) -> cache_pb2.ObjectHead:
    """Return the first message of a Put.

    Raises:
        InvalidArgument: There is none, or it is no head.
    """
    try:
        async with asyncio.timeout(FIRST_MESSAGE_S):
            first = await anext(aiter(messages), None)
    except TimeoutError:
        first = None
    if first is None or first.WhichOneof("body") != "head":
        raise InvalidArgument("a Put begins with the head of its object")
    return first.head


async def _drain(messages: AsyncIterator[cache_pb2.PutRequest]) -> None:
    """Read what a client still sends of an object that is settled, within bounds."""
    size_bytes = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S_MAX):
            async for message in messages:
                size_bytes += len(message.chunk)
                if size_bytes > DRAIN_BYTES_MAX:
                    return


async def _chunks(messages: AsyncIterator[cache_pb2.PutRequest]) -> AsyncIterator[bytes]:
    async for message in messages:
        if message.WhichOneof("body") != "chunk":
            raise InvalidArgument("after its head a Put has chunks only")
        yield message.chunk


async def _decoded(decoder: Decoder, chunks: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for chunk in chunks:
        yield decoder.feed(chunk)
    yield decoder.finish()


def _head_of(info: ObjectInfo) -> cache_pb2.ObjectHead:
    """Return the head of an answer."""
    metadata = dict(info.metadata or {})
    return cache_pb2.ObjectHead(
        key=key_to_pb(info.key),
        size_bytes=info.size_bytes,
        digest=info.digest,
        metadata=metadata_to_bytes(metadata) if metadata else b"",
        durability=cache_pb2.Durability.ValueType(info.durability),
        row_count=len(metadata.get("clients", ())) if "is_in" in metadata else 0,  # type: ignore[arg-type]
    )

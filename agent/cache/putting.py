"""Results and updates on their way into a cache: this node's own, or that of another node."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent.cache.own import OwnRounds, pieces
from agent.cache.peers import CachePeers
from agent.cache.reach import ANYWHERE, HOLDERS_TRIED_MAX, Reach
from agent.cache.residuals import Residuals
from agent.cache.rights import CLUSTER, Rights
from tierwise.clock import precise_s
from tierwise.domain.cache import (
    Durability,
    IncomingHead,
    ObjectInfo,
    ObjectKey,
    ObjectKind,
)
from tierwise.domain.ids import NodeId
from tierwise.errors import FailedPrecondition, TierwiseError, Unavailable
from tierwise.v1 import cache_pb2
from tierwise.wire import compression
from tierwise.wire.convert_cache import key_to_pb, metadata_to_bytes
from tierwise.wire.identity import Identity, Role

TRIES_MAX = 4
RETRY_S = 0.2  # doubles


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One object to put.

    Attributes:
        vector: A buffer: float32 of the round's length, or encoded metadata.
        writer: For whom (URI); empty: the cluster itself.
        encoding: One of the wire's, or "auto".
        relative_to: What is subtracted on the way.
    """

    key: ObjectKey
    vector: Any
    metadata: dict[str, Any] | None = None
    durability: Durability = Durability.DISK
    writer: str = CLUSTER
    encoding: str = ""
    relative_to: ObjectKey | None = None

    @property
    def size_bytes(self) -> int:
        """Return how many bytes there are, uncompressed."""
        return memoryview(self.vector).nbytes


class Putting:
    """Puts for this node's calls."""

    def __init__(
        self,
        own: OwnRounds,
        reach: Reach,
        peers: CachePeers,
        rights: Rights,
        node_id: NodeId,
        residual_bytes_max: int,
    ) -> None:
        self._own = own
        self._reach = reach
        self._peers = peers
        self._rights = rights
        self._here = node_id
        self._residuals = Residuals(residual_bytes_max)
        self._rates: compression.Rates | None = None

    def forget(self, namespace: str, job: str) -> None:
        """Drop what is kept of a job."""
        self._residuals.forget(namespace, job)

    async def put(self, outgoing: Outgoing, node_id: NodeId = ANYWHERE) -> ObjectInfo:
        """Put an object into the cache of a node: the one named, else this one, else the holder.

        Raises:
            TierwiseError: As that node's store says.
            FailedPrecondition: The round is open nowhere.
        """
        key = outgoing.key
        is_open = self._own.manifest(key.namespace, key.job, key.round) is not None
        if node_id in ("", self._here) and is_open:
            own = Identity(Role.NODE, self._here)
            head = IncomingHead(
                key=key,
                size_bytes=outgoing.size_bytes,
                metadata=outgoing.metadata,
                durability=outgoing.durability,
            )
            writer = self._rights.writer(key, outgoing.writer, own)
            return await self._own.take(head, writer, pieces(outgoing.vector))
        targets = [node_id] if node_id else self._reach.holders(key)[:HOLDERS_TRIED_MAX]
        if not targets or targets == [self._here]:
            raise FailedPrecondition(f"round {key.round} of {key.namespace}/{key.job} is not open")
        return await self._send(outgoing, targets)

    async def _send(self, outgoing: Outgoing, targets: Sequence[NodeId]) -> ObjectInfo:
        failure: TierwiseError | None = None
        for attempt in range(TRIES_MAX):
            node_id = targets[attempt % len(targets)]
            try:
                return await self._send_to(outgoing, node_id)
            except Unavailable as error:
                failure = error
            await asyncio.sleep(RETRY_S * 2**attempt)
        raise failure or Unavailable(f"{outgoing.key} could not be put", retry_after_s=1.0)

    async def _send_to(self, outgoing: Outgoing, node_id: NodeId) -> ObjectInfo:
        key = outgoing.key
        encoding = await self._encoding(outgoing, node_id)
        head = cache_pb2.ObjectHead(
            key=key_to_pb(key),
            size_bytes=outgoing.size_bytes,
            metadata=metadata_to_bytes(outgoing.metadata),
            durability=cache_pb2.Durability.ValueType(outgoing.durability),
            encoding=encoding,
            writer=outgoing.writer,
        )
        if encoding == compression.RAW:
            return await self._peers.put(node_id, head, pieces(outgoing.vector))
        vector = np.frombuffer(outgoing.vector, np.float32)
        base: Any = None
        if outgoing.relative_to is not None:
            head.relative_to.CopyFrom(key_to_pb(outgoing.relative_to))
            file, _ = await self._reach.read(outgoing.relative_to, outgoing.writer)
            base = np.frombuffer(file.view(), np.float32)
        residual = self._residuals.copy_of(key, len(vector))
        blobs = compression.encoded(vector, encoding, relative_to=base, residual=residual)
        info = await self._peers.put(node_id, head, _in_thread(blobs))
        self._residuals.keep(key, residual)  # what has arrived is lost for good
        return info

    async def _encoding(self, outgoing: Outgoing, node_id: NodeId) -> str:
        if outgoing.key.kind not in (ObjectKind.UPDATE, ObjectKind.AGGREGATE):
            return compression.RAW
        if outgoing.encoding != compression.AUTO:
            return outgoing.encoding
        link = self._peers.link(node_id)
        if link is None:
            return compression.RAW
        if self._rates is None:
            self._rates = await asyncio.to_thread(compression.measured, precise_s)
        return compression.choose(outgoing.size_bytes // 4, link, self._rates)


async def _in_thread(blobs: Iterator[Any]) -> AsyncIterator[Any]:
    """Yield what an iterator makes, made in a thread."""
    while (blob := await asyncio.to_thread(next, blobs, None)) is not None:
        yield blob

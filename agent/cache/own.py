"""The rounds of this node: those it took, and those it has copies of.

Whatever is lost of them, by a broken disk or a restart without one, comes back from the other nodes
that hold the round, when somebody reads it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import structlog

from agent.cache.peers import CachePeers
from agent.cache.rights import CLUSTER
from agent.cache.store import CacheStore
from tierwise.domain.cache import (
    IncomingHead,
    ObjectInfo,
    ObjectKey,
    ObjectKind,
    RoundManifest,
)
from tierwise.domain.ids import NodeId
from tierwise.errors import NotFound, TierwiseError, Unavailable
from tierwise.wire.convert_cache import CHUNK_BYTES
from tierwise.wire.memfd import Memfd

log = structlog.get_logger()

YIELD_BYTES = 8 << 20  # copied in one go before the loop gets its turn
T = TypeVar("T")


class OwnRounds:
    """What this node holds, as the rest of the cache's fleet sees it."""

    def __init__(self, store: CacheStore, peers: CachePeers, node_id: NodeId) -> None:
        self._store = store
        self._peers = peers
        self._here = node_id

    def manifests(self, namespace: str, job: str) -> Iterator[RoundManifest]:
        """Yield the rounds of a job that this node holds, the newest first."""
        for number in reversed(self._store.rounds(namespace, job)):
            found = self.manifest(namespace, job, number)
            if found is not None:
                yield found

    def manifest(self, namespace: str, job: str, number: int) -> RoundManifest | None:
        """Return a round that this node took, or has copies of; None if it is other nodes'."""
        found = self._store.manifest(namespace, job, number)
        is_ours = found is not None and (
            found.home in ("", self._here) or self._here in found.replica_nodes
        )
        return found if is_ours else None

    def is_here(self, key: ObjectKey) -> bool:
        """Return whether this node should hold an object, or happens to: as a base."""
        if self.manifest(key.namespace, key.job, key.round) is not None:
            return True
        return self._store.has(key)

    def newest(self, namespace: str, job: str) -> tuple[int, int]:
        """Return the newest round here that has ended or has every update, and the newest of all.

        −1 stands for none.
        """
        newest = -1
        for manifest in self.manifests(namespace, job):
            newest = max(newest, manifest.round)
            if self._store.is_done(namespace, job, manifest.round):
                return manifest.round, newest
        return -1, newest

    async def take(self, head: IncomingHead, writer: str, pieces: AsyncIterator[Any]) -> ObjectInfo:
        """Take an object into this node's cache, piece by piece.

        Raises:
            TierwiseError: As the store says; nothing is kept then.
        """
        incoming = self._store.receive(head, writer)
        try:
            if incoming.known is None:  # else it is held already, and need not be read
                async for piece in pieces:
                    incoming.write(piece)
            return await incoming.commit()
        finally:
            incoming.abort()

    async def take_copy(self, info: ObjectInfo, file: Memfd) -> None:
        """Take a copy of what other nodes hold."""
        head = IncomingHead(
            key=info.key,
            size_bytes=info.size_bytes,
            digest=info.digest,
            metadata=info.metadata,
            is_replica=True,
        )
        await self.take(head, CLUSTER, pieces(file.view()))
        self._store.mark_replicated(info.key, info.node_ids)

    async def sound(self, key: ObjectKey, use: Callable[[ObjectKey], Awaitable[T]]) -> T:
        """Use an object of this node, with what is lost of it brought back from copies.

        Raises:
            NotFound: It is not here, nor at the nodes with copies.
            Unavailable: It is in the object store, which does not answer, and nowhere else.
        """
        if key.kind is not ObjectKind.MATRIX and not self._store.has(key):
            await self._refill([key])
        try:
            return await use(key)
        except (NotFound, Unavailable):
            if not await self._refill([each async for each in self._lost(key)]):
                raise
        return await use(key)

    async def _lost(self, key: ObjectKey) -> AsyncIterator[ObjectKey]:
        """Yield those of an object's parts whose bytes are gone: itself, or rows of a matrix."""
        keys = [key]
        if key.kind is ObjectKind.MATRIX:
            manifest = self.manifest(key.namespace, key.job, key.round)
            clients = manifest.clients if manifest is not None else ()
            keys = [replace(key, kind=ObjectKind.UPDATE, client=each.client) for each in clients]
        for each in keys:
            try:
                await self._store.view(each)
            except (NotFound, Unavailable):
                if self._store.has(each):
                    yield each

    async def _refill(self, keys: Sequence[ObjectKey]) -> bool:
        """Bring objects back from the nodes with copies; return whether any came."""
        has_come = False
        for key in keys:
            manifest = self.manifest(key.namespace, key.job, key.round)
            if manifest is None:
                continue
            if manifest.base is not None and manifest.base != key:  # updates are measured from it
                with contextlib.suppress(NotFound, Unavailable):
                    await self.sound(manifest.base, self._store.view)
            for node_id in copies_of(manifest, self._here):
                try:
                    file, info = await self._peers.get(node_id, key, CLUSTER)
                    self._store.discard(key)
                    await self.take_copy(info, file)
                except TierwiseError as error:
                    log.info("object.not_refilled", key=str(key), cause=str(error))
                    continue
                log.info("object.refilled", key=str(key), node_id=node_id)
                has_come = True
                break
        return has_come


def copies_of(manifest: RoundManifest, here: NodeId) -> list[NodeId]:
    """Return the other nodes that should hold a round: its home and those with copies."""
    named = dict.fromkeys((manifest.home, *manifest.replica_nodes))
    return [NodeId(node_id) for node_id in named if node_id and node_id != here]


async def pieces(buffer: Any) -> AsyncIterator[memoryview]:
    """Yield a buffer in pieces, and let others run in between."""
    view = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]
        if (start + CHUNK_BYTES) % YIELD_BYTES == 0:
            await asyncio.sleep(0)

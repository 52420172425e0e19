"""Objects wherever they are: in this node's cache, in that of the node that holds them, or stored.

Whoever reads gets a file that workers can map. What came from another node is kept for a while, for
the next call here often reads the same: the aggregate of the last round.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import structlog

from agent.cache.holders import HolderIndex, common
from agent.cache.peers import CachePeers
from agent.cache.residuals import Residuals
from agent.cache.rights import CLUSTER, Rights
from agent.cache.store import CacheStore
from tierwise.clock import monotonic_s, precise_s
from tierwise.domain.cache import (
    Durability,
    IncomingHead,
    ObjectInfo,
    ObjectKey,
    ObjectKind,
    RoundManifest,
)
from tierwise.domain.ids import NodeId
from tierwise.errors import FailedPrecondition, NotFound, TierwiseError, Unavailable
from tierwise.v1 import cache_pb2
from tierwise.wire import compression
from tierwise.wire.convert_cache import CHUNK_BYTES, key_to_pb, metadata_to_bytes
from tierwise.wire.identity import Identity, Role
from tierwise.wire.memfd import Memfd

log = structlog.get_logger()

YIELD_BYTES = 8 << 20  # copied in one go before the loop gets its turn
FETCHED_BYTES_MAX = 512 << 20  # of other nodes' objects that are kept here
FETCHED_KEPT_S = 120.0
HOLDERS_TRIED_MAX = 3
PUT_TRIES_MAX = 4
PUT_RETRY_S = 0.2  # doubles

ANYWHERE = NodeId("")
Found = tuple[Memfd, ObjectInfo]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One object to put.

    Attributes:
        vector: A buffer: float32 of the round's length, or encoded metadata.
        file: The same bytes, if they lie in a file.
        writer: For whom (URI); empty: the cluster itself.
        encoding: One of the wire's, or "auto".
        relative_to: What is subtracted on the way.
    """

    key: ObjectKey
    vector: Any
    file: Memfd | None = None
    metadata: dict[str, Any] | None = None
    durability: Durability = Durability.DISK
    writer: str = CLUSTER
    encoding: str = ""
    relative_to: ObjectKey | None = None

    @property
    def size_bytes(self) -> int:
        """Return how many bytes there are, uncompressed."""
        return memoryview(self.vector).nbytes


class Reach:
    """Reads and puts for this node's calls, and for callers who came to the wrong node."""

    def __init__(
        self,
        store: CacheStore,
        index: HolderIndex,
        peers: CachePeers,
        rights: Rights,
        node_id: NodeId,
    ) -> None:
        self.on_put: Callable[[ObjectInfo], None] = lambda info: None
        self._store = store
        self._index = index
        self._peers = peers
        self._rights = rights
        self._here = node_id
        self._fetched: OrderedDict[tuple[ObjectKey, str], tuple[Found, float]] = OrderedDict()
        self._fetching: dict[tuple[ObjectKey, str], asyncio.Task[Found]] = {}
        self._residuals = Residuals()
        self._rates: compression.Rates | None = None

    def manifests(self, namespace: str, job: str) -> list[RoundManifest]:
        """Return the rounds of a job that this node holds, ascending."""
        numbers = self._store.rounds(namespace, job)
        return [each for n in numbers if (each := self.manifest(namespace, job, n)) is not None]

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
        return self._store.info(key) is not None

    async def open(self, manifest: RoundManifest) -> None:
        """Open a round here, with its base if that is another node's.

        Raises:
            TierwiseError: As the store says.
        """
        base = manifest.base
        if base is not None and self._store.info(base) is None:
            try:
                await self._bring(base, manifest.owner)
            except NotFound:
                log.warning("base.not_found", key=str(base))  # the store says what follows
        await self._store.open_round(manifest)

    async def _bring(self, base: ObjectKey, owner: str) -> None:
        """Copy a base from who has it; its round stays that node's."""
        file, info = await self.read(base, CLUSTER)
        if self._store.info(base) is not None:
            return  # it has come back from the store, or from a copy
        if self._store.manifest(base.namespace, base.job, base.round) is None:
            bare = RoundManifest(
                namespace=base.namespace,
                job=base.job,
                round=base.round,
                clients=(),
                parameter_count=file.nbytes // 4,
                owner=owner,
                home=info.node_ids[0],
            )
            await self._store.open_round(bare)
        await self._take_copy(info, file)

    async def _take_copy(self, info: ObjectInfo, file: Memfd) -> None:
        head = IncomingHead(
            key=info.key,
            size_bytes=info.size_bytes,
            digest=info.digest,
            metadata=info.metadata,
            is_replica=True,
        )
        await self.take(head, CLUSTER, _pieces(file.view()))
        self._store.mark_replicated(info.key, info.node_ids)

    def holders(self, key: ObjectKey, near: NodeId = ANYWHERE) -> list[NodeId]:
        """Return who should have an object, the best first.

        Args:
            key: The object.
            near: Where somebody says that it is.
        """
        found = [self._here] if self.is_here(key) else []
        elsewhere = self._index.holders(key.namespace, key.job, key.round)
        if near and near not in (*found, *elsewhere):
            elsewhere.insert(0, near)
        elif near in elsewhere and not self._index.is_lost(near):
            elsewhere.remove(near)
            elsewhere.insert(0, near)
        return found + elsewhere

    def best(self, holders: Sequence[tuple[list[NodeId], int]]) -> tuple[NodeId, ...]:
        """Return the nodes that hold the most bytes of several objects."""
        return common(holders)

    # -- reading --------------------------------------------------------------------------------

    async def read(self, key: ObjectKey, caller: str, *, near: NodeId = ANYWHERE) -> Found:
        """Return an object as a file that workers can map.

        Args:
            key: The object.
            caller: For whom (URI); empty: the cluster itself.
            near: Where somebody says that it is.

        Raises:
            NotFound: It is nowhere.
            PermissionDenied: The caller may not read it.
            Unavailable: Who has it cannot be reached.
        """
        self._rights.check_read(caller, key)
        if self.is_here(key):
            await self.refill(key)
            return await self._store.read(key)
        kept = self._fetched.get((key, caller))
        if kept is not None and kept[1] > monotonic_s():
            self._fetched.move_to_end((key, caller))
            return kept[0]
        task = self._fetching.get((key, caller))
        if task is None:
            task = asyncio.get_running_loop().create_task(self._fetch(key, caller, near))
            self._fetching[key, caller] = task
            task.add_done_callback(lambda done: self._has_fetched(key, caller, done))
        return await asyncio.shield(task)

    async def _fetch(self, key: ObjectKey, caller: str, near: NodeId) -> Found:
        """Get an object from who has it, and keep it for the next who asks."""
        failure: TierwiseError | None = None
        for node_id in self.holders(key, near)[:HOLDERS_TRIED_MAX]:
            try:
                found = await self._peers.get(node_id, key, caller)
            except (NotFound, Unavailable) as error:
                failure = error
                continue
            if key.kind is not ObjectKind.MATRIX:  # its rows still come
                self._keep(key, caller, found)
            return found
        try:
            return await self._store.read(key)  # the object store may have it
        except NotFound:
            raise failure or _nowhere(key) from None

    def _has_fetched(self, key: ObjectKey, caller: str, done: asyncio.Task[Found]) -> None:
        del self._fetching[key, caller]
        if not done.cancelled():
            done.exception()  # who still waits hears it

    def _keep(self, key: ObjectKey, caller: str, found: Found) -> None:
        self._fetched[key, caller] = found, monotonic_s() + FETCHED_KEPT_S
        total_bytes = sum(file.nbytes for (file, _), _ in self._fetched.values())
        while total_bytes > FETCHED_BYTES_MAX:
            _, ((file, _), _) = self._fetched.popitem(last=False)
            total_bytes -= file.nbytes

    def forget(self, namespace: str, job: str) -> None:
        """Drop what is kept of a job."""
        for key, caller in list(self._fetched):
            if (key.namespace, key.job) == (namespace, job):
                del self._fetched[key, caller]
        self._residuals.forget(namespace, job)

    def expire(self) -> None:
        """Drop what has been kept long enough."""
        now_s = monotonic_s()
        for name, (_, until_s) in list(self._fetched.items()):
            if until_s <= now_s:
                del self._fetched[name]

    async def refill(self, key: ObjectKey) -> None:
        """Bring back what this node should hold and has lost, from the nodes with copies.

        What is nowhere, or cannot be reached, stays away: who reads it will hear so.
        """
        if key.kind is ObjectKind.MATRIX or self._store.info(key) is not None:
            return
        manifest = self.manifest(key.namespace, key.job, key.round)
        for node_id in copies_of(manifest, self._here) if manifest is not None else ():
            try:
                file, info = await self._peers.get(node_id, key, CLUSTER)
                await self._take_copy(info, file)
                return
            except TierwiseError:
                continue

    # -- putting --------------------------------------------------------------------------------

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

    async def put(self, outgoing: Outgoing, node_id: NodeId = ANYWHERE) -> ObjectInfo:
        """Put an object into the cache of a node: the one named, else this one, else the holder.

        Raises:
            TierwiseError: As that node's store says.
            FailedPrecondition: The round is open nowhere.
        """
        key = outgoing.key
        is_open = self.manifest(key.namespace, key.job, key.round) is not None
        if node_id in ("", self._here) and is_open:
            own = Identity(Role.NODE, self._here)
            head = IncomingHead(
                key=key,
                size_bytes=outgoing.size_bytes,
                metadata=outgoing.metadata,
                durability=outgoing.durability,
            )
            writer = self._rights.writer(key, outgoing.writer, own)
            info = await self.take(head, writer, _pieces(outgoing.vector))
            self.on_put(info)
            return info
        targets = [node_id] if node_id else self.holders(key)[:HOLDERS_TRIED_MAX]
        if not targets or targets == [self._here]:
            raise FailedPrecondition(f"round {key.round} of {key.namespace}/{key.job} is not open")
        return await self._send(outgoing, targets)

    async def _send(self, outgoing: Outgoing, targets: Sequence[NodeId]) -> ObjectInfo:
        failure: TierwiseError | None = None
        for attempt in range(PUT_TRIES_MAX):
            node_id = targets[attempt % len(targets)]
            try:
                return await self._send_to(outgoing, node_id)
            except Unavailable as error:
                failure = error
            await asyncio.sleep(PUT_RETRY_S * 2**attempt)
        raise failure or _nowhere(outgoing.key)

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
            return await self._peers.put(node_id, head, _pieces(outgoing.vector))
        vector = np.frombuffer(outgoing.vector, np.float32)
        base: Any = None
        if outgoing.relative_to is not None:
            head.relative_to.CopyFrom(key_to_pb(outgoing.relative_to))
            file, _ = await self.read(outgoing.relative_to, outgoing.writer)
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


def copies_of(manifest: RoundManifest, here: NodeId) -> list[NodeId]:
    """Return the other nodes that should hold a round: its home and those with copies."""
    named = dict.fromkeys((manifest.home, *manifest.replica_nodes))
    return [NodeId(node_id) for node_id in named if node_id and node_id != here]


async def _pieces(buffer: Any) -> AsyncIterator[memoryview]:
    """Yield a buffer in pieces, and let others run in between."""
    view = memoryview(buffer).cast("B") if memoryview(buffer).nbytes else memoryview(b"")
    for start in range(0, len(view), CHUNK_BYTES):
        yield view[start : start + CHUNK_BYTES]
        if (start + CHUNK_BYTES) % YIELD_BYTES == 0:
            await asyncio.sleep(0)


async def _in_thread(blobs: Iterator[Any]) -> AsyncIterator[Any]:
    """Yield what an iterator makes, made in a thread."""
    while (blob := await asyncio.to_thread(next, blobs, None)) is not None:
        yield blob


def _nowhere(key: ObjectKey) -> NotFound:
    return NotFound(f"there is no {key} here, nor at any node that is known to hold its round")

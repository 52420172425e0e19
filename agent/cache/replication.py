"""Copies of what this node has taken, on the other nodes that should hold it.

Each object goes to every node that its round names, in the order in which it came. What cannot be
delivered is tried again, later and later; a look over everything that is held finds what was given
up, or lost with a restart.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import structlog

from agent.cache.own import copies_of, pieces
from agent.cache.peers import CachePeers
from agent.cache.store import CacheStore
from tierwise.domain.cache import Durability, IncomingHead, ObjectInfo, ObjectKey, ObjectKind
from tierwise.domain.ids import NodeId
from tierwise.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    TierwiseError,
    Unavailable,
)
from tierwise.v1 import cache_pb2
from tierwise.wire.convert_cache import (
    key_to_pb,
    manifest_to_pb,
    metadata_to_bytes,
)

log = structlog.get_logger()

PENDING_MAX = 10_000  # objects per node; those beyond are found by the look over everything
RETRY_FIRST_S, RETRY_MAX_S = 0.2, 10.0
REPAIR_S = 15.0
COPY_WAIT_S = 30.0  # of a Put that asks for a copy


@dataclass(slots=True)
class _Target:
    """What one node should still get, oldest first."""

    pending: OrderedDict[ObjectKey, None] = field(default_factory=OrderedDict)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Replicator:
    """Copies objects of one node to others."""

    def __init__(
        self,
        store: CacheStore,
        peers: CachePeers,
        node_id: NodeId,
        is_lost: Callable[[NodeId], bool],
        group: asyncio.TaskGroup,
    ) -> None:
        """Copy what `store` takes.

        Args:
            store: This node's.
            peers: The way to the others.
            node_id: This node.
            is_lost: Whether a node is given up; it is not tried before it is back.
            group: Owns a task per node.
        """
        self._store = store
        self._peers = peers
        self._here = node_id
        self._is_lost = is_lost
        self._group = group
        self._targets: dict[NodeId, _Target] = {}
        self._copied: dict[ObjectKey, set[asyncio.Event]] = {}
        store.on_committed.append(self._committed)

    def check(self, key: ObjectKey) -> None:
        """Refuse to promise a copy of what no other node should hold.

        Raises:
            FailedPrecondition: The round names no other node, or is not open.
        """
        manifest = self._store.manifest(key.namespace, key.job, key.round)
        if manifest is None or not copies_of(manifest, self._here):
            raise FailedPrecondition(
                f"durability REPLICATED: round {key.round} of {key.namespace}/{key.job} names no "
                "replica_nodes; open it with some"
            )

    async def copied(self, key: ObjectKey) -> None:
        """Return once another node has a copy.

        Raises:
            Unavailable: None has taken it in time; it is on disk here, and goes there later.
        """
        event = asyncio.Event()
        waiting = self._copied.setdefault(key, set())
        waiting.add(event)
        try:
            info = self._store.info(key)
            if info is not None and info.durability >= Durability.REPLICATED:
                return
            async with asyncio.timeout(COPY_WAIT_S):
                await event.wait()
        except TimeoutError:
            raise Unavailable(
                f"{key} is on disk at {self._here}, and no other node has taken a copy within "
                f"{COPY_WAIT_S:.0f} s; it will be copied when one can",
                retry_after_s=RETRY_MAX_S,
            ) from None
        finally:
            waiting.discard(event)
            if not waiting:
                self._copied.pop(key, None)

    async def run_forever(self) -> None:
        """Look over the rounds that others should hold, now and then, for what has no copy yet."""
        while True:
            for manifest in self._store.manifests():
                if copies_of(manifest, self._here):
                    for info in self._store.list_round(manifest):
                        if not info.quarantined:
                            self._add(info)
                    await asyncio.sleep(0)  # there may be many
            await asyncio.sleep(REPAIR_S)

    def close(self) -> None:
        """Stop; the rest is copied after the next start."""
        for target in self._targets.values():
            if target.task is not None:
                target.task.cancel()

    def _committed(self, info: ObjectInfo, head: IncomingHead) -> None:
        if not head.is_replica:
            self._add(info)

    def _add(self, info: ObjectInfo) -> None:
        key = info.key
        manifest = self._store.manifest(key.namespace, key.job, key.round)
        if manifest is None or key.kind is ObjectKind.MATRIX:
            return
        for node_id in copies_of(manifest, self._here):
            if node_id in info.node_ids:
                continue
            target = self._targets.setdefault(node_id, _Target())
            if len(target.pending) < PENDING_MAX:
                target.pending.setdefault(key)
                target.wake.set()
            if target.task is None:
                target.task = self._group.create_task(self._feed(node_id, target))

    async def _feed(self, node_id: NodeId, target: _Target) -> None:
        """Send one node what it should get, for as long as this node runs."""
        pause_s = RETRY_FIRST_S
        while True:
            while target.pending:
                key = next(iter(target.pending))
                try:
                    if self._is_lost(node_id):
                        raise Unavailable(f"{node_id} is lost")
                    await self._copy(key, node_id)
                except (Unavailable, OSError):
                    await asyncio.sleep(pause_s)
                    pause_s = min(RETRY_MAX_S, 2 * pause_s)
                    continue
                except TierwiseError as error:  # it will not have it: the look may try again
                    log.warning("copy.refused", key=str(key), node_id=node_id, cause=str(error))
                except Exception:  # a bug must not end the copies of everything else
                    log.exception("copy.crashed", key=str(key), node_id=node_id)
                pause_s = RETRY_FIRST_S
                target.pending.pop(key, None)
            target.wake.clear()
            await target.wake.wait()

    async def _copy(self, key: ObjectKey, node_id: NodeId) -> None:
        manifest = self._store.manifest(key.namespace, key.job, key.round)
        if manifest is None:
            return  # forgotten meanwhile
        try:
            view, info = await self._store.view(key)
        except NotFound:
            return
        head = cache_pb2.ObjectHead(
            key=key_to_pb(key),
            size_bytes=info.size_bytes,
            digest=info.digest,
            metadata=metadata_to_bytes(info.metadata or None),
            is_replica=True,
        )
        try:
            await self._peers.put(node_id, head, pieces(view))
        except (FailedPrecondition, InvalidArgument, NotFound):
            # It may not know the round yet: say so and try once more.
            opened = manifest_to_pb(replace(manifest, home=manifest.home or self._here))
            await self._peers.ask(node_id, "OpenRound", cache_pb2.OpenRoundRequest(manifest=opened))
            await self._peers.put(node_id, head, pieces(view))
        except AlreadyExists:
            log.warning("copy.differs", key=str(key), node_id=node_id)
            return
        self._store.mark_replicated(key, [node_id])
        for event in self._copied.get(key, ()):
            event.set()

"""All of one node's cache, wired: the store, what others hold, copies, the gRPC side."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from agent.cache.holders import HolderIndex
from agent.cache.ingress import CacheIngress
from agent.cache.overview import Overview
from agent.cache.own import OwnRounds
from agent.cache.peers import CachePeers
from agent.cache.putting import Putting
from agent.cache.reach import Reach
from agent.cache.replication import Replicator
from agent.cache.rights import Rights
from agent.cache.store import CacheStore
from agent.objects import CallObjects
from tierwise.config import CacheConfig
from tierwise.domain.cache import HeldRounds
from tierwise.domain.event import ViewReceived
from tierwise.domain.ids import NodeId
from tierwise.v1 import cache_pb2
from tierwise.wire.convert_cache import HELD_ROUNDS_MAX, manifest_from_pb
from tierwise.wire.identity import Role

EXPIRE_S = 10.0
RESIDUAL_SHARE = 4  # of the cache's memory, for what lossy encodings lose
METHODS = ("OpenRound", "Put", "Get", "ListObjects", "AskStatistics", "ForgetJob")
ROLES = {
    f"/tierwise.v1.CacheService/{method}": {Role.USER, Role.ADMIN, Role.NODE} for method in METHODS
}


class CacheRoom:
    """Is the CacheSide of the uplink."""

    def __init__(
        self,
        folder: Path,
        config: CacheConfig,
        peers: CachePeers,
        node_id: NodeId,
        group: asyncio.TaskGroup,
    ) -> None:
        """Wire a cache that is not open yet.

        Args:
            folder: Where it keeps its files.
            config: Its bounds and its object store.
            peers: The way to other caches.
            node_id: This node.
            group: Owns its tasks.
        """
        self.on_changed: Callable[[], None] = lambda: None
        self._here = node_id
        self._store = CacheStore(folder, config, node_id=node_id)
        self._index = HolderIndex(node_id)
        self._peers = peers
        self._own = OwnRounds(self._store, peers, node_id)
        rights = Rights(self._own.manifests, self._index.owner)
        self._reach = Reach(self._store, self._own, self._index, peers, rights, node_id)
        residual_bytes_max = self._store.reading().memory_bytes_max // RESIDUAL_SHARE
        putting = Putting(self._own, self._reach, peers, rights, node_id, residual_bytes_max)
        self._replicator = Replicator(self._store, peers, node_id, self._index.is_lost, group)
        self.objects = CallObjects(self._reach, putting, group)
        overview = Overview(
            self._store, self._own, self._index, peers, rights, self._reach, putting, node_id
        )
        self.ingress = CacheIngress(
            self._store,
            self._own,
            self._index,
            peers,
            self._reach,
            rights,
            self._replicator,
            overview,
            node_id,
            lambda: self.on_changed(),
        )

    async def open(self) -> None:
        """Take up what the disk holds.

        Raises:
            FailedPrecondition: Another process uses the folder.
        """
        await self._store.recover()

    async def run_forever(self) -> None:
        """Write through, copy and evict, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._store.run_forever())
            group.create_task(self._replicator.run_forever())
            while True:
                await asyncio.sleep(EXPIRE_S)
                self._reach.expire()

    async def close(self) -> None:
        """Stop copying, finish what is being written, close the connections."""
        self._replicator.close()
        await self._peers.close()
        await self._store.close()

    # -- for the session ------------------------------------------------------------------------

    def held(self) -> tuple[HeldRounds, ...]:
        """Return what heartbeats say."""
        return tuple(map(self._told, self._store.held()))

    def received(self, view: ViewReceived) -> None:
        """Take over what other nodes hold."""
        self._index.received(view)

    async def open_round(self, manifest: cache_pb2.RoundManifest) -> None:
        """Open a round that the scheduler asks for: this node is its home.

        Raises:
            TierwiseError: As the store says.
        """
        asked = manifest_from_pb(manifest)
        base_node = NodeId(manifest.base_node)
        await self.ingress.open(replace(asked, home=asked.home or self._here), base_node=base_node)

    def _told(self, held: HeldRounds) -> HeldRounds:
        """Add what only this layer knows; a round that is open and empty is held, too."""
        manifests = self._own.manifests(held.namespace, held.job)[-HELD_ROUNDS_MAX:]
        return replace(
            held,
            rounds=tuple(manifest.round for manifest in manifests),
            owner=manifests[-1].owner if manifests else "",
            newest_done=self._own.newest(held.namespace, held.job)[0],
            is_copy=bool(manifests) and all(m.home not in ("", self._here) for m in manifests),
        )

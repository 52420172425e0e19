"""Objects wherever they are: in this node's cache, in that of the node that holds them, or stored.

Whoever reads gets a file that workers can map. What came from another node is kept for a while, for
the next call here often reads the same: the aggregate of the last round.
"""

import asyncio
from collections import OrderedDict

import structlog

from agent.cache.holders import HolderIndex
from agent.cache.own import OwnRounds
from agent.cache.peers import CachePeers
from agent.cache.rights import CLUSTER, Rights
from agent.cache.store import CacheStore
from tierwise.clock import monotonic_s
from tierwise.domain.cache import ObjectInfo, ObjectKey, ObjectKind, RoundManifest
from tierwise.domain.ids import NodeId
from tierwise.errors import NotFound, TierwiseError, Unavailable
from tierwise.wire.memfd import Memfd

log = structlog.get_logger()

FETCHED_SHARE = 4  # of the cache's memory, for other nodes' objects
FETCHED_KEPT_S = 120.0
HOLDERS_TRIED_MAX = 3

ANYWHERE = NodeId("")
Found = tuple[Memfd, ObjectInfo]


class Reach:
    """Reads for this node's calls, and opens rounds here."""

    def __init__(
        self,
        store: CacheStore,
        own: OwnRounds,
        index: HolderIndex,
        peers: CachePeers,
        rights: Rights,
        node_id: NodeId,
    ) -> None:
        self._store = store
        self._own = own
        self._index = index
        self._peers = peers
        self._rights = rights
        self._here = node_id
        self._fetched_bytes_max = store.reading().memory_bytes_max // FETCHED_SHARE
        self._fetched: OrderedDict[tuple[ObjectKey, str], tuple[Found, float]] = OrderedDict()
        self._fetching: dict[tuple[ObjectKey, str], asyncio.Task[Found]] = {}

    async def open(self, manifest: RoundManifest, *, base_node: NodeId = ANYWHERE) -> None:
        """Open a round here, with its base if that is another node's.

        Args:
            manifest: The round.
            base_node: Where the base is, by the word of who opens the round.

        Raises:
            TierwiseError: As the store says.
        """
        base = manifest.base
        if base is not None and self._store.info(base) is None:
            try:
                await self._bring(base, manifest.owner, base_node)
            except NotFound:
                log.warning("base.not_found", key=str(base))  # the store says what follows
        await self._store.open_round(manifest)

    async def _bring(self, base: ObjectKey, owner: str, near: NodeId) -> None:
        """Copy a base from who has it; its round stays that node's.

        This node may have taken part in that round, and not have what it ended with.
        """
        if near not in ("", self._here):
            file, info = await self._peers.get(near, base, CLUSTER)
        else:
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
        await self._own.take_copy(info, file)

    def holders(self, key: ObjectKey, near: NodeId = ANYWHERE) -> list[NodeId]:
        """Return who should have an object, the best first.

        Args:
            key: The object.
            near: Where somebody says that it is.
        """
        found = [self._here] if self._own.is_here(key) else []
        elsewhere = self._index.holders(key.namespace, key.job, key.round)
        if near and near not in (*found, *elsewhere):
            elsewhere.insert(0, near)
        elif near in elsewhere and not self._index.is_lost(near):
            elsewhere.remove(near)
            elsewhere.insert(0, near)
        return found + elsewhere

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
        if self._own.is_here(key):
            return await self._own.sound(key, self._store.read)
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
        while total_bytes > self._fetched_bytes_max:
            _, ((file, _), _) = self._fetched.popitem(last=False)
            total_bytes -= file.nbytes

    def forget(self, namespace: str, job: str) -> None:
        """Drop what is kept of a job."""
        for key, caller in list(self._fetched):
            if (key.namespace, key.job) == (namespace, job):
                del self._fetched[key, caller]

    def expire(self) -> None:
        """Drop what has been kept long enough."""
        now_s = monotonic_s()
        for name, (_, until_s) in list(self._fetched.items()):
            if until_s <= now_s:
                del self._fetched[name]


def _nowhere(key: ObjectKey) -> NotFound:
    return NotFound(f"there is no {key} here, nor at any node that is known to hold its round")

"""Which nodes have joined: each is listed until it is removed, also over restarts."""

import asyncio

import structlog
from sqlalchemy import Connection, select

from scheduler.dispatch import Dispatcher
from scheduler.store.store import Store
from scheduler.store.tables import nodes
from tierwise.clock import monotonic_s, wall_s
from tierwise.domain.event import NodeRemembered
from tierwise.errors import TierwiseError
from tierwise.v1 import types_pb2
from tierwise.wire import convert

log = structlog.get_logger()

STORE_INTERVAL_S = 5.0


class Roster:
    """Keeps the nodes of the view in the store."""

    def __init__(self, store: Store, dispatcher: Dispatcher) -> None:
        """Tell the machine of the nodes that joined before; they may not come back."""
        self._store = store
        self._dispatcher = dispatcher
        self._changed = asyncio.Event()
        now_unix_s = wall_s()
        for row in store.read_now(lambda c: c.execute(select(nodes)).all()):
            try:
                node = convert.node_from_pb(types_pb2.Node.FromString(row.node))
            except TierwiseError as error:
                log.error("node.not_loaded", node_id=row.node_id, cause=str(error))
                continue
            age_s = max(0.0, now_unix_s - row.seen_unix_s)
            dispatcher.feed(NodeRemembered(node=node, age_s=age_s))

    def changed(self) -> None:
        """Note that a node has joined or changed; it is stored at once."""
        self._changed.set()

    async def store_forever(self) -> None:
        """Store who is there when that changes, and now and then when each was heard of."""
        while True:
            self._changed.clear()
            try:
                await self._store_all()
            except TierwiseError as error:
                log.error("nodes.not_stored", cause=str(error))
            try:
                async with asyncio.timeout(STORE_INTERVAL_S):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _store_all(self) -> None:
        offset_s = wall_s() - monotonic_s()
        rows = [
            {
                "node_id": row.node.node_id,
                "node": convert.node_to_pb(row.node).SerializeToString(),
                "seen_unix_s": row.received_at_s + offset_s,
            }
            for row in self._dispatcher.plane.table.rows()
        ]

        def write(connection: Connection) -> None:
            connection.execute(nodes.delete())
            if rows:
                connection.execute(nodes.insert(), rows)

        await self._store.write(write)

"""One node's cache as its session sees it: rounds that the scheduler opens, what heartbeats say."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from agent.cache.peers import CachePeers
from agent.cache.putting import Outgoing
from agent.cache.room import CacheRoom
from agent.machine import NodeMachine
from agent.objects import Cached
from agent.runtime.instance import ItemKind, ItemResult, RunReport
from tierwise.config import CacheConfig
from tierwise.domain.cache import ObjectKey, ObjectKind, RoundClient, RoundManifest
from tierwise.domain.ids import NodeId
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Node, Tier
from tierwise.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from tierwise.v1 import cache_pb2
from tierwise.wire import payload
from tierwise.wire.convert_cache import key_to_pb, manifest_to_pb
from tierwise.wire.identity import Credentials

HERE = NodeId("edge-1")
OWNER = "tierwise://user/ada"
NOBODY = Credentials(b"", b"", b"")


@asynccontextmanager
async def room(folder: Path) -> AsyncIterator[CacheRoom]:
    node = Node(node_id=HERE, tier=Tier.EDGE, capacity=Resources(cpus=1, memory_mib=512))
    async with asyncio.TaskGroup() as group:
        peers = CachePeers(NodeMachine(node), NOBODY)
        made = CacheRoom(folder / "cache", CacheConfig(memory_mib=64), peers, HERE, group)
        await made.open()
        try:
            yield made
        finally:
            await made.close()


def manifest(number: int = 0, **changes: object) -> cache_pb2.RoundManifest:
    fields: dict[str, object] = {
        "namespace": "default",
        "job": "digits",
        "round": number,
        "clients": (RoundClient(client="a"), RoundClient(client="b")),
        "parameter_count": 1000,
        "owner": OWNER,
        **changes,
    }
    return manifest_to_pb(RoundManifest(**fields))  # type: ignore[arg-type]


def key(client: str = "a", kind: ObjectKind = ObjectKind.UPDATE, number: int = 0) -> ObjectKey:
    return ObjectKey(namespace="default", job="digits", round=number, kind=kind, client=client)


async def test_a_round_that_the_scheduler_opens_is_told_at_once_and_kept_over_a_restart(
    tmp_path: Path,
) -> None:
    async with room(tmp_path) as cache:
        changes: list[int] = []
        cache.on_changed = lambda: changes.append(1)
        assert cache.held() == ()
        await cache.open_round(manifest())
        await cache.open_round(manifest())  # sent again after a lost session
        assert changes == [1]
        (held,) = cache.held()
        assert (held.rounds, held.owner, held.is_copy, held.newest_done) == ((0,), OWNER, False, -1)
        with pytest.raises(AlreadyExists):
            await cache.open_round(manifest(parameter_count=2000))
    async with room(tmp_path) as cache:
        assert cache.held()[0].rounds == (0,)


async def test_a_round_is_done_when_every_update_is_in_or_it_has_ended(tmp_path: Path) -> None:
    async with room(tmp_path) as cache:
        putting = cache.objects._putting
        await cache.open_round(manifest(0))
        for client in "ab":
            assert cache.held()[0].newest_done == -1
            vector = np.full(1000, ord(client), np.float32)
            await putting.put(Outgoing(key=key(client), vector=vector))
        assert cache.held()[0].newest_done == 0
        await cache.open_round(manifest(1))
        assert cache.held()[0].newest_done == 0
        ended = Outgoing(key=key("", ObjectKind.AGGREGATE, 1), vector=np.ones(1000, np.float32))
        await putting.put(ended)
        assert cache.held()[0].newest_done == 1


async def test_what_is_nowhere_is_said_to_be(tmp_path: Path) -> None:
    async with room(tmp_path) as cache:
        with pytest.raises(NotFound, match="000007"):
            await cache._reach.read(key(number=7), OWNER)
        with pytest.raises(Unavailable, match="no way to the cache of fog-9"):
            await cache._reach.read(key(number=7), OWNER, near=NodeId("fog-9"))
        with pytest.raises(FailedPrecondition, match="not open"):
            await cache.objects._putting.put(Outgoing(key=key(), vector=np.ones(3, np.float32)))


def report(value: object) -> RunReport:
    items = (ItemResult(ItemKind.OK, payload.encode(value)),)
    return RunReport(
        items=items, run_s=0.1, peak_memory_mib=1, cpu_s=0.1, log="printed", instance_alive=True
    )


async def test_a_run_with_objects_ends_in_one_report_however_it_is_cut(tmp_path: Path) -> None:
    async with room(tmp_path) as cache:
        await cache.open_round(manifest())
        sink = cache_pb2.ObjectSink(key=key_to_pb(key()))
        ref = cache_pb2.ObjectRef(key=key_to_pb(key("b")))
        argument = payload.encode(((), {}))
        vector = np.ones(1000, np.float32)
        reports: list[RunReport] = []
        over = asyncio.Event()

        def done(found: RunReport) -> None:
            reports.append(found)
            over.set()

        async def carry(cached: Cached, *, is_cut: bool = False, value: object = None) -> RunReport:
            reports.clear()
            over.clear()
            started = asyncio.Event()

            def start(files: object, timeout_s: float, on_done: object) -> None:
                started.set()
                on_done(report(value))  # type: ignore[operator]

            carried = cache.objects.carry(cached, [argument], 5.0, start, done)
            if is_cut:
                assert carried.cut()
                assert not carried.cut()  # it is over
            await over.wait()
            await asyncio.sleep(0.01)
            (found,) = reports
            return found

        kept = await carry(Cached((), sink), value=(vector, {"loss": 0.5}))
        receipt = payload.decode(kept.items[0].value)
        assert (receipt["node_id"], receipt["loss"], kept.log) == ("edge-1", 0.5, "printed")
        cut = await carry(Cached((), sink), is_cut=True, value=(vector, {}))
        assert cut.items[0].kind is ItemKind.CANCELLED
        wrong = await carry(Cached((), sink), value=[1, 2])
        assert wrong.items[0].error_code == "result_rejected"
        other = await carry(Cached((), sink), value=(2 * vector, {}))
        assert other.items[0].error_code == "already_exists"
        lacking = await carry(Cached((ref,), None))
        assert lacking.items[0].error_code == "invalid_argument"  # the payload lacks no array
        assert lacking.instance_alive

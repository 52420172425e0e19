"""What nodes hold reaches the other nodes by way of the scheduler; rounds are opened over it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scheduler_builders import FakeAgent, SchedulerProcess, agent_of, connected

from scheduler.holdings import Holdings
from scheduler.outbox import Outbox
from tierwise.domain.cache import HeldRounds, ObjectKey, ObjectKind
from tierwise.domain.ids import NodeId
from tierwise.sdk.cached import CachedArray
from tierwise.v1 import cache_pb2, node_pb2, types_pb2
from tierwise.wire import payload

EDGE, FOG = NodeId("edge-1"), NodeId("fog-1")


def held(*rounds: int, **changes: Any) -> HeldRounds:
    return HeldRounds(namespace="default", job="digits", rounds=rounds, **changes)


def test_only_what_changed_is_news() -> None:
    holdings = Holdings()
    holdings.told(EDGE, (held(1),))
    assert holdings.take_news() == {EDGE}
    holdings.told(EDGE, (held(1),))
    assert holdings.take_news() == set()
    holdings.told(EDGE, ())
    assert holdings.take_news() == {EDGE}
    assert holdings.of(EDGE) == () == holdings.of(FOG)


def test_holders_of_a_round_are_those_that_took_it_then_copies() -> None:
    holdings = Holdings()
    holdings.told(EDGE, (held(1, 2, is_copy=True),))
    holdings.told(FOG, (held(2),))
    assert holdings.holders("default", "digits", 2) == [FOG, EDGE]
    assert holdings.holders("default", "digits", 1) == [EDGE]
    holdings.remove(FOG)
    assert holdings.holders("default", "digits", 2) == [EDGE]


async def test_news_of_a_cache_is_not_lost_when_views_are_merged() -> None:
    outbox = Outbox()
    row = cache_pb2.HeldRounds(namespace="default", job="digits", rounds=[1])
    node = types_pb2.Node(node_id="a")
    first = node_pb2.PeerView(node=node, held=[row], is_held_known=True)
    outbox.put_view(node_pb2.View(peers=[first]))
    outbox.put_view(node_pb2.View(peers=[node_pb2.PeerView(node=node, age_s=1.0)]))
    outbox.put_view(node_pb2.View(peers=[node_pb2.PeerView(node=node, age_s=2.0)]))
    messages: list[node_pb2.SessionResponse] = []

    async def write(message: node_pb2.SessionResponse) -> None:
        messages.append(message)
        outbox.close()

    await outbox.write_to(write)
    (peer,) = messages[0].view.peers
    assert peer.age_s == 2.0
    assert peer.is_held_known and list(peer.held) == [row]


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SchedulerProcess]:
    process = SchedulerProcess(tmp_path_factory.mktemp("scheduler")).start()
    yield process
    assert process.end() == 0, process.log.read_text()


async def tell(agent: FakeAgent, *rows: cache_pb2.HeldRounds) -> None:
    beat = agent._heartbeat()
    beat.held.extend(rows)
    beat.is_held_known = True
    await agent.send(node_pb2.SessionRequest(heartbeat=beat))


async def test_what_one_node_holds_the_others_hear_at_once_and_newcomers_too(
    scheduler: SchedulerProcess,
) -> None:
    row = cache_pb2.HeldRounds(
        namespace="default", job="digits", rounds=[3], owner="tierwise://user/ada", newest_done=3
    )

    def has_it(view: node_pb2.View) -> bool:
        return any(p.node.node_id == "one" and list(p.held) == [row] for p in view.peers)

    async with await agent_of(scheduler, "one") as one, await agent_of(scheduler, "two") as two:
        await tell(one, row)
        await two.told("view", has_it)
        async with await agent_of(scheduler, "three") as three:
            await three.told("view", has_it)
        await tell(one)
        await two.told(
            "view",
            lambda view: any(
                p.node.node_id == "one" and p.is_held_known and not p.held for p in view.peers
            ),
        )


async def test_durable_work_goes_to_who_holds_what_it_reads_and_keeps_its_references(
    scheduler: SchedulerProcess,
) -> None:
    key = ObjectKey(namespace="default", job="mine", round=1, kind=ObjectKind.MATRIX)
    array = CachedArray(key, (1000, 100_000))
    detached: list[Any] = []
    blob = payload.encode(((array,), {}), detached=detached)
    row = cache_pb2.HeldRounds(namespace="default", job="mine", rounds=[1])
    async with (
        await agent_of(scheduler, "holds") as holds,
        await agent_of(scheduler, "other"),
        connected(scheduler.main, scheduler.admin) as user,
    ):
        await tell(holds, row)
        await holds.told("view", lambda view: any(list(p.held) == [row] for p in view.peers))
        await user.deploy()
        sink = cache_pb2.ObjectSink(key=array.to_pb().key)
        sink.key.kind = cache_pb2.OBJECT_KIND_AGGREGATE
        inputs = [each.to_pb() for each in detached]
        await user.submit("reads", arguments=[blob], inputs=inputs, output=sink)
        work = await holds.dispatched()
        assert list(work.data_nodes) == ["holds"]
        assert work.data_bytes == array.nbytes == 4 * 10**8
        assert [ref.key.job for ref in work.inputs] == ["mine"]
        assert work.inputs[0].caller == work.output.caller == "tierwise://admin/admin"
        await holds.finish(work)


def test_a_cached_array_stands_in_a_payload_for_what_lies_elsewhere() -> None:
    key = ObjectKey(namespace="default", job="mine", round=1, kind=ObjectKind.MATRIX)
    array = CachedArray(key, (2, 3))
    own = np.ones(1 << 19, np.float32)
    detached: list[Any] = []
    blob = payload.encode([own, array], detached=detached)
    assert detached == [array]  # an array that is here stays inside
    assert payload.detached_bytes(blob) == [24]
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    back = payload.decode(blob, [memoryview(matrix).cast("B")])
    assert np.array_equal(back[0], own) and np.array_equal(back[1], matrix)
    with pytest.raises(payload.PayloadError, match="lie in a cache"):
        payload.encode([array])
    with pytest.raises(payload.PayloadError, match="at most 16"):
        payload.encode([array] * 17, detached=[])
    only: list[Any] = []
    payload.encode([own], detached=only, only_refs=True)
    assert only == []
    assert payload.detached_bytes(b"junk") == []

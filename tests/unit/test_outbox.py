"""What waits for a slow agent: bounded, newest state, nothing else lost or reordered."""

import asyncio

from scheduler.outbox import QUEUE_MAX, Outbox
from tierwise.v1 import node_pb2, types_pb2


def peer(name: str, sequence: int) -> node_pb2.PeerView:
    return node_pb2.PeerView(
        node=types_pb2.Node(node_id=name), reading=types_pb2.NodeReading(sequence=sequence)
    )


def view(*peers: node_pb2.PeerView, is_full: bool = False, **profiles: float) -> node_pb2.View:
    return node_pb2.View(
        peers=peers,
        is_full=is_full,
        profiles={k: types_pb2.FunctionProfile(run_s=v) for k, v in profiles.items()},
    )


def ack(name: str) -> node_pb2.SessionResponse:
    return node_pb2.SessionResponse(work_ack=node_pb2.WorkAck(request_id=name))


async def written(outbox: Outbox) -> list[node_pb2.SessionResponse]:
    """Return what is written now."""
    messages: list[node_pb2.SessionResponse] = []

    async def write(message: node_pb2.SessionResponse) -> None:
        messages.append(message)

    writer = asyncio.ensure_future(outbox.write_to(write))
    await asyncio.sleep(0)
    writer.cancel()
    return messages


async def test_views_that_wait_become_one_with_the_newest_word_on_each_node() -> None:
    outbox = Outbox()
    first = view(peer("a", 1), peer("b", 1), f=1.0)
    outbox.put_view(first)
    outbox.put_view(view(peer("a", 2), f=2.0, g=3.0))
    outbox.put_view(view(peer("a", 3)))
    [message] = await written(outbox)
    assert {p.node.node_id: p.reading.sequence for p in message.view.peers} == {"a": 3, "b": 1}
    assert {k: v.run_s for k, v in message.view.profiles.items()} == {"f": 2.0, "g": 3.0}
    assert not message.view.is_full
    assert first.peers[0].reading.sequence == 1  # other sessions share it


async def test_a_full_view_forgets_the_nodes_before_it_and_stays_full() -> None:
    outbox = Outbox()
    outbox.put_view(view(peer("gone", 1)))
    outbox.put_view(view(peer("a", 1), is_full=True))
    outbox.put_view(view(peer("a", 2)))
    [message] = await written(outbox)
    assert [(p.node.node_id, p.reading.sequence) for p in message.view.peers] == [("a", 2)]
    assert message.view.is_full


async def test_the_newest_catalogue_goes_before_the_work_that_may_need_it() -> None:
    outbox = Outbox()
    outbox.put(node_pb2.SessionResponse(welcome=node_pb2.Welcome()))
    outbox.put(ack("one"))
    outbox.put(node_pb2.SessionResponse(dispatch=types_pb2.Invocation(request_id="w")))
    outbox.put_catalogue(types_pb2.Catalogue(revision=1))
    outbox.put_catalogue(types_pb2.Catalogue(revision=2))
    messages = await written(outbox)
    kinds = [message.WhichOneof("body") for message in messages]
    assert kinds == ["welcome", "catalogue", "work_ack", "dispatch"]
    assert messages[1].catalogue.revision == 2


async def test_an_agent_that_reads_nothing_is_cut_off_at_the_bound() -> None:
    outbox = Outbox()
    for index in range(QUEUE_MAX):
        outbox.put(ack(str(index)))
    assert not outbox.is_closed
    outbox.put(ack("one too many"))
    assert outbox.is_closed
    assert await written(outbox) == []

"""The short way: real sockets, both ends in this process."""

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator

import pytest

from agent.door import Door
from tierwise.wire import memfd
from tierwise.wire.handover import MESSAGE_BYTES_MAX, UNCLAIMED_MAX, Handover, socket_name
from tierwise.wire.memfd import Memfd


@pytest.fixture
async def place() -> AsyncIterator[tuple[Door, bytes]]:
    node = f"test-{secrets.token_hex(4)}"
    door = Door(node, "127.0.0.1:1")
    door.open()
    try:
        yield door, socket_name(node, "127.0.0.1:1")
    finally:
        door.close()


def ends(door: Door, name: bytes) -> tuple[Handover, Handover]:
    client = Handover.connect(name)
    assert client is not None
    agent = door.find(client.channel_id)  # before the loop has had a turn
    assert agent is not None
    return client, agent


async def test_files_and_messages_cross_both_ways_in_order(place: tuple[Door, bytes]) -> None:
    client, agent = ends(*place)
    heard: list[bytes] = []
    agent.on_message = heard.append
    first, second = client.send(memfd.make([b"one"])), client.send(memfd.make([b"two"]))
    assert client.post(b"hello")
    assert first is not None
    assert second is not None
    taken = agent.take(second)
    assert isinstance(taken, Memfd)
    assert bytes(taken.view()) == b"two"
    assert bytes(agent.take(first).view()) == b"one"  # type: ignore[union-attr]
    assert agent.take(first) is None
    assert heard == [b"hello"]
    back = agent.send(memfd.make([b"three"]))
    assert back is not None
    assert bytes(client.take(back).view()) == b"three"  # type: ignore[union-attr]
    client.close()


async def test_an_id_that_nobody_said_finds_nobody(place: tuple[Door, bytes]) -> None:
    door, name = place
    client, _ = ends(door, name)
    assert door.find(secrets.token_bytes(16)) is None
    assert door.find(b"") is None
    client.close()


async def test_where_no_agent_listens_there_is_no_short_way() -> None:
    assert Handover.connect(socket_name("nobody", "127.0.0.1:1")) is None


async def test_a_client_that_leaves_is_forgotten(place: tuple[Door, bytes]) -> None:
    door, name = place
    before = len(list(os.scandir("/proc/self/fd")))
    for _ in range(100):
        client, agent = ends(door, name)
        client.send(memfd.make([b"never claimed"]))
        client.close()
        async with asyncio.timeout(10):
            while agent.is_open:
                await asyncio.sleep(0)
        assert door.find(client.channel_id) is None
    assert len(list(os.scandir("/proc/self/fd"))) <= before + 1


async def test_files_that_nobody_claims_are_bounded(place: tuple[Door, bytes]) -> None:
    client, agent = ends(*place)
    numbers = []
    for index in range(3 * UNCLAIMED_MAX):
        numbers.append(client.send(memfd.make([b"x"])))
        if index % 16 == 15:
            agent.drain()
    agent.drain()
    kept = [agent.take(number) for number in numbers if number is not None]
    assert sum(file is not None for file in kept) == UNCLAIMED_MAX
    client.close()


async def test_what_is_unsealed_or_too_large_does_not_go(place: tuple[Door, bytes]) -> None:
    client, agent = ends(*place)
    fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    socket.send_fds(client._channel, [(7).to_bytes(8, "little")], [fd])
    os.close(fd)
    assert agent.take(7) is None
    assert agent.is_open
    assert not client.post(bytes(MESSAGE_BYTES_MAX + 1))
    client.close()


async def test_a_socket_that_is_full_says_no_and_does_not_block(place: tuple[Door, bytes]) -> None:
    client, _ = ends(*place)
    sent = 0
    while client.post(bytes(MESSAGE_BYTES_MAX)):
        sent += 1
        assert sent < 10_000
    client.close()

"""Connections to other agents, one stream each, with link emulation where that is switched on."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import numpy as np

from agent.machine import NodeMachine
from tierwise.clock import monotonic_s
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.topology import Channel
from tierwise.v1 import types_pb2
from tierwise.wire.channel import secure_channel
from tierwise.wire.identity import Credentials, node_dns_name
from tierwise.wire.stream import CallStream

OnResult = Callable[[types_pb2.InvocationResult | None], None]


@dataclass(slots=True)
class _Peer:
    address: str
    channel: grpc.aio.Channel
    stream: CallStream
    out: Channel
    back: Channel


class PeerStreams:
    """The way to other agents. Connections open on first use and close with the agent."""

    def __init__(
        self, machine: NodeMachine, credentials: Credentials, *, emulate: bool, seed: int
    ) -> None:
        self._machine = machine
        self._credentials = credentials
        self._emulate = emulate
        self._rng = np.random.default_rng(seed)
        self._peers: dict[NodeId, _Peer] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def send(self, node_id: NodeId, invocation: types_pb2.Invocation, on_result: OnResult) -> None:
        """Send one invocation; `on_result` follows once, None if the peer is unreachable."""
        loop = asyncio.get_running_loop()
        peer = self._peer(node_id)
        if peer is None:
            loop.call_soon(on_result, None)
            return
        if not self._emulate:
            peer.stream.send(invocation, on_result)
            return
        request_bytes = sum(map(len, invocation.arguments))

        def arrived(result: types_pb2.InvocationResult | None) -> None:
            if result is None:
                on_result(None)
                return
            response_bytes = sum(len(item.value) for item in result.items)
            loop.call_later(self._delay_s(peer.back, response_bytes), on_result, result)

        delay_s = self._delay_s(peer.out, request_bytes)
        loop.call_later(delay_s, peer.stream.send, invocation, arrived)

    def cancel(self, node_id: NodeId, request_id: RequestId) -> None:
        """Tell the peer that the result is not wanted."""
        peer = self._peers.get(node_id)
        if peer is not None:
            peer.stream.cancel(request_id)

    async def close(self) -> None:
        """Close every connection; what is in flight fails."""
        peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
            await peer.stream.close()
            await peer.channel.close()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _delay_s(self, channel: Channel, payload_bytes: int) -> float:
        return channel.delay_s(payload_bytes, monotonic_s(), float(self._rng.random()))

    def _peer(self, node_id: NodeId) -> _Peer | None:
        """Return the connection to a node, made anew if the node has moved."""
        path = self._machine.path_to(node_id)
        if path is None or not path[0].address:
            return None
        node, link = path
        peer = self._peers.get(node_id)
        if peer is not None and peer.address == node.address:
            peer.out.link = peer.back.link = link
            return peer
        if peer is not None:
            self._retire(peer)
        channel = secure_channel(node.address, self._credentials, node_dns_name(node_id))
        peer = _Peer(node.address, channel, CallStream(channel), Channel(link), Channel(link))
        self._peers[node_id] = peer
        return peer

    def _retire(self, peer: _Peer) -> None:
        async def close() -> None:
            await peer.stream.close()
            await peer.channel.close()

        task = asyncio.get_running_loop().create_task(close(), name="peer-close")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

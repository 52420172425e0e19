"""The way from a client to the caches of the agents: one channel each, beside that of the calls."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc

from tierwise.errors import NotFound, TierwiseError, Unavailable
from tierwise.v1 import cache_pb2, cache_pb2_grpc
from tierwise.wire.channel import is_connected, secure_channel
from tierwise.wire.errors import error_from_rpc
from tierwise.wire.identity import node_dns_name

if TYPE_CHECKING:
    from tierwise.sdk.connection import Agent, Connection

ASK_TIMEOUT_S = 30.0
MOVE_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 3.0
TRIES_MAX = 4
RETRY_FIRST_S = 0.1  # doubles


@dataclass(slots=True)
class _Way:
    agent: "Agent"
    channel: grpc.aio.Channel
    stub: Any  # CacheServiceStub; its types are those of blocking calls


class Caches:
    """Asks the cache of a node by name, or of whichever agent is nearest."""

    def __init__(self, connection: "Connection") -> None:
        self._connection = connection
        self._ways: dict[str, _Way] = {}
        self._broken: set[str] = set()

    async def close(self) -> None:
        """Close every channel."""
        ways, self._ways = list(self._ways.values()), {}
        for way in ways:
            await way.channel.close()

    async def ask(self, node: str, method: str, request: Any) -> Any:
        """Call an RPC of one message each way.

        Args:
            node: Which node; empty: the nearest that answers.
            method: Of CacheService.
            request: Its message.

        Raises:
            TierwiseError: What it answered; Unavailable if nobody could be reached.
        """

        async def call(stub: Any) -> Any:
            return await getattr(stub, method)(request, timeout=ASK_TIMEOUT_S)

        return await self._try(node, call)

    async def put(
        self, node: str, head: cache_pb2.ObjectHead, chunks: Callable[[], Iterable[Any]]
    ) -> cache_pb2.ObjectInfo:
        """Send an object; again if a connection breaks, which changes nothing.

        Args:
            node: As in `ask`.
            head: What is said of it.
            chunks: Gives its bytes in pieces, from the beginning each time.
        """

        async def requests() -> AsyncIterator[cache_pb2.PutRequest]:
            yield cache_pb2.PutRequest(head=head)
            for chunk in chunks():
                yield cache_pb2.PutRequest(chunk=bytes(chunk))

        async def call(stub: Any) -> Any:
            return await stub.Put(requests(), timeout=MOVE_TIMEOUT_S)

        response: cache_pb2.PutResponse = await self._try(node, call)
        return response.object

    async def get(
        self, node: str, request: cache_pb2.GetRequest
    ) -> tuple[cache_pb2.ObjectHead, Any]:
        """Return the head of an object and its bytes, as a writable uint8 array."""
        import numpy as np

        async def call(stub: Any) -> Any:
            head: cache_pb2.ObjectHead | None = None
            body: Any = np.empty(0, np.uint8)
            count = 0
            async for response in stub.Get(request, timeout=MOVE_TIMEOUT_S):
                if response.WhichOneof("body") == "head":
                    head = response.head
                    if not request.is_head_only:
                        body = np.empty(head.size_bytes, np.uint8)
                else:
                    chunk = response.chunk
                    body[count : count + len(chunk)] = np.frombuffer(chunk, np.uint8)
                    count += len(chunk)
            if head is None or count != body.nbytes:
                raise Unavailable("the object came incomplete: read it again")
            return head, body

        head, body = await self._try(node, call)
        return head, body

    async def _try(self, node: str, call: Callable[[Any], Any]) -> Any:
        failure: TierwiseError | None = None
        for attempt in range(TRIES_MAX):
            if attempt:
                await asyncio.sleep(RETRY_FIRST_S * 2 ** (attempt - 1))
            try:
                way = await self._way(node, is_again=attempt > 0)
            except Unavailable as error:
                failure = error
                continue
            try:
                return await call(way.stub)
            except grpc.RpcError as error:
                failure = error_from_rpc(error)
                if not isinstance(failure, Unavailable):
                    raise failure from None
                # An agent that answers has its reasons; one that does not is left.
                if failure.retry_after_s is None:
                    await self._leave(way)
        raise failure or Unavailable("no cache could be reached")

    async def _way(self, node: str, *, is_again: bool) -> _Way:
        """Return the channel to a node once it stands."""
        known = self._ways.get(node)
        if known is not None and not is_again:
            return known
        agents = await self._connection.agents()
        agent = self._choose(node, agents)
        known = self._ways.get(agent.node_id)
        if known is not None and known.agent.address == agent.address:
            if not node:
                self._ways[""] = known
            return known
        channel = secure_channel(
            agent.address, self._connection.credentials, node_dns_name(agent.node_id)
        )
        if not await is_connected(channel, CONNECT_TIMEOUT_S):
            await channel.close()
            self._broken.add(agent.node_id)
            raise Unavailable(f"the cache of {agent.node_id} does not answer at {agent.address}")
        self._broken.discard(agent.node_id)
        way = _Way(agent, channel, cache_pb2_grpc.CacheServiceStub(channel))
        self._ways[agent.node_id] = way
        if not node:
            self._ways[""] = way
        return way

    def _choose(self, node: str, agents: "list[Agent]") -> "Agent":
        if node:
            for agent in agents:
                if agent.node_id == node:
                    return agent
            known = ", ".join(agent.node_id for agent in agents)
            raise NotFound(f"there is no node {node!r} that takes calls; there are {known}")
        if not agents:
            raise Unavailable("the cluster has no agent; start one")
        wanted = self._connection.entry_name
        return min(agents, key=lambda a: (a.node_id in self._broken, a.node_id != wanted))

    async def _leave(self, way: _Way) -> None:
        self._broken.add(way.agent.node_id)
        for name in [name for name, each in self._ways.items() if each is way]:
            del self._ways[name]
        await way.channel.close()

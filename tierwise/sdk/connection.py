"""The asynchronous side of a client: one event loop, one stream to an agent, stubs for the rest."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import msgspec

from tierwise.config import ClientConfig
from tierwise.domain.function import Priority
from tierwise.domain.topology import Tier
from tierwise.errors import DeadlineExceeded, NotFound, Unavailable
from tierwise.files import write_atomically
from tierwise.v1 import (
    call_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    function_pb2_grpc,
    policy_pb2_grpc,
    types_pb2,
    work_pb2_grpc,
)
from tierwise.wire.channel import diagnose, secure_channel
from tierwise.wire.errors import error_from_rpc
from tierwise.wire.identity import Credentials, node_dns_name, scheduler_dns_name
from tierwise.wire.stream import CallStream

T = TypeVar("T")

RPC_TIMEOUT_S = 10.0
CONNECTS_MAX = 4  # agents tried for one call whose stream broke
CALL_MARGIN_S = 5.0
DEFAULT_TIMEOUT_S = 90.0  # of a call by name whose own timeout is not known here


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a caller may ask for one call; None takes the function's own."""

    deadline_s: float | None = None
    timeout_s: float | None = None
    priority: Priority | None = None
    budget_usd: float | None = None
    tiers: frozenset[Tier] | None = None
    node: str = ""
    data_nodes: tuple[str, ...] = ()
    data_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Agent:
    """A node that takes calls."""

    node_id: str
    tier: int
    address: str
    cpus: float


class Connection:
    """Everything that one event loop needs to reach one cluster."""

    def __init__(self, folder: Path, config: ClientConfig, credentials: Credentials) -> None:
        self._folder = folder
        self._config = config
        self._credentials = credentials
        self._scheduler = secure_channel(config.scheduler, credentials, scheduler_dns_name())
        self.functions = function_pb2_grpc.FunctionServiceStub(self._scheduler)
        self.work = work_pb2_grpc.WorkServiceStub(self._scheduler)
        self.calls = call_pb2_grpc.CallServiceStub(self._scheduler)
        self.policies = policy_pb2_grpc.PolicyServiceStub(self._scheduler)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(self._scheduler)
        self._agents: list[Agent] = []
        self._entry: Agent | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stream: CallStream | None = None
        self._lock = asyncio.Lock()

    async def close(self) -> None:
        """Close the stream and every channel."""
        if self._stream is not None:
            await self._stream.close()
        if self._channel is not None:
            await self._channel.close()
        await self._scheduler.close()

    async def ask(
        self, method: Callable[..., Awaitable[T]], request: Any, timeout_s: float = RPC_TIMEOUT_S
    ) -> T:
        """Call the scheduler.

        Raises:
            TierwiseError: What it answered; Unavailable says why it cannot be reached.
        """
        try:
            return await method(request, timeout=timeout_s)
        except grpc.RpcError as failure:
            error = error_from_rpc(failure)
            if isinstance(error, Unavailable) and error.retry_after_s is None:
                cause = await diagnose(
                    self._config.scheduler, self._credentials, scheduler_dns_name()
                )
                raise Unavailable(f"the scheduler cannot be reached: {cause}") from None
            raise error from None

    async def agents(self) -> list[Agent]:
        """Return the nodes that take calls, nearest tier first; the last known if need be.

        Raises:
            Unavailable: The scheduler is away and nothing was learnt before.
        """
        cache = self._folder / "agents.json"
        try:
            response = await self.ask(self.cluster.ListNodes, cluster_pb2.ListNodesRequest(), 3.0)
        except Unavailable:
            if not self._agents:
                try:
                    self._agents = msgspec.json.decode(cache.read_bytes(), type=list[Agent])
                except (OSError, msgspec.DecodeError):
                    raise
            return self._agents
        self._agents = sorted(
            (
                Agent(n.node.node_id, n.node.tier, n.node.address, n.node.capacity.cpus)
                for n in response.nodes
                if n.node.address and n.state != types_pb2.NODE_STATE_LOST
            ),
            key=lambda agent: (agent.tier, agent.node_id),
        )
        try:
            write_atomically(cache, msgspec.json.encode(self._agents))
        except OSError:
            pass  # a read-only context works, it only forgets
        return self._agents

    async def cpu_count(self) -> float:
        """Return the CPUs of all agents that are known."""
        agents = self._agents or await self.agents()
        return sum(agent.cpus for agent in agents)

    async def invoke(
        self, function: str, arguments: Sequence[bytes], options: Options, timeout_s: float | None
    ) -> types_pb2.InvocationResult:
        """Run one invocation and return its result, with one item per argument set.

        A broken stream is opened again, to another agent if need be, and the invocation sent
        again under its old id: agents repeat the answer of what they ran before.

        Raises:
            DeadlineExceeded: There was no answer within the timeout and a margin.
            Unavailable: No agent could be reached.
        """
        invocation = invocation_of(function, arguments, options)
        limit_s = (options.timeout_s or timeout_s or DEFAULT_TIMEOUT_S) + CALL_MARGIN_S
        loop = asyncio.get_running_loop()
        tried: set[str] = set()
        stream: CallStream | None = None
        try:
            async with asyncio.timeout(limit_s):
                for _ in range(CONNECTS_MAX):
                    stream = self._stream or await self._connect(tried)
                    done: asyncio.Future[types_pb2.InvocationResult | None] = loop.create_future()
                    stream.send(invocation, _settle(done))
                    result = await done
                    if result is not None:
                        return result
                    await self._broken(stream, tried)
        except TimeoutError:
            if stream is not None:
                stream.cancel(invocation.request_id)
            raise DeadlineExceeded(f"{function} gave no answer within {limit_s:.0f} s") from None
        except asyncio.CancelledError:
            if stream is not None:
                stream.cancel(invocation.request_id)
                await asyncio.sleep(0)  # let the writer send it before the loop may stop
            raise
        where = ", ".join(sorted(tried)) or "no agent"
        raise Unavailable(f"the call was lost on its way to {where}; is the cluster up?")

    # -- the stream to the entry agent ----------------------------------------------------------

    async def _connect(self, tried: set[str]) -> CallStream:
        async with self._lock:
            if self._stream is not None:
                return self._stream
            agents = await self.agents()
            if not agents:
                raise Unavailable("the cluster has no agent that takes calls; start one")
            named = [agent for agent in agents if agent.node_id == self._config.entry]
            if self._config.entry and not named and not tried:
                raise NotFound(f"the entry node {self._config.entry!r} is not in the cluster")
            candidates = [a for a in (*named, *agents) if a.node_id not in tried]
            agent = candidates[0] if candidates else agents[0]
            self._entry = agent
            self._channel = secure_channel(
                agent.address, self._credentials, node_dns_name(agent.node_id)
            )
            self._stream = CallStream(self._channel)
            return self._stream

    async def _broken(self, stream: CallStream, tried: set[str]) -> None:
        if self._stream is not stream:
            return  # another call has seen to it
        if self._entry is not None:
            tried.add(self._entry.node_id)
        channel, self._channel, self._stream = self._channel, None, None
        await stream.close()
        if channel is not None:
            await channel.close()


def invocation_of(
    function: str, arguments: Sequence[bytes], options: Options
) -> types_pb2.Invocation:
    """Return the message of a new call with a fresh id."""
    invocation = types_pb2.Invocation(
        request_id=secrets.token_hex(10),
        function=function,
        arguments=arguments,
        deadline_s=options.deadline_s or 0.0,
        timeout_s=options.timeout_s or 0.0,
        node_id=options.node,
        data_nodes=options.data_nodes,
        data_bytes=options.data_bytes,
    )
    if options.priority is not None:
        invocation.priority = types_pb2.Priority.ValueType(options.priority)
    if options.budget_usd is not None:
        invocation.budget_usd = options.budget_usd
    if options.tiers is not None:
        invocation.tiers.extend(types_pb2.Tier.ValueType(tier) for tier in sorted(options.tiers))
    return invocation


def scaled(options: Options, spec_deadline_s: float | None, item_count: int) -> Options:
    """Return options for a chunk of calls: its deadline is that of all its items together."""
    deadline_s = options.deadline_s or spec_deadline_s
    if deadline_s is None or item_count == 1:
        return options
    return replace(options, deadline_s=deadline_s * item_count)


def _settle(
    done: "asyncio.Future[types_pb2.InvocationResult | None]",
) -> Callable[[types_pb2.InvocationResult | None], None]:
    def settle(result: types_pb2.InvocationResult | None) -> None:
        if not done.done():
            done.set_result(result)

    return settle



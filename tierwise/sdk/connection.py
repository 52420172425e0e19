"""The asynchronous side of a client: one event loop, one stream to an agent, stubs for the rest."""

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import msgspec

from tierwise.clock import monotonic_s
from tierwise.config import ClientConfig
from tierwise.domain.function import Priority
from tierwise.domain.topology import Tier
from tierwise.errors import (
    CallerError,
    DeadlineExceeded,
    NotFound,
    PayloadTooLarge,
    Unauthenticated,
    Unavailable,
)
from tierwise.files import write_atomically
from tierwise.sdk.cached import CachedArray, CachedResult
from tierwise.sdk.caches import Caches
from tierwise.sdk.lane import Lane, Lanes
from tierwise.v1 import (
    advisor_pb2_grpc,
    budget_pb2_grpc,
    call_pb2_grpc,
    cluster_pb2,
    cluster_pb2_grpc,
    federated_pb2_grpc,
    function_pb2_grpc,
    policy_pb2_grpc,
    types_pb2,
    work_pb2_grpc,
)
from tierwise.wire import memfd, payload
from tierwise.wire.channel import diagnose, secure_channel
from tierwise.wire.errors import error_from_rpc
from tierwise.wire.handover import ATTACHMENT_LOST, BOUND, Handover, socket_name
from tierwise.wire.identity import Credentials, node_dns_name, scheduler_dns_name
from tierwise.wire.memfd import Memfd
from tierwise.wire.stream import CallStream

T = TypeVar("T")

RPC_TIMEOUT_S = 10.0
LIST_TIMEOUT_S = 3.0
SENDS_MAX = 6  # of one call whose stream broke: once, and five times again
BACKOFF_FIRST_S = 0.05  # doubles with every send, so a call waits 1.6 s in all for an agent
FAILURES_MAX = 2  # in a row, before an agent is avoided
AVOID_S = 10.0
CALL_MARGIN_S = 5.0
DEFAULT_TIMEOUT_S = 90.0  # of a call by name whose own timeout is not known here
SWEEP_S = 0.1  # how exactly calls end on time
DRAIN_S = 0.02
LANE_TIMEOUT_S = 2.0
ARGUMENTS_BYTES_MAX = 120 << 20  # one message holds 128 MiB


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
    idempotency_key: str = ""
    output: CachedResult | None = None


@dataclass(frozen=True, slots=True)
class Agent:
    """A node that takes calls."""

    node_id: str
    tier: int
    address: str
    cpus: float


@dataclass(slots=True, eq=False)
class _Entry:
    """The open stream to the agent that takes this connection's calls."""

    agent: Agent
    channel: grpc.aio.Channel
    stream: CallStream
    handover: Handover | None = None  # if the agent is on this machine
    has_answered: bool = False

    async def close(self) -> None:
        """Close everything that leads to the agent."""
        await self.stream.close()
        await self.channel.close()
        if self.handover is not None:
            self.handover.close()


class Connection:
    """Everything that one event loop needs to reach one cluster."""

    def __init__(
        self,
        folder: Path,
        config: ClientConfig,
        credentials: Credentials,
        lanes: Lanes | None = None,
    ) -> None:
        """Make a connection that opens with its first call.

        Args:
            folder: The context.
            config: What the context says.
            credentials: Of its user.
            lanes: To be kept open for callers that block, if there may be some.
        """
        self._lanes = lanes
        self._opening: asyncio.Task[None] | None = None
        self._folder = folder
        self._config = config
        self.credentials = self._credentials = credentials
        self.caches = Caches(self)
        self._scheduler = secure_channel(config.scheduler, credentials, scheduler_dns_name())
        self.functions = function_pb2_grpc.FunctionServiceStub(self._scheduler)
        self.work = work_pb2_grpc.WorkServiceStub(self._scheduler)
        self.calls = call_pb2_grpc.CallServiceStub(self._scheduler)
        self.advisor = advisor_pb2_grpc.AdvisorServiceStub(self._scheduler)
        self.budgets = budget_pb2_grpc.BudgetServiceStub(self._scheduler)
        self.federated = federated_pb2_grpc.FederatedServiceStub(self._scheduler)
        self.policies = policy_pb2_grpc.PolicyServiceStub(self._scheduler)
        self.cluster = cluster_pb2_grpc.ClusterServiceStub(self._scheduler)
        self._agents: list[Agent] = []
        self._entry: _Entry | None = None
        self._failure_counts: dict[str, int] = {}
        self._avoided_until_s: dict[str, float] = {}
        self._lock = asyncio.Lock()
        self._open: dict[asyncio.Future[types_pb2.InvocationResult | None], float] = {}
        self._sweep: asyncio.TimerHandle | None = None

    @property
    def entry_name(self) -> str:
        """Return the node that takes the calls, or should; empty: the nearest."""
        return self._entry.agent.node_id if self._entry is not None else self._config.entry

    @property
    def entry(self) -> Agent | None:
        """Return the agent that takes the calls, if there is a stream to one."""
        return self._entry.agent if self._entry is not None else None

    async def close(self) -> None:
        """Close the stream and every channel."""
        entry, self._entry = self._entry, None
        if self._sweep is not None:
            self._sweep.cancel()
        if entry is not None:
            await self._leave(entry)
        await self.caches.close()
        await self._scheduler.close()
        # gRPC shares one queue among all loops of the process, and stumbles over events of a
        # loop that is closed: let it deliver what it still has for this one.
        await asyncio.sleep(DRAIN_S)

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
            response = await self.ask(
                self.cluster.ListNodes, cluster_pb2.ListNodesRequest(), LIST_TIMEOUT_S
            )
        except (Unavailable, DeadlineExceeded):
            if not self._agents:
                try:
                    self._agents = msgspec.json.decode(cache.read_bytes(), type=list[Agent])
                except (OSError, msgspec.DecodeError):
                    self._agents = []
            if not self._agents:
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
        with contextlib.suppress(OSError):  # a read-only context works, it only forgets
            write_atomically(cache, msgspec.json.encode(self._agents))
        return self._agents

    async def cpu_count(self) -> float:
        """Return the CPUs of all agents that are known."""
        agents = self._agents or await self.agents()
        return sum(agent.cpus for agent in agents)

    async def invoke(
        self,
        function: str,
        arguments: Sequence[bytes],
        options: Options,
        timeout_s: float | None,
        *,
        detached: Sequence[Any] = (),
        files: dict[int, Memfd] | None = None,
    ) -> types_pb2.InvocationResult:
        """Run one invocation and return its result, with one item per argument set.

        A broken stream is opened again, to another agent if that fails too, and the invocation
        sent again under its old id: an agent repeats the answer of what it ran before.

        Args:
            function: Its name.
            arguments: Encoded argument sets.
            options: What the caller asks for.
            timeout_s: The function's own, if it is known.
            detached: Arrays that the only argument set lacks. An agent on this machine is handed
                them as files; otherwise they are put back.
            files: Takes the files that such an agent hands over with the result, by number.

        Raises:
            PayloadTooLarge: The arguments do not fit into one message.
            DeadlineExceeded: There was no answer within the timeout and a margin.
            Unavailable: No agent could be reached; the message names those that were tried.
        """
        invocation = invocation_of(function, arguments, options, detached)
        if invocation.inputs:
            detached = ()  # they are in caches, and stay there
        limit_s = limit_of(options, timeout_s)
        ends_s = monotonic_s() + limit_s
        entry = self._entry
        try:
            if entry is None and detached:
                async with asyncio.timeout(ends_s - monotonic_s()):
                    entry = await self._connect()
            if entry is not None:
                is_handed = _hand_over(entry.handover, invocation, detached, files is not None)
                if not is_handed:
                    _put_back(invocation, detached)
                result = await self._sent(entry, invocation, ends_s)
                if result is not None and not (is_handed and _is_lost(result)):
                    if files is not None and entry.handover is not None:
                        numbers = [n for item in result.items for n in item.attachments]
                        found = ((n, entry.handover.take(n)) for n in numbers)
                        files.update({n: file for n, file in found if file is not None})
                    return result
                if is_handed:
                    _put_back(invocation, detached)
            async with asyncio.timeout(ends_s - monotonic_s()):
                return await self._send_again(entry, invocation, ends_s)
        except TimeoutError:
            raise late(function, limit_s) from None

    async def resend(
        self, invocation: types_pb2.Invocation, ends_s: float, limit_s: float
    ) -> types_pb2.InvocationResult:
        """Send what was lost with its lane; the rest as for `invoke`."""
        try:
            async with asyncio.timeout(ends_s - monotonic_s()):
                return await self._send_again(None, invocation, ends_s, was_sent=True)
        except TimeoutError:
            raise late(invocation.function, limit_s) from None

    def open_lane(self) -> None:
        """Begin to open one more lane, if the agent is on this machine."""
        entry = self._entry
        is_busy = self._opening is not None and not self._opening.done()
        if entry is None or self._lanes is None or is_busy or not entry.stream.has_short_way:
            return
        self._opening = asyncio.get_running_loop().create_task(self._open_lane(entry, self._lanes))

    async def _open_lane(self, entry: _Entry, lanes: Lanes) -> None:
        handover = Handover.connect(socket_name(entry.agent.node_id, entry.agent.address))
        if handover is None:
            lanes.has_room = False
            return
        loop = asyncio.get_running_loop()
        bound: asyncio.Future[None] = loop.create_future()

        def readable() -> None:
            handover.drain()
            if not handover.is_open:
                loop.remove_reader(fileno)

        def came(message: bytes) -> None:
            if message == BOUND and not bound.done():
                bound.set_result(None)

        fileno = handover.fileno()
        handover.on_message = came
        loop.add_reader(fileno, readable)
        entry.stream.bind(handover.channel_id)
        try:
            async with asyncio.timeout(LANE_TIMEOUT_S):
                await bound
        except TimeoutError:
            lanes.has_room = False  # the agent has its reasons
        loop.remove_reader(fileno)
        if bound.done() and not bound.cancelled() and self._entry is entry:
            lanes.add(Lane(handover))
        else:
            handover.close()

    async def _send_again(
        self,
        entry: _Entry | None,
        invocation: types_pb2.Invocation,
        ends_s: float,
        *,
        was_sent: bool = False,
    ) -> types_pb2.InvocationResult:
        """Open a stream and send; again with growing pauses when streams break, bounded.

        Args:
            entry: Whose stream broke while it held the invocation, if that was the beginning.
            invocation: What to send.
            ends_s: Monotonic time at which the caller gives up.
            was_sent: Whether it was before, so that an agent may have cancelled it.
        """
        tried = [] if entry is None else [entry]
        is_broken = entry is not None
        while len(tried) < SENDS_MAX:
            if tried:
                if is_broken:
                    await self._lost(tried[-1])
                await asyncio.sleep(BACKOFF_FIRST_S * 2 ** (len(tried) - 1))
            entry = self._entry or await self._connect()
            tried.append(entry)
            result = await self._sent(entry, invocation, ends_s)
            is_broken = result is None
            was_sent = was_sent or len(tried) > 1
            if result is not None and not (was_sent and _is_cancelled(result)):
                return result
            if result is not None:
                # Not cancelled by us: agents cancel what a broken stream leaves behind. It has
                # not run to its end, so it may run again.
                invocation.request_id = new_request_id()
        last = tried[-1]
        if is_broken:
            await self._lost(last)
        names = ", ".join(dict.fromkeys(e.agent.node_id for e in tried))
        cause = await diagnose(
            last.agent.address, self._credentials, node_dns_name(last.agent.node_id)
        )
        raise Unavailable(
            f"{invocation.function} could not be called in {len(tried)} tries ({names}): {cause}"
        )

    async def _sent(
        self, entry: _Entry, invocation: types_pb2.Invocation, ends_s: float
    ) -> types_pb2.InvocationResult | None:
        """Send one invocation and wait for its result; None if the stream broke first.

        Raises:
            TimeoutError: There was none until `ends_s`; the agent is told to stop.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[types_pb2.InvocationResult | None] = loop.create_future()

        def settle(result: types_pb2.InvocationResult | None) -> None:
            if not done.done():
                done.set_result(result)

        # One timer for all calls: a timer for each would cost as much as sending it.
        self._open[done] = ends_s
        if self._sweep is None:
            self._sweep = loop.call_later(SWEEP_S, self._end_late_calls, loop)
        entry.stream.send(invocation, settle)
        try:
            result = await done
        except (TimeoutError, asyncio.CancelledError):
            entry.stream.cancel(invocation.request_id)
            await asyncio.sleep(0)  # let the writer send it before the loop may stop
            raise
        finally:
            del self._open[done]
        if result is not None:
            entry.has_answered = True
        return result

    def _end_late_calls(self, loop: asyncio.AbstractEventLoop) -> None:
        now_s = monotonic_s()
        for done, ends_s in self._open.items():
            if ends_s <= now_s and not done.done():
                done.set_exception(TimeoutError())
        is_needed = bool(self._open)
        self._sweep = loop.call_later(SWEEP_S, self._end_late_calls, loop) if is_needed else None

    # -- the stream to the entry agent ----------------------------------------------------------

    async def _connect(self) -> _Entry:
        async with self._lock:
            if self._entry is None:
                agent = self._choose(await self.agents())
                channel = secure_channel(
                    agent.address, self._credentials, node_dns_name(agent.node_id)
                )
                name = socket_name(agent.node_id, agent.address)
                handover = Handover.connect(name)
                self._entry = _Entry(agent, channel, CallStream(channel, handover), handover)
                if self._lanes is not None:
                    self._lanes.has_room = handover is not None
            return self._entry

    def _choose(self, agents: Sequence[Agent]) -> Agent:
        """Return the agent to use: the configured one, else the nearest, but none that fails."""
        if not agents:
            raise Unavailable("the cluster has no agent that takes calls; start one")
        wanted = self._config.entry
        if wanted and not self._failure_counts and wanted not in {a.node_id for a in agents}:
            known = ", ".join(agent.node_id for agent in agents)
            raise NotFound(f"the entry node {wanted!r} is not in the cluster; it has {known}")
        now_s = monotonic_s()
        return min(
            agents,
            key=lambda agent: (
                max(0.0, self._avoided_until_s.get(agent.node_id, 0.0) - now_s),
                agent.node_id != wanted,
                agent.tier,
                agent.node_id,
            ),
        )

    async def _leave(self, entry: _Entry) -> None:
        if self._lanes is not None:
            self._lanes.close()
        await entry.close()

    async def _lost(self, entry: _Entry) -> None:
        """Take note that a stream broke; the next call opens another.

        Raises:
            TierwiseError: The agent refused us for good: trying again is of no use.
        """
        error = entry.stream.last_error
        if self._entry is entry:  # otherwise another call has seen to it
            self._entry = None
            node_id = entry.agent.node_id
            count = 1 if entry.has_answered else self._failure_counts.get(node_id, 0) + 1
            self._failure_counts[node_id] = count
            if count >= FAILURES_MAX:
                self._avoided_until_s[node_id] = monotonic_s() + AVOID_S
            await self._leave(entry)
        if isinstance(error, grpc.RpcError):
            refusal = error_from_rpc(error)
            if isinstance(refusal, CallerError | Unauthenticated):
                raise refusal from None


def limit_of(options: Options, timeout_s: float | None) -> float:
    """Return how many seconds a caller waits for a result."""
    return (options.timeout_s or timeout_s or DEFAULT_TIMEOUT_S) + CALL_MARGIN_S


def late(function: str, limit_s: float) -> DeadlineExceeded:
    """Return the error of a call that had no result in that time."""
    return DeadlineExceeded(f"{function} gave no answer within {limit_s:.0f} s")


def _hand_over(
    handover: Handover | None,
    invocation: types_pb2.Invocation,
    detached: Sequence[Any],
    wants_files: bool,
) -> bool:
    """Hand the arrays over and name them in the invocation; return whether nothing is missing."""
    if handover is None or not handover.is_open:
        return not detached
    if wants_files:
        invocation.channel_id = handover.channel_id
    for value in detached:
        try:
            number = handover.send(value.file if hasattr(value, "file") else memfd.make([value]))
        except OSError:  # no memory for it
            number = None
        if number is None:
            return False
        invocation.attachments.append(number)
    return True


def _put_back(invocation: types_pb2.Invocation, detached: Sequence[Any]) -> None:
    """Let the arrays travel inside the message."""
    invocation.ClearField("attachments")
    if detached:
        invocation.arguments[0] = payload.inline(invocation.arguments[0], detached)


def _is_lost(result: types_pb2.InvocationResult) -> bool:
    return bool(result.items) and result.items[0].message == ATTACHMENT_LOST


def _is_cancelled(result: types_pb2.InvocationResult) -> bool:
    return bool(result.items) and all(item.error_code == "cancelled" for item in result.items)


def new_request_id() -> str:
    """Return a fresh id; 80 random bits, so that two never meet."""
    return secrets.token_hex(10)


def invocation_of(
    function: str, arguments: Sequence[bytes], options: Options, detached: Sequence[Any] = ()
) -> types_pb2.Invocation:
    """Return the message of a new call with a fresh id.

    Raises:
        PayloadTooLarge: It would not fit into one message.
    """
    cached = [each for each in detached if isinstance(each, CachedArray)]
    size_bytes = sum(map(len, arguments))
    if not cached:
        size_bytes += sum(array.nbytes for array in detached)
    if size_bytes > ARGUMENTS_BYTES_MAX:
        raise PayloadTooLarge(
            f"the arguments of {function} have {size_bytes} bytes, the limit of one call is "
            f"{ARGUMENTS_BYTES_MAX}: send less, or send it in parts"
        )
    invocation = types_pb2.Invocation(
        request_id=new_request_id(),
        function=function,
        arguments=arguments,
        deadline_s=options.deadline_s or 0.0,
        timeout_s=options.timeout_s or 0.0,
        node_id=options.node,
        data_nodes=options.data_nodes,
        data_bytes=options.data_bytes,
        inputs=[each.to_pb() for each in cached],
        output=None if options.output is None else options.output.to_pb(),
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

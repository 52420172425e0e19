"""A function that lives on the cluster, and the ways to call it."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tierwise.clock import monotonic_s
from tierwise.config import parse_duration_s
from tierwise.domain.function import FunctionSpec, Priority
from tierwise.domain.topology import Tier, parse_tier
from tierwise.errors import InvalidArgument, NotFound, TierwiseError, Unavailable
from tierwise.sdk.cached import CachedResult
from tierwise.sdk.connection import Options, invocation_of, late, limit_of
from tierwise.sdk.handle import Handle
from tierwise.sdk.lane import Lane, LaneLost
from tierwise.sdk.mapping import Mapping, Target, encode, take, value_of
from tierwise.sdk.verb import Verb
from tierwise.v1 import work_pb2
from tierwise.wire.handover import SHORT_BYTES_MAX
from tierwise.wire.memfd import Memfd

if TYPE_CHECKING:
    from tierwise.sdk.client import Client

QUEUE_S = 30.0  # a call may wait this long in queues on top of its timeout, as agents have it
SUBMIT_TIMEOUT_S = 30.0
SUBMIT_TRIES_MAX = 6
SUBMIT_RETRY_FIRST_S = 0.2  # doubles: a scheduler that restarts is waited for, 6 s in all
SUBMIT_ITEMS_MAX = 500
SUBMIT_BYTES_MAX = 16 << 20


class MapVerb:
    """`.map(inputs)` as an iterator, `.map.aio(inputs)` as an asynchronous one."""

    def __init__(self, function: "RemoteFunction") -> None:
        self._function = function

    def __call__(
        self,
        *iterables: Iterable[Any],
        ordered: bool = True,
        return_exceptions: bool = False,
    ) -> Iterator[Any]:
        """Yield the result of each input, as `map` does.

        Inputs are read lazily and in this thread, and only so many ahead as keep the cluster busy.

        Args:
            *iterables: One per argument of the function.
            ordered: Yield in the order of the inputs, not as they end.
            return_exceptions: Yield errors in place of results instead of raising the first.
        """
        client = self._function.client()
        inputs = zip(*iterables, strict=False)
        mapping = client.run(lambda: self._function.mapping(is_ordered=ordered))
        in_flight_count, has_more = 0, True
        try:
            while in_flight_count or has_more:
                while has_more and in_flight_count < mapping.window:
                    if blobs := take(inputs, mapping.item_count):
                        client.call_soon(mapping.start, blobs)
                        in_flight_count += 1
                    else:
                        has_more = False
                    if mapping.is_ready:
                        break
                if in_flight_count:
                    results = client.run(mapping.next)
                    in_flight_count -= 1
                    yield from _checked(results, return_exceptions)
        finally:
            client.run(mapping.close)

    async def aio(
        self,
        *iterables: Iterable[Any],
        ordered: bool = True,
        return_exceptions: bool = False,
    ) -> AsyncIterator[Any]:
        """Yield as `__call__` does, without blocking the loop; the iterables must not block it."""
        inputs = zip(*iterables, strict=False)
        mapping = await self._function.mapping(is_ordered=ordered)
        in_flight_count, has_more = 0, True
        try:
            while in_flight_count or has_more:
                while has_more and in_flight_count < mapping.window:
                    if blobs := take(inputs, mapping.item_count):
                        mapping.start(blobs)
                        in_flight_count += 1
                    else:
                        has_more = False
                    if mapping.is_ready:
                        break
                if in_flight_count:
                    results = await mapping.next()
                    in_flight_count -= 1
                    for result in _checked(results, return_exceptions):
                        yield result
        finally:
            await mapping.close()


class RemoteFunction:
    """A deployed function by name. `tierwise.App` makes subclasses that also hold the code."""

    remote: Verb[..., Any]
    spawn: Verb[..., Handle]
    spawn_map: Verb[..., list[Handle]]
    map: MapVerb

    def __init__(
        self, client: "Callable[[], Client]", name: str, options: Options | None = None
    ) -> None:
        self.client = client
        self.name = name
        self._options = options or Options()
        self.remote = Verb(client, self._remote, self._remote_blocking)
        self.spawn = Verb(client, self._spawn)
        self.spawn_map = Verb(client, self._spawn_map)
        self.map = MapVerb(self)

    def options(
        self,
        *,
        deadline: str | float | None = None,
        timeout: str | float | None = None,
        priority: str | Priority | None = None,
        budget_usd: float | None = None,
        tier: str | Iterable[str] | None = None,
        node: str = "",
        data_nodes: Iterable[str] = (),
        data_bytes: int = 0,
        idempotency_key: str = "",
        output: CachedResult | None = None,
    ) -> "RemoteFunction":
        """Return the same function with other wishes for its calls.

        Args:
            deadline: How soon the result should be there, "200ms".
            timeout: When to give up, "30s". Durable work counts from its submission, and is
                never given up without one.
            priority: low, normal, high or critical.
            budget_usd: Nodes that would cost more are not used.
            tier: edge, fog, cloud, or several of them.
            node: Run on this node and no other.
            data_nodes: Nodes that hold the data it reads.
            data_bytes: How much that is, to weigh moving it.
            idempotency_key: Of durable work: the same key is accepted once, whoever sends it again.
            output: The cache that its result goes into; the call returns a receipt.

        Raises:
            InvalidArgument: A value is not understood.
        """
        old = self._options
        changed = replace(
            old,
            deadline_s=old.deadline_s if deadline is None else parse_duration_s(deadline),
            timeout_s=old.timeout_s if timeout is None else parse_duration_s(timeout),
            priority=old.priority if priority is None else parse_priority(priority),
            budget_usd=old.budget_usd if budget_usd is None else budget_usd,
            tiers=old.tiers if tier is None else parse_tiers(tier),
            node=node or old.node,
            data_nodes=tuple(data_nodes) or old.data_nodes,
            data_bytes=data_bytes or old.data_bytes,
            idempotency_key=idempotency_key or old.idempotency_key,
            output=output or old.output,
        )
        return self._with(changed)

    def _with(self, options: Options) -> "RemoteFunction":
        return RemoteFunction(self.client, self.name, options)

    async def resolve(self) -> tuple[str, FunctionSpec | None]:
        """Return the name to call, and the declaration if it is known here."""
        return self.name, None

    def resolved(self) -> tuple[str, FunctionSpec | None] | None:
        """Return what `resolve` would, if that is known without asking anybody."""
        return self.name, None

    def forget(self) -> bool:
        """Forget what is known of the deployed version; return whether another try may help."""
        return False

    async def mapping(self, *, is_ordered: bool) -> Mapping:
        """Return a new map on the running loop."""
        mapping = Mapping(self.client().connection(), await self._target(), is_ordered=is_ordered)
        await mapping.open()
        return mapping

    async def _target(self) -> Target:
        name, spec = await self.resolve()
        if spec is None:
            return Target(function=name, options=self._options)
        return Target(
            function=name,
            options=self._options,
            deadline_s=spec.deadline_s,
            timeout_s=spec.timeout_s + QUEUE_S,
        )

    async def _remote(self, *args: Any, **kwargs: Any) -> Any:
        detached: list[Any] = []
        return await self._answer(encode(args, kwargs, detached), detached)

    async def _answer(self, blob: bytes, detached: list[Any]) -> Any:
        value = await self._call(blob, detached)
        if isinstance(value, NotFound) and self.forget():
            value = await self._call(blob, detached)  # it was deleted: deploy it again
        if isinstance(value, TierwiseError):
            raise value
        return value

    def _remote_blocking(self, *args: Any, **kwargs: Any) -> Any:
        """Call by a lane if one is idle and the call is small, else through the client's loop."""
        detached: list[Any] = []
        blob = encode(args, kwargs, detached)
        client, known = self.client(), self.resolved()
        is_small = not detached and len(blob) <= SHORT_BYTES_MAX
        lane = client.lanes.take() if is_small and known is not None else None
        if lane is None or known is None:
            value = client.run(lambda: self._answer(blob, detached))
            if is_small and client.lanes.has_room:
                client.open_lane()
            return value
        try:
            value = self._call_by(lane, client, known, blob)
        finally:
            client.lanes.give_back(lane)
        if isinstance(value, NotFound) and self.forget():
            return client.run(lambda: self._answer(blob, detached))
        if isinstance(value, TierwiseError):
            raise value
        return value

    def _call_by(
        self, lane: Lane, client: "Client", known: tuple[str, FunctionSpec | None], blob: bytes
    ) -> Any:
        client.check_thread()
        name, spec = known
        limit_s = limit_of(self._options, spec.timeout_s + QUEUE_S if spec is not None else None)
        ends_s = monotonic_s() + limit_s
        invocation = invocation_of(name, [blob], self._options)
        invocation.channel_id = lane.channel_id
        files: dict[int, Memfd] = {}
        try:
            result = lane.call(invocation, ends_s, files)
        except TimeoutError:
            raise late(name, limit_s) from None
        except LaneLost:
            client.lanes.drop(lane)
            invocation.ClearField("channel_id")
            result = client.run(lambda: client.connection().resend(invocation, ends_s, limit_s))
        return value_of(result.items[0], files)

    async def _call(self, blob: bytes, detached: list[Any]) -> Any:
        name, spec = await self.resolve()
        timeout_s = spec.timeout_s + QUEUE_S if spec is not None else None
        files: dict[int, Memfd] = {}
        result = (
            await self.client()
            .connection()
            .invoke(name, [blob], self._options, timeout_s, detached=detached, files=files)
        )
        return value_of(result.items[0], files)

    async def _spawn(self, *args: Any, **kwargs: Any) -> Handle:
        return (await self._submit([_prepared(args, kwargs)]))[0]

    async def _spawn_map(self, *iterables: Iterable[Any]) -> list[Handle]:
        """Submit one piece of durable work per input, in batches that are accepted as a whole."""
        return await self._submit([_prepared(args, {}) for args in zip(*iterables, strict=False)])

    async def _submit(self, prepared: list[tuple[bytes, list[Any]]]) -> list[Handle]:
        name, _ = await self.resolve()
        client = self.client()
        submissions = [
            work_pb2.Submission(invocation=invocation_of(name, [blob], self._options, cached))
            for blob, cached in prepared
        ]
        if key := self._options.idempotency_key:
            for index, submission in enumerate(submissions):
                submission.idempotency_key = key if len(prepared) == 1 else f"{key}/{index}"
        handles = []
        for batch in _batches(submissions):
            response = await _submitted(client, work_pb2.SubmitRequest(submissions=batch))
            handles += [Handle(client, request_id) for request_id in response.request_ids]
        return handles


def parse_priority(value: str | Priority) -> Priority:
    """Return the priority of a name.

    Raises:
        InvalidArgument: It is none.
    """
    if isinstance(value, Priority):
        return value
    try:
        return Priority[value.upper()]
    except KeyError:
        raise InvalidArgument(f"priority {value!r}: use low, normal, high or critical") from None


def parse_tiers(value: str | Iterable[str]) -> frozenset[Tier]:
    """Return the tiers of one name or several.

    Raises:
        InvalidArgument: One of them is none, or there is none.
    """
    names = [value] if isinstance(value, str) else list(value)
    try:
        tiers = frozenset(parse_tier(name) for name in names)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
    if not tiers:
        raise InvalidArgument("tier: name at least one of edge, fog, cloud")
    return tiers


def _prepared(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, list[Any]]:
    """Return the arguments of durable work, and the cached arrays that they lack."""
    cached: list[Any] = []
    return encode(args, kwargs, cached, only_cached=True), cached


def _checked(results: list[Any], return_exceptions: bool) -> Iterator[Any]:
    for result in results:
        if isinstance(result, TierwiseError) and not return_exceptions:
            raise result
        yield result


async def _submitted(client: "Client", request: work_pb2.SubmitRequest) -> work_pb2.SubmitResponse:
    """Submit, again if the scheduler is away for a moment: the ids make that safe."""
    connection = client.connection()
    for retry in itertools.count():
        try:
            return await connection.ask(connection.work.Submit, request, SUBMIT_TIMEOUT_S)
        except Unavailable:
            if retry + 1 >= SUBMIT_TRIES_MAX:
                raise
        await asyncio.sleep(SUBMIT_RETRY_FIRST_S * 2**retry)
    raise AssertionError("unreachable")


def _batches(submissions: list[work_pb2.Submission]) -> Iterator[list[work_pb2.Submission]]:
    """Split submissions into messages that the scheduler takes."""
    batch: list[work_pb2.Submission] = []
    size_bytes = 0
    for submission in submissions:
        submission_bytes = submission.ByteSize()
        is_full = len(batch) >= SUBMIT_ITEMS_MAX or size_bytes + submission_bytes > SUBMIT_BYTES_MAX
        if batch and is_full:
            yield batch
            batch, size_bytes = [], 0
        batch.append(submission)
        size_bytes += submission_bytes
    if batch:
        yield batch

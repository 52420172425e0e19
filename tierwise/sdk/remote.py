"""A function that lives on the cluster, and the ways to call it."""

from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from tierwise.config import parse_duration_s
from tierwise.domain.function import FunctionSpec, Priority
from tierwise.domain.topology import Tier, parse_tier
from tierwise.errors import InvalidArgument, TierwiseError
from tierwise.sdk.connection import Options, invocation_of
from tierwise.sdk.handle import Handle
from tierwise.sdk.mapping import map_chunks, value_of
from tierwise.v1 import work_pb2
from tierwise.wire import payload

if TYPE_CHECKING:
    from tierwise.sdk.client import Client

P = ParamSpec("P")
R = TypeVar("R")


class Verb(Generic[P, R]):
    """One way to call: `verb(…)` blocks, `await verb.aio(…)` does not."""

    def __init__(
        self, client: "Callable[[], Client]", aio: Callable[P, Coroutine[Any, Any, R]]
    ) -> None:
        self._client = client
        self.aio = aio

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._client().run(lambda: self.aio(*args, **kwargs))


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
        """Yield the result of each input, as `map` does; inputs are read lazily.

        Args:
            *iterables: One per argument of the function.
            ordered: Yield in the order of the inputs, not as they end.
            return_exceptions: Yield errors in place of results instead of raising the first.
        """
        client = self._function.client()
        chunks = self._function.chunks(zip(*iterables, strict=False), is_ordered=ordered)

        async def following() -> list[Any] | None:
            return await anext(chunks, None)

        try:
            while (results := client.run(following)) is not None:
                for result in results:
                    if isinstance(result, TierwiseError) and not return_exceptions:
                        raise result
                    yield result
        finally:
            client.run(lambda: _close(chunks))

    async def aio(
        self,
        *iterables: Iterable[Any],
        ordered: bool = True,
        return_exceptions: bool = False,
    ) -> AsyncIterator[Any]:
        """Yield as `__call__` does, without blocking the loop."""
        chunks = self._function.chunks(zip(*iterables, strict=False), is_ordered=ordered)
        try:
            async for results in chunks:
                for result in results:
                    if isinstance(result, TierwiseError) and not return_exceptions:
                        raise result
                    yield result
        finally:
            await _close(chunks)


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
        self.remote = Verb(client, self._remote)
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
    ) -> "RemoteFunction":
        """Return the same function with other wishes for its calls.

        Args:
            deadline: How soon the result should be there, "200ms".
            timeout: When to give up, "30s".
            priority: low, normal, high or critical.
            budget_usd: Nodes that would cost more are not used.
            tier: edge, fog, cloud, or several of them.
            node: Run on this node and no other.
            data_nodes: Nodes that hold the data it reads.
            data_bytes: How much that is, to weigh moving it.

        Raises:
            InvalidArgument: A value is not understood.
        """
        changed = replace(
            self._options,
            deadline_s=_or(deadline, parse_duration_s, self._options.deadline_s),
            timeout_s=_or(timeout, parse_duration_s, self._options.timeout_s),
            priority=_or(priority, parse_priority, self._options.priority),
            budget_usd=self._options.budget_usd if budget_usd is None else budget_usd,
            tiers=_or(tier, parse_tiers, self._options.tiers),
            node=node or self._options.node,
            data_nodes=tuple(data_nodes) or self._options.data_nodes,
            data_bytes=data_bytes or self._options.data_bytes,
        )
        return self._with(changed)

    def _with(self, options: Options) -> "RemoteFunction":
        return RemoteFunction(self.client, self.name, options)

    async def resolve(self) -> tuple[str, FunctionSpec | None]:
        """Return the name to call, and the declaration if it is known here."""
        return self.name, None

    async def _remote(self, *args: Any, **kwargs: Any) -> Any:
        name, spec = await self.resolve()
        blob = _encode(args, kwargs)
        timeout_s = spec.timeout_s + 30.0 if spec is not None else None
        result = await self.client().connection().invoke(name, [blob], self._options, timeout_s)
        value = value_of(result.items[0])
        if isinstance(value, TierwiseError):
            raise value
        return value

    async def _spawn(self, *args: Any, **kwargs: Any) -> Handle:
        return (await self._submit([_encode(args, kwargs)]))[0]

    async def _spawn_map(self, *iterables: Iterable[Any]) -> list[Handle]:
        """Submit one piece of durable work per input; all or none is accepted."""
        return await self._submit([_encode(args, {}) for args in zip(*iterables, strict=False)])

    async def _submit(self, blobs: list[bytes]) -> list[Handle]:
        name, _ = await self.resolve()
        client = self.client()
        connection = client.connection()
        request = work_pb2.SubmitRequest(
            submissions=[
                work_pb2.Submission(invocation=invocation_of(name, [blob], self._options))
                for blob in blobs
            ]
        )
        response = await connection.ask(connection.work.Submit, request, 30.0)
        return [Handle(client, request_id) for request_id in response.request_ids]

    async def chunks(
        self, argument_sets: Iterable[tuple[Any, ...]], *, is_ordered: bool
    ) -> AsyncIterator[list[Any]]:
        """Yield lists of results; see `map`."""
        name, spec = await self.resolve()
        found = map_chunks(
            self.client().connection(),
            name,
            argument_sets,
            self._options,
            deadline_s=spec.deadline_s if spec is not None else None,
            timeout_s=spec.timeout_s if spec is not None else None,
            is_ordered=is_ordered,
        )
        try:
            async for results in found:
                yield results
        finally:
            await _close(found)


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
        raise InvalidArgument(
            f"priority {value!r}: use low, normal, high or critical"
        ) from None


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


V = TypeVar("V")
W = TypeVar("W")


def _or(value: V | None, parse: Callable[[V], W], otherwise: W | None) -> W | None:
    return otherwise if value is None else parse(value)


def _encode(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    try:
        return payload.encode((args, kwargs))
    except payload.PayloadError as error:
        raise InvalidArgument(f"the arguments cannot travel: {error}") from None


async def _close(chunks: AsyncIterator[Any]) -> None:
    close = getattr(chunks, "aclose", None)
    if close is not None:
        await close()

"""What changes until it has ended, for synchronous and asynchronous callers."""

from collections.abc import AsyncGenerator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grpc

from tierwise.wire.errors import error_from_rpc

if TYPE_CHECKING:
    from tierwise.sdk.client import Client
    from tierwise.sdk.connection import Connection

Change = TypeVar("Change")


class WatchVerb(Generic[Change]):
    """`.watch()` as an iterator, `.watch.aio()` as an asynchronous one."""

    def __init__(
        self,
        client: "Callable[[], Client]",
        call: "Callable[[Connection], Any]",
        change: Callable[[Any], Change],
    ) -> None:
        """Make a verb.

        Args:
            client: Whose background loop runs it for synchronous callers.
            call: Begins the RPC, which answers with a stream.
            change: What callers get of a response.
        """
        self._client = client
        self._call = call
        self._change = change

    def __call__(self) -> Iterator[Change]:
        """Yield every change until what is watched has ended."""
        client = self._client()
        changes = self.aio()

        async def following() -> Change | None:
            return await anext(changes, None)

        try:
            while (change := client.run(following)) is not None:
                yield change
        finally:
            client.run(changes.aclose)

    async def aio(self) -> AsyncGenerator[Change, None]:
        """Yield as `__call__` does, without blocking the loop.

        Raises:
            NotFound: There is nothing of that name.
            Unavailable: The scheduler went away; what is watched goes on when it is back.
        """
        call = self._call(self._client().connection())
        try:
            async for response in call:
                yield self._change(response)
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
        finally:
            call.cancel()

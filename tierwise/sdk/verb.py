"""One way to call, for synchronous and asynchronous callers."""

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

if TYPE_CHECKING:
    from tierwise.sdk.client import Client

P = ParamSpec("P")
R = TypeVar("R")


class Verb(Generic[P, R]):
    """`verb(…)` blocks, `await verb.aio(…)` does not."""

    def __init__(
        self,
        client: "Callable[[], Client]",
        aio: Callable[P, Coroutine[Any, Any, R]],
        blocking: Callable[P, R] | None = None,
    ) -> None:
        """Make a verb.

        Args:
            client: Whose background loop runs it for synchronous callers.
            aio: What it does.
            blocking: How a synchronous caller does the same, if not so.
        """
        self._client = client
        self.aio = aio
        self._blocking = blocking

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run `aio` on the client's background loop and wait for it."""
        if self._blocking is not None:
            return self._blocking(*args, **kwargs)
        return self._client().run(lambda: self.aio(*args, **kwargs))

"""A client of one cluster, for synchronous and asynchronous callers alike."""

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from tierwise.config import ClientConfig, load
from tierwise.domain.function import FunctionSpec
from tierwise.errors import NotFound
from tierwise.sdk.connection import Connection
from tierwise.sdk.handle import Handle
from tierwise.sdk.remote import RemoteFunction
from tierwise.v1 import function_pb2
from tierwise.wire import convert
from tierwise.wire.identity import Credentials

T = TypeVar("T")
CLOSE_TIMEOUT_S = 5.0


def find_context(context: str | Path | None = None) -> Path:
    """Return the folder that says how to reach the cluster.

    Looked up in this order: the argument, $TIERWISE_CONTEXT, ./.tierwise/client,
    ~/.tierwise/client.

    Raises:
        NotFound: None of them exists.
    """
    named = context or os.environ.get("TIERWISE_CONTEXT")
    places = [Path(named)] if named else [Path(".tierwise/client"), Path.home() / ".tierwise/client"]
    for place in places:
        if (place / "client.toml").exists():
            return place
    looked = " nor ".join(str(place) for place in places)
    raise NotFound(
        f"no cluster is known here (neither {looked}): start one with `tierwise up`, or join one "
        "with `tierwise login`"
    )


class Client:
    """Calls functions on a cluster. Thread-safe; close it, or use it in a `with` block.

    Synchronous methods run on one background event loop; asynchronous ones on the caller's own
    loop, with no thread in between.
    """

    def __init__(self, context: str | Path | None = None, *, entry: str | None = None) -> None:
        """Open a client.

        Args:
            context: Folder with client.toml and credentials; see `find_context`.
            entry: Node that takes the calls; default: the nearest tier's first.

        Raises:
            NotFound: There is no context.
            Unauthenticated: The context has no credentials.
        """
        self.folder = find_context(context)
        self.config = load(
            self.folder / "client.toml", ClientConfig, overrides={"entry": entry}, environ={}
        )
        self._credentials = Credentials.load(self.folder)
        self._connections: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Connection] = (
            weakref.WeakKeyDictionary()
        )
        self._deployed: dict[tuple[int, int], FunctionSpec] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the background loop and its connections."""
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        connection = self._connections.pop(loop, None)
        if connection is not None:
            closing = asyncio.run_coroutine_threadsafe(connection.close(), loop)
            try:
                closing.result(CLOSE_TIMEOUT_S)
            except TimeoutError:
                pass  # the loop stops next, which ends whatever is left
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join(CLOSE_TIMEOUT_S)

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        connection = self._connections.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            await connection.close()

    def connection(self) -> Connection:
        """Return the connection of the running event loop."""
        loop = asyncio.get_running_loop()
        connection = self._connections.get(loop)
        if connection is None:
            connection = Connection(self.folder, self.config, self._credentials)
            self._connections[loop] = connection
        return connection

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the background loop and return its result; Ctrl-C cancels it."""
        loop = self._background()
        future = asyncio.run_coroutine_threadsafe(_deferred(make), loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def function(self, name: str) -> RemoteFunction:
        """Return a deployed function by name (`resize`, `default/resize@3`), with no code at hand."""
        return RemoteFunction(lambda: self, name)

    def handle(self, request_id: str) -> Handle:
        """Return the handle of durable work that was submitted before."""
        return Handle(self, request_id)

    async def deploy(self, spec: FunctionSpec, code: bytes) -> FunctionSpec:
        """Deploy a function once per client; the same content again costs nothing.

        Raises:
            TierwiseError: The scheduler refused it, or is away.
        """
        key = (hash(spec), hash(code))
        known = self._deployed.get(key)
        if known is None:
            request = function_pb2.DeployFunctionRequest(spec=convert.spec_to_pb(spec), code=code)
            connection = self.connection()
            response = await connection.ask(connection.functions.DeployFunction, request, 60.0)
            known = self._deployed[key] = convert.spec_from_pb(response.spec)
        return known

    def _background(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = _new_loop()
                self._thread = threading.Thread(
                    target=loop.run_forever, name="tierwise-client", daemon=True
                )
                self._thread.start()
                self._loop = loop
            return self._loop


_default: Client | None = None
_default_lock = threading.Lock()


def connect(context: str | Path | None = None, *, entry: str | None = None) -> Client:
    """Open a client and make it the one that functions use unless told otherwise."""
    global _default
    client = Client(context, entry=entry)
    with _default_lock:
        _default = client
    return client


def default_client() -> Client:
    """Return the client of `connect`, opening one from the usual context if there is none."""
    global _default
    with _default_lock:
        if _default is None:
            _default = Client()
        return _default


async def _deferred(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Build the coroutine inside the loop, where `Client.connection` knows which loop it is."""
    return await make()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # for example on Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()



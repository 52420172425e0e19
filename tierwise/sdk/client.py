"""A client of one cluster, for synchronous and asynchronous callers alike."""

import asyncio
import atexit
import contextlib
import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tierwise.config import ClientConfig, load
from tierwise.domain.function import FunctionSpec
from tierwise.errors import FailedPrecondition, NotFound, Unavailable
from tierwise.files import write_atomically
from tierwise.sdk.connection import Connection
from tierwise.sdk.handle import Handle
from tierwise.sdk.lane import Lanes
from tierwise.sdk.remote import RemoteFunction
from tierwise.v1 import function_pb2, types_pb2
from tierwise.wire import convert
from tierwise.wire.identity import Credentials

T = TypeVar("T")
CLOSE_TIMEOUT_S = 5.0
DEPLOY_TIMEOUT_S = 60.0
DEPLOYED_MAX = 1000  # functions whose versions a context remembers


def find_context(context: str | Path | None = None) -> Path:
    """Return the folder that says how to reach the cluster.

    Looked up in this order: the argument, $TIERWISE_CONTEXT, ./.tierwise/client,
    ~/.tierwise/client.

    Raises:
        NotFound: None of them exists.
    """
    named = context or os.environ.get("TIERWISE_CONTEXT")
    usual = [Path(".tierwise/client"), Path.home() / ".tierwise/client"]
    places = [Path(named)] if named else usual
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
        self._deployed: dict[str, FunctionSpec] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.lanes = Lanes()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Close the background loop and its connections. Safe to call twice."""
        with self._lock:
            loop, self._loop = self._loop, None
            thread, self._thread = self._thread, None
        if loop is None or thread is None:
            return
        connection = self._connections.pop(loop, None)
        if connection is not None:
            closing = asyncio.run_coroutine_threadsafe(connection.close(), loop)
            with contextlib.suppress(TimeoutError):  # stopping the loop ends whatever is left
                closing.result(CLOSE_TIMEOUT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_TIMEOUT_S)
        if not thread.is_alive():
            loop.close()

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
            for old in [old for old in self._connections if old.is_closed()]:
                del self._connections[old]  # left by an asyncio.run that has ended
            lanes = self.lanes if loop is self._loop else None
            connection = Connection(self.folder, self.config, self._credentials, lanes)
            self._connections[loop] = connection
        return connection

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine on the background loop and return its result; Ctrl-C cancels it.

        Raises:
            FailedPrecondition: This is the background loop's own thread, which must not wait.
        """
        loop = self._background()
        self.check_thread()
        future = asyncio.run_coroutine_threadsafe(_deferred(make), loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            # Give the cancellation a moment to reach the agent before the process may end.
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(1.0)
            raise

    def check_thread(self) -> None:
        """Raise FailedPrecondition in the background loop's own thread, which must not wait."""
        if threading.current_thread() is self._thread:
            raise FailedPrecondition(
                "a blocking call inside the client's own loop would wait for itself: "
                "use `await … .aio(…)` here"
            )

    def open_lane(self) -> None:
        """Open one more lane for blocking calls, when the background loop comes to it."""
        self.call_soon(lambda: self.connection().open_lane())

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Call a function on the background loop, before whatever is run there next."""
        self._background().call_soon_threadsafe(callback, *args)

    def function(self, name: str) -> RemoteFunction:
        """Return a function by name (`resize`, `default/resize@3`), with no code at hand."""
        return RemoteFunction(lambda: self, name)

    def handle(self, request_id: str) -> Handle:
        """Return the handle of durable work that was submitted before."""
        return Handle(self, request_id)

    async def deploy(self, spec: FunctionSpec, code: bytes) -> FunctionSpec:
        """Deploy a function once per client; the same content again costs nothing.

        With the scheduler away, content that was deployed from this context before is taken as
        deployed: agents go on serving it.

        Raises:
            TierwiseError: The scheduler refused it, or is away.
        """
        wanted = convert.spec_to_pb(spec)
        key = hashlib.sha256(wanted.SerializeToString(deterministic=True) + code).hexdigest()
        known = self._deployed.get(key)
        if known is not None:
            return known
        request = function_pb2.DeployFunctionRequest(spec=wanted, code=code)
        connection = self.connection()
        try:
            response = await connection.ask(
                connection.functions.DeployFunction, request, DEPLOY_TIMEOUT_S
            )
        except Unavailable:
            remembered = self._remembered().get(key)
            if remembered is None:
                raise
            return convert.spec_from_pb(types_pb2.FunctionSpec.FromString(remembered))
        known = self._deployed[key] = convert.spec_from_pb(response.spec)
        self._remember(key, response.spec.SerializeToString())
        return known

    def forget(self) -> None:
        """Forget which functions are deployed; the next call of each deploys it again."""
        self._deployed.clear()

    def _remembered(self) -> dict[str, bytes]:
        try:
            return msgspec.msgpack.decode(
                (self.folder / "deployed.bin").read_bytes(), type=dict[str, bytes]
            )
        except (OSError, msgspec.DecodeError):
            return {}

    def _remember(self, key: str, spec: bytes) -> None:
        kept = self._remembered()
        if kept.get(key) == spec:
            return
        kept[key] = spec
        newest = dict(list(kept.items())[-DEPLOYED_MAX:])
        with contextlib.suppress(OSError):  # a read-only context works, it only forgets
            write_atomically(self.folder / "deployed.bin", msgspec.msgpack.encode(newest))

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


def handle(request_id: str) -> Handle:
    """Return the handle of durable work that was submitted before, on the default client."""
    return default_client().handle(request_id)


@atexit.register
def _close_default() -> None:
    """Close the default client before the interpreter ends: its loop runs in a daemon thread."""
    if _default is not None:
        _default.close()


async def _deferred(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Build the coroutine inside the loop, where `Client.connection` knows which loop it is."""
    return await make()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # for example on Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()

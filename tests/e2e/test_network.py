"""The network of a sealed function: what it lists, through the agent, and nothing else."""

import asyncio
import hashlib
import http.server
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import tierwise
from agent.runtime.environments import HOST
from agent.runtime.runtime import ItemKind, RunReport, Runtime
from tierwise.wire import payload

BODY = b"hello " * 100_000


class Answer(http.server.BaseHTTPRequestHandler):
    """Answers every request with the same text."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running.server_address[1]
        running.shutdown()


def fetch(url: str) -> bytes:
    import urllib.request

    with urllib.request.urlopen(url, timeout=5) as answer:
        return bytes(answer.read())


async def fetch_without_waiting(port: int) -> int:
    import asyncio

    reader, writer = await asyncio.open_connection("localhost", port)
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    found = len(await reader.read(-1))
    writer.close()
    return found


def fetch_by_asyncio(port: int) -> int:
    import asyncio

    return asyncio.run(fetch_without_waiting(port))


def send_other_things() -> str:
    """Hand the agent what is no socket, a target that is no text, and nothing at all."""
    import os
    import socket

    for descriptor in range(3, 64):
        try:
            end = socket.socket(socket.AF_UNIX, fileno=os.dup(descriptor))
            if end.type == socket.SOCK_SEQPACKET:
                socket.send_fds(end, [b"localhost:1"], [0])
                socket.send_fds(end, [b"\xff" * 400], [1, 2])
                end.send(b"localhost:1")
                end.send(b"x" * 100_000)
                return "sent"
        except OSError:
            continue
    return "no way found"


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[Runtime]:
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["fetch"]))
    runtime = Runtime(state_dir=tmp_path / "runtime", may_reach_node=True)
    await runtime.open()
    try:
        yield runtime
    finally:
        await runtime.close()


async def call(
    runtime: Runtime, folder: Path, function: Any, *arguments: Any, network: tuple[str, ...]
) -> RunReport:
    code = cloudpickle.dumps(function)
    path = folder / "code"
    path.write_bytes(code)
    await runtime.start(
        "a",
        code_digest=hashlib.sha256(code).hexdigest(),
        code_path=path,
        environment=HOST,
        memory_mib=128,
        network=network,
    )
    done: asyncio.Future[RunReport] = asyncio.get_running_loop().create_future()
    blob = payload.encode((list(arguments), {}))
    runtime.run("a", [blob], timeout_s=20, on_done=done.set_result)
    try:
        return await done
    finally:
        await runtime.stop("a")


async def test_a_listed_target_is_reached_by_ordinary_code(
    runtime: Runtime, tmp_path: Path, server: int
) -> None:
    network = (f"localhost:{server}",)
    url = f"http://localhost:{server}/"
    report = await call(runtime, tmp_path, fetch, url, network=network)
    assert payload.decode(report.items[0].value) == BODY
    assert not report.refused_calls
    report = await call(runtime, tmp_path, fetch_by_asyncio, server, network=network)
    assert payload.decode(report.items[0].value) > len(BODY)


@pytest.mark.parametrize("network", [(), ("localhost:1",), ("127.0.0.1:{port}",)])
async def test_a_target_that_is_not_listed_by_its_name_is_not_reached(
    runtime: Runtime, tmp_path: Path, server: int, network: tuple[str, ...]
) -> None:
    listed = tuple(target.format(port=server) for target in network)
    report = await call(runtime, tmp_path, fetch, f"http://localhost:{server}/", network=listed)
    (item,) = report.items
    assert item.kind is ItemKind.RAISED
    assert ("is not among" in item.message) == bool(network)


async def test_the_node_itself_is_reached_only_if_its_owner_says_so(
    tmp_path: Path, server: int
) -> None:
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["fetch"]))
    runtime = Runtime(state_dir=tmp_path / "closed")
    await runtime.open()
    try:
        for name in ("localhost", "127.0.0.1", "0.0.0.0"):
            target = f"{name}:{server}"
            report = await call(runtime, tmp_path, fetch, f"http://{target}/", network=(target,))
            assert "this node itself" in report.items[0].message
    finally:
        await runtime.close()


async def test_nonsense_to_the_relay_harms_nobody(
    runtime: Runtime, tmp_path: Path, server: int
) -> None:
    network = (f"localhost:{server}",)
    report = await call(runtime, tmp_path, send_other_things, network=network)
    assert payload.decode(report.items[0].value) == "sent"
    report = await call(runtime, tmp_path, fetch, f"http://localhost:{server}/", network=network)
    assert report.items[0].kind is ItemKind.OK


async def test_no_connection_outlives_its_instance(runtime: Runtime, tmp_path: Path) -> None:
    def leave_open(port: int) -> None:
        import builtins
        import socket

        vars(builtins)["kept"] = socket.create_connection(("localhost", port))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        await call(runtime, tmp_path, leave_open, port, network=(f"localhost:{port}",))
        end, _ = await asyncio.to_thread(listener.accept)
        with end:
            end.settimeout(10)
            assert await asyncio.to_thread(end.recv, 1) == b""


@pytest.mark.parametrize("target", ["example", "example:0", "example:70000", "http://x:1", ":80"])
def test_a_target_that_is_none_is_refused_where_it_is_declared(target: str) -> None:
    app = tierwise.App("net")
    with pytest.raises(tierwise.InvalidArgument, match="host:port"):
        app.function(network=[target])(fetch)


def test_one_target_needs_a_list_too() -> None:
    app = tierwise.App("net")
    with pytest.raises(tierwise.InvalidArgument, match="network="):
        app.function(network="api.example:443")(fetch)

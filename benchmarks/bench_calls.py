"""What does a warm call cost over a bare gRPC stream, and what does `.map` win over unary calls?

    python -m benchmarks.bench_calls

One edge node without emulation, a function that returns its argument. The rivals are echo servers
in processes of their own that run nothing. All rows are measured interleaved, round by round.
"""

import asyncio
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import uvloop

import tierwise
from benchmarks.report import at_least, at_most, make_table, show, spread
from tierwise.clock import precise_s
from tierwise.wire.channel import channel_options, secure_channel
from tierwise.wire.identity import Credentials

ROUNDS = 20
CALLS = 100  # per round, one after the other
CONCURRENT = 64  # calls in flight where throughput is measured
MAP_ITEMS = 20_000  # per round
RATIO_MAX = 1.5
SPEEDUP_MIN = 10.0

app = tierwise.App("bench")


@app.function(memory="64MiB", deadline="1s")
def same(value: int) -> int:
    return value


@contextlib.contextmanager
def echo_server(*arguments: str) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.echo_server", *arguments]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        yield f"127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.stdin.close()
        process.wait()


@contextlib.asynccontextmanager
async def ping(channel: grpc.aio.Channel) -> AsyncIterator[Callable[[], Awaitable[Any]]]:
    """Yield one ping-pong over a persistent stream."""
    call = channel.stream_stream("/echo.Echo/Stream")()

    async def once() -> None:
        await call.write(b"x" * 64)
        await call.read()

    try:
        yield once
    finally:
        call.cancel()


async def median_us(call: Callable[[], Awaitable[Any]]) -> float:
    elapsed = np.empty(CALLS)
    for index in range(CALLS):
        start_s = precise_s()
        await call()
        elapsed[index] = precise_s() - start_s
    return float(np.median(elapsed)) * 1e6


async def rate(call: Callable[[], Awaitable[Any]], count: int) -> float:
    """Return calls per second with CONCURRENT of them in flight."""

    async def worker() -> None:
        for _ in range(count // CONCURRENT):
            await call()

    start_s = precise_s()
    await asyncio.gather(*(worker() for _ in range(CONCURRENT)))
    return count / (precise_s() - start_s)


async def map_rate(function: Any) -> float:
    start_s = precise_s()
    total = 0
    async for value in function.map.aio(range(MAP_ITEMS)):
        total += value
    assert total == MAP_ITEMS * (MAP_ITEMS - 1) // 2, "a result was lost or doubled"
    return MAP_ITEMS / (precise_s() - start_s)


async def measure(cluster: tierwise.LocalCluster, plain: str, secure: str) -> dict[str, Any]:
    client = tierwise.Client(cluster.context)
    app.use(client)
    figures: dict[str, list[float]] = {}
    credentials = Credentials.load(cluster.context)
    async with contextlib.AsyncExitStack() as stack:
        bare = await stack.enter_async_context(
            grpc.aio.insecure_channel(plain, options=channel_options())
        )
        sealed = await stack.enter_async_context(
            secure_channel(secure, credentials, "edge-1.node.tierwise")
        )
        one = bare.unary_unary("/echo.Echo/Unary")
        rows: dict[str, Callable[[], Awaitable[float]]] = {}
        bare_ping = await stack.enter_async_context(ping(bare))
        sealed_ping = await stack.enter_async_context(ping(sealed))
        rows["stream"] = lambda: median_us(bare_ping)
        rows["stream, mTLS"] = lambda: median_us(sealed_ping)
        rows["call"] = lambda: median_us(lambda: same.remote.aio(1))
        rows["unary/s"] = lambda: rate(lambda: one(b"x" * 64), 20 * CONCURRENT)
        rows["call/s"] = lambda: rate(lambda: same.remote.aio(1), 20 * CONCURRENT)
        rows["map/s"] = lambda: map_rate(same)
        for round_number in range(ROUNDS + 2):
            for name, row in rows.items():
                figure = await row()
                if round_number >= 2:  # the first ones warm up
                    figures.setdefault(name, []).append(figure)
    await client.aclose()
    return {name: np.array(values) for name, values in figures.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cluster = tierwise.LocalCluster(Path(folder), "1e", emulate=False, policy="ect")
        with cluster:
            identity = str(cluster.state / "agents/edge-1/credentials")
            with echo_server() as plain, echo_server(identity) as secure:
                figures = uvloop.run(measure(cluster, plain, secure))
    caption = (
        f"{ROUNDS} rounds of {CALLS} calls one after the other; throughput with {CONCURRENT} in "
        "flight. The echo servers run no function, place nothing, record nothing; ours goes "
        "client → agent → worker process → agent → client."
    )
    table = make_table("Warm calls", ("", "p50 µs or per s", "ratio", "target"), caption)
    stream = figures["stream"]
    table.add_row("bare gRPC stream echo", spread(stream), "1.00", "")
    for title, name in (("the same with mTLS", "stream, mTLS"), ("tierwise .remote", "call")):
        ratio = float(np.median(figures[name] / stream))
        target = at_most(ratio, RATIO_MAX, "×") if name == "call" else ""
        table.add_row(title, spread(figures[name]), f"{ratio:.2f}", target)
    table.add_section()
    unary = figures["unary/s"]
    table.add_row("bare gRPC unary echo, per s", spread(unary), "1.00", "")
    for title, name in (("tierwise .remote, per s", "call/s"), ("tierwise .map, per s", "map/s")):
        ratio = float(np.median(figures[name] / unary))
        target = at_least(ratio, SPEEDUP_MIN, "×") if name == "map/s" else ""
        table.add_row(title, spread(figures[name]), f"{ratio:.2f}", target)
    show(table)


if __name__ == "__main__":
    main()

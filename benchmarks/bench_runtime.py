"""What does a call, a start, an instance and an array cost, beside Ray, Parsl and Dask?

    make bench-runtime        # installs the rivals into .venv-rivals first

Every system runs in processes of its own on this machine; all are up while each is measured, in
turns, round by round, so that a slow moment hits all of them. A rival that cannot be started is
reported, not left out.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import uvloop

import tierwise
from agent.runtime.environments import HOST
from agent.runtime.runtime import RunReport, Runtime
from benchmarks.report import at_least, at_most, make_table, show, spread
from tierwise.clock import precise_s
from tierwise.wire import payload

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-rivals/bin/python"
RIVALS = {"ray": "Ray", "parsl": "Parsl HTEX", "dask": "Dask"}
CALL_RATIOS = {"ray": 0.6, "parsl": 0.4, "dask": 0.1}
MAP_RATIO = 5.0
COLD_RATIO = 10.0
ARRAY_MS = 2.0
INSTANCE_MB = 5.0
GOODPUT_SHARE = 0.9
ROUNDS, CALLS, ARRAY_CALLS = 10, 40, 5
MAP_ITEMS = {"tierwise": 2000, "ray": 1000, "parsl": 200, "dask": 200}  # a second or less
COLD_ROUNDS = 15
REST_S = 0.15
INSTANCES = 100
SERVICE_S, PEAK_S, FLOOD_S, DEADLINE_S = 0.02, 3.0, 6.0, 1.0

app = tierwise.App("bench")
Figures = dict[str, dict[str, list[float]]]


@app.function(memory="64MiB")
def same(value: Any) -> Any:
    return value


@app.function(memory="128MiB")
def size(array: Any) -> int:
    return int(array.nbytes)


@app.function(memory="32MiB", deadline="1s", timeout="1s")
def work(seconds: float) -> None:
    import time

    time.sleep(seconds)


class Rival:
    """One rival system in a process of its own; `error` says why it is not there."""

    def __init__(self, name: str) -> None:
        self.error = ""
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [str(PYTHON), str(Path(__file__).with_name("rivals.py")), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={
                **os.environ,
                "PATH": f"{PYTHON.parent}:{os.environ['PATH']}",  # Parsl starts helpers by name
                "RAY_USAGE_STATS_ENABLED": "0",
            },
        )
        if self._read() != "ready":
            self.error = self.error or "it did not start"

    def ask(self, order: str, count: int) -> list[float]:
        """Return what the rival answers to one order; nothing once it has failed."""
        if self.error or self._process.stdin is None:
            return []
        try:
            self._process.stdin.write(f"{order} {count}\n")
            self._process.stdin.flush()
            return [float(x) for x in json.loads(self._read() or "[]")]
        except (OSError, ValueError) as error:
            self.error = self.error or str(error)
            return []

    def close(self) -> None:
        """End the process, and what it has started with it."""
        with contextlib.suppress(OSError):
            self._process.communicate(timeout=30)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:]
            self.error = " ".join(last)[-200:] or "it ended without a word"
        return line


@contextlib.contextmanager
def rivals() -> Iterator[dict[str, Rival]]:
    if not PYTHON.exists():
        print(f"no rivals: there is no {PYTHON.relative_to(ROOT)} (make bench-runtime makes it)")
        yield {}
        return
    running: dict[str, Rival] = {}
    try:
        for name in RIVALS:
            running[name] = Rival(name)
        yield running
    finally:
        for rival in running.values():
            rival.close()


def timed(call: Callable[[], object], count: int) -> list[float]:
    found = []
    for _ in range(count):
        start_s = precise_s()
        call()
        found.append(precise_s() - start_s)
    return found


def ours(array: Any, shared: Any) -> dict[str, Callable[[int], list[float]]]:
    """Return the orders of rivals.py, carried out by tierwise."""

    def mapped(count: int) -> list[float]:
        start_s = precise_s()
        assert sum(same.map(range(count))) == count * (count - 1) // 2
        return [count / (precise_s() - start_s)]

    return {
        "call": lambda n: timed(lambda: same.remote(1), n),
        "map": mapped,
        "array": lambda n: timed(lambda: size.remote(shared), n),
        "plain": lambda n: timed(lambda: size.remote(array), n),
    }


def beside_rivals(running: dict[str, Rival]) -> Figures:
    """Measure every order on every system, in turns; medians per round."""
    array = np.random.default_rng(0).random(12_500_000)
    own = ours(array, tierwise.share(array))
    counts = {"call": CALLS, "array": ARRAY_CALLS, "plain": 1}
    figures: Figures = {order: {} for order in own}
    for number in range(ROUNDS + 2):
        for order in own:
            size_of = {name: counts.get(order, MAP_ITEMS[name]) for name in MAP_ITEMS}
            asked = {"tierwise": own[order](size_of["tierwise"])}
            asked |= {name: rival.ask(order, size_of[name]) for name, rival in running.items()}
            for name, found in asked.items():
                if found and number >= 2:  # the first ones warm up
                    figures[order].setdefault(name, []).append(float(np.median(found)))
    return figures


def cold_starts() -> dict[str, list[float]]:
    """Return seconds to start an instance of a NumPy function, and a fresh interpreter.

    The instance is a spare that was sealed before, or is made from the order on (`bare`). And, as
    `private`, MB of memory that each of INSTANCES instances shares with nobody.
    """

    def multiply(n: int) -> float:
        import numpy as np

        return float((np.ones((n, n)) @ np.ones((n, n))).sum())

    async def measure() -> dict[str, list[float]]:
        with tempfile.TemporaryDirectory() as folder:
            code = cloudpickle.dumps(multiply)
            path = Path(folder) / "code"
            path.write_bytes(code)
            runtime = Runtime(state_dir=Path(folder) / "runtime")
            await runtime.open()

            async def start(name: str, memory_mib: int = 64) -> float:
                start_s = precise_s()
                await runtime.start(
                    name,
                    code_digest=hashlib.sha256(code).hexdigest(),
                    code_path=path,
                    environment=HOST,
                    memory_mib=memory_mib,
                )
                done: asyncio.Future[RunReport] = asyncio.get_running_loop().create_future()
                blob = payload.encode(((16,), {}))
                runtime.run(name, [blob], timeout_s=30.0, on_done=done.set_result)
                assert payload.decode((await done).items[0].value) == 16.0**3
                return precise_s() - start_s

            try:
                await start("first")  # brings up the zygote
                await runtime.nursery.settled()
                found: dict[str, list[float]] = {"cold": [], "bare": [], "fresh": []}
                command = [sys.executable, "-I", "-c", "import numpy as np; np.ones((16, 16))"]
                for number in range(COLD_ROUNDS):
                    found["cold"].append(await start(f"cold-{number}"))
                    await runtime.stop(f"cold-{number}")
                    size_mib = 100 + number  # there is no spare of that size
                    found["bare"].append(await start(f"bare-{number}", size_mib))
                    await runtime.stop(f"bare-{number}")
                    await start(f"same-{number}")
                    await runtime.stop(f"same-{number}")
                    await asyncio.sleep(REST_S)  # a spare is made
                    start_s = precise_s()
                    await asyncio.to_thread(subprocess.run, command, check=True)
                    found["fresh"].append(precise_s() - start_s)
                for number in range(INSTANCES):
                    await start(f"i-{number}")
                found["private"] = [private_mb(pid) for pid in workers(runtime)]
            finally:
                await runtime.close()
            return found

    return uvloop.run(measure())


def workers(runtime: Runtime) -> list[int]:
    return [worker.pid for name, worker in runtime.workers().items() if name.startswith("i-")]


def private_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith("Private_")) * 1024 / 1e6


async def flood(rate_per_s: float, seconds: float) -> dict[str, Any]:
    """Send calls at a rate, whatever becomes of them; return how they ended."""
    ends: dict[str, int] = {}
    hints: list[float] = []
    good_count = 0
    loop = asyncio.get_running_loop()

    async def one() -> None:
        nonlocal good_count
        start_s = loop.time()
        try:
            await work.remote.aio(SERVICE_S)
            end = "ok"
            ended_s = loop.time()
            good_count += ended_s - start_s <= DEADLINE_S and ended_s <= begun_s + seconds
        except tierwise.TierwiseError as error:
            end = error.code
            if isinstance(error, tierwise.RetryLater):
                hints.append(error.retry_after_s or 0.0)
        ends[end] = ends.get(end, 0) + 1

    calls = []
    begun_s = loop.time()
    for number in range(int(rate_per_s * seconds)):
        await asyncio.sleep(max(0.0, begun_s + number / rate_per_s - loop.time()))
        calls.append(loop.create_task(one()))
    await asyncio.gather(*calls)
    return {
        "offered": len(calls) / seconds,
        "good": good_count / seconds,
        "ends": ends,
        "hinted": sum(hint > 0 for hint in hints) / max(1, len(hints)),
    }


async def peak() -> float:
    """Return calls per second with as many callers as keep the node busy, and no more."""
    count = 0
    ends_s = precise_s() + PEAK_S

    async def caller() -> None:
        nonlocal count
        while precise_s() < ends_s:
            await work.remote.aio(SERVICE_S)
            count += 1

    await asyncio.gather(*(caller() for _ in range(8)))
    return count / PEAK_S


async def overload(context: Path) -> dict[str, Any]:
    async with tierwise.Client(context) as client:
        app.use(client)
        await peak()  # warms up
        best = await peak()
        found = await flood(5 * best, FLOOD_S)
        return {**found, "peak": best}


def show_calls(figures: Figures, running: dict[str, Rival]) -> None:
    table = make_table(
        "Warm calls beside rivals",
        ("", "p50 or rate", "tierwise ÷ it", "target"),
        f"{ROUNDS} rounds in turns, {CALLS} calls one after the other. "
        "mTLS on ours; the rivals run without.",
    )
    calls = {name: np.array(found) * 1e6 for name, found in figures["call"].items()}
    table.add_row("tierwise .remote, µs", spread(calls["tierwise"]), "", "")
    for name, title in RIVALS.items():
        if name not in calls:
            why = running[name].error if name in running else "not installed"
            print(f"{title} failed: {why}")
            table.add_row(f"{title} call", "failed", "", "")
            continue
        ratio = float(np.median(calls["tierwise"] / calls[name]))
        target = at_most(ratio, CALL_RATIOS[name], "×")
        table.add_row(f"{title} call, µs", spread(calls[name]), f"{ratio:.2f}", target)
    table.add_section()
    maps = {name: np.array(found) for name, found in figures["map"].items()}
    table.add_row("tierwise .map, per s", spread(maps["tierwise"]), "", "")
    for name, title in RIVALS.items():
        if name in maps:
            ratio = float(np.median(maps["tierwise"] / maps[name]))
            target = at_least(ratio, MAP_RATIO, "×") if name == "ray" else ""
            table.add_row(f"{title} tasks, per s", spread(maps[name]), f"{ratio:.1f}", target)
    table.add_section()
    titles = {"array": "100 MB shared before", "plain": "100 MB as it is"}
    for order, title in titles.items():
        for name, found in figures[order].items():
            label = RIVALS.get(name, name)
            ms = np.array(found) * 1e3
            is_ours = order == "array" and name == "tierwise"
            target = at_most(float(np.median(ms)), ARRAY_MS, " ms") if is_ours else ""
            table.add_row(f"{label}, {title}, ms", spread(ms), "", target)
    show(table)


def show_starts(found: dict[str, list[float]]) -> None:
    table = make_table(
        "Starting", ("", "figure", "ratio", "target"), "Start and first call of a NumPy function."
    )
    fresh, private = np.array(found["fresh"]), found["private"]
    table.add_row("fresh interpreter with NumPy, ms", spread(fresh * 1e3), "1", "")
    ratio = float(np.median(fresh / found["cold"]))
    target = at_least(ratio, COLD_RATIO, "×")
    ms = spread(np.array(found["cold"]) * 1e3)
    table.add_row("instance, of a spare, ms", ms, f"{ratio:.1f}", target)
    ratio = float(np.median(fresh / found["bare"]))
    ms = spread(np.array(found["bare"]) * 1e3)
    table.add_row("instance, no spare ready, ms", ms, f"{ratio:.1f}", "")
    table.add_row(
        f"unshared memory of {len(private)} instances, MB",
        spread(private),
        f"100th: {private[-1]:.2f}",
        at_most(private[-1], INSTANCE_MB, " MB"),
    )
    show(table)


def show_overload(found: dict[str, Any]) -> None:
    share = found["good"] / found["peak"]
    table = make_table(
        "Five times overload", ("", "figure", "target"), f"Calls of {SERVICE_S * 1e3:.0f} ms rest."
    )
    table.add_row("peak, calls per s", f"{found['peak']:.0f}", "")
    table.add_row("offered, calls per s", f"{found['offered']:.0f}", "")
    table.add_row(
        "goodput: in time, per s", f"{found['good']:.0f}", at_least(share, GOODPUT_SHARE, "×")
    )
    for end, count in sorted(found["ends"].items()):
        table.add_row(f"ended {end}", str(count), "")
    table.add_row("refusals with a retry hint", f"{found['hinted']:.0%}", "")
    show(table)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        cluster = tierwise.LocalCluster(Path(folder), "1e", emulate=False, policy="ect")
        with cluster, rivals() as running, tierwise.Client(cluster.context) as client:
            app.use(client)
            show_calls(beside_rivals(running), running)
        show_starts(cold_starts())
        with cluster:
            show_overload(uvloop.run(overload(cluster.context)))


if __name__ == "__main__":
    main()

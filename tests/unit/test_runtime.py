"""The runtime with real processes: what a function does to its worker, and what the agent sees."""

import asyncio
import hashlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from agent.runtime.environments import HOST, reason
from agent.runtime.runtime import InstanceStartError, ItemKind, RunReport, Runtime
from tests.settling import settled
from tierwise.wire import payload


def behave(how: str, value: Any = None) -> Any:
    import os
    import time

    if how == "raise":
        raise KeyError("no cheese")
    if how == "hang":
        time.sleep(60)
    if how == "exit":
        os._exit(3)
    if how == "print":
        print("y" * 3_000_000)
        print("the last line")
    if how == "allocate":
        return len(bytearray(900 << 20))
    if how == "pid":
        return os.getpid()
    if how == "import":
        import tierwise  # noqa: F401
    return value


class Bench:
    """A runtime, and what a test asks of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.runtime = Runtime(state_dir=folder / "runtime")

    async def start(self, name: str, function: Callable[..., Any] = behave) -> None:
        code = cloudpickle.dumps(function)
        path = self.folder / f"{name}.code"
        path.write_bytes(code)
        await self.runtime.start(
            name,
            code_digest=hashlib.sha256(code).hexdigest(),
            code_path=path,
            environment=HOST,
            memory_mib=256,
        )

    def send(self, name: str, *calls: tuple[Any, ...], timeout_s: float = 20.0) -> Any:
        """Start a batch and return the future of its report."""
        done = asyncio.get_running_loop().create_future()
        blobs = [payload.encode((list(call), {})) for call in calls]
        self.runtime.run(name, blobs, timeout_s=timeout_s, on_done=done.set_result)
        return done

    async def run(self, name: str, *calls: tuple[Any, ...], timeout_s: float = 20.0) -> RunReport:
        report: RunReport = await self.send(name, *calls, timeout_s=timeout_s)
        return report


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["behave"]))
    await bench.runtime.open()
    try:
        yield bench
    finally:
        await bench.runtime.close()


def values(report: RunReport) -> list[Any]:
    assert [item.kind for item in report.items] == [ItemKind.OK] * len(report.items)
    return [payload.decode(item.value) for item in report.items]


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def workers() -> set[int]:
    """Return the children of our children: instances, whose own number for themselves is 1."""
    zygotes = psutil.Process().children()
    return {process.pid for zygote in zygotes for process in zygote.children(recursive=True)}


def descriptor_count() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_batch_comes_back_in_order_from_one_warm_process(bench: Bench) -> None:
    await bench.start("a")
    report = await bench.run("a", *[("echo", index) for index in range(100)])
    assert values(report) == list(range(100))
    first = values(await bench.run("a", ("pid",)))
    assert first == values(await bench.run("a", ("pid",)))
    assert first != [os.getpid()]


async def test_an_exception_leaves_the_instance_alive_and_the_other_items_whole(
    bench: Bench,
) -> None:
    await bench.start("a")
    report = await bench.run("a", ("echo", 1), ("raise",), ("echo", 2))
    assert [item.kind for item in report.items] == [ItemKind.OK, ItemKind.RAISED, ItemKind.OK]
    assert report.items[1].error_type == "KeyError"
    assert "in behave" in report.items[1].remote_traceback
    assert report.instance_alive


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("hang", ItemKind.TIMED_OUT, "raise timeout="),
        ("exit", ItemKind.WORKER_DIED, "code 3"),
    ],
)
async def test_a_worker_that_goes_spoils_its_item_and_those_behind_it_only(
    bench: Bench, how: str, kind: ItemKind, words: str
) -> None:
    await bench.start("a")
    report = await bench.run("a", (how,), ("echo", 2), timeout_s=0.3)
    assert [item.kind for item in report.items] == [kind, ItemKind.NOT_RUN]
    assert words in report.items[0].message
    assert not report.instance_alive
    await bench.start("b")
    assert values(await bench.run("b", ("echo", 5))) == [5]


async def test_more_memory_than_allowed_is_out_of_memory(bench: Bench) -> None:
    await bench.start("a")
    report = await bench.run("a", ("allocate",))
    assert report.items[0].kind is ItemKind.OUT_OF_MEMORY


async def test_megabytes_of_output_keep_their_end(bench: Bench) -> None:
    await bench.start("a")
    report = await bench.run("a", ("print",))
    assert report.log.rstrip().endswith("the last line")
    assert len(report.log) < 20_000


async def test_a_cancelled_batch_says_so(bench: Bench) -> None:
    await bench.start("a")
    done = bench.send("a", ("hang",))
    bench.runtime.cancel("a")
    report = await done
    assert report.items[0].kind is ItemKind.CANCELLED
    assert not report.instance_alive


async def test_a_kill_that_comes_too_late_gives_the_instance_up(bench: Bench) -> None:
    """Else the next batch would die of it."""
    for round_number in range(20):
        name = f"a{round_number}"
        await bench.start(name)
        done = bench.send(name, ("echo", 1))
        await asyncio.sleep(0.0002 * round_number)
        if done.done():
            continue
        bench.runtime.cancel(name)
        report = await done
        assert not report.instance_alive


async def test_a_worker_killed_from_outside_is_noticed_while_it_idles(bench: Bench) -> None:
    await bench.start("a")
    pid = bench.runtime.workers()["a"].pid
    died = asyncio.get_running_loop().create_future()
    bench.runtime.on_died = died.set_result
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(10):
        assert await died == "a"


async def test_a_killed_zygote_is_replaced(bench: Bench) -> None:
    before = children()
    await bench.start("a")
    (zygote,) = children() - before - workers()
    os.kill(zygote, signal.SIGKILL)
    async with asyncio.timeout(20):
        while True:
            try:
                await bench.start("b")
                break
            except InstanceStartError:
                await asyncio.sleep(0.05)
    assert values(await bench.run("b", ("echo", 7))) == [7]


async def test_functions_cannot_import_the_platform(bench: Bench) -> None:
    await bench.start("a")
    report = await bench.run("a", ("import",))
    assert report.items[0].error_type == "ModuleNotFoundError"


async def test_code_that_does_not_have_its_digest_is_not_loaded(bench: Bench) -> None:
    path = bench.folder / "code"
    path.write_bytes(cloudpickle.dumps(behave))
    with pytest.raises(InstanceStartError, match="digest"):
        await bench.runtime.start(
            "a", code_digest="0" * 64, code_path=path, environment=HOST, memory_mib=64
        )


async def test_starting_and_stopping_leaves_no_process_file_or_descriptor(bench: Bench) -> None:
    before = children()  # another test may have left one: multiprocessing's resource tracker
    await bench.start("first")  # brings up the zygote
    await bench.runtime.stop("first")
    count, descriptors = await settled(lambda: len(children())), descriptor_count()
    for round_number in range(20):
        await bench.start(f"i{round_number}")
        await bench.run(f"i{round_number}", ("echo", 1))
        await bench.runtime.stop(f"i{round_number}")
    assert await settled(lambda: len(children())) == count  # a zygote and its spare
    assert descriptor_count() <= descriptors + 1
    assert not list((bench.folder / "runtime" / "work").iterdir())
    await bench.runtime.close()
    assert children() == before
    assert not (bench.folder / "runtime").exists()


def test_of_what_pip_says_its_errors_are_told() -> None:
    warning = "WARNING: Retrying (Retry(total=4, connect=None)) after connection broken"
    error = "ERROR: No matching distribution found for nonesuch"
    assert reason("\n".join([warning] * 90 + [error, error, ""])) == error
    assert reason(f"{warning}\nnetwork is unreachable\n{warning}\n") == "network is unreachable"
    assert reason(warning) == warning
    assert reason("") == ""


def hold(mib: int, is_in_pieces: bool) -> int:
    if is_in_pieces:
        return len([bytes([i % 255]) * 262_144 for i in range(mib * 4)])
    return len(b"x" * (mib << 20))


async def test_each_batch_has_its_own_peak_whatever_ran_before(bench: Bench) -> None:
    await bench.start("one", hold)
    peaks = []
    for mib, is_in_pieces in ((150, False), (2, False), (60, True), (20, False), (3, True)):
        report = await bench.run("one", (mib, is_in_pieces))
        assert values(report)
        peaks.append((mib, report.peak_memory_mib))
    for mib, peak_mib in peaks:
        assert mib - 2 <= peak_mib <= mib + 10


async def test_a_batch_is_held_to_its_own_limit_and_the_next_to_another(bench: Bench) -> None:
    await bench.start("one", hold)

    async def run(mib: int, memory_mib: int) -> ItemKind:
        done = asyncio.get_running_loop().create_future()
        blob = payload.encode(([mib, False], {}))
        bench.runtime.run(
            "one", [blob], timeout_s=20.0, on_done=done.set_result, memory_mib=memory_mib
        )
        return ItemKind((await done).items[0].kind)

    assert await run(100, 64) is ItemKind.OUT_OF_MEMORY
    assert await run(100, 160) is ItemKind.OK
    assert await run(100, 64) is ItemKind.OUT_OF_MEMORY
    assert await run(20, 64) is ItemKind.OK
    assert await run(300, 1000) is ItemKind.OUT_OF_MEMORY  # started with 256

"""Starts: branches that have imported what functions do, classes, arrays in shared memory."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import pytest

from agent.runtime import nursery
from agent.runtime.environments import HOST
from agent.runtime.runtime import InstanceStartError, ItemKind, RunReport, Runtime
from tests.settling import settled
from tierwise.wire import memfd, payload


def parses(text: str) -> Any:
    import sys

    had = "xml.dom.minidom" in sys.modules
    from xml.dom import minidom

    return had, minidom.parseString(text).documentElement.tagName


def had_at_start(name: str) -> bool:
    import sys

    return name in sys.modules


def echo(value: Any) -> Any:
    return value


def writable(array: Any) -> bool:
    return bool(array.flags.writeable)


class Bench:
    """A runtime, and what a test asks of it."""

    def __init__(self, folder: Path, isolation: str = "standard") -> None:
        self.folder = folder
        self.runtime = Runtime(
            state_dir=folder / "runtime", isolation=isolation, imports=folder / "imports.json"
        )

    async def start(self, name: str, function: Callable[..., Any], memory_mib: int = 256) -> None:
        code = cloudpickle.dumps(function)
        path = self.folder / hashlib.sha256(code).hexdigest()
        path.write_bytes(code)
        await self.runtime.start(
            name, code_digest=path.name, code_path=path, environment=HOST, memory_mib=memory_mib
        )

    def zygote_of(self, name: str) -> int:
        """Return the process that forked an instance, which itself cannot see it."""
        return psutil.Process(self.runtime.workers()[name].pid).ppid()

    async def run(self, name: str, *args: Any) -> RunReport:
        done: asyncio.Future[RunReport] = asyncio.get_running_loop().create_future()
        detached: list[Any] = []
        blob = payload.encode((args, {}), detached=detached)
        files = [memfd.make([part]) for part in detached]
        self.runtime.run(name, [blob], timeout_s=20.0, on_done=done.set_result, attachments=files)
        return await done

    async def value(self, name: str, *args: Any) -> Any:
        report = await self.run(name, *args)
        (item,) = report.items
        assert item.kind is ItemKind.OK, item
        return payload.decode(item.value, [file.view() for file in item.attachments])


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["echo"]))
    bench = Bench(tmp_path)
    await bench.runtime.open()
    try:
        yield bench
    finally:
        await bench.runtime.close()


async def test_the_second_instance_finds_what_the_first_had_to_import(bench: Bench) -> None:
    await bench.start("a", parses)
    assert await bench.value("a", "<tag/>") == (False, "tag")
    await bench.runtime.nursery.settled()
    await bench.start("b", parses)
    assert await bench.value("b", "<tag/>") == (True, "tag")
    assert bench.zygote_of("b") != bench.zygote_of("a")


async def test_what_one_function_imports_does_not_reach_the_others(bench: Bench) -> None:
    await bench.start("a", parses)
    await bench.value("a", "<tag/>")
    await bench.runtime.nursery.settled()
    await bench.start("b", had_at_start)
    assert await bench.value("b", "numpy")
    assert not await bench.value("b", "xml.dom.minidom")


async def test_imports_are_remembered_over_a_restart(bench: Bench) -> None:
    await bench.start("a", parses)
    await bench.value("a", "<tag/>")
    await bench.runtime.close()
    again = Bench(bench.folder)
    await again.runtime.open()
    try:
        await again.start("first", parses)  # from the root; its branch begins to grow
        await again.runtime.nursery.settled()
        await again.start("second", parses)
        assert (await again.value("second", "<tag/>"))[0]
    finally:
        await again.runtime.close()


async def test_branches_are_bounded_and_go_when_their_instances_have(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nursery, "BRANCHES_MAX", 2)
    await bench.start("a", echo)
    digests = [f"{index:064}" for index in range(5)]
    names = ["wave", "sndhdr", "chunk", "colorsys", "netrc"]
    before = await settled(lambda: len(psutil.Process().children(recursive=True)))
    for digest, name in zip(digests, names, strict=True):
        bench.runtime.nursery.learn(HOST, digest, [name])
        await bench.runtime.nursery.settled()
    async with asyncio.timeout(10):
        while len(psutil.Process().children(recursive=True)) > before + 2:
            await asyncio.sleep(0.01)
    assert await bench.value("a", 1) == 1


async def test_names_that_are_no_modules_or_do_something_are_not_imported(bench: Bench) -> None:
    await bench.start("a", echo)
    bad = ["antigravity", "os; x", "../evil", "__main__", "a" * 200]
    bench.runtime.nursery.learn(HOST, "0" * 64, bad)
    assert bench.runtime.nursery._imports.get("0" * 64) is None


async def test_a_killed_branch_is_replaced_by_the_root_and_grows_again(bench: Bench) -> None:
    await bench.start("a", parses)
    await bench.value("a", "<tag/>")
    await bench.runtime.nursery.settled()
    await bench.start("b", parses)
    os.kill(bench.zygote_of("b"), 9)
    async with asyncio.timeout(20):
        for number in range(1000):
            try:
                await bench.start(f"c{number}", parses)
                break
            except InstanceStartError:
                await asyncio.sleep(0.01)
    await bench.runtime.nursery.settled()
    await bench.start("d", parses)
    assert (await bench.value("d", "<tag/>"))[0]


class Model:
    """Loaded once, told of its end."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def enter(self) -> None:
        self.calls.append("enter")

    def __call__(self, value: Any) -> Any:
        self.calls.append(str(value))
        self.path = value
        return list(self.calls)

    def exit(self) -> None:
        from pathlib import Path

        Path(self.path).write_text("left")


async def test_a_class_is_entered_once_and_left_when_its_instance_stops(tmp_path: Path) -> None:
    """Without the seal, through which no file of its exit would be seen."""
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["Model"]))
    bench = Bench(tmp_path, "off")
    await bench.runtime.open()
    await bench.start("a", Model)
    path = str(bench.folder / "left")
    assert await bench.value("a", path) == ["enter", path]
    assert await bench.value("a", path) == ["enter", path, path]
    await bench.runtime.close()
    assert Path(path).read_text() == "left"


class Stuck(Model):
    def exit(self) -> None:
        import time

        time.sleep(600)


async def test_an_exit_that_hangs_is_cut_short(bench: Bench) -> None:
    await bench.start("a", Stuck)
    assert await bench.value("a", "x") == ["enter", "x"]
    async with asyncio.timeout(30):
        await bench.runtime.stop("a")


class Broken(Model):
    def enter(self) -> None:
        raise RuntimeError("no model")


async def test_an_enter_that_fails_is_a_failed_start_with_its_traceback(bench: Bench) -> None:
    with pytest.raises(InstanceStartError, match="no model") as caught:
        await bench.start("a", Broken)
    assert "in enter" in caught.value.remote_traceback


@pytest.mark.parametrize("size", [0, 1000, 1 << 17, 1 << 20])
async def test_arrays_of_any_size_come_back_equal(bench: Bench, size: int) -> None:
    await bench.start("a", echo)
    array = np.arange(size, dtype=np.float64)
    found = await bench.value("a", {"x": array, "n": [1, (2, array[:10])]})
    assert np.array_equal(found["x"], array)
    assert found["n"][0] == 1
    assert np.array_equal(found["n"][1][1], array[:10])


async def test_a_large_array_reaches_the_function_read_only_and_leaves_in_a_file(
    bench: Bench,
) -> None:
    await bench.start("a", writable)
    array = np.zeros(1 << 18)
    assert await bench.value("a", array) is False
    await bench.start("b", echo)
    report = await bench.run("b", array)
    assert len(report.items[0].attachments) == 1
    assert len(report.items[0].value) < 1000


async def test_a_large_text_travels_too(bench: Bench) -> None:
    await bench.start("a", echo)
    assert await bench.value("a", "x" * (3 << 20)) == "x" * (3 << 20)


async def test_large_arrays_leave_no_descriptor_behind(bench: Bench) -> None:
    await bench.start("a", echo)
    array = np.zeros(1 << 18)
    await bench.value("a", array)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        await bench.value("a", array)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


def test_a_file_that_could_change_is_not_taken_over() -> None:
    fd = os.memfd_create("open", os.MFD_ALLOW_SEALING)
    os.write(fd, b"x")
    with pytest.raises(ValueError, match="not sealed"):
        memfd.Memfd(fd)


def test_a_detached_array_that_is_missing_is_said_so() -> None:
    detached: list[Any] = []
    blob = payload.encode(np.zeros(1 << 18), detached=detached)
    with pytest.raises(payload.PayloadError, match="missing"):
        payload.decode(blob)
    with pytest.raises(payload.PayloadError, match="missing"):
        payload.decode(blob, [memoryview(b"short")])
    assert payload.inline(blob, detached) == payload.encode(np.zeros(1 << 18))

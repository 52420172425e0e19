"""WebAssembly modules as functions: in real workers, by wasmtime."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agent.runtime.environments import HOST
from agent.runtime.runtime import InstanceStartError, ItemKind, ItemResult, RunReport, Runtime
from tierwise.errors import InvalidArgument
from tierwise.sdk.app import App, Function
from tierwise.sdk.code import pack
from tierwise.wire import payload

wasmtime = pytest.importorskip("wasmtime")

TEXT = """(module
  (memory 1)
  (func (export "add") (param i32 i32) (result i32) local.get 0 local.get 1 i32.add)
  (func (export "half") (param f64) (result f64) local.get 0 f64.const 0.5 f64.mul)
  (func (export "grow") (param i32) (result i32) local.get 0 memory.grow)
  (func (export "count") (result i32)
    (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1)))
    (i32.load (i32.const 0)))
  (func (export "spin") (loop br 0)))"""
MODULE = bytes(wasmtime.wat2wasm(TEXT))


def declared(export: str, **options: Any) -> Function:
    return App("wasm").wasm(MODULE, export, requirements=(), **options)


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[Runtime]:
    runtime = Runtime(state_dir=tmp_path / "runtime")
    await runtime.open()
    try:
        yield runtime
    finally:
        await runtime.close()


async def start(runtime: Runtime, folder: Path, function: Function) -> None:
    code = pack(function.code)
    path = folder / "code"
    path.write_bytes(code)
    digest = hashlib.sha256(code).hexdigest()
    await runtime.start("a", code_digest=digest, code_path=path, environment=HOST, memory_mib=256)


async def call(runtime: Runtime, *args: Any) -> ItemResult:
    done: asyncio.Future[RunReport] = asyncio.get_running_loop().create_future()
    blob = payload.encode((args, {}))
    runtime.run("a", [blob], timeout_s=20.0, on_done=done.set_result)
    return (await done).items[0]


async def value(runtime: Runtime, *args: Any) -> Any:
    item = await call(runtime, *args)
    assert item.kind is ItemKind.OK, item
    return payload.decode(item.value)


@pytest.mark.parametrize(
    ("export", "args", "result"), [("add", (2, 3), 5), ("half", (3.0,), 1.5), ("grow", (1,), 1)]
)
async def test_an_export_runs_in_a_worker(
    runtime: Runtime, tmp_path: Path, export: str, args: tuple[Any, ...], result: float
) -> None:
    await start(runtime, tmp_path, declared(export))
    assert await value(runtime, *args) == result


async def test_a_module_that_never_ends_runs_out_of_fuel_and_harms_nobody(
    runtime: Runtime, tmp_path: Path
) -> None:
    await start(runtime, tmp_path, declared("spin", fuel=1_000_000))
    item = await call(runtime)
    assert item.kind is ItemKind.RAISED
    assert "fuel" in item.message
    assert (await call(runtime)).kind is ItemKind.RAISED  # the same worker goes on


async def test_its_memory_does_not_grow_beyond_its_limit(runtime: Runtime, tmp_path: Path) -> None:
    await start(runtime, tmp_path, declared("grow", wasm_memory="1MiB"))
    assert await value(runtime, 100) == -1


async def test_calls_share_no_memory(runtime: Runtime, tmp_path: Path) -> None:
    await start(runtime, tmp_path, declared("count"))
    assert [await value(runtime) for _ in range(3)] == [1, 1, 1]


async def test_bad_arguments_are_the_callers_error(runtime: Runtime, tmp_path: Path) -> None:
    await start(runtime, tmp_path, declared("add"))
    assert (await call(runtime, "x", 1)).kind is ItemKind.RAISED


async def test_an_export_that_is_missing_fails_the_start(runtime: Runtime, tmp_path: Path) -> None:
    with pytest.raises(InstanceStartError, match="exports add"):
        await start(runtime, tmp_path, declared("nonesuch"))


def test_bad_modules_are_refused_when_they_are_declared() -> None:
    app = App("wasm")
    with pytest.raises(InvalidArgument, match="asm"):
        app.wasm(b"not wasm", "add")
    with pytest.raises(InvalidArgument, match="name one"):
        app.wasm(MODULE)
    with pytest.raises(InvalidArgument, match="no WebAssembly module"):
        app.wasm(MODULE[:20])
    wanting = bytes(wasmtime.wat2wasm('(module (import "os" "system" (func)))'))
    with pytest.raises(InvalidArgument, match=r"os\.system"):
        app.wasm(wanting)
    with pytest.raises(InvalidArgument, match="positive"):
        app.wasm(MODULE, "add", fuel=0)


def test_equal_modules_pack_to_equal_code() -> None:
    assert pack(declared("add").code) == pack(declared("add").code)
    assert pack(declared("add").code) != pack(declared("half").code)

"""WebAssembly modules as functions: an exported function of numbers, with fuel and a memory limit.

A module runs inside an ordinary worker, by wasmtime: what keeps functions from harm holds for it
too, and it sees nothing else besides, for it is given no imports. Each call gets a fresh memory.
"""

from collections.abc import Callable
from typing import Any

from tierwise.errors import InvalidArgument

REQUIREMENT = "wasmtime>=30"
MODULE_BYTES_MAX = 16 << 20
MAGIC = b"\0asm"


def exports(module: bytes) -> list[str]:
    """Return the names of the functions that a module exports.

    Raises:
        InvalidArgument: It is no module, or one that wants imports; or wasmtime is not here.
    """
    try:
        import wasmtime
    except ImportError:
        raise InvalidArgument(
            "to look into a module, wasmtime must be installed here (the extra `wasm`); or name "
            "the export"
        ) from None
    try:
        found = wasmtime.Module(wasmtime.Engine(), module)
    except wasmtime.WasmtimeError as error:
        raise InvalidArgument(f"this is no WebAssembly module: {error}") from None
    if found.imports:
        wanted = ", ".join(f"{each.module}.{each.name}" for each in found.imports[:5])
        raise InvalidArgument(f"the module wants imports ({wanted}): functions are given none")
    return [each.name for each in found.exports if isinstance(each.type, wasmtime.FuncType)]


def as_class(module: bytes, export: str, *, fuel: int, memory_bytes: int) -> Callable[..., Any]:
    """Return a class for `App.function` that compiles the module once and runs one export.

    It refers to nothing of tierwise, which workers lack.

    Args:
        module: WebAssembly in binary form.
        export: Name of the exported function; its parameters and results are i32, i64, f32, f64.
        fuel: About how many instructions one call may execute.
        memory_bytes: What its linear memory may grow to.

    Raises:
        InvalidArgument: It is no module, too large, or a limit is not positive.
    """
    if not module.startswith(MAGIC):
        raise InvalidArgument("a WebAssembly module begins with \\0asm: give the compiled .wasm")
    if len(module) > MODULE_BYTES_MAX:
        raise InvalidArgument(f"the module has {len(module)} bytes; at most {MODULE_BYTES_MAX}")
    if fuel <= 0 or memory_bytes <= 0:
        raise InvalidArgument("fuel and memory of a module must be positive")

    class WebAssembly:
        def enter(self) -> None:
            import wasmtime

            config = wasmtime.Config()
            config.consume_fuel = True
            self._engine = wasmtime.Engine(config)
            self._module = wasmtime.Module(self._engine, module)
            names = [each.name for each in self._module.exports]
            if export not in names:
                raise ValueError(f"the module exports {', '.join(names) or 'nothing'}, no {export}")

        def __call__(self, *args: float) -> Any:
            import wasmtime

            store = wasmtime.Store(self._engine)
            store.set_limits(memory_size=memory_bytes)
            store.set_fuel(fuel)
            instance = wasmtime.Instance(store, self._module, [])
            return instance.exports(store)[export](store, *args)  # type: ignore[operator]

    return WebAssembly

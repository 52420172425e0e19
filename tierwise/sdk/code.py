"""A user's function as bytes that a worker can load without the user's files."""

import functools
import hashlib
import io
import site
import sys
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle

from tierwise.errors import InvalidArgument, PayloadTooLarge

CODE_BYTES_MAX = 32 << 20
_Cached = type(functools.lru_cache(len))
_packing = threading.Lock()  # cloudpickle's registry of modules is global


def pack(function: Callable[..., Any]) -> bytes:
    """Return `function` pickled by value, with the user's own modules that it refers to.

    So is `tierwise.functions`, which is made to be shipped: workers see nothing else of tierwise.
    Other installed packages are referred to by name: the function's environment must have them.
    Equal code gives equal bytes in every process, so that running a script again deploys nothing
    new.

    Raises:
        InvalidArgument: It refers to something that cannot be shipped; the message names it.
        PayloadTooLarge: The code is over 32 MiB.
    """
    with _packing:
        own = [module for module in list(sys.modules.values()) if _travels(module)]
        for module in own:
            cloudpickle.register_pickle_by_value(module)
        try:
            buffer = io.BytesIO()
            _StablePickler(buffer).dump(function)
        except Exception as error:  # pickling runs user code: anything may come out
            raise InvalidArgument(
                f"{function.__qualname__} cannot be shipped: {error}. It may use only what can be "
                "pickled: make connections, locks and open files inside the function"
            ) from error
        finally:
            for module in own:
                cloudpickle.unregister_pickle_by_value(module)
    code = buffer.getvalue()
    if len(code) > CODE_BYTES_MAX:
        raise PayloadTooLarge(
            f"{function.__qualname__} has {len(code)} bytes of code, the limit is "
            f"{CODE_BYTES_MAX}: pass large data as an argument"
        )
    return code


class _StablePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes the same bytes in every process: cloudpickle draws ids, and sets have no order."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._class_count = 0
        self._ordered: dict[int, _Ordered] = {}  # also keeps each alive, as the memo is by id

    def reducer_override(self, obj: Any) -> Any:
        """Reduce as cloudpickle does, with order in sets and ids from names.

        What tierwise ships of its own is the same wherever it is installed: it has relative paths.
        """
        if isinstance(obj, CodeType):
            consts = tuple(self._in_order(value) for value in obj.co_consts)
            shown = _shown(obj.co_filename)
            return self.dispatch_table[CodeType](obj.replace(co_consts=consts, co_filename=shown))
        if isinstance(obj, _Cached) and not _is_elsewhere(obj):
            return _reduce_cached(obj)
        if isinstance(obj, ModuleType) and _is_shipped(obj):
            reduce, (name, state) = self.dispatch_table[ModuleType](obj)
            return reduce, (name, {key: state[key] for key in state if key not in _OF_A_FILE})
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented or isinstance(reduced, str):
            return reduced
        if isinstance(obj, FunctionType):
            slots = reduced[2][1]
            names = slots["__globals__"]
            slots["__globals__"] = {name: self._in_order(names[name]) for name in names}
            base = reduced[1][1]
            if "__file__" in base:
                base["__file__"] = _shown(base["__file__"])
        elif isinstance(obj, type) and len(reduced[1]) >= 2 and _is_random_id(reduced[1][-2]):
            self._class_count += 1
            name = f"{self._class_count}:{obj.__module__}.{obj.__qualname__}"
            arguments = (*reduced[1][:-2], hashlib.sha256(name.encode()).hexdigest()[:32], None)
            return (reduced[0], arguments, *reduced[2:])
        return reduced

    def _in_order(self, value: Any) -> Any:
        if type(value) not in (set, frozenset):
            return value
        return self._ordered.setdefault(id(value), _Ordered(value))


class _Ordered:
    """Stands for a set, and is written with its members in a fixed order."""

    def __init__(self, members: set[Any] | frozenset[Any]) -> None:
        self._members = members

    def __reduce__(self) -> Any:
        in_order = sorted(self._members, key=lambda member: (type(member).__name__, repr(member)))
        return type(self._members), (in_order,)


def _is_elsewhere(cached: Any) -> bool:
    """Return whether a function is found by its name in the worker, too."""
    module = sys.modules.get(cached.__module__)
    is_here = cached.__module__ == "__main__" or "<locals>" in cached.__qualname__
    return not is_here and not _travels(module)


def _reduce_cached(cached: Any) -> Any:
    """Reduce a function with `functools.lru_cache` by value, without what it has cached."""
    made = functools.lru_cache(**cached.cache_parameters())
    return made, (cached.__wrapped__,), vars(cached)


def _is_random_id(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 32


def _installed() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    folders = [paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple(Path(folder).resolve() for folder in folders)


_INSTALLED = _installed()
_PLATFORM = frozenset({"tierwise", "agent", "scheduler", "envs", "training"})
_SHIPPED = "tierwise.functions"
_KERNEL = str(Path(__file__).parents[2]) + "/"
_OF_A_FILE = frozenset({"__cached__", "__file__", "__loader__", "__path__", "__spec__"})


def _travels(module: ModuleType | None) -> bool:
    """Return whether a module is shipped: the user's own file, or one of `tierwise.functions`."""
    if _is_shipped(module):
        return True
    file = getattr(module, "__file__", None)
    name = getattr(module, "__name__", "")
    if not file or name == "__main__" or name.partition(".")[0] in _PLATFORM:
        return False
    return _is_outside(file)


def _is_shipped(module: ModuleType | None) -> bool:
    name = getattr(module, "__name__", "")
    return name == _SHIPPED or name.startswith(f"{_SHIPPED}.")


@functools.lru_cache(maxsize=4096)
def _shown(file: str) -> str:
    """Return the path of a file, that of one of ours from the kernel's folder on."""
    return file.removeprefix(_KERNEL) if file.startswith(f"{_KERNEL}tierwise/") else file


@functools.lru_cache(maxsize=65_536)
def _is_outside(file: str) -> bool:
    path = Path(file).resolve()
    return not any(path.is_relative_to(folder) for folder in _INSTALLED)

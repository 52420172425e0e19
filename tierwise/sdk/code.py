"""A user's function as bytes that a worker can load without the user's files."""

import site
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from tierwise.errors import InvalidArgument, PayloadTooLarge

CODE_BYTES_MAX = 32 << 20


def pack(function: Callable[..., Any]) -> bytes:
    """Return `function` pickled by value, with the user's own modules that it refers to.

    Installed packages are referred to by name: the function's environment must have them.

    Raises:
        InvalidArgument: It refers to something that cannot be shipped; the message names it.
        PayloadTooLarge: The code is over 32 MiB.
    """
    own = [module for module in list(sys.modules.values()) if _is_users(module)]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        code = cloudpickle.dumps(function)
    except Exception as error:  # pickling runs user code: anything may come out
        raise InvalidArgument(
            f"{function.__qualname__} cannot be shipped: {error}. It may use only what can be "
            "pickled: make connections, locks and open files inside the function"
        ) from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)
    if len(code) > CODE_BYTES_MAX:
        raise PayloadTooLarge(
            f"{function.__qualname__} has {len(code)} bytes of code, the limit is "
            f"{CODE_BYTES_MAX}: pass large data as an argument"
        )
    return bytes(code)


def _installed() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    folders = [paths["stdlib"], paths["platstdlib"], paths["purelib"], paths["platlib"]]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple(Path(folder).resolve() for folder in folders)


_INSTALLED = _installed()
_PLATFORM = frozenset({"tierwise", "agent", "scheduler", "envs", "training"})


def _is_users(module: ModuleType) -> bool:
    """Return whether a module is the user's own file, neither installed nor part of tierwise."""
    file = getattr(module, "__file__", None)
    name = getattr(module, "__name__", "")
    if not file or name == "__main__" or name.partition(".")[0] in _PLATFORM:
        return False
    path = Path(file).resolve()
    return not any(path.is_relative_to(folder) for folder in _INSTALLED)

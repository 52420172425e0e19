"""Files of users, imported."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tierwise.errors import InvalidArgument


def load_module(path: Path) -> ModuleType:
    """Import a Python file, with its folder on the path.

    Raises:
        InvalidArgument: It is none, or fails while it is imported.
    """
    name = path.stem if path.stem not in sys.modules else f"app_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidArgument(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may do anything
        kind = type(error).__name__
        raise InvalidArgument(f"{path} could not be imported: {kind}: {error}") from error
    return module

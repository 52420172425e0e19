"""tierwise: write a function once, run it on edge, fog or cloud, where it is fast and cheap enough."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierwise.errors import (
        Cancelled,
        DeadlineExceeded,
        FunctionDied,
        FunctionError,
        FunctionOutOfMemory,
        FunctionRaised,
        FunctionTimedOut,
        InvalidArgument,
        NotFound,
        Overloaded,
        TierwiseError,
        Unavailable,
        Unplaceable,
    )
    from tierwise.sdk.app import App, Function
    from tierwise.sdk.client import Client, connect
    from tierwise.sdk.handle import Handle
    from tierwise.sdk.local import LocalCluster

_ROOMS = {
    "tierwise.sdk.app": ("App", "Function"),
    "tierwise.sdk.client": ("Client", "connect"),
    "tierwise.sdk.handle": ("Handle",),
    "tierwise.sdk.local": ("LocalCluster",),
    "tierwise.errors": (
        "Cancelled",
        "DeadlineExceeded",
        "FunctionDied",
        "FunctionError",
        "FunctionOutOfMemory",
        "FunctionRaised",
        "FunctionTimedOut",
        "InvalidArgument",
        "NotFound",
        "Overloaded",
        "TierwiseError",
        "Unavailable",
        "Unplaceable",
    ),
}
_ROOM_BY_NAME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "App",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Function",
    "FunctionDied",
    "FunctionError",
    "FunctionOutOfMemory",
    "FunctionRaised",
    "FunctionTimedOut",
    "Handle",
    "InvalidArgument",
    "LocalCluster",
    "NotFound",
    "Overloaded",
    "TierwiseError",
    "Unavailable",
    "Unplaceable",
    "connect",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: an agent imports this package, too."""
    if name in _ROOM_BY_NAME:
        return getattr(import_module(_ROOM_BY_NAME[name]), name)
    raise AttributeError(f"module 'tierwise' has no attribute {name!r}")

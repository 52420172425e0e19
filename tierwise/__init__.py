"""tierwise: write a function once, run it on edge, fog or cloud, where it is fast and cheap."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tierwise.errors import (
        AlreadyExists,
        CallerError,
        Cancelled,
        DeadlineExceeded,
        FailedPrecondition,
        FunctionDied,
        FunctionError,
        FunctionOutOfMemory,
        FunctionRaised,
        FunctionTimedOut,
        Infeasible,
        InvalidArgument,
        NotFound,
        Overloaded,
        PayloadTooLarge,
        PermissionDenied,
        ResultRejected,
        RetryLater,
        StartFailed,
        TierwiseError,
        Unauthenticated,
        Unavailable,
        Unplaceable,
    )
    from tierwise.sdk.app import App, Function
    from tierwise.sdk.cached import CachedArray
    from tierwise.sdk.client import Client, connect, handle
    from tierwise.sdk.federated import FederatedJob
    from tierwise.sdk.handle import Handle
    from tierwise.sdk.local import LocalCluster
    from tierwise.sdk.rounds import Rounds
    from tierwise.sdk.shared import SharedArray, share

    __version__: str

_ROOMS = {
    "tierwise.sdk.app": ("App", "Function"),
    "tierwise.sdk.client": ("Client", "connect", "handle"),
    "tierwise.sdk.federated": ("FederatedJob",),
    "tierwise.sdk.handle": ("Handle",),
    "tierwise.sdk.cached": ("CachedArray",),
    "tierwise.sdk.local": ("LocalCluster",),
    "tierwise.sdk.rounds": ("Rounds",),
    "tierwise.sdk.shared": ("SharedArray", "share"),
    "tierwise.errors": (
        "AlreadyExists",
        "CallerError",
        "Cancelled",
        "DeadlineExceeded",
        "FailedPrecondition",
        "FunctionDied",
        "FunctionError",
        "FunctionOutOfMemory",
        "FunctionRaised",
        "FunctionTimedOut",
        "Infeasible",
        "InvalidArgument",
        "NotFound",
        "Overloaded",
        "PayloadTooLarge",
        "PermissionDenied",
        "ResultRejected",
        "RetryLater",
        "StartFailed",
        "TierwiseError",
        "Unauthenticated",
        "Unavailable",
        "Unplaceable",
    ),
}
_ROOM_BY_NAME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "AlreadyExists",
    "App",
    "CachedArray",
    "CallerError",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FederatedJob",
    "Function",
    "FunctionDied",
    "FunctionError",
    "FunctionOutOfMemory",
    "FunctionRaised",
    "FunctionTimedOut",
    "Handle",
    "Infeasible",
    "InvalidArgument",
    "LocalCluster",
    "NotFound",
    "Overloaded",
    "PayloadTooLarge",
    "PermissionDenied",
    "ResultRejected",
    "RetryLater",
    "Rounds",
    "SharedArray",
    "StartFailed",
    "TierwiseError",
    "Unauthenticated",
    "Unavailable",
    "Unplaceable",
    "__version__",
    "connect",
    "handle",
    "share",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: an agent imports this package, too."""
    if name in _ROOM_BY_NAME:
        return getattr(import_module(_ROOM_BY_NAME[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("tierwise")
    raise AttributeError(f"module 'tierwise' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

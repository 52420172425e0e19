"""Waits for what other processes come to: there is nothing here to wait on, so it looks again."""

import time
from collections.abc import Callable
from typing import Any

import tierwise

LOOK_S = 0.05


def until(
    found: Callable[[], Any], timeout_s: float = 30.0, what: str = "the condition came true"
) -> Any:
    """Return what `found` returns once that is true."""
    ends_s = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < ends_s, f"never: {what}"
        time.sleep(LOOK_S)
    return value


def eventually(ask: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Return what `ask` returns once the cluster no longer refuses it for now."""
    ends_s = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except (tierwise.NotFound, tierwise.FailedPrecondition, tierwise.Unavailable):
            if time.monotonic() > ends_s:
                raise
            time.sleep(LOOK_S)

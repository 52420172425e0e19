"""The only place where the process reads time.

Machines receive `now_s` with each event; shells read it here. Monotonic time measures,
wall time is for people, certificates and stored records.
"""

import time


def monotonic_s() -> float:
    """Return seconds on this process's monotonic clock; only differences mean anything."""
    return time.monotonic()


def wall_s() -> float:
    """Return seconds since the Unix epoch."""
    return time.time()


def precise_s() -> float:
    """Return seconds on the highest-resolution clock, to time short pieces of code."""
    return time.perf_counter()


def pause(duration_s: float) -> None:
    """Block the calling thread for `duration_s` seconds; for shells with a thread of their own."""
    time.sleep(duration_s)

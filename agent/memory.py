"""Give memory back to the system after large payloads; glibc keeps what was freed otherwise.

Measured with `python -m benchmarks.bench_memory`.
"""

import ctypes
from collections.abc import Callable
from typing import Any

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of <malloc.h>
LARGE_BYTES = 1 << 20
GIVE_BACK_AFTER_S = 1.0


def set_up() -> None:
    """Have blocks of 1 MiB and more returned when they are freed; call before threads start.

    Without this glibc raises the threshold to 32 MiB once such a block was freed, and keeps an
    arena for each of gRPC's threads.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)
        libc.mallopt(M_ARENA_MAX, 2)


class GiveBack:
    """Returns to the system what large payloads leave behind, a while after they have gone."""

    def __init__(self, trim: Callable[[], None] | None = None) -> None:
        libc = _libc()
        self._trim = trim or (lambda: libc.malloc_trim(0) if libc is not None else None)
        self._freed_bytes = 0
        self._due_at_s: float | None = None

    def freed(self, size_bytes: int) -> None:
        """Note that a payload is held no longer."""
        self._freed_bytes += size_bytes

    def tick(self, now_s: float) -> None:
        """Give back if it is time; that takes some milliseconds, so it is not done at each call."""
        if self._due_at_s is not None and now_s >= self._due_at_s:
            self._due_at_s = None
            self._trim()
        if self._due_at_s is None and self._freed_bytes > LARGE_BYTES:
            self._freed_bytes = 0
            self._due_at_s = now_s + GIVE_BACK_AFTER_S  # gRPC lets go of it later than we do


def _libc() -> Any:
    """Return glibc, or None where malloc is another's."""
    try:
        libc = ctypes.CDLL(None)
        return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
    except (OSError, TypeError):
        return None

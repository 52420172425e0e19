"""The updates of one round as one matrix in shared memory.

Rows are written where they stay: from the wire straight into the file that workers map. The agent
alone can write, through the mapping that was made before the file was sealed.
"""

import contextlib
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tierwise.wire import memfd

PIECE_BYTES = 2 << 20  # prepared at a time: a new page costs 2 µs here, which holds Python up
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14


class Matrix:
    """K rows of P float32 in one live memfd.

    Attributes:
        file: What readers get. Its memory is free when nobody holds it nor a view.
        rows: Shape (K, P), float32, writable: for the store alone.
        mapping: What views of rows are taken from.
        filled: Rows that hold an update which counts.
        attempts: How often each row was begun to be written.
    """

    __slots__ = ("attempts", "file", "filled", "mapping", "nbytes", "row_bytes", "rows")

    def __init__(self, row_count: int, parameter_count: int) -> None:
        """Make room; the kernel gives pages as they are touched.

        Raises:
            OSError: It will not.
        """
        self.row_bytes = 4 * parameter_count
        self.nbytes = row_count * self.row_bytes
        self.file, self.mapping = memfd.make_live(self.nbytes)
        self.rows: NDArray[np.float32] = np.frombuffer(self.mapping, np.float32).reshape(
            row_count, parameter_count
        )
        self.filled: set[int] = set()
        self.attempts = [0] * row_count

    def row(self, index: int) -> memoryview:
        """Return one row's bytes, writable."""
        return memoryview(self.rows[index]).cast("B")

    def clear(self, index: int) -> None:
        """Make a row zeros again."""
        self.rows[index] = 0.0
        self.filled.discard(index)

    def prepare(self, is_wanted: Callable[[], bool]) -> None:
        """Have the kernel lay out all pages, for rows to be written at the speed of memory.

        Runs in a thread, until done or no longer wanted. Where it cannot, writing does it.
        """
        with contextlib.suppress(OSError, ValueError):
            for start in range(0, self.nbytes, PIECE_BYTES):
                if not is_wanted():
                    return
                length = min(PIECE_BYTES, self.nbytes - start)
                os.posix_fallocate(self.file.fd, start, length)
                self.mapping.madvise(_POPULATE_WRITE, start, length)


class RowTarget:
    """One row while it is written."""

    __slots__ = ("_attempt", "_index", "_matrix", "view")

    def __init__(self, matrix: Matrix, index: int) -> None:
        self._matrix = matrix
        self._index = index
        matrix.attempts[index] += 1
        self._attempt = matrix.attempts[index]
        self.view: memoryview | None = matrix.row(index)

    def write(self, chunk: memoryview, offset: int) -> None:
        """Put bytes at their place."""
        assert self.view is not None
        self.view[offset : offset + chunk.nbytes] = chunk

    def fill(self) -> None:
        """Count the row in."""
        self._matrix.filled.add(self._index)

    def drop(self) -> None:
        """Make the row zeros: half an update may hold NaN, which no weight of 0 hides.

        Unless it is being written anew, which writes all of it.
        """
        if self._matrix.attempts[self._index] == self._attempt:
            self._matrix.clear(self._index)


class Sheet:
    """One object's file while it is written: by `pwrite`, which is cheaper than touching pages."""

    __slots__ = ("_fd", "view")

    def __init__(self, size_bytes: int) -> None:
        """Make an empty file of `size_bytes`, at least 1.

        Raises:
            OSError: There is no memory.
        """
        self._fd = memfd.create()
        try:
            os.ftruncate(self._fd, size_bytes)
            # Private: the file can be sealed while this view is alive.
            private = mmap.mmap(self._fd, size_bytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        except BaseException:
            self.drop()
            raise
        self.view: memoryview | None = memoryview(private)

    def write(self, chunk: memoryview, offset: int) -> None:
        """Put bytes at their place."""
        while chunk:
            count = os.pwrite(self._fd, chunk, offset)
            chunk, offset = chunk[count:], offset + count

    def fill_from(self, path: Path, size_bytes: int) -> None:
        """Copy a file of `size_bytes`, in the kernel.

        Raises:
            OSError: There is no such file, or it is shorter.
        """
        with path.open("rb", buffering=0) as source:
            offset = 0
            while offset < size_bytes:
                count = os.sendfile(self._fd, source.fileno(), offset, size_bytes - offset)
                if not count:
                    raise OSError(f"{path} is truncated")
                offset += count

    def seal(self) -> memfd.Memfd:
        """Return the file, complete; this object must not be used again."""
        fd, self._fd = self._fd, -1
        try:
            return memfd.seal(fd)
        except BaseException:
            os.close(fd)
            raise

    def drop(self) -> None:
        """Give up. Safe to call twice, and after `seal`."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.drop()

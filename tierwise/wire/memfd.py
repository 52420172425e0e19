"""Large arrays as sealed anonymous files, which processes of one machine hand over uncopied.

This file stands alone: workers load it by path. A file is taken over only if it is sealed against
writing and shrinking: then nobody can change it under a reader, nor make reading it a bus error.
"""

import array
import fcntl
import mmap
import os
import socket
from collections.abc import Iterable
from typing import Any

ATTACHMENTS_MAX = 16  # per call or result; what is beyond travels inside the message
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_NOEXEC_SEAL = 0x0008  # MFD_NOEXEC_SEAL, Linux 6.3: the content can never be run


class Memfd:
    """Owns one descriptor; it is closed when nobody holds this object any more."""

    __slots__ = ("fd", "nbytes")

    def __init__(self, fd: int) -> None:
        """Take over a descriptor.

        Raises:
            ValueError: It is no sealed memfd; it has been closed.
        """
        self.fd = fd
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ValueError("a shared file is not sealed")
            self.nbytes = os.fstat(fd).st_size
        except (OSError, ValueError) as error:
            self.close()
            raise ValueError(f"a shared file cannot be taken over: {error}") from None

    def view(self) -> memoryview:
        """Return its content as a read-only mapping, which lives on when this object is gone."""
        if not self.nbytes:
            return memoryview(b"")
        return memoryview(mmap.mmap(self.fd, self.nbytes, prot=mmap.PROT_READ))

    def close(self) -> None:
        """Close the descriptor; mappings stay. Safe to call twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


def descriptors(ancillary: Iterable[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors that came with a message, from what `recvmsg` says beside it."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return found.tolist()


def make(parts: Iterable[Any]) -> Memfd:
    """Return a sealed file with the bytes of `parts`, one after the other.

    Raises:
        OSError: There is no memory, or this process may not make such files.
    """
    file = Filling()
    try:
        for part in parts:
            file.write(part)
        return file.seal()
    finally:
        file.close()


class Filling:
    """A file that is being filled, for bytes that come over time. Close it if it is not sealed."""

    def __init__(self) -> None:
        self._fd = _create()
        self.nbytes = 0

    def write(self, part: Any) -> None:
        """Append bytes.

        Raises:
            OSError: There is no memory.
        """
        left = memoryview(part).cast("B")
        self.nbytes += len(left)
        while left:
            left = left[os.write(self._fd, left) :]

    def seal(self) -> Memfd:
        """Return the file; nobody can change it any more."""
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
        fd, self._fd = self._fd, -1
        return Memfd(fd)

    def close(self) -> None:
        """Give up what was not sealed. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _create() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("tierwise", flags | _NOEXEC_SEAL)
    except OSError:  # an older kernel
        return os.memfd_create("tierwise", flags)

"""Large arrays as sealed anonymous files, which processes of one machine hand over uncopied.

This file stands alone: workers load it by path. A file is taken over only if it is sealed against
writing and shrinking: then nobody can change it under a reader, nor make reading it a bus error.
"""

import fcntl
import mmap
import os
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


def make(parts: Iterable[Any]) -> Memfd:
    """Return a sealed file with the bytes of `parts`, one after the other.

    Raises:
        OSError: There is no memory, or this process may not make such files.
    """
    fd = _create()
    try:
        for part in parts:
            left = memoryview(part).cast("B")
            while left:
                left = left[os.write(fd, left) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return Memfd(fd)


def _create() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("tierwise", flags | _NOEXEC_SEAL)
    except OSError:  # an older kernel
        return os.memfd_create("tierwise", flags)

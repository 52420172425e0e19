"""Large arrays as sealed anonymous files, which processes of one machine hand over uncopied.

This file stands alone: workers load it by path. A file is taken over only if it is sealed against
writing and shrinking: then nobody can change it under a reader, nor make reading it a bus error.
A *live* file is one that its maker still fills through a mapping made before it was sealed; only
those who trust the maker take it over: workers, from the agent.
"""

import array
import fcntl
import mmap
import os
import socket
from collections.abc import Iterable
from typing import Any

ATTACHMENTS_MAX = 16  # per call or result; what is beyond travels inside the message
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_SEALS = fcntl.F_SEAL_WRITE | _SIZE_SEALS
_FUTURE_WRITE = 0x0010  # F_SEAL_FUTURE_WRITE, Linux 5.1: no new way to write
_NOEXEC_SEAL = 0x0008  # MFD_NOEXEC_SEAL, Linux 6.3: the content can never be run


class Memfd:
    """Owns one descriptor; it is closed when nobody holds this object any more."""

    __slots__ = ("__weakref__", "fd", "nbytes")

    def __init__(self, fd: int, *, is_live: bool = False) -> None:
        """Take over a descriptor.

        Args:
            fd: Of a memfd.
            is_live: Whether its maker may still fill it.

        Raises:
            ValueError: It is no sealed memfd; it has been closed.
        """
        self.fd = fd
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if is_live and seals & _FUTURE_WRITE:
                seals |= fcntl.F_SEAL_WRITE
            if seals & _SEALS != _SEALS:
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
    fd = create()
    try:
        for part in parts:
            left = memoryview(part).cast("B")
            while left:
                left = left[os.write(fd, left) :]
        return seal(fd)
    except BaseException:
        os.close(fd)
        raise


def make_live(nbytes: int) -> tuple[Memfd, mmap.mmap]:
    """Return a file of zeros that can be changed through the mapping beside it, and no other way.

    Raises:
        OSError: There is no memory, or the kernel is older than 5.1.
    """
    fd = create()
    try:
        os.ftruncate(fd, nbytes)
        mapping = mmap.mmap(fd, nbytes)
        seals = _FUTURE_WRITE | _SIZE_SEALS | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return Memfd(fd, is_live=True), mapping


def seal(fd: int) -> Memfd:
    """Take over a file of `create` that is complete.

    Raises:
        OSError: It is mapped for writing.
    """
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS | fcntl.F_SEAL_SEAL)
    return Memfd(fd)


def create() -> int:
    """Return the descriptor of an empty anonymous file.

    Raises:
        OSError: There is no memory, or this process may not make such files.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("tierwise", flags | _NOEXEC_SEAL)
    except OSError:  # an older kernel
        return os.memfd_create("tierwise", flags)

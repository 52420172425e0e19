"""Objects as files named by what is in them, and what a crash can leave of them.

A file appears under its name only when all of it is on the disk. Its name is the BLAKE2b-256 of
its bytes, so that two objects with the same bytes are one file, and no name of a job or client ever
becomes a path.
"""

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

DIGEST_BYTES = 32


class Folder:
    """The files of one cache. Blocking; safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.root = path
        self._objects = path / "objects"
        self._unfinished = path / "unfinished"

    def open(self) -> None:
        """Make the folders, and drop what was never finished."""
        for folder in (self._objects, self._unfinished):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self._unfinished.iterdir():
            path.unlink()

    def path(self, digest: str) -> Path:
        """Return where the object with these bytes is, or would be."""
        return self._objects / digest[:2] / digest[2:]

    def size_bytes(self, digest: str) -> int:
        """Return the size of a file, −1 if there is none."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return -1

    def begin(self, number: int) -> "Draft":
        """Return a file to write to; `number` tells those that are open apart."""
        return Draft(self, self._unfinished / str(number))

    def map(self, digest: str) -> memoryview:
        """Return a file's bytes, read-only and unread so far.

        Raises:
            OSError: There is no such file, or it is empty.
        """
        with self.path(digest).open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))

    def read_into(self, digest: str, target: memoryview) -> None:
        """Fill `target` with a file.

        Raises:
            OSError: There is no such file, or it is shorter.
        """
        with self.path(digest).open("rb", buffering=0) as file:
            while target:
                count = file.readinto(target)
                if not count:
                    raise OSError(f"{digest} is truncated on the disk")
                target = target[count:]

    def set_aside(self, digest: str, number: int) -> list[Path]:
        """Take a file's name away; return where it is until it is deleted, if it was there."""
        path = self._unfinished / f"{number}.gone"
        try:
            self.path(digest).rename(path)
        except FileNotFoundError:
            return []
        return [path]

    def sweep(self, known: Iterable[str]) -> int:
        """Delete files that nothing refers to: they were never acknowledged. Return how many."""
        expected = set(known)
        count = 0
        for folder in self._objects.iterdir():
            for path in folder.iterdir():
                if folder.name + path.name not in expected:
                    path.unlink()
                    count += 1
        return count


class Draft:
    """A file that is being written."""

    __slots__ = ("_fd", "_folder", "_path")

    def __init__(self, folder: Folder, path: Path) -> None:
        """Make the file.

        Raises:
            OSError: The disk is full.
        """
        self._folder = folder
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o600)

    def write(self, part: memoryview) -> None:
        """Append.

        Raises:
            OSError: The disk is full.
        """
        while part:
            part = part[os.write(self._fd, part) :]

    def finish(self, digest: str) -> None:
        """Put it on the disk, then under its name.

        The new name itself is on the disk once the journal's next record is: a file system orders
        what it journals.

        Raises:
            OSError: The disk is full, or failed; what was there before is as it was.
        """
        try:
            os.fdatasync(self._fd)
            path = self._folder.path(digest)
            path.parent.mkdir(exist_ok=True, mode=0o700)
            self._path.rename(path)
        finally:
            self.drop()

    def drop(self) -> None:
        """Close and delete what is left. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
            self._path.unlink(missing_ok=True)

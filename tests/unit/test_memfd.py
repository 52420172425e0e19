"""Sealed files, and live ones that their maker still fills."""

import os

import pytest

from tierwise.wire import memfd
from tierwise.wire.memfd import Memfd


def test_a_live_file_shows_what_its_maker_writes_and_nobody_else_can() -> None:
    file, mapping = memfd.make_live(8192)
    view = file.view()
    mapping[4096:4099] = b"abc"
    assert bytes(view[4096:4099]) == b"abc"
    with pytest.raises(PermissionError):
        os.pwrite(file.fd, b"x", 0)
    for size in (0, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(file.fd, size)
    with pytest.raises(TypeError):
        view[0] = 1


def test_a_live_file_is_taken_over_only_by_who_trusts_its_maker() -> None:
    file, _ = memfd.make_live(10)
    with pytest.raises(ValueError, match="not sealed"):
        Memfd(os.dup(file.fd))
    assert Memfd(os.dup(file.fd), is_live=True).nbytes == 10


def test_an_open_file_is_taken_over_by_nobody() -> None:
    for is_live in (False, True):
        fd = memfd.create()
        os.ftruncate(fd, 10)
        with pytest.raises(ValueError, match="not sealed"):
            Memfd(fd, is_live=is_live)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_file_written_piece_by_piece_is_sealed_at_the_end() -> None:
    fd = memfd.create()
    os.pwrite(fd, b"12345", 0)
    file = memfd.seal(fd)
    assert bytes(file.view()) == b"12345"
    with pytest.raises(PermissionError):
        os.pwrite(file.fd, b"x", 0)

"""The agent's end of a worker's socket: frames with descriptors, without blocking."""

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

READ_BYTES = 1 << 18
FRAME_BYTES_MAX = 160 << 20
FDS_MAX = 64  # that wait to be claimed
_U32 = struct.Struct("<I")
_FLAGS = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT


class FramePipe:
    """Sends and receives frames (a u32 length and a body); descriptors keep their order.

    An asyncio transport would lose the descriptors, so this reads and writes the socket itself.
    """

    def __init__(
        self,
        channel: socket.socket,
        on_frame: Callable[[bytes], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """Begin to read.

        Args:
            channel: A connected stream socket; this object closes it.
            on_frame: Gets each body.
            on_lost: Called once when the other side is gone, with "", or broke the rules, with what
                it did.
        """
        channel.setblocking(False)
        self._channel = channel
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._unsent: deque[Any] = deque()
        self._is_open = True
        self._loop.add_reader(channel.fileno(), self._readable)

    @property
    def is_open(self) -> bool:
        """Return whether the other side may still be there."""
        return self._is_open

    def send(self, parts: Sequence[Any], fds: Sequence[int] = ()) -> None:
        """Send one frame; what the socket does not take at once follows later."""
        if not self._is_open:
            return
        header = _U32.pack(sum(len(part) for part in parts))
        if fds:
            with contextlib.suppress(OSError):  # a dead worker is seen by the reader
                socket.send_fds(self._channel, [header], fds)
            self._write(b"".join(parts))
        else:
            self._write(b"".join((header, *parts)))

    def take_fd(self) -> int:
        """Return the next descriptor that came, which is the caller's from now on.

        Raises:
            IndexError: There is none.
        """
        return self._fds.popleft()

    def finish(self) -> None:
        """Tell the other side that nothing more will come."""
        if self._is_open:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket and every descriptor that nobody has claimed. Safe to call twice."""
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._channel.fileno())
            self._loop.remove_writer(self._channel.fileno())
            self._channel.close()
        while self._fds:
            os.close(self._fds.popleft())
        self._unsent.clear()
        self._buffer.clear()

    def _write(self, data: bytes) -> None:
        if not self._unsent:
            try:
                sent = self._channel.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:  # the reader finds out
                return
            if sent == len(data):
                return
            self._loop.add_writer(self._channel.fileno(), self._writable)
            self._unsent.append(memoryview(data)[sent:])
        else:
            self._unsent.append(memoryview(data))

    def _writable(self) -> None:
        while self._unsent:
            try:
                sent = self._channel.send(self._unsent[0])
            except BlockingIOError:
                return
            except OSError:
                self._unsent.clear()
                break
            if sent < len(self._unsent[0]):
                self._unsent[0] = self._unsent[0][sent:]
            else:
                self._unsent.popleft()
        if self._is_open:
            self._loop.remove_writer(self._channel.fileno())

    def _readable(self) -> None:
        try:
            data, ancillary, _, _ = self._channel.recvmsg(
                READ_BYTES, socket.CMSG_SPACE(FDS_MAX * 4), _FLAGS
            )
        except BlockingIOError:
            return
        except OSError:
            self._lose("")
            return
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds.extend(fds)
        if not data:
            self._lose("")
            return
        if len(self._fds) > FDS_MAX:
            self._lose("the worker sent files that it did not announce")
            return
        if not self._buffer and len(data) >= 4:  # one whole frame is the usual case
            (length,) = _U32.unpack_from(data)
            if len(data) == 4 + length:
                self._on_frame(data[4:])
                return
        self._buffer += data
        while self._is_open and len(self._buffer) >= 4:
            (length,) = _U32.unpack_from(self._buffer)
            if length > FRAME_BYTES_MAX:
                self._lose("the worker sent a frame beyond all bounds")
                return
            if len(self._buffer) < 4 + length:
                return
            body = bytes(memoryview(self._buffer)[4 : 4 + length])
            del self._buffer[: 4 + length]
            self._on_frame(body)

    def _lose(self, offence: str) -> None:
        self.close()
        self._on_lost(offence)

"""The short way between a client and an agent of the same machine, beside their gRPC stream.

The agent listens on an abstract socket named after itself; the client knows the name, and finds
nobody there if the agent is on another machine. The client says a random id, which it repeats over
mTLS: so whoever shows that id there is at the other end of this socket, and what comes over it
comes from the identity of that stream, for as long as the stream lasts. Both look at the kernel's
word for who the other is before anything is said. Small messages and memfds go this way; whatever
does not fit or fails here goes over gRPC instead.
"""

import contextlib
import os
import secrets
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable

from tierwise.wire.memfd import Memfd, descriptors, make

CHANNEL_ID_BYTES = 16
UNCLAIMED_MAX = 64  # files that came and were not asked for; the oldest go
READS_MAX = 256  # in one go
MESSAGE_BYTES_MAX = 64 << 10  # of what goes this way; a socket holds about three times as much
SHORT_BYTES_MAX = 48 << 10  # of the arguments of a call, or the values of a result, in a message
BOUND = b"\1"  # what the agent says when the channel belongs to a stream
IN_FILE = b"\2\2\2\2"  # then the number of the file that holds a message; no message begins so
ATTACHMENT_LOST = "an array that was handed over beside this call is not here; send it again"
_U64 = struct.Struct("<Q")
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def socket_name(node_id: str, address: str) -> bytes:
    """Return the abstract name under which the agent of a node can be found on its machine."""
    return f"\0tierwise/{node_id}/{address}".encode()[:107]


def peer_uid(channel: socket.socket) -> int:
    """Return the user at the other end, as the kernel knows it."""
    word = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(word)[1])


class Handover:
    """One end of such a socket. Nothing here ever blocks."""

    def __init__(self, channel: socket.socket, channel_id: bytes = b"") -> None:
        self.channel_id = channel_id
        self._channel = channel
        self._sent_count = 0
        self._unclaimed: OrderedDict[int, Memfd] = OrderedDict()
        self._buffer = memoryview(bytearray(MESSAGE_BYTES_MAX))
        self.on_message: Callable[[bytes], None] = lambda message: None
        self.is_open = True
        channel.setblocking(False)

    @classmethod
    def connect(cls, name: bytes) -> "Handover | None":
        """Return the end of a client; None if there is no agent that may be trusted."""
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            channel.connect(name)
            if peer_uid(channel) not in (0, os.getuid()):
                raise PermissionError
            channel_id = secrets.token_bytes(CHANNEL_ID_BYTES)
            channel.send(channel_id)
        except OSError:
            channel.close()
            return None
        return cls(channel, channel_id)

    def fileno(self) -> int:
        """Return the descriptor, for a loop that watches it."""
        return self._channel.fileno()

    def send(self, file: Memfd) -> int | None:
        """Hand over a file and return its number; None if the socket does not take it now."""
        number = self._sent_count + 1
        try:
            socket.send_fds(self._channel, [_U64.pack(number)], [file.fd])
        except OSError:
            return None
        self._sent_count = number
        return number

    def take(self, number: int) -> Memfd | None:
        """Return a file that was handed over, once; None if there is none of that number."""
        if number not in self._unclaimed:
            self.drain()
        return self._unclaimed.pop(number, None)

    def post(self, message: bytes) -> bool:
        """Send a small message; return whether the socket took it."""
        if len(message) > MESSAGE_BYTES_MAX:
            return False
        try:
            return self._channel.send(message) == len(message)
        except OSError:
            return False

    def post_large(self, message: bytes) -> bool:
        """Send a message of any size, in a file if it must be; return whether that worked."""
        if self.post(message):
            return True
        try:
            number = self.send(make([message]))
        except OSError:  # no memory for it
            return False
        return number is not None and self.post(IN_FILE + _U64.pack(number))

    def detach(self) -> socket.socket:
        """Return the socket, which is the caller's from now on; this object is closed."""
        self.is_open = False
        return self._channel

    def drain(self) -> None:
        """Take in what has come: keep files, give messages to `on_message`."""
        for _ in range(READS_MAX):
            try:
                length, ancillary, _, _ = self._channel.recvmsg_into(
                    [self._buffer], socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                self.close()
                return
            fds = descriptors(ancillary)
            if not length:
                self.close()
                return
            if fds:
                self._keep(bytes(self._buffer[:length]), fds)
            else:
                self.on_message(bytes(self._buffer[:length]))

    def _keep(self, message: bytes, fds: list[int]) -> None:
        for extra in fds[1:]:
            os.close(extra)
        with contextlib.suppress(ValueError):  # not sealed: it counts as not sent
            file = Memfd(fds[0])
            if len(message) == _U64.size:
                self._unclaimed[_U64.unpack(message)[0]] = file
        while len(self._unclaimed) > UNCLAIMED_MAX:
            self._unclaimed.popitem(last=False)

    def shut_down(self) -> None:
        """Let both ends read that the socket is closed; whoever watches it then closes it."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and what nobody has claimed. Safe to call twice."""
        self.is_open = False
        self._channel.close()
        self._unclaimed.clear()

"""A way from a blocking caller straight to an agent of the same machine: no event loop between.

Two changes of thread cost as much as a quarter of a short call. So a thread that may block takes an
idle lane, sends, and reads the answer itself. A lane is a socket as in `wire/handover.py`, bound to
the same stream as the connection's own, and open as long as that is; one call at a time is on it.
"""

import contextlib
import os
import socket
import struct
from collections import deque

from tierwise.clock import monotonic_s
from tierwise.v1 import invocation_pb2, types_pb2
from tierwise.wire.handover import IN_FILE, MESSAGE_BYTES_MAX, Handover
from tierwise.wire.memfd import Memfd, descriptors

LANES_MAX = 4  # of one client: so many threads call at once without its loop
LOOK_S = 1  # how often the clock is looked at while nothing comes
_U64 = struct.Struct("<Q")
_TIMEVAL = struct.Struct("ll")


class LaneLost(Exception):
    """The agent or the stream is gone; the call may or may not have run."""


class Lane:
    """One such socket."""

    def __init__(self, handover: Handover) -> None:
        """Take over a bound socket; from now on reading it blocks."""
        self.channel_id = handover.channel_id
        self._channel = handover.detach()
        self._channel.setblocking(True)
        wait = _TIMEVAL.pack(LOOK_S, 0)
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)
        self._buffer = bytearray(MESSAGE_BYTES_MAX)
        self._space = socket.CMSG_SPACE(4 * 4)

    def call(
        self, invocation: types_pb2.Invocation, ends_s: float, files: dict[int, Memfd]
    ) -> types_pb2.InvocationResult:
        """Send one invocation, small and without attachments, and wait for its result.

        Args:
            invocation: What to send.
            ends_s: Monotonic time at which the caller gives up.
            files: Takes the files that come with the result, by number.

        Raises:
            LaneLost: The lane is closed; whoever called must ask another way under the same id.
            TimeoutError: There was no result until `ends_s`; the agent is told to stop.
        """
        request = invocation_pb2.InvokeStreamRequest(invocations=[invocation])
        try:
            self._channel.send(request.SerializeToString())
            while (result := self._receive(files)) is None or (
                result.request_id != invocation.request_id
            ):
                if monotonic_s() > ends_s:
                    raise TimeoutError
        except OSError as error:
            if isinstance(error, TimeoutError):
                self._stop(invocation.request_id)
                raise
            self.close()
            raise LaneLost from None
        except BaseException:  # Ctrl-C
            self._stop(invocation.request_id)
            raise
        return result

    def close(self) -> None:
        """Close the socket; a call that is on it is lost. Safe to call twice, from any thread."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        """Close the descriptor when no thread reads it any more."""
        self._channel.close()

    def _receive(self, files: dict[int, Memfd]) -> types_pb2.InvocationResult | None:
        """Take in one message; return the result if it is one.

        Raises:
            OSError: The agent has closed the lane, or says what it may not.
        """
        try:
            length, ancillary, _, _ = self._channel.recvmsg_into(
                [self._buffer], self._space, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        if not length:
            raise ConnectionResetError
        message = memoryview(self._buffer)[:length]
        found = [Memfd(fd) for fd in descriptors(ancillary)]
        if found:
            files[_U64.unpack(message)[0]] = found[0]
            return None
        if length == len(IN_FILE) + _U64.size and message[: len(IN_FILE)] == IN_FILE:
            file = files.pop(_U64.unpack(message[len(IN_FILE) :])[0])
            message = file.view()
        response = invocation_pb2.InvokeStreamResponse.FromString(message)  # type: ignore[arg-type]
        return response.results[0] if response.results else None

    def _stop(self, request_id: str) -> None:
        """Tell the agent that a result is not wanted, and use the lane no more."""
        cancel = invocation_pb2.InvokeStreamRequest(cancels=[request_id])
        with contextlib.suppress(OSError):
            self._channel.send(cancel.SerializeToString())
        self.close()


class Lanes:
    """The lanes of one client."""

    def __init__(self) -> None:
        self._idle: deque[Lane] = deque()
        self._open: set[Lane] = set()
        self._pid = os.getpid()
        self.has_room = False  # whether another may be opened; the connection says so

    def take(self) -> Lane | None:
        """Return an idle lane, the caller's until it is given back; None if there is none."""
        try:
            lane = self._idle.pop()
        except IndexError:
            return None
        if os.getpid() != self._pid:  # a fork: the parent reads from it too
            self._idle.append(lane)
            return None
        return lane

    def give_back(self, lane: Lane) -> None:
        """Let others use a lane whose call has ended."""
        if lane in self._open:
            self._idle.append(lane)

    def add(self, lane: Lane) -> None:
        """Take in a new one."""
        self._open.add(lane)
        self._idle.append(lane)
        self.has_room = len(self._open) < LANES_MAX

    def drop(self, lane: Lane) -> None:
        """Forget one that is closed."""
        self._open.discard(lane)

    def close(self) -> None:
        """Close all, for their stream has ended."""
        self.has_room = False
        self._idle.clear()
        for lane in list(self._open):
            lane.close()
        self._open.clear()

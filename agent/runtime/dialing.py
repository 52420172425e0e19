"""Sockets of a sealed function that declares `network=`: the agent dials for it.

`install` puts a class in the place of `socket.socket` that makes local stream sockets where TCP is
asked for, and hands the other end to the agent at `connect`; names are resolved there too. What
does not go through Python's `socket` (C libraries of their own) has no network. Stands alone:
zygotes load it; the agent's end is `relay.py`.
"""

import os
import select
import socket
from typing import Any

_SERVICES = {"http": 80, "https": 443}
_LINE_MAX = 1024
_TCP_LEVELS = (socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6)
_Socket = socket.socket


def install(dialer: int) -> None:
    """Have this process's new TCP sockets connect through the agent.

    Args:
        dialer: Descriptor of the socket over which the agent is asked.
    """
    way = _Socket(fileno=dialer)

    class RelayedSocket(_Socket):
        """A socket whose other end is with the agent."""

        _other: _Socket | None = None
        _peer: tuple[Any, ...] | None = None

        def __init__(
            self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None
        ) -> None:
            is_tcp = family in (-1, socket.AF_INET, socket.AF_INET6) and (
                type == -1 or type & 0xF == socket.SOCK_STREAM
            )
            if fileno is not None or not is_tcp:
                super().__init__(family, type, proto, fileno)
                return
            mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            super().__init__(fileno=mine.detach())
            self._other = other

        def connect(self, address: Any) -> None:
            if self._other is None:
                super().connect(address)
                return
            host, port = address[:2]
            socket.send_fds(way, [f"{host}:{port}".encode()], [self._other.fileno()])
            self._other.close()
            self._other = None
            answer = _read_line(self.fileno(), self.gettimeout() or None)
            if not answer.startswith("+"):
                raise PermissionError(1, answer[1:] or "the agent refused the connection")
            self._peer = tuple(address)

        def connect_ex(self, address: Any) -> int:
            try:
                self.connect(address)
            except OSError as error:
                return error.errno or 1
            return 0

        def setsockopt(self, level: int, *rest: Any) -> None:
            if level not in _TCP_LEVELS:  # they mean a connection that is the agent's
                super().setsockopt(level, *rest)

        def getpeername(self) -> Any:
            return self._peer if self._peer is not None else super().getpeername()

        def close(self) -> None:
            if self._other is not None:
                self._other.close()
                self._other = None
            super().close()

    vars(socket)["socket"] = RelayedSocket
    vars(socket)["getaddrinfo"] = _getaddrinfo


def _getaddrinfo(
    host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
) -> list[Any]:
    """Leave the name as it is: the agent resolves it when it dials."""
    name = host.decode() if isinstance(host, bytes) else str(host)
    number = _SERVICES.get(port) if isinstance(port, str) and not port.isdigit() else int(port or 0)
    if number is None or type not in (0, socket.SOCK_STREAM):
        raise socket.gaierror(socket.EAI_SERVICE, f"only TCP is relayed, and no service {port}")
    address = (name, number)
    return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)]


def _read_line(descriptor: int, timeout_s: float | None) -> str:
    """Return the agent's answer, and not a byte of what the target says after it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < _LINE_MAX:
        if not select.select([descriptor], [], [], timeout_s)[0]:
            raise TimeoutError("timed out")
        byte = os.read(descriptor, 1)
        if not byte:
            break
        line += byte
    return line.decode(errors="replace").strip()

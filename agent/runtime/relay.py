"""The only way of a sealed function to the network: connections that the agent makes for it.

A function that declares `network=("host:port", …)` gets one end of a socket. Over it, it sends the
name of a target together with one end of a socket pair; the agent dials the target, if it is on the
list, and carries bytes between the two until either side ends. No socket of the node's network ever
reaches the function: it could be connected anew, to elsewhere.
"""

import asyncio
import contextlib
import ipaddress
import socket

CONNECTIONS_MAX = 64  # of one instance at a time
CONNECT_TIMEOUT_S = 10.0
REQUEST_BYTES_MAX = 512
CHUNK_BYTES = 64 << 10


class Relay:
    """Dials for one instance."""

    def __init__(self, allowed: frozenset[str], *, may_reach_node: bool = False) -> None:
        """Make the socket.

        Args:
            allowed: Targets, "host:port".
            may_reach_node: Whether a target may be the node itself, or a link-local address.
        """
        self._allowed = allowed
        self._may_reach_node = may_reach_node
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.setblocking(False)
        self._loop.add_reader(self._ours.fileno(), self._asked)

    def close(self) -> None:
        """End every connection."""
        if self._ours.fileno() >= 0:
            self._loop.remove_reader(self._ours.fileno())
        self._ours.close()
        self.theirs.close()
        for task in self._tasks:
            task.cancel()

    def _asked(self) -> None:
        """Take one request; whatever is wrong with it concerns the function alone."""
        try:
            message, fds, _, _ = socket.recv_fds(self._ours, REQUEST_BYTES_MAX, 1)
        except BlockingIOError:
            return
        except OSError:
            message, fds = b"", []
        if not message and not fds:
            self._loop.remove_reader(self._ours.fileno())
            return
        if not fds:
            return
        end = socket.socket(fileno=fds[0])
        if (end.family, end.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            end.close()
            return
        end.setblocking(False)
        task = self._loop.create_task(self._serve(message.decode(errors="replace"), end))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, target: str, end: socket.socket) -> None:
        with end, contextlib.suppress(OSError):  # the function's own end broke: nobody to tell
            try:
                outside = await self._dial(target)
            except (OSError, TimeoutError) as error:
                why = str(error) or f"no answer within {CONNECT_TIMEOUT_S:.0f} s"
                await self._loop.sock_sendall(end, f"-{why}\n".encode())
                return
            with outside:
                await self._loop.sock_sendall(end, b"+\n")
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._carry(end, outside))
                    group.create_task(self._carry(outside, end))

    async def _dial(self, target: str) -> socket.socket:
        if target not in self._allowed:
            raise PermissionError(
                f"{target} is not among the function's network=({', '.join(sorted(self._allowed))})"
            )
        if len(self._tasks) > CONNECTIONS_MAX:
            raise ConnectionRefusedError(f"more than {CONNECTIONS_MAX} connections at a time")
        host, _, port = target.rpartition(":")
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            found = await self._loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            refusal: OSError = OSError(f"{host} has no address")
            for family, kind, protocol, _, address in found:
                if not self._may_reach_node and _is_of_node(str(address[0])):
                    refusal = PermissionError(f"{target} is this node itself, or link-local")
                    continue
                outside = socket.socket(family, kind, protocol)
                outside.setblocking(False)
                try:
                    await self._loop.sock_connect(outside, address)
                except OSError as error:
                    outside.close()
                    refusal = error
                    continue
                except BaseException:
                    outside.close()
                    raise
                return outside
        raise refusal

    async def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        """Copy until the source ends, and pass the end on; one chunk is held at a time."""
        with contextlib.suppress(ConnectionError):
            while data := await self._loop.sock_recv(source, CHUNK_BYTES):
                await self._loop.sock_sendall(sink, data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _is_of_node(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    return (
        address.is_loopback
        or address.is_link_local
        or address.is_unspecified
        or address.is_multicast
    )

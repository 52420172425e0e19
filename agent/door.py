"""Where clients on this machine come in the short way: see tierwise/wire/handover.py."""

import asyncio
import functools
import os
import socket

import structlog

from tierwise.wire.handover import CHANNEL_ID_BYTES, Handover, peer_uid, socket_name

log = structlog.get_logger()

CLIENTS_MAX = 64


class Door:
    """Listens on this node's abstract socket. An agent works without it, copying more."""

    def __init__(self, node_id: str, address: str) -> None:
        self._name = socket_name(node_id, address)
        self._listener: socket.socket | None = None
        self._strangers: set[Handover] = set()  # have not said their id yet
        self._known: dict[bytes, Handover] = {}

    def open(self) -> None:
        """Begin to listen."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.setblocking(False)
        try:
            listener.bind(self._name)
            listener.listen(CLIENTS_MAX)
        except OSError as error:
            listener.close()
            log.warning("door.not_opened", cause=str(error))
            return
        self._listener = listener
        asyncio.get_running_loop().add_reader(listener.fileno(), self._accept)

    def find(self, channel_id: bytes) -> Handover | None:
        """Return the end of the client that named itself so; None if it is not on this machine."""
        found = self._known.get(channel_id)
        if found is None and self._listener is not None and len(channel_id) == CHANNEL_ID_BYTES:
            self._accept()  # its call may have come faster than its connection
            for client in list(self._strangers):
                self._readable(client)
            found = self._known.get(channel_id)
        return found if found is not None and found.is_open else None

    def close(self) -> None:
        """Stop listening and close every connection."""
        listener, self._listener = self._listener, None
        if listener is not None:
            asyncio.get_running_loop().remove_reader(listener.fileno())
            listener.close()
        for client in [*self._strangers, *self._known.values()]:
            self._forget(client)

    def _accept(self) -> None:
        assert self._listener is not None
        while True:
            try:
                channel, _ = self._listener.accept()
            except OSError:
                return
            is_full = len(self._known) + len(self._strangers) >= CLIENTS_MAX
            if is_full or (os.getuid() != 0 and peer_uid(channel) not in (0, os.getuid())):
                channel.close()
                continue
            client = Handover(channel)
            client.on_message = functools.partial(self._named, client)
            self._strangers.add(client)
            asyncio.get_running_loop().add_reader(client.fileno(), self._readable, client)

    def _readable(self, client: Handover) -> None:
        fileno = client.fileno()
        if fileno < 0:
            return
        client.drain()
        if not client.is_open:
            asyncio.get_running_loop().remove_reader(fileno)
            self._forget(client)

    def _named(self, client: Handover, message: bytes) -> None:
        """Take the first message of a client: the id that its calls will show."""
        self._strangers.discard(client)
        client.on_message = lambda message: None
        if len(message) == CHANNEL_ID_BYTES and message not in self._known:
            client.channel_id = message
            self._known[message] = client

    def _forget(self, client: Handover) -> None:
        self._strangers.discard(client)
        if self._known.get(client.channel_id) is client:
            del self._known[client.channel_id]
        if client.is_open:
            asyncio.get_running_loop().remove_reader(client.fileno())
            client.close()

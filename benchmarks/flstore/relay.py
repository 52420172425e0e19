"""A path with a first-byte latency and a bandwidth, between a client and a server on this machine.

    python -m benchmarks.flstore.relay TARGET_PORT FIRST_BYTE_MS MB_PER_S_CONNECTION MB_PER_S_TOTAL

A process of its own that stands alone. It prints the port it listens on, and ends with its
standard input. What a client sends is handed on FIRST_BYTE_MS later, without slowing what follows:
a request on a connection that is kept open so waits once, requests sent together wait together.
What the server sends is paced per connection and over all of them. What runs through here is
*emulated* in every table: figures are chosen, not measured on a network.
"""

import contextlib
import queue
import socket
import sys
import threading
import time

CHUNK_BYTES = 256 * 1024
CREDIT_S = 0.004  # late wake-ups are made good up to here, so that the rate asked is the rate met


class Pace:
    """A rate that several threads share.

    Attributes:
        bytes_per_s: Its limit.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._next_s = 0.0
        self._lock = threading.Lock()

    def due_s(self, byte_count: int) -> float:
        """Return when so many more bytes may have been sent, and count them."""
        with self._lock:
            start_s = max(self._next_s, time.perf_counter() - CREDIT_S)
            self._next_s = start_s + byte_count / self.bytes_per_s
            return self._next_s


def wait_until(due_s: float) -> None:
    left_s = due_s - time.perf_counter()
    if left_s > 0:
        time.sleep(left_s)


def close(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def send_later(client: socket.socket, server: socket.socket, delay_s: float) -> None:
    """Hand on what a client sends, each piece `delay_s` after it came."""
    pieces: queue.Queue[tuple[float, bytes]] = queue.Queue(maxsize=256)

    def deliver() -> None:
        with contextlib.suppress(OSError):
            while True:
                due_s, piece = pieces.get()
                if not piece:
                    break
                wait_until(due_s)
                server.sendall(piece)
        close(client, server)

    threading.Thread(target=deliver, daemon=True).start()
    with contextlib.suppress(OSError):
        while piece := client.recv(CHUNK_BYTES):
            pieces.put((time.perf_counter() + delay_s, piece))
    pieces.put((0.0, b""))


def send_paced(server: socket.socket, client: socket.socket, paces: tuple[Pace, ...]) -> None:
    """Hand on what the server sends, no faster than every pace allows."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with contextlib.suppress(OSError):
        while count := server.recv_into(buffer):
            wait_until(max(pace.due_s(count) for pace in paces))
            client.sendall(buffer[:count])
    close(client, server)


def serve(target: int, first_byte_s: float, connection_rate: float, total: Pace) -> None:
    """Accept connections for ever."""
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client, _ = listener.accept()
            try:
                server = socket.create_connection(("127.0.0.1", target))
            except OSError:
                client.close()
                continue
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            paces = (Pace(connection_rate), total)
            for job, arguments in (
                (send_later, (client, server, first_byte_s)),
                (send_paced, (server, client, paces)),
            ):
                threading.Thread(target=job, args=arguments, daemon=True).start()


def main() -> None:
    target, first_byte_ms, connection_mb, total_mb = (float(x) for x in sys.argv[1:5])
    arguments = (int(target), first_byte_ms / 1e3, connection_mb * 1e6, Pace(total_mb * 1e6))
    threading.Thread(target=serve, args=arguments, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()

"""An instance before it is one: forked and sealed, waiting for the function that it will run.

Most of a start is the seal, and of the function that depends on its memory and CPU only. So a
zygote keeps a spare of each size that it was asked for last; a start hands it the function's files,
and another is made once nothing else happens. Stands alone: zygotes load this.
"""

import itertools
import json
import os
import socket
from typing import Any

from agent.runtime import mounts
from agent.runtime.cell import Cell
from agent.runtime.sandbox import Seal

SPARES_MAX = 3  # of one zygote
IDLE_MS = 25  # a start that follows at once does not wait for the making of a spare
MESSAGE_MAX = 65536
WORK = mounts.WORK
_numbers = itertools.count()

Size = tuple[int, float]  # MiB and CPUs: what the seal of an instance depends on


class Spare:
    """One, as its zygote sees it; the child uses `theirs` alone."""

    def __init__(self, size: Size, seal: Seal) -> None:
        """Prepare what is needed before the fork.

        Raises:
            OSError: The kernel refused a control group.
        """
        memory_mib, cpus = size
        self.size = size
        # Branches share the folder of their root's groups: the process number tells them apart.
        name = f"spare-{os.getpid()}-{next(_numbers)}"
        self.cell = Cell(name, seal, memory_mib=memory_mib, cpus=cpus)
        self.orders, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def forked(self, pid: int, first: int) -> None:
        """Take the new process in charge; for its zygote."""
        self.theirs.close()
        self.cell.forked(pid, first)

    def give(self, order: dict[str, Any], fds: list[int]) -> bool:
        """Make it the instance of an order; return False if it has ended."""
        self.cell.name = order["fork"]
        try:
            socket.send_fds(self.orders, [json.dumps(order).encode()], fds)
        except OSError:
            return False
        self.orders.close()
        return True

    def close(self) -> None:
        """Let it end, for nobody will give it anything."""
        self.orders.close()
        self.theirs.close()


class Spares:
    """Those of one zygote, and the sizes of which there should be one."""

    def __init__(self) -> None:
        self._ready: dict[Size, Spare] = {}
        self._wanted: dict[Size, None] = {}  # what was asked for last is the last
        self._leaving: list[Cell] = []

    def take(self, size: Size) -> Spare | None:
        """Return the spare of a size, if there is one, and want another."""
        self._wanted.pop(size, None)
        self._wanted[size] = None
        while len(self._wanted) > SPARES_MAX:
            oldest = next(iter(self._wanted))
            del self._wanted[oldest]
            if oldest in self._ready:
                self._dismiss(oldest)
        return self._ready.pop(size, None)

    def missing(self) -> Size | None:
        """Return a size of which there should be a spare and is none."""
        return next((size for size in self._wanted if size not in self._ready), None)

    def put(self, spare: Spare) -> None:
        """Keep a spare until its size is asked for."""
        self._ready[spare.size] = spare

    def lost(self, cell: Cell) -> bool:
        """Forget a cell that has ended if it was a spare; return whether it was.

        No other is made of its size before that is asked for again: if none can live here, they
        would be made for ever.
        """
        if cell in self._leaving:
            self._leaving.remove(cell)
            return True
        size = next((size for size, spare in self._ready.items() if spare.cell is cell), None)
        if size is None:
            return False
        self._ready.pop(size).close()
        self._wanted.pop(size, None)
        return True

    def cells(self) -> list[Cell]:
        """Return the cells of all that have not ended."""
        return [*self._leaving, *(spare.cell for spare in self._ready.values())]

    def _dismiss(self, size: Size) -> None:
        spare = self._ready.pop(size)
        spare.close()
        self._leaving.append(spare.cell)


def wait_for_order(orders: socket.socket, fds_max: int) -> tuple[dict[str, Any], list[int]]:
    """Return what a spare is to be, with its descriptors; end the process if nobody wants it."""
    message, fds, _, _ = socket.recv_fds(orders, MESSAGE_MAX, fds_max)
    orders.close()
    if not message:
        os._exit(0)
    order: dict[str, Any] = json.loads(message)
    return order, fds

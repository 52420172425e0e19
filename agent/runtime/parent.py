"""The agent's end of a zygote process."""

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from agent.runtime.environments import Environment
from tierwise.wire import payload

ZYGOTE = Path(__file__).with_name("zygote.py")
# Nothing of the agent's environment reaches a function, and one process uses one thread.
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/nonexistent",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
MESSAGE_MAX = 65536
CLOSE_TIMEOUT_S = 2.0


class ZygoteProcess:
    """Forks instances on request and tells when they end; a root also branches into more."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.is_alive = False
        self.private_mib = 0.0  # memory that it shares with nobody, when it was ready
        self.thread_count = 1
        self.on_idle: Callable[[], None] = lambda: None  # its last instance has ended
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._forked: dict[str, Callable[[int], None]] = {}
        self._ended: dict[str, Callable[[int | None], None]] = {}

    async def open(self) -> None:
        """Start the process and wait until it has imported what it should.

        Raises:
            OSError: The interpreter could not be started, or ended at once.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [
                    str(self.environment.python),
                    "-I",
                    str(ZYGOTE),
                    str(theirs.fileno()),
                    str(os.getpid()),
                    str(payload.__file__),
                    *self.environment.preload,
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        await self._listen(ours)

    async def branch(self, name: str, modules: Sequence[str]) -> "ZygoteProcess":
        """Return a new zygote, forked from this one, that has imported `modules` as well.

        Those that cannot be imported are left out.

        Raises:
            OSError: This zygote is gone, or the new one ended before it was ready.
        """
        child = ZygoteProcess(self.environment)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                self._order({"branch": name, "modules": list(modules)}, [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        try:
            await child._listen(ours)
        except BaseException:
            await child.close()
            raise
        return child

    @property
    def instance_count(self) -> int:
        """Return how many instances it has that are not known to have ended."""
        return len(self._ended)

    async def _listen(self, control: socket.socket) -> None:
        control.setblocking(False)
        self._control = control
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        loop.add_reader(control.fileno(), self._receive)
        await self._ready
        self.is_alive = True

    def _order(self, order: dict[str, object], fds: Sequence[int]) -> None:
        if self._control is None:
            raise OSError("the zygote is gone")
        socket.send_fds(self._control, [json.dumps(order).encode()], fds)

    def fork(
        self,
        instance_id: str,
        order: dict[str, object],
        fds: list[int],
        *,
        on_forked: Callable[[int], None],
        on_ended: Callable[[int | None], None],
    ) -> None:
        """Ask for an instance; `on_forked` gets its pid, `on_ended` its exit code.

        Raises:
            OSError: The zygote is gone.
        """
        self._forked[instance_id] = on_forked
        self._ended[instance_id] = on_ended
        try:
            self._order({"fork": instance_id, **order}, fds)
        except OSError:
            self._forked.pop(instance_id)
            self._ended.pop(instance_id)
            raise

    def kill(self, instance_id: str) -> None:
        """Kill an instance if it has not ended yet; the zygote knows, so no pid is reused."""
        if self._control is not None and instance_id in self._ended:
            try:
                self._control.send(json.dumps({"kill": instance_id}).encode())
            except OSError:
                self._lost()

    async def close(self) -> None:
        """End the process and all its children."""
        process, self._process = self._process, None
        self._lost()
        if process is None:
            return
        try:
            await asyncio.to_thread(process.wait, CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)

    def _receive(self) -> None:
        assert self._control is not None
        try:
            message = self._control.recv(MESSAGE_MAX)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if not message:
            self._lost()
            return
        event = json.loads(message)
        if "forked" in event:
            self._forked.pop(event["forked"], _ignore)(event["pid"])
        elif "ended" in event:
            self._ended.pop(event["ended"], _ignore)(event["code"])
            if not self._ended:
                self.on_idle()
        elif self._ready is not None and not self._ready.done():
            self.private_mib = event["private_kib"] / 1024
            self.thread_count = event["thread_count"]
            self._ready.set_result(None)

    def _lost(self) -> None:
        """The zygote is gone, and with it, by the parent-death signal, all its children."""
        self.is_alive = False
        control, self._control = self._control, None
        if control is not None:
            asyncio.get_running_loop().remove_reader(control.fileno())
            control.close()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(OSError("the zygote ended before it was ready"))
        ended, self._ended = self._ended, {}
        self._forked.clear()
        for callback in ended.values():
            callback(None)


def _ignore(_: object) -> None:
    """Take what nobody waits for any more."""

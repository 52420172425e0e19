"""The agent's end of a zygote process."""

import asyncio
import itertools
import json
import os
import socket
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from agent.runtime import cgroups
from agent.runtime.environments import Environment
from agent.runtime.sandbox import OFF, STANDARD, STRICT, tell
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
_numbers = itertools.count()
log = structlog.get_logger()


class Listener(Protocol):
    """Hears what becomes of one instance."""

    def forked(self, pid: int) -> None:
        """It runs, under this process number."""

    def fork_failed(self, why: str) -> None:
        """It could not be made."""

    def call_refused(self, call: str) -> None:
        """It made a system call that it may not make."""

    def ended(self, code: int | None, *, has_run_out_of_memory: bool) -> None:
        """It is gone, with this exit code; None if nobody saw it."""


class ZygoteProcess:
    """Forks instances on request and tells when they end; a root also branches into more."""

    def __init__(
        self, environment: Environment, isolation: str = STANDARD, data: Sequence[str] = ()
    ) -> None:
        self.environment = environment
        self.is_alive = False
        self.missing: dict[str, str] = {}  # layers of the seal that this node lacks, and why
        self._isolation = isolation
        self._data = data
        self._group = f"{cgroups.PREFIX}{os.getpid()}-{next(_numbers)}"
        self.private_mib = 0.0  # memory that it shares with nobody, when it was ready
        self.thread_count = 1
        self.on_idle: Callable[[], None] = lambda: None  # its last instance has ended
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._ready: asyncio.Future[None] | None = None
        self._instances: dict[str, Listener] = {}

    async def open(self) -> None:
        """Start the process and wait until it has imported what it should.

        Raises:
            OSError: The interpreter could not be started, or ended at once.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        own = os.pidfd_open(os.getpid())
        with theirs:
            self._process = subprocess.Popen(
                [
                    str(self.environment.python),
                    "-I",
                    str(ZYGOTE),
                    str(theirs.fileno()),
                    str(own),
                    self._isolation,
                    self._group,
                    json.dumps(list(self._data)),
                    str(payload.__file__),
                    *self.environment.preload,
                ],
                pass_fds=[theirs.fileno(), own],
                stdin=subprocess.DEVNULL,
                env=ENVIRONMENT,
                cwd="/",
                start_new_session=True,
            )
        os.close(own)
        await self._listen(ours)
        if self.missing and self._isolation == STRICT:
            await self.close()
            raise OSError(tell(self.missing))
        if self.missing and self._isolation == STANDARD:
            log.warning("seal.incomplete", missing=self.missing)

    async def branch(self, name: str, modules: Sequence[str]) -> "ZygoteProcess":
        """Return a new zygote, forked from this one, that has imported `modules` as well.

        Those that cannot be imported are left out.

        Raises:
            OSError: This zygote is gone, or the new one ended before it was ready.
        """
        child = ZygoteProcess(self.environment, self._isolation, self._data)
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
        return len(self._instances)

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
        self, instance_id: str, order: dict[str, object], fds: list[int], listener: Listener
    ) -> None:
        """Ask for an instance; the listener hears of it from now on.

        Raises:
            OSError: The zygote is gone.
        """
        self._instances[instance_id] = listener
        try:
            self._order({"fork": instance_id, **order}, fds)
        except OSError:
            self._instances.pop(instance_id)
            raise

    def kill(self, instance_id: str) -> None:
        """Kill an instance if it has not ended yet; the zygote knows, so no pid is reused."""
        if self._control is not None and instance_id in self._instances:
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
        if self._isolation != OFF:
            left_count = await asyncio.to_thread(cgroups.sweep, self._group)
            if left_count:
                log.error("group.left_behind", group=self._group, count=left_count)

    def drain(self) -> None:
        """Hear what the zygote has said up to now."""
        while self._control is not None and self._receive():
            pass

    def _receive(self) -> bool:
        """Hear one message; return whether there was one."""
        assert self._control is not None
        try:
            message, fds, _, _ = socket.recv_fds(self._control, MESSAGE_MAX, 1)
        except BlockingIOError:
            return False
        except OSError:
            message, fds = b"", []
        if not message:
            self._lost()
            return False
        event = json.loads(message)
        if "forked" in event:
            pid = _pid_behind(fds[0])
            for descriptor in fds:
                os.close(descriptor)
            if event["forked"] in self._instances:
                self._instances[event["forked"]].forked(pid)
        elif "refused" in event:
            if event["refused"] in self._instances:
                self._instances[event["refused"]].call_refused(event["call"])
        elif "failed" in event:
            if (listener := self._instances.pop(event["failed"], None)) is not None:
                listener.fork_failed(event["why"])
        elif "ended" in event:
            if event["left"]:
                log.error("instance.left_behind", instance_id=event["ended"], what=event["left"])
            if (listener := self._instances.pop(event["ended"], None)) is not None:
                listener.ended(event["code"], has_run_out_of_memory=event["oom"])
            if not self._instances:
                self.on_idle()
        elif self._ready is not None and not self._ready.done():
            self.missing = event["missing"]
            self.private_mib = event["private_kib"] / 1024
            self.thread_count = event["thread_count"]
            self._ready.set_result(None)
        return True

    def _lost(self) -> None:
        """The zygote is gone, and with it, by the parent-death signal, all its children."""
        self.is_alive = False
        control, self._control = self._control, None
        if control is not None:
            asyncio.get_running_loop().remove_reader(control.fileno())
            control.close()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(OSError("the zygote ended before it was ready"))
        instances, self._instances = self._instances, {}
        for listener in instances.values():
            listener.ended(None, has_run_out_of_memory=False)


def _pid_behind(pidfd: int) -> int:
    """Return the number of a process as this one sees it; -1 if it is gone already."""
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    return -1

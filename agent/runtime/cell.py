"""One sealed instance as its zygote sees it: its process, its control group, what it was refused.

Stands alone: zygotes load it.
"""

import contextlib
import os
import signal
import socket

from agent.runtime import cgroups
from agent.runtime.sandbox import OFF, Seal
from agent.runtime.seccomp import Refusals

REFUSALS_MAX = 1000  # after so many of one instance the kernel refuses by itself, uncounted


class Cell:
    """Made before the fork, gone after the end: no process, group or descriptor of it is left."""

    def __init__(self, name: str, seal: Seal, *, memory_mib: int, cpus: float) -> None:
        self.name = name
        self.pid = -1
        self._first = -1
        self.pidfd = -1
        self.group: cgroups.Group | None = seal.make_group(name, memory_mib, cpus)
        self.report: socket.socket | None = None  # the child's end
        self._ours: socket.socket | None = None
        self._refusals: Refusals | None = None
        self._refused_count = 0
        self._waiting: int | None = None
        if seal.isolation != OFF:
            self._ours, self.report = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def forked(self, pid: int, first: int) -> None:
        """Take the new process, and process 1 of its namespace, in charge; for its zygote."""
        self.pid = pid
        self._first = first
        self.pidfd = os.pidfd_open(pid)
        if self.report is not None:
            self.report.close()
            self.report = None

    def descriptors(self) -> list[int]:
        """Return what to poll: the process's end, and its refused calls or the way to them."""
        found = [self.pidfd]
        if self._ours is not None:
            found.append(self._ours.fileno())
        if self._refusals is not None:
            found.append(self._refusals.listener)
        return found

    def listen(self) -> None:
        """Take the supervisor's descriptor from the child, or notice that none will come."""
        assert self._ours is not None
        with contextlib.suppress(OSError):
            _, fds, _, _ = socket.recv_fds(self._ours, 65536, 1)
            if fds:
                self._refusals = Refusals(fds[0])
        self._ours.close()
        self._ours = None

    @property
    def is_listening(self) -> bool:
        """Return whether the supervisor's descriptor has come."""
        return self._refusals is not None

    def refused(self) -> str | None:
        """Return the name of a system call that waits to be denied, or None."""
        if self._refusals is None:
            return None
        found = self._refusals.receive()
        if found is None:
            return None
        self._waiting, name = found
        return name

    def deny(self) -> bool:
        """Deny the call that `refused` named; return whether more will be heard."""
        if self._refusals is None or self._waiting is None:
            return False
        self._refusals.deny(self._waiting)
        self._waiting = None
        self._refused_count += 1
        if self._refused_count < REFUSALS_MAX:
            return True
        self.stop_listening()
        return False

    def stop_listening(self) -> None:
        """Answer no more; the kernel goes on refusing."""
        if self._refusals is not None:
            self._refusals.close()
            self._refusals = None

    def kill(self) -> None:
        """Kill process 1, and with it its namespace; without one, its session."""
        if self._first > 0:
            os.kill(self._first, signal.SIGKILL)  # not reaped before `end`: nobody else's number
            return
        for send in (os.killpg, os.kill):  # before its setsid it has no group of its own
            with contextlib.suppress(ProcessLookupError):
                send(self.pid, signal.SIGKILL)

    def end(self) -> tuple[int, bool, str]:
        """Reap the process, end its namespace, then its group, see it empty and remove it.

        Returns:
            The exit code; whether the kernel ran out of the group's memory; what is left, if
            anything is.
        """
        _, state = os.waitpid(self.pid, 0)
        if self._first > 0:
            os.kill(self._first, signal.SIGKILL)
            os.waitpid(self._first, 0)  # it is gone when everything below it is
        left = ""
        has_run_out = False
        if self.group is not None:
            try:
                has_run_out = self.group.has_run_out_of_memory()
                self.group.destroy()
            except OSError as error:
                left = str(error)
        self.abandon()
        return os.waitstatus_to_exitcode(state), has_run_out, left

    def abandon(self) -> None:
        """Close what is open, and remove a group that no process has entered."""
        self.stop_listening()
        for end in (self._ours, self.report):
            if end is not None:
                end.close()
        self._ours = self.report = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        if self.group is not None:
            with contextlib.suppress(OSError):
                self.group.destroy()

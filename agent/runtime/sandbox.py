"""What a worker may not do: the seal. Layers are put on in the child, in order, before user code.

The order matters, each layer needing what the next takes away:

1. own session, so that no terminal and no signal to the agent's group reaches it
2. control group first: whatever the child does from here on is counted and bounded
3. namespaces: processes, mounts, network, System V IPC, host name (the user's follows in 7)
4. private mounts: a root that holds the environment only, a /tmp bounded in bytes and files
5. every descriptor closed but its own three; the environment variables are clean since the zygote
6. resource limits
7. own user: a number that nothing else has; then a user namespace, in which it is nobody
8. the parent-death signal again: the kernel forgets it when the user changes
9. no new privileges, without which the last two are not allowed
10. landlock, then seccomp: the last, since it refuses the very calls that the others are made of

What can be done once is done by the zygote (`seal.py`): the root of step 4 becomes its own, and the
seccomp program is compiled. Process 1 of an instance's namespace does nothing but bury orphans; the
function is process 2, for the kernel keeps from process 1 the signals that would end it. When
process 1 ends, so does everything in the namespace, however it hid. Stands alone: zygotes load this
file and its siblings from this folder.
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from agent.runtime import cgroups, kernel, landlock, mounts, seccomp

OPEN_FILES_MAX = 256
FILE_BYTES_MAX = 1 << 30
PROCESSES_MAX = 128  # threads count
HOST_USERS = range(0x6000_0000, 0x6100_0000)  # beyond any user's, and any sub-user's
INNER_UID = 1000
MARGIN_MIB = 24  # page tables, stacks and buffers, which no limit on data counts

ISOLATIONS = STRICT, STANDARD, OFF = "strict", "standard", "off"
LAYERS = {
    "own session": "no terminal; signals to the agent's group do not reach it",
    "control group": "memory, processes and CPU of an instance and its children are bounded",
    "process namespace": "it sees and signals its own children only; they end with it",
    "network namespace": "no network",
    "ipc and host-name namespaces": "no shared memory, queue or name of the host",
    "private mounts": "no file of the host but the environment, read-only; a bounded /tmp",
    "closed descriptors": "only its own socket, log pipe and progress page are open",
    "clean environment": "no variable of the agent is inherited",
    "resource limits": "data memory, open files, file size, processes, no core dumps",
    "own user": "another user than the agent's, and than any other instance's",
    "user namespace": "whatever it became in there, it would be nobody out here",
    "parent-death signal": "no worker outlives its zygote, no zygote its agent",
    "no new privileges": "set-uid programs gain nothing",
    "landlock": "nothing but its own files can be written, and no file can be run",
    "seccomp": "system calls that a function has no need of are refused",
    "refusal reports": "refused system calls are counted for the agent",
}
MINIMUM = (
    *("own session", "closed descriptors", "clean environment", "resource limits"),
    *("parent-death signal", "no new privileges"),
)  # what isolation = "off" leaves in force


class Unsealed(Exception):
    """A layer is missing and isolation is strict."""


@dataclass(slots=True)
class Seal:
    """What one zygote has prepared for its instances."""

    isolation: str
    missing: dict[str, str] = field(default_factory=dict)  # layer → why
    groups: cgroups.Parent | None = None
    has_process_namespaces: bool = False
    own_processes: int = -1  # descriptor of the zygote's own process namespace
    has_root: bool = False
    covered: list[str] = field(default_factory=list)
    program: bytes = b""
    reports: bool = False
    users: range = range(0)  # of these an instance becomes one

    def fork(self, parent: int) -> tuple[int, int]:
        """Fork; return the child's number, or 0 in the child, and that of its process 1, or -1.

        Args:
            parent: pidfd of this process.

        Raises:
            OSError: There can be no more processes or namespaces.
        """
        if not self.has_process_namespaces:
            return os.fork(), -1
        kernel.unshare(kernel.CLONE_NEWPID, "process namespace")
        first = pid = -1
        try:
            first = os.fork()
            if first == 0:
                self._be_process_1(parent)
            pid = os.fork()
            return pid, first
        finally:
            if pid != 0:  # back, for one process can make only one such namespace for its children
                kernel.setns(self.own_processes, kernel.CLONE_NEWPID)
            if pid < 0 < first:
                os.kill(first, signal.SIGKILL)
                os.waitpid(first, 0)

    def descriptors(self) -> list[int]:
        """Return what must stay open in a zygote."""
        own = [self.own_processes] if self.own_processes >= 0 else []
        return [*own, *(self.groups.descriptors() if self.groups is not None else ())]

    def new_user(self) -> int:
        """Return a user that no other instance is; were two by chance one, neither could tell."""
        return self.users[int.from_bytes(os.urandom(4)) % len(self.users)]

    def _be_process_1(self, parent: int) -> NoReturn:
        try:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries orphans at once
            if self.users:
                change_user(self.new_user())
            kernel.drop_capabilities()
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
            kernel.prctl(kernel.PR_SET_DUMPABLE, 0)  # its root is the zygote's
            die_with_parent(parent)
            os.closerange(0, 65536)
            while True:
                signal.pause()
        finally:
            os._exit(1)

    def make_group(self, name: str, memory_mib: int, cpus: float) -> cgroups.Group | None:
        """Make the control group of an instance that is to be forked.

        Raises:
            OSError: The kernel refused it.
        """
        if self.groups is None:
            return None
        limits = cgroups.Limits(
            memory_bytes=((memory_mib + MARGIN_MIB) << 20) + _copied_bytes(),
            pids_max=PROCESSES_MAX,
            cpus=cpus,
        )
        return self.groups.make(name, limits)


def enter(
    seal: Seal,
    *,
    parent: int,
    group: cgroups.Group | None,
    keep: tuple[int, ...],
    log: int,
    folder: str,
    memory_mib: int,
    report: socket.socket | None = None,
) -> dict[str, str]:
    """Put every layer on this process; return those that could not be, with the reason.

    Args:
        seal: What the zygote prepared.
        parent: pidfd of the zygote.
        group: Made for this instance.
        keep: Descriptors that stay open.
        log: Becomes standard output and error.
        folder: Becomes the working folder where there are no private mounts.
        memory_mib: How much data memory may grow beyond what the zygote had.
        report: Takes the supervisor's descriptor of seccomp to the zygote.

    Raises:
        Unsealed: A layer is missing and isolation is strict.
    """
    missing = dict(seal.missing)
    is_sealed = seal.isolation != OFF
    os.setsid()
    die_with_parent(parent)
    uid = seal.new_user() if seal.users else os.geteuid()
    data_bytes = _data_bytes() + (memory_mib << 20)
    if group is not None:
        with noted(missing, "control group"):
            group.join()
    if is_sealed:
        _enter_namespaces(missing)
    if seal.has_root and "private mounts" not in missing:
        with noted(missing, "private mounts"):
            mounts.make_own_places(seal.covered, size_bytes=memory_mib << 19, uid=uid)
            folder = mounts.WORK
    os.chdir(folder)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # some containers mount /proc read-only: the kernel then chooses
    kept = (*keep, parent) if report is None else (*keep, parent, report.fileno())
    _keep_only(kept, log)
    _limit(data_bytes)
    if seal.users and "private mounts" not in missing:
        with noted(missing, "own user"):
            change_user(uid)
    if is_sealed:
        with noted(missing, "user namespace"):
            _enter_user_namespace()
        with contextlib.suppress(OSError):  # it never had any
            kernel.drop_capabilities()
        with noted(missing, "resource limits"):  # of this user in its namespace: here, not before
            resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES_MAX, PROCESSES_MAX))
    die_with_parent(parent)
    os.close(parent)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if is_sealed:
        with noted(missing, "landlock"):
            _enter_landlock(seal, folder)
        listener = _enter_seccomp(seal, missing)
        _report(report, listener, missing)
    if seal.isolation == STRICT and missing:
        raise Unsealed(tell(missing))
    return missing


def tell(missing: dict[str, str]) -> str:
    """Return why code is not run under strict isolation."""
    what = "; ".join(f"{layer}: {why}" for layer, why in missing.items())
    return (
        f'isolation = "strict" and this node lacks layers of the seal ({what}). Give the agent '
        'what it needs (`tierwise doctor`), or set isolation = "standard" in agent.toml'
    )


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; exit if it has ended already.

    Args:
        parent: pidfd of the parent: its number means nothing in another process namespace.
    """
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    poll = select.poll()
    poll.register(parent, select.POLLIN)
    if poll.poll(0):
        os._exit(1)


def change_user(uid: int) -> None:
    """Become a user and its group, and no other group's member."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def _enter_namespaces(missing: dict[str, str]) -> None:
    for layer, flags in (
        ("private mounts", kernel.CLONE_NEWNS),
        ("network namespace", kernel.CLONE_NEWNET),
        ("ipc and host-name namespaces", kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS),
    ):
        with noted(missing, layer):
            kernel.unshare(flags, layer)
    if "ipc and host-name namespaces" not in missing:
        with noted(missing, "ipc and host-name namespaces"):
            kernel.set_host_name("function")


def _keep_only(keep: tuple[int, ...], log: int) -> None:
    """Close every descriptor but these; standard input is empty, output goes to the log."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    low = 3
    for descriptor in sorted(keep):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, 65536)


def _limit(data_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))
    # At 0 the kernel would still feed a core to a handler that core_pattern names, as the host's
    # root; 1 is the value at which it does not (fs/coredump.c), and too small for a file.
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES_MAX, OPEN_FILES_MAX))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES_MAX, FILE_BYTES_MAX))


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    kernel.prctl(kernel.PR_SET_DUMPABLE, 1)  # else the files of /proc/self are root's
    kernel.unshare(kernel.CLONE_NEWUSER, "user namespace")
    map_user(INNER_UID, uid, gid)


def map_user(inner: int, uid: int, gid: int) -> None:
    """Say who this process is in the user namespace that it has just made."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{inner} {uid} 1"),
        ("gid_map", f"{inner} {gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _enter_landlock(seal: Seal, folder: str) -> None:
    if folder == mounts.WORK and seal.has_root:
        readable, writable = mounts.paths_for_landlock()
    else:  # all the more needed: the host's files are still in sight
        readable, writable = ["/proc", "/dev", *mounts.environment_paths()], [folder, "/dev/null"]
    landlock.enter(readable=readable, writable=writable)


def _enter_seccomp(seal: Seal, missing: dict[str, str]) -> int:
    """Return the supervisor's descriptor, or -1 if refusals are not reported."""
    if not seal.program:
        return -1
    if seal.reports:
        try:
            return seccomp.enter(seal.program, reports=True)
        except OSError as error:  # whoever started the agent may have a supervisor already
            missing["refusal reports"] = str(error)
    with noted(missing, "seccomp"):
        program = seccomp.compile_filter(reports=False) if seal.reports else seal.program
        seccomp.enter(program, reports=False)
    return -1


def _report(report: socket.socket | None, listener: int, missing: dict[str, str]) -> None:
    if report is not None:
        fds = [listener] if listener >= 0 else []
        socket.send_fds(report, [json.dumps(missing).encode()], fds)
        report.close()
    if listener >= 0:
        os.close(listener)


def _data_bytes() -> int:
    """Return the data memory that this process has mapped, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()


def _copied_bytes() -> int:
    """Return what an instance may copy of its zygote's memory by touching it, in bytes."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * resource.getpagesize()


@contextlib.contextmanager
def noted(missing: dict[str, str], layer: str) -> Iterator[None]:
    """Note why a layer could not be put on, and go on: the caller decides by what is missing."""
    try:
        yield
    except OSError as error:
        missing[layer] = str(error)

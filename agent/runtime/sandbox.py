"""What a worker may not do. Layers are applied in the child, in order, before user code loads.

Stands alone: workers load this file by path. Namespaces, landlock and seccomp join the list in
the runtime's own issue; `active_layers` tells an operator what is in force today.
"""

import ctypes
import os
import resource
import signal

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
OPEN_FILES_MAX = 256
FILE_BYTES_MAX = 1 << 30
_libc = ctypes.CDLL(None, use_errno=True)

LAYERS = {
    "own session": "a worker and its children are killed together",
    "parent-death signal": "no worker outlives its zygote, no zygote its agent",
    "closed descriptors": "only its own socket, log pipe and progress page are open",
    "private folder": "a fresh working folder, removed with the instance",
    "resource limits": "data memory, open files, file size, no core dumps",
    "no new privileges": "set-uid programs gain nothing",
    "clean environment": "no variable of the agent is inherited",
}


def active_layers() -> dict[str, str]:
    """Return the layers in force on this machine, name → what it does."""
    return dict(LAYERS)


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; exit if it has ended already."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def enter(
    *, parent_pid: int, keep: tuple[int, ...], log: int, folder: str, memory_mib: int
) -> None:
    """Apply every layer to this process.

    Args:
        parent_pid: The zygote.
        keep: Descriptors that stay open.
        log: Becomes standard output and error.
        folder: Becomes the working folder.
        memory_mib: How much data memory may grow beyond what the zygote had.
    """
    os.setsid()
    die_with_parent(parent_pid)
    devnull = os.open(os.devnull, os.O_RDONLY)
    os.dup2(devnull, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    low = 3
    for descriptor in sorted(keep):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, 65536)
    os.chdir(folder)
    data_bytes = _data_bytes() + (memory_mib << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES_MAX, OPEN_FILES_MAX))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES_MAX, FILE_BYTES_MAX))
    _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    except OSError:
        pass  # some containers mount /proc read-only; the kernel then chooses by itself


def _data_bytes() -> int:
    """Return the data memory that this process has mapped, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()

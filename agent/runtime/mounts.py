"""The files that a function can see: its environment, read-only, and one small folder of its own.

Built once per zygote, in a mount namespace of its own, and made its root: the host's files are gone
for the zygote already, so an instance has none to lose. What an instance adds is a fresh /tmp,
bounded in bytes and in files, and a /proc that shows its own processes only. Stands alone: zygotes
load it.
"""

import contextlib
import os
import stat
import sys

from agent.runtime import kernel

WORK = "/tmp"  # noqa: S108 - the working folder, a mount of each instance's own
INODES_MAX = 16_384
_SPOT = "/sys"  # always there, and never part of an environment: our root is built upon it
_LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib")
_FILES = (
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/etc/ssl/certs"),
    *("/etc/pki/tls/certs", "/etc/pki/ca-trust/extracted", "/usr/share/ca-certificates"),
    "/usr/share/zoneinfo",
)
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = {
    "/dev/fd": "/proc/self/fd",
    "/dev/stdin": "/proc/self/fd/0",
    "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2",
    "/dev/shm": WORK,  # noqa: S108 - semaphores and shared memory of multiprocessing count too
}
_TEXTS = {
    "/etc/passwd": "function:x:1000:1000::/tmp:/nonexistent\n",
    "/etc/group": "function:x:1000:\n",
    "/etc/hosts": "127.0.0.1 localhost\n",
}
_SPARE = "/env"  # where folders that /tmp will cover are kept for putting back
_PROC_FLAGS = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC


def environment_paths() -> list[str]:
    """Return the folders that this interpreter needs, outermost only; never the platform's own."""
    wanted = list(_LIBRARIES)
    for prefix in {sys.base_prefix, sys.prefix, *map(os.path.realpath, _prefixes())}:
        wanted += [f"{prefix}/lib", f"{prefix}/lib64"] if _is_shared(prefix) else [prefix]
    for path in sys.path:
        if os.path.isdir(path) and not os.path.exists(f"{path}/tierwise/wire"):
            wanted.append(os.path.abspath(path))
    existing = sorted({path for path in wanted if os.path.isdir(path)})
    return [
        path for path in existing if not any(path.startswith(f"{other}/") for other in existing)
    ]


def _prefixes() -> tuple[str, str]:
    return sys.base_prefix, sys.prefix


def _is_shared(prefix: str) -> bool:
    """Return whether a prefix holds the host's programs too."""
    return prefix in ("/", "/usr", "/usr/local")


def _covered(data: list[str]) -> list[str]:
    """Return the folders to be seen that an instance's own /tmp hides."""
    return [path for path in [*environment_paths(), *data] if path.startswith(f"{WORK}/")]


def unreadable() -> str:
    """Return a path of the environment that other users may not read; empty if there is none."""
    for path in (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), os.__file__):
        mode = os.stat(path).st_mode
        if not mode & stat.S_IROTH or (stat.S_ISDIR(mode) and not mode & stat.S_IXOTH):
            return path
    return ""


def make_private_root(data: list[str]) -> list[str]:
    """Leave the host's files; this process has a mount namespace of its own already.

    Args:
        data: Folders of this node that functions may read; those that do not exist are left out.

    Returns:
        Folders below /tmp that are to be seen: each instance's own /tmp covers them.

    Raises:
        OSError: A mount was refused; nothing outside this namespace has changed.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tierwise", _SPOT, "tmpfs", kernel.MS_NOSUID, "size=1m,nr_inodes=4096,mode=755")
    for folder in (WORK, "/proc", "/dev", "/etc"):
        os.mkdir(f"{_SPOT}{folder}")
    data = [path for path in data if os.path.isdir(path)]
    for path in [*environment_paths(), *data]:
        _show(path)
    covered = _covered(data)
    for index, path in enumerate(covered):
        os.makedirs(f"{_SPOT}{_SPARE}/{index}")
        kernel.bind(path, f"{_SPOT}{_SPARE}/{index}")
        kernel.make_read_only(f"{_SPOT}{_SPARE}/{index}")
    for path in _FILES:
        if os.path.exists(path):
            _show(path)
    for path, text in _TEXTS.items():
        with open(f"{_SPOT}{path}", "w") as file:
            file.write(text)
    for name in _DEVICES:
        target = f"{_SPOT}/dev/{name}"
        _touch(target)
        kernel.bind(f"/dev/{name}", target)
        kernel.make_read_only(target, with_devices=True)
    for path, aim in _LINKS.items():
        os.symlink(aim, f"{_SPOT}{path}")
    kernel.mount("proc", f"{_SPOT}/proc", "proc", _PROC_FLAGS)
    kernel.make_read_only(_SPOT, is_recursive=False, with_devices=True)
    kernel.make_root(_SPOT)
    return covered


def _show(path: str) -> None:
    """Bind a path of the host read-only at the same place; a link stays the link that it is."""
    target = f"{_SPOT}{path}"
    if os.path.lexists(target):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path) and not os.path.isabs(os.readlink(path)):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        _touch(target)
    kernel.bind(path, target)
    kernel.make_read_only(target)


def _touch(path: str) -> None:
    with open(path, "w"):
        pass


def make_own_places(covered: list[str], *, size_bytes: int, uid: int) -> None:
    """Give this process, in a mount namespace of its own, a fresh /tmp and its own /proc.

    Args:
        covered: What `make_private_root` returned.
        size_bytes: Of all files together.
        uid: Who owns the folder.

    Raises:
        OSError: A mount was refused.
    """
    options = f"size={size_bytes},nr_inodes={INODES_MAX},mode=700,uid={uid},gid={uid}"
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("tierwise", WORK, "tmpfs", flags, options)
    for index, path in enumerate(covered):
        os.makedirs(path)
        kernel.bind(f"{_SPARE}/{index}", path)
    try:
        kernel.mount("proc", "/proc", "proc", _PROC_FLAGS, "subset=pid,hidepid=invisible")
    except OSError:  # before Linux 5.8 there is no `subset`
        kernel.mount("proc", "/proc", "proc", _PROC_FLAGS, "hidepid=2")


def paths_for_landlock() -> tuple[list[str], list[str]]:
    """Return what is readable and what is writable in the private root."""
    readable = [f"/{name}" for name in os.listdir("/") if f"/{name}" not in (WORK, "/dev")]
    devices = [f"/dev/{name}" for name in _DEVICES]
    with contextlib.suppress(ValueError):
        readable.remove(WORK)
    return ["/dev", *readable], [WORK, *devices]

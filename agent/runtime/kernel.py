"""System calls that Python does not offer, through ctypes. Stands alone: zygotes load it.

Every function raises OSError with the kernel's reason; none of them decides anything.
"""

import ctypes
import os

CLONE_NEWNS = 0x0002_0000
CLONE_NEWCGROUP = 0x0200_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000
CLONE_NEWTIME = 0x80
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1 << 5, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
_CAPABILITY_VERSION = 0x2008_0522  # _LINUX_CAPABILITY_VERSION_3 of <linux/capability.h>
_MOUNT_SETATTR = 442
_MOUNT_ATTR_RDONLY, _MOUNT_ATTR_NOSUID, _MOUNT_ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """Return a system call's result.

    Raises:
        OSError: It is negative; the text names `what` was tried.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(what: str, number: int, *arguments: object) -> int:
    """Make a system call by number; integers are passed as 64 bits.

    Raises:
        OSError: See `check`.
    """
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return check(_libc.syscall(ctypes.c_long(number), *words), what)


def prctl(option: int, value: int) -> None:
    """Set something of this process."""
    arguments = [ctypes.c_ulong(word) for word in (value, 0, 0, 0)]
    check(_libc.prctl(option, *arguments), f"prctl {option}")


def unshare(flags: int, what: str) -> None:
    """Give this process (or, for CLONE_NEWPID, its next child) namespaces of its own."""
    check(_libc.unshare(flags), what)


def setns(descriptor: int, kind: int) -> None:
    """Enter a namespace; for CLONE_NEWPID, this process's children will."""
    check(_libc.setns(descriptor, kind), "setns")


def set_host_name(name: str) -> None:
    """Rename the host, as far as this process's namespace goes."""
    check(_libc.sethostname(name.encode(), len(name)), "sethostname")


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount something."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    check(result, f"mount {kind or source} on {target}")


def bind(source: str, target: str) -> None:
    """Show a folder or file, with all mounts below it, at another place."""
    mount(source, target, None, MS_BIND | MS_REC)


def make_read_only(target: str, *, is_recursive: bool = True, with_devices: bool = False) -> None:
    """Make a mount, and by default those below it, read-only and without set-uid programs."""
    flags = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | (0 if with_devices else _MOUNT_ATTR_NODEV)
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    syscall(
        f"making {target} read-only",
        _MOUNT_SETATTR,
        _AT_FDCWD,
        target.encode(),
        _AT_RECURSIVE if is_recursive else 0,
        attributes,
        ctypes.sizeof(attributes),
    )


def make_root(folder: str) -> None:
    """Make a mounted folder this process's root, and let go of everything outside it."""
    os.chdir(folder)
    check(_libc.pivot_root(b".", b"."), "pivot_root")
    check(_libc.umount2(b".", MNT_DETACH), "leaving the old root")
    os.chdir("/")


def drop_capabilities() -> None:
    """Give up every capability, and the right to get any back."""
    for number in range(64):
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError:  # past the last one that this kernel knows, or without the right to
            break
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    check(_libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")

"""Seccomp: which system calls a function may make. Stands alone: zygotes load it.

What is not on the list is refused with EPERM, and the refusal is reported: the kernel asks a
supervisor by *user notification*, and the supervisor always denies. Calls that are newer than our
list answer ENOSYS, like an older kernel: libraries then use what came before. The program is
written for the kernel's classic BPF machine by the few lines of assembler below.
Source of the constants: `<linux/seccomp.h>`, `<linux/bpf_common.h>`, `<linux/audit.h>`.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import sys

from agent.runtime import kernel, syscalls

NAMESPACES = (
    kernel.CLONE_NEWNS
    | kernel.CLONE_NEWCGROUP
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWUSER
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWTIME
)
_MAP_HUGETLB, _MFD_HUGETLB, _MFD_EXEC = 0x4_0000, 0x4, 0x10  # huge pages are in no group's account
_CLONE_PARENT = 0x8000  # a child that is its parent's sibling, and the zygote's
_ARCHITECTURES = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
_AF_UNIX = 1
_TIOCSTI, _TIOCSETD, _TIOCLINUX = 0x5412, 0x5423, 0x541C  # type into a terminal, drivers
# Names, dumpable, seccomp and no_new_privs read, timer slack, huge pages, names of mappings: not
# the parent-death signal, nor what a tracer or a capability could use.
_PRCTL = (2, 3, 15, 16, 21, 23, 29, 30, 39, 41, 42, 0x53564D41)

# Ordinary work of a Python function: files in its folder, memory, threads, time, local sockets.
ALLOWED = frozenset(
    """
    accept accept4 access alarm arch_prctl bind brk cachestat capget chdir chmod clock_getres
    clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3
    epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 exit
    exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fcntl
    fdatasync fgetxattr flistxattr flock fork fstat fstatfs fsync ftruncate futex futex_requeue
    futex_wait futex_waitv futex_wake get_mempolicy get_robust_list getcpu getcwd getdents
    getdents64 getegid geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid
    getpriority getrandom getresgid getresuid getrlimit getrusage getsid getsockname getsockopt
    gettid gettimeofday getuid getxattr inotify_add_watch inotify_init inotify_init1
    inotify_rm_watch kill lgetxattr link linkat listen listxattr llistxattr lseek lstat madvise
    membarrier mincore mkdir mkdirat mlock mlock2 mlockall mprotect mremap mseal
    msync munlock munlockall munmap nanosleep newfstatat open openat openat2 pause pidfd_open
    pidfd_send_signal pipe pipe2 poll ppoll pread64 preadv preadv2 prlimit64 pselect6 pwrite64
    pwritev pwritev2 read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg rename
    renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask
    rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam
    sched_getscheduler sched_rr_get_interval sched_setaffinity sched_yield select sendfile sendmmsg
    sendmsg sendto set_robust_list set_tid_address setitimer setpgid setpriority setrlimit setsid
    setsockopt shutdown sigaltstack signalfd signalfd4 splice stat statfs statx symlink symlinkat
    sync_file_range sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime
    timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname
    unlink unlinkat utime utimensat utimes vfork wait4 waitid write writev
    """.split()
)
# The kernel reads clone3's flags from memory, where a filter cannot look: C libraries fall back to
# clone. The others are what C libraries try first of new calls.
ABSENT = ("clone3",)

# Libraries for linear algebra ask where memory lies as a matter of course: refused, not reported.
QUIET = ("mbind", "set_mempolicy")

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL, _NOTIFY = 0x7FFF_0000, 0x0005_0000, 0x8000_0000, 0x7FC0_0000
_NUMBER, _ARCHITECTURE = 0, 4  # offsets in struct seccomp_data
_SET_MODE_FILTER, _NEW_LISTENER = 1, 8
_RECEIVE, _SEND = 0xC050_2100, 0xC018_2101  # SECCOMP_IOCTL_NOTIF_RECV, …_SEND
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_ANSWER = struct.Struct("=QqiI")


def _machine() -> str:
    machine = os.uname().machine
    if machine not in _ARCHITECTURES or sys.maxsize < 2**32:
        raise OSError(errno.ENOSYS, f"there is no list of system calls for {machine}")
    return machine


def _argument(index: int) -> int:
    """Return the offset of an argument's low half: all that the kernel looks at where we do."""
    return 16 + 8 * index


def compile_filter(*, reports: bool) -> bytes:
    """Return the program for this machine.

    Args:
        reports: Refuse by asking the supervisor, rather than at once.

    Raises:
        OSError: There is no list of system calls for this machine.
    """
    numbers = syscalls.BY_MACHINE[_machine()]
    refuse = _NOTIFY if reports else _ERRNO | errno.EPERM
    absent = _ERRNO | errno.ENOSYS
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[_machine()]),
        (_RETURN, 0, 0, _KILL),  # 32-bit calls have other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, syscalls.LAST + 1),  # x32 calls too
        (_RETURN, 0, 0, absent),
    ]
    for name in ABSENT:
        program += [(_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, absent)]
    for name in QUIET:
        program += [(_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    program += _only(numbers["socket"], _argument(0), (_AF_UNIX,), refuse)
    program += _only(numbers["socketpair"], _argument(0), (_AF_UNIX,), refuse)
    program += _only(numbers["prctl"], _argument(0), _PRCTL, refuse)
    terminal = (_TIOCSTI, _TIOCSETD, _TIOCLINUX)
    program += _only(numbers["ioctl"], _argument(1), terminal, _ALLOW, matched=refuse)
    program += _without(numbers["clone"], _argument(0), NAMESPACES | _CLONE_PARENT, refuse)
    program += _without(numbers["mmap"], _argument(3), _MAP_HUGETLB, refuse)
    program += _without(numbers["memfd_create"], _argument(1), _MFD_HUGETLB | _MFD_EXEC, refuse)
    for name in sorted(ALLOWED & numbers.keys()):
        program += [(_EQUAL, 0, 1, numbers[name]), (_RETURN, 0, 0, _ALLOW)]
    program.append((_RETURN, 0, 0, refuse))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _only(
    number: int, offset: int, values: tuple[int, ...], otherwise: int, *, matched: int = _ALLOW
) -> list[tuple[int, int, int, int]]:
    """Return the instructions that look at one argument of one call."""
    tests = [
        instruction
        for value in values
        for instruction in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, matched))
    ]
    body = [(_LOAD, 0, 0, offset), *tests, (_RETURN, 0, 0, otherwise)]
    return [(_EQUAL, 0, len(body), number), *body]


def _without(
    number: int, offset: int, bits: int, otherwise: int
) -> list[tuple[int, int, int, int]]:
    """Return the instructions that refuse one call if one of its flags is set."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, offset),
        (_ANY_BIT, 0, 1, bits),
        (_RETURN, 0, 0, otherwise),
        (_RETURN, 0, 0, _ALLOW),
    ]


def enter(program: bytes, *, reports: bool) -> int:
    """Put this process under the filter, for ever; return the supervisor's descriptor, or -1.

    Raises:
        OSError: The kernel refuses the filter, or (EBUSY) has a supervisor for it already.
    """
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("=HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
    number = syscalls.BY_MACHINE[_machine()]["seccomp"]
    flags = _NEW_LISTENER if reports else 0
    result = kernel.syscall("seccomp", number, _SET_MODE_FILTER, flags, header)
    return result if reports else -1


class Refusals:
    """The supervisor's end: it denies whatever it is asked, and names it."""

    def __init__(self, listener: int) -> None:
        self.listener = listener
        numbers = syscalls.BY_MACHINE[_machine()]
        self._names = {number: name for name, number in numbers.items()}

    def receive(self) -> tuple[int, str] | None:
        """Return the id and the name of a call that waits; None if its caller has gone."""
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self.listener, _RECEIVE, buffer)
        except OSError:
            return None
        identity, _, _, number, *_ = _NOTIFICATION.unpack(buffer)
        return identity, self._names.get(number, f"call {number}")

    def deny(self, identity: int) -> None:
        """Answer EPERM."""
        with contextlib.suppress(OSError):  # the caller has gone meanwhile
            fcntl.ioctl(self.listener, _SEND, _ANSWER.pack(identity, 0, -errno.EPERM, 0))

    def close(self) -> None:
        """Answer no more: from now on the kernel itself refuses, with ENOSYS."""
        os.close(self.listener)

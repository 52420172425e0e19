"""Landlock: what this process may do with files, set by itself. Stands alone.

A second wall behind the mounts: were one of them left writable by mistake, writing, making and
running files would still be refused. No path may be executed.
Source of the constants: `<linux/landlock.h>`, ABI 1 to 6; newer kernels know more rights.
"""

import ctypes
import os
import struct
from collections.abc import Iterable

from agent.runtime import kernel

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_FS_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # number of rights; later ABIs have 16
_NET_TCP = 0b11  # bind, connect: from ABI 4 on
_SCOPES = 0b11  # abstract unix sockets, signals: from ABI 6 on
_MAKE_DEVICES = (1 << 6) | (1 << 11)  # character and block devices
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | (1 << 14) | (1 << 15)  # + truncate, ioctl


def abi() -> int:
    """Return the version that this kernel speaks.

    Raises:
        OSError: It speaks none.
    """
    return kernel.syscall("landlock", _CREATE_RULESET, 0, 0, _CREATE_RULESET_VERSION)


def enter(*, readable: Iterable[str], writable: Iterable[str]) -> None:
    """Allow reading beneath some paths, everything but running beneath others, and nothing else.

    TCP, abstract unix sockets of others and signals to others are refused too where the kernel can.

    Raises:
        OSError: The kernel has no landlock, or a path does not exist.
    """
    version = abi()
    handled = (1 << _FS_RIGHTS_BY_ABI.get(version, 16)) - 1
    words = [handled]
    if version >= 4:
        words.append(_NET_TCP)
    if version >= 6:
        words.append(_SCOPES)
    attributes = struct.pack(f"={len(words)}Q", *words)
    ruleset = kernel.syscall("landlock", _CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path in readable:
            _allow(ruleset, path, _READ_FILE | _READ_DIR)
        for path in writable:
            _allow(ruleset, path, handled & ~_EXECUTE & ~_MAKE_DEVICES)
        kernel.syscall("landlock", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not os.path.isdir(path):  # noqa: PTH112 - stands alone, and small
            rights &= _FILE_RIGHTS
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, descriptor))
        kernel.syscall("landlock", _ADD_RULE, ruleset, _RULE_PATH_BENEATH, rule, 0)
    finally:
        os.close(descriptor)

"""What a zygote does once, so that sealing an instance is quick; and a trial of the seal.

The order of the layers and their reasons are in `sandbox.py`. Stands alone: zygotes load this file.
"""

import json
import os
import signal
import socket
from dataclasses import replace

from agent.runtime import cgroups, kernel, mounts, sandbox, seccomp
from agent.runtime.sandbox import HOST_USERS, LAYERS, MINIMUM, OFF, STANDARD, Seal, noted

TRIAL_MEMORY_MIB = 64


def prepare(isolation: str, name: str, data: list[str]) -> Seal:
    """Do what is done once, in the zygote, before it imports what functions need.

    An agent that is not root may make no mounts: the zygote then enters a user namespace first, in
    which it may. A process has to wait outside, and this function returns in its child.

    Args:
        isolation: strict, standard or off.
        name: Of the zygote's folder among the control groups.
        data: Folders of this node that functions may read.
    """
    seal = Seal(isolation=isolation)
    missing = seal.missing
    if isolation == OFF:
        missing |= {layer: "isolation is off" for layer in LAYERS if layer not in MINIMUM}
        return seal
    with noted(missing, "control group"):
        hierarchies = cgroups.find()
        seal.groups = cgroups.Parent.open(name, hierarchies)
        found = {controller for tree in hierarchies for controller in tree.controllers}
        if lacking := [one for one in cgroups.CONTROLLERS if one not in found]:
            missing["control group"] = f"{', '.join(lacking)} cannot be bounded here"
    with noted(missing, "private mounts"):
        if not _may_mount():
            missing["own user"] = "only root may change users: it runs as the agent's"
        elif path := mounts.unreadable():
            missing["own user"] = f"{path} is not readable for other users: chmod o+rX"
        else:
            seal.users = _users()
            if not seal.users:
                missing["own user"] = "there is no other user in this user namespace"
        _prepare_process_namespaces(seal)
        seal.covered = mounts.make_private_root(data)
        seal.has_root = True
    if not seal.has_root:
        seal.users = range(0)
        missing.setdefault("own user", "without private mounts it could not read its environment")
    with noted(missing, "seccomp"):
        seal.program = seccomp.compile_filter(reports=True)
        seal.reports = True
    missing |= _trial(seal)
    if "refusal reports" in missing and seal.reports:
        seal.program, seal.reports = seccomp.compile_filter(reports=False), False
    return seal


def survey() -> dict[str, dict[str, str]]:
    """Return which layers hold on this machine, and why the others do not, by trying them.

    This process is changed by it and good for nothing else afterwards.
    """
    seal = prepare(STANDARD, f"{cgroups.PREFIX}{os.getpid()}-survey", [])
    if seal.groups is not None:
        seal.groups.close()
    active = {layer: what for layer, what in LAYERS.items() if layer not in seal.missing}
    return {"active": active, "missing": seal.missing}


def _may_mount() -> bool:
    """Enter a mount namespace; return whether this process is root outside it too.

    Raises:
        OSError: Neither the host nor a user namespace allows it.
    """
    try:
        kernel.unshare(kernel.CLONE_NEWNS, "mount namespace")
    except OSError:
        _become_root_of_a_user_namespace()
        return False
    return os.geteuid() == 0


def _users() -> range:
    """Return who instances may become: beyond all users, or the upper half of a container's."""
    with open("/proc/self/uid_map") as file:
        extents = [tuple(map(int, line.split())) for line in file]
    for first, _, count in extents:
        if first <= HOST_USERS.start and HOST_USERS.stop <= first + count:
            return HOST_USERS
    first, _, count = max(extents, key=lambda extent: extent[2])
    return range(first + count // 2, first + count) if count > 1 else range(0)


def _become_root_of_a_user_namespace() -> None:
    """Go on as process 1 of new namespaces; a process outside waits and ends with it."""
    uid, gid = os.geteuid(), os.getegid()
    flags = kernel.CLONE_NEWUSER | kernel.CLONE_NEWNS | kernel.CLONE_NEWPID
    kernel.unshare(flags, "user, mount and process namespaces")
    sandbox.map_user(0, uid, gid)
    outside = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid:
        os.closerange(0, 65536)
        _, state = os.waitpid(pid, 0)
        os._exit(os.waitstatus_to_exitcode(state) & 0xFF)
    sandbox.die_with_parent(outside)
    os.close(outside)


def _prepare_process_namespaces(seal: Seal) -> None:
    with noted(seal.missing, "process namespace"):
        seal.own_processes = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        kernel.setns(seal.own_processes, kernel.CLONE_NEWPID)  # as after each fork: may we?
        seal.has_process_namespaces = True


def _trial(seal: Seal) -> dict[str, str]:
    """Seal a child that does nothing; return what it lacks. A try tells more than a version."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.pidfd_open(os.getpid())
    missing = dict(seal.missing)
    group = None
    with noted(missing, "control group"):
        group = seal.make_group("trial", TRIAL_MEMORY_MIB, 1.0)
    pid, first = seal.fork(parent)
    if pid == 0:
        _try(replace(seal, isolation=STANDARD, missing=missing), parent, group, theirs)
    theirs.close()
    os.close(parent)
    message, fds, _, _ = socket.recv_fds(ours, 65536, 1)
    for descriptor in fds:
        os.close(descriptor)
    ours.close()
    os.waitpid(pid, 0)
    if first > 0:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    if group is not None:
        with noted(missing, "control group"):
            group.destroy()
    if not message:
        return missing | dict.fromkeys(LAYERS.keys() - MINIMUM, "the trial of the seal died")
    told: dict[str, str] = json.loads(message)
    return missing | told


def _try(seal: Seal, parent: int, group: cgroups.Group | None, report: socket.socket) -> None:
    """Be the child of a trial; its answer travels with the supervisor's descriptor."""
    try:
        sandbox.enter(
            seal,
            parent=parent,
            group=group,
            keep=(),
            log=os.open(os.devnull, os.O_WRONLY),
            folder="/",
            memory_mib=TRIAL_MEMORY_MIB,
            report=report,
        )
    finally:
        os._exit(0)

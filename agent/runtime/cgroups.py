"""Control groups: memory, processes and CPU of one instance, its children and its files together.

Both versions, found at run time, each controller where this machine has it. A zygote has a folder
of its own below the agent's group, an instance one below that; folders are reached through
descriptors, because the zygote leaves the host's file system behind. Stands alone: zygotes load it.
"""

import contextlib
import errno
import os
import signal
import time
from dataclasses import dataclass, field

CONTROLLERS = ("memory", "pids", "cpu")
PREFIX = "tierwise-"
CPU_PERIOD_US = 20_000  # the kernel's default of 100 ms would stall calls of some milliseconds
DESTROY_TIMEOUT_S = 2.0
DESTROY_POLL_S = 0.002
_OPTIONAL = {"memory.memsw.limit_in_bytes", "memory.swap.max", "memory.oom.group"}  # no swap, old
_OUT_OF_MEMORY = {1: "memory.oom_control", 2: "memory.events"}


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where the agent's own group is in one tree of groups, and what can be bounded there."""

    version: int
    folder: str
    controllers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one instance may take."""

    memory_bytes: int
    pids_max: int
    cpus: float = 0.0  # 0 for as many as there are


def find() -> list[Hierarchy]:
    """Return the trees of groups that this process may work in, one per set of controllers."""
    paths: dict[str, str] = {}
    with open("/proc/self/cgroup") as file:
        for line in file:
            _, names, path = line.rstrip("\n").split(":", 2)
            paths |= dict.fromkeys(names.split(",") if names else [""], path)
    found: list[Hierarchy] = []
    missing = set(CONTROLLERS)
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split(" - ") for line in file]
    mounts.sort(key=lambda halves: not halves[1].startswith("cgroup2 "))  # the new version first
    for left, right in mounts:
        root, point = left.split()[3:5]
        kind, _, options = right.split()[:3]
        if kind == "cgroup2":
            folder, controllers = _delegated(_inside(point, root, paths.get("", "/")), missing)
        elif kind == "cgroup":
            folder = _inside(point, root, _path_of(options, paths))
            controllers = tuple(sorted(missing & set(options.split(","))))
        else:
            continue
        if controllers and os.access(folder, os.W_OK):
            found.append(Hierarchy(2 if kind == "cgroup2" else 1, folder, controllers))
            missing -= set(controllers)
    return found


def _path_of(options: str, paths: dict[str, str]) -> str:
    return next((paths[name] for name in options.split(",") if name in paths), "/")


def _inside(point: str, root: str, path: str) -> str:
    """Return where a group lies on this file system; inside a container its root is cut off."""
    path = path.removeprefix(root) if root != "/" else path
    return f"{point}/{path.strip('/')}".rstrip("/")


def _delegated(folder: str, wanted: set[str]) -> tuple[str, tuple[str, ...]]:
    """Return the nearest group below which controllers may be handed out, and these controllers.

    The kernel hands none out below a group that has processes itself, so the agent's own group may
    have to stand aside: under systemd, `Delegate=yes` with `DelegateSubgroup=agent` does that.
    """
    for candidate in (folder, folder.rpartition("/")[0]):
        try:
            with open(f"{candidate}/cgroup.controllers") as file:
                controllers = tuple(sorted(wanted & set(file.read().split())))
            _write(f"{candidate}/cgroup.subtree_control", " ".join(f"+{n}" for n in controllers))
        except OSError:
            continue
        if controllers:
            return candidate, controllers
    return folder, ()


@dataclass(slots=True)
class Parent:
    """A zygote's own folder in each tree, open."""

    hierarchies: list[Hierarchy]
    name: str
    _folders: list[int] = field(default_factory=list)
    _above: list[int] = field(default_factory=list)  # the agent's own group in each tree

    @classmethod
    def open(cls, name: str, hierarchies: list[Hierarchy]) -> "Parent":
        """Make the folders.

        Raises:
            OSError: The agent may not, or there is no tree at all.
        """
        if not hierarchies:
            raise OSError(errno.EACCES, "no control group is writable")
        parent = cls(hierarchies, name)
        for hierarchy in hierarchies:
            path = f"{hierarchy.folder}/{name}"
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
            if hierarchy.version == 2 and hierarchy.controllers:
                _write(
                    f"{path}/cgroup.subtree_control",
                    " ".join(f"+{name}" for name in hierarchy.controllers),
                )
            parent._folders.append(os.open(path, os.O_DIRECTORY | os.O_CLOEXEC))
            parent._above.append(os.open(hierarchy.folder, os.O_DIRECTORY | os.O_CLOEXEC))
        return parent

    def make(self, name: str, limits: Limits) -> "Group":
        """Make the folders of one instance, bounded and empty.

        Raises:
            OSError: The kernel refused a folder or a limit.
        """
        group = Group(name)
        for hierarchy, parent in zip(self.hierarchies, self._folders, strict=True):
            os.mkdir(name, dir_fd=parent)
            folder = os.open(name, os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
            group.places.append((hierarchy, parent, folder))
            for file, value in _limits(hierarchy, limits):
                _write(file, value, folder, is_optional=file in _OPTIONAL)
        return group

    def descriptors(self) -> list[int]:
        """Return the open folders."""
        return [*self._folders, *self._above]

    def close(self) -> None:
        """Remove the folders; instances must have gone."""
        for folder, above in zip(self._folders, self._above, strict=True):
            os.close(folder)
            with contextlib.suppress(OSError):
                os.rmdir(self.name, dir_fd=above)  # a path of the host means nothing any more
            os.close(above)
        self._folders.clear()
        self._above.clear()


def _limits(hierarchy: Hierarchy, limits: Limits) -> list[tuple[str, str]]:
    """Return the files to write, in order, with what goes in."""
    memory, pids = str(limits.memory_bytes), str(limits.pids_max)
    quota = max(1000, round(limits.cpus * CPU_PERIOD_US))  # the kernel takes no less
    files: dict[str, list[tuple[str, str]]] = {
        "memory": [("memory.limit_in_bytes", memory), ("memory.memsw.limit_in_bytes", memory)],
        "pids": [("pids.max", pids)],
        "cpu": [("cpu.cfs_period_us", str(CPU_PERIOD_US)), ("cpu.cfs_quota_us", str(quota))],
    }
    if hierarchy.version == 2:
        files["memory"] = [
            *(("memory.max", memory), ("memory.swap.max", "0"), ("memory.oom.group", "1"))
        ]
        files["cpu"] = [("cpu.max", f"{quota} {CPU_PERIOD_US}")]
    if not limits.cpus:
        files["cpu"] = []
    return [pair for name in hierarchy.controllers for pair in files[name]]


@dataclass(slots=True)
class Group:
    """The group of one instance."""

    name: str
    places: list[tuple[Hierarchy, int, int]] = field(default_factory=list)  # tree, parent, folder

    def join(self) -> None:
        """Move this process, which has one thread, into the group.

        Raises:
            OSError: The kernel refused it.
        """
        for hierarchy, _, folder in self.places:
            # Version 1's list of threads is joined without waiting for the whole system; a move by
            # the list of processes may take many milliseconds.
            _write("tasks" if hierarchy.version == 1 else "cgroup.procs", "0", folder)

    def has_run_out_of_memory(self) -> bool:
        """Return whether the kernel has killed a process of this group for want of memory."""
        for hierarchy, _, folder in self.places:
            if "memory" in hierarchy.controllers:
                words = _read(_OUT_OF_MEMORY[hierarchy.version], folder).split()
                if "oom_kill" in words:
                    return words[words.index("oom_kill") + 1] != "0"
        return False

    def destroy(self) -> None:
        """Kill what is in the group, see that it is empty, and remove it.

        Raises:
            OSError: A process did not go in time; the text names it.
        """
        places, self.places = self.places, []
        deadline_s = time.monotonic() + DESTROY_TIMEOUT_S
        stuck = ""
        for hierarchy, parent, folder in places:
            while pids := _read("cgroup.procs", folder).split():
                if time.monotonic() > deadline_s:
                    stuck = f"processes {', '.join(pids[:5])} do not end"
                    break
                _kill(hierarchy, folder, pids)
                time.sleep(DESTROY_POLL_S)
            os.close(folder)
            while True:
                try:
                    os.rmdir(self.name, dir_fd=parent)
                    break
                except FileNotFoundError:
                    break
                except OSError as error:  # the last process is just leaving
                    if time.monotonic() > deadline_s:
                        stuck = stuck or f"it cannot be removed: {error.strerror}"
                        break
                    time.sleep(DESTROY_POLL_S)
        if stuck:
            raise OSError(errno.EBUSY, f"control group {self.name}: {stuck}")


def _kill(hierarchy: Hierarchy, folder: int, pids: list[str]) -> None:
    if hierarchy.version == 2:
        with contextlib.suppress(OSError):  # before Linux 5.14 there is no such file
            _write("cgroup.kill", "1", folder)
            return
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def sweep(name: str, hierarchies: list[Hierarchy] | None = None) -> int:
    """Kill and remove what is left of a zygote's folders; return how many trees still hold some.

    A zygote that was killed cannot remove its own.
    """
    found = find() if hierarchies is None else hierarchies
    return sum(not _swept(hierarchy, name) for hierarchy in found)


def sweep_dead() -> None:
    """Remove what agents that were killed have left."""
    for hierarchy in find():
        for name in _children(hierarchy.folder):
            owner = name.removeprefix(PREFIX).partition("-")[0]
            if name.startswith(PREFIX) and owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
                _swept(hierarchy, name)


def _swept(hierarchy: Hierarchy, name: str) -> bool:
    path = f"{hierarchy.folder}/{name}"
    try:
        parent = os.open(path, os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        for child in _children(path):
            folder = os.open(child, os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=parent)
            Group(child, [(hierarchy, parent, folder)]).destroy()
        os.rmdir(path)
    except OSError:
        return False
    finally:
        os.close(parent)
    return True


def _children(folder: str) -> list[str]:
    try:
        return [entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _read(name: str, folder: int) -> str:
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder)
    with open(descriptor) as file:
        return file.read()


def _write(path: str, value: str, folder: int | None = None, *, is_optional: bool = False) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_optional:
            raise OSError(error.errno, f"{path}: {error.strerror}") from None

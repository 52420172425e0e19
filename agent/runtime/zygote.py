"""The clean parent of all workers of one environment. Run as a script, never imported.

    ENV_PYTHON -I zygote.py <control fd> <agent> <isolation> <group> <data> <payload.py> [module…]

Agent is a pidfd, data a JSON list of folders that functions may read.

It holds one thread and one socket, so a fork is cheap and safe. Before it imports the modules that
functions need it goes where they will run: behind private mounts, without the host's files. Over
the control socket (SOCK_SEQPACKET, JSON) it is told to fork or kill instances, and tells when one
has ended or was refused a system call. While nothing happens it makes spares, which become the next
instances. Told to branch, it forks a zygote like itself, with a
control socket of its own, that imports more modules: what some functions were seen to import never
enters the root.
"""

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import json
import mmap
import os
import select
import signal
import socket
import sys
from types import ModuleType
from typing import Any, NoReturn

MESSAGE_MAX = 65536
SEAL_FILES = ("sandbox", "seal", "cell", "dialing", "spare")
FDS_PER_FORK = 5  # socket, log pipe, progress page, code, and the way to the network if any


def load(name: str, path: str) -> ModuleType:
    """Import one file under a private name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def open_package(folder: str) -> None:
    """Make the seal's files importable by their names, and nothing else of the platform."""
    for name, path in (("agent", ""), ("agent.runtime", folder)):
        package = ModuleType(name)
        package.__path__ = [path] if path else []
        sys.modules[name] = package


@dataclasses.dataclass(frozen=True)
class Kit:
    """The files that zygotes and instances are made of."""

    sandbox: Any
    seal: Any
    cell: Any
    dialing: Any
    spare: Any
    payload: Any
    worker: Any


def main() -> None:
    """Serve until the agent closes the socket or dies."""
    control = socket.socket(fileno=int(sys.argv[1]))
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - keeps start-up small
    open_package(here)
    kit = Kit(
        **{name: importlib.import_module(f"agent.runtime.{name}") for name in SEAL_FILES},
        payload=load("tierwise_payload", sys.argv[6]),
        worker=load("tierwise_worker", f"{here}/worker.py"),
    )
    vars(kit.worker)["memfd"] = load(
        "tierwise_memfd",
        f"{os.path.dirname(sys.argv[6])}/memfd.py",  # noqa: PTH120
    )
    kit.sandbox.die_with_parent(int(sys.argv[2]))
    os.close(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seal = kit.seal.prepare(sys.argv[3], sys.argv[4], json.loads(sys.argv[5]))
    prepare(control, sys.argv[7:], seal)
    Zygote(control, seal, kit).serve()
    if seal.groups is not None:
        seal.groups.close()


def prepare(control: socket.socket, modules: list[str], seal: Any) -> None:
    """Import what the instances will want, and say that this zygote is ready."""
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException:  # what cannot be imported here fails later, in its function
            continue
    gc.collect()
    gc.freeze()
    with open("/proc/self/smaps_rollup") as file:
        rollup = file.read()
    private_kib = sum(
        int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_")
    )
    ready = {
        "ready": os.getpid(),
        "missing": seal.missing,
        "thread_count": len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "private_kib": private_kib,
    }
    control.send(json.dumps(ready).encode())


class Zygote:
    """Forks, reaps, and denies what instances may not do, until the control socket closes."""

    def __init__(self, control: socket.socket, seal: Any, kit: Kit) -> None:
        self._control = control
        self._seal = seal
        self._kit = kit
        self._own = os.pidfd_open(os.getpid())
        self._cells: dict[str, Any] = {}
        self._owners: dict[int, Any] = {}  # descriptor that is polled → its cell
        self._branches: dict[int, int] = {}  # pidfd → number
        self._spares = kit.spare.Spares()
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)

    def serve(self) -> None:
        """Do what the agent says; return when it is gone, and everything below with it."""
        while True:
            size = self._spares.missing() if self._seal.has_root else None
            ready = self._poll.poll(self._kit.spare.IDLE_MS if size is not None else None)
            if size is not None and not ready:
                with contextlib.suppress(OSError):  # then a start makes its own, and says why not
                    self._spares.put(self._make(size, self._kit.spare.WORK))
            for descriptor, events in ready:
                if descriptor == self._control.fileno():
                    message, fds, _, _ = socket.recv_fds(self._control, MESSAGE_MAX, FDS_PER_FORK)
                    if not message:
                        self._end()
                        return
                    self._obey(json.loads(message), fds)
                elif descriptor in self._branches:
                    self._poll.unregister(descriptor)
                    os.close(descriptor)
                    os.waitpid(self._branches.pop(descriptor), 0)
                elif descriptor in self._owners:  # else it ended earlier in this round
                    self._hear(self._owners[descriptor], descriptor, events)

    def _obey(self, order: dict[str, Any], fds: list[int]) -> None:
        if "kill" in order:
            if order["kill"] in self._cells:
                self._cells[order["kill"]].kill()
            return
        if "branch" in order:
            self._branch(order["modules"], fds[0])
        else:
            self._fork(order, fds)
        for descriptor in fds:
            os.close(descriptor)

    def _fork(self, order: dict[str, Any], fds: list[int]) -> None:
        name = order["fork"]
        size = order["memory_mib"], order["cpus"]
        spare = self._spares.take(size)
        if spare is not None and not spare.give(order, fds):
            self._spares.put(spare)  # until its end is heard of
            spare = None
        try:
            if spare is None:
                spare = self._make(size, order["folder"])
                spare.give(order, fds)  # if it has ended already, that is heard next
        except OSError as error:
            self._tell({"failed": name, "why": str(error)})
            return
        self._cells[name] = spare.cell
        self._tell({"forked": name}, (spare.cell.pidfd,))

    def _make(self, size: tuple[int, float], folder: str) -> Any:
        """Return a new process that seals itself and waits for its order.

        Raises:
            OSError: There can be no more processes, groups or namespaces.
        """
        spare = self._kit.spare.Spare(size, self._seal)
        try:
            pid, first = self._seal.fork(self._own)
        except OSError:
            spare.cell.abandon()
            spare.close()
            raise
        if pid == 0:
            become_instance(spare, folder, self._own, self._seal, self._kit)
        spare.forked(pid, first)
        self._watch(spare.cell.descriptors(), spare.cell)
        return spare

    def _branch(self, modules: list[str], control_fd: int) -> None:
        pid = os.fork()
        if pid == 0:
            self._control.detach()  # the number is closed below, and may be given out again
            become_branch(modules, control_fd, self._own, self._seal, self._kit)
        pidfd = os.pidfd_open(pid)
        self._branches[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)

    def _hear(self, cell: Any, descriptor: int, events: int) -> None:
        if descriptor == cell.pidfd:
            self._forget(cell.descriptors())
            code, has_run_out, left = cell.end()
            if self._spares.lost(cell):
                return
            del self._cells[cell.name]
            self._tell({"ended": cell.name, "code": code, "oom": has_run_out, "left": left})
        elif not cell.is_listening:
            self._forget([descriptor])
            cell.listen()
            self._watch([fd for fd in cell.descriptors() if fd not in self._owners], cell)
        elif events & select.POLLIN and (call := cell.refused()) is not None:
            self._tell({"refused": cell.name, "call": call})  # told, then denied: never late
            if not cell.deny():
                self._forget([descriptor])
        elif not events & select.POLLIN:
            self._forget([descriptor])  # nobody is left who could be refused anything

    def _end(self) -> None:
        cells = [*self._cells.values(), *self._spares.cells()]
        for cell in cells:
            cell.kill()
        for pid in self._branches.values():
            os.kill(pid, signal.SIGKILL)
        for cell in cells:
            cell.end()
        for pid in self._branches.values():
            os.waitpid(pid, 0)

    def _watch(self, descriptors: list[int], cell: Any) -> None:
        for descriptor in descriptors:
            self._owners[descriptor] = cell
            self._poll.register(descriptor, select.POLLIN)

    def _forget(self, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            if self._owners.pop(descriptor, None) is not None:
                self._poll.unregister(descriptor)

    def _tell(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(self._control, [json.dumps(message).encode()], fds)


def become_branch(
    modules: list[str], control_fd: int, parent: int, seal: Any, kit: Kit
) -> NoReturn:
    """Be a zygote that has imported more; it shares the seal that its root has prepared."""
    try:
        os.setsid()
        kit.sandbox.die_with_parent(parent)
        kit.sandbox.close_others({control_fd, *seal.descriptors()})
        control = socket.socket(fileno=control_fd)
        prepare(control, modules, seal)
        Zygote(control, seal, kit).serve()
    except BaseException as error:
        os.write(2, f"zygote could not start: {error!r}\n".encode())
    finally:
        os._exit(0)


def become_instance(spare: Any, folder: str, parent: int, seal: Any, kit: Kit) -> NoReturn:
    """Put on the seal, wait for the order, load its function, serve calls."""
    try:
        failure = None
        try:
            kit.sandbox.enter(
                seal,
                parent=parent,
                group=spare.cell.group,
                keep=(spare.theirs.fileno(),),
                log=os.open(os.devnull, os.O_WRONLY),
                folder=folder,
                memory_mib=spare.size[0],
                report=spare.cell.report,
            )
        except BaseException as error:  # who gets this process is told
            failure = error
        order, fds = kit.spare.wait_for_order(spare.theirs, FDS_PER_FORK)
        channel_fd, log_fd, progress_fd, code_fd, *network_fds = fds
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.close(log_fd)
        if failure is not None:
            raise failure
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for descriptor in network_fds:
            kit.dialing.install(descriptor)
        progress = memoryview(mmap.mmap(progress_fd, 8))
        kit.worker.run(
            socket.socket(fileno=channel_fd),
            progress,
            kit.payload,
            code_fd=code_fd,
            code_digest=order["code_digest"],
            result_bytes_max=order["result_bytes_max"],
        )
    except BaseException as error:
        os.write(2, f"worker could not start: {error!r}\n".encode())
    finally:
        os._exit(70)


if __name__ == "__main__":
    main()

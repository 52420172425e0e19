"""The clean parent of all workers of one environment. Run as a script, never imported.

    ENV_PYTHON -I zygote.py <control fd> <agent pidfd> <isolation> <group> <payload.py> [module]…

It holds one thread and one socket, so a fork is cheap and safe. Before it imports the modules that
functions need it goes where they will run: behind private mounts, without the host's files. Over
the control socket (SOCK_SEQPACKET, JSON) it is told to fork or kill instances, and tells when one
has ended or was refused a system call.
"""

import array
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
from collections.abc import Callable
from types import ModuleType
from typing import Any

MESSAGE_MAX = 65536
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


def main() -> None:
    """Serve until the agent closes the socket or dies."""
    control = socket.socket(fileno=int(sys.argv[1]))
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - keeps start-up small
    open_package(here)
    sandbox = importlib.import_module("agent.runtime.sandbox")
    cell = importlib.import_module("agent.runtime.cell")
    dialing = importlib.import_module("agent.runtime.dialing")
    sandbox.die_with_parent(int(sys.argv[2]))
    os.close(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    payload = load("tierwise_payload", sys.argv[5])
    worker = load("tierwise_worker", f"{here}/worker.py")
    seal = importlib.import_module("agent.runtime.seal").prepare(sys.argv[3], sys.argv[4])
    for name in sys.argv[6:]:
        try:
            importlib.import_module(name)
        except Exception:  # a module that cannot be imported here fails later, in its function
            continue
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"ready": os.getpid(), "missing": seal.missing}).encode())
    serve(control, seal, cell.Cell, sandbox, dialing, payload, worker)


def serve(
    control: socket.socket,
    seal: Any,
    new_cell: Callable[..., Any],
    sandbox: ModuleType,
    dialing: ModuleType,
    payload: ModuleType,
    worker: ModuleType,
) -> None:
    """Fork, reap, and deny what instances may not do, until the control socket closes."""
    own = os.pidfd_open(os.getpid())
    cells: dict[str, Any] = {}
    owners: dict[int, Any] = {}  # descriptor that is polled → its cell
    poll = select.poll()
    poll.register(control, select.POLLIN)

    def watch(descriptors: list[int], cell: Any) -> None:
        for descriptor in descriptors:
            owners[descriptor] = cell
            poll.register(descriptor, select.POLLIN)

    def forget(descriptors: list[int]) -> None:
        for descriptor in descriptors:
            if owners.pop(descriptor, None) is not None:
                poll.unregister(descriptor)

    def tell(message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(control, [json.dumps(message).encode()], fds)

    while True:
        for descriptor, events in poll.poll():
            if descriptor == control.fileno():
                message, fds = receive(control)
                if not message:
                    for cell in cells.values():
                        cell.kill()
                    for cell in cells.values():
                        cell.end()
                    if seal.groups is not None:
                        seal.groups.close()
                    return
                order = json.loads(message)
                if "kill" in order:
                    if order["kill"] in cells:
                        cells[order["kill"]].kill()
                    continue
                name = order["fork"]
                cell = None
                try:
                    cell = new_cell(name, seal, memory_mib=order["memory_mib"], cpus=order["cpus"])
                    pid, first = seal.fork(own)
                except OSError as error:
                    if cell is not None:
                        cell.abandon()
                    for fd in fds:
                        os.close(fd)
                    tell({"failed": name, "why": str(error)})
                    continue
                if pid == 0:
                    run_child(order, fds, own, seal, cell, sandbox, dialing, payload, worker)
                for fd in fds:
                    os.close(fd)
                cells[name] = cell
                cell.forked(pid, first)
                watch(cell.descriptors(), cell)
                tell({"forked": name}, (cell.pidfd,))
                continue
            cell = owners.get(descriptor)
            if cell is None:
                continue  # it ended earlier in this round
            if descriptor == cell.pidfd:
                forget(cell.descriptors())
                del cells[cell.name]
                code, has_run_out, left = cell.end()
                tell({"ended": cell.name, "code": code, "oom": has_run_out, "left": left})
            elif not cell.is_listening:
                forget([descriptor])
                cell.listen()
                watch([fd for fd in cell.descriptors() if fd not in owners], cell)
            elif events & select.POLLIN and (call := cell.refused()) is not None:
                tell({"refused": cell.name, "call": call})  # first told, then denied: never late
                if not cell.deny():
                    forget([descriptor])
            elif not events & select.POLLIN:
                forget([descriptor])  # nobody is left who could be refused anything


def receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """Return one message and the descriptors that came with it; empty when the agent is gone."""
    fds = array.array("i")
    message, ancillary, _, _ = control.recvmsg(
        MESSAGE_MAX, socket.CMSG_SPACE(FDS_PER_FORK * fds.itemsize)
    )
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds)


def run_child(
    order: dict[str, Any],
    fds: list[int],
    parent: int,
    seal: Any,
    cell: Any,
    sandbox: ModuleType,
    dialing: ModuleType,
    payload: ModuleType,
    worker: ModuleType,
) -> None:
    """Become the instance; never returns."""
    try:
        channel_fd, log_fd, progress_fd, code_fd, *network_fds = fds
        sandbox.enter(
            seal,
            parent=parent,
            group=cell.group,
            keep=(channel_fd, progress_fd, code_fd, *network_fds),
            log=log_fd,
            folder=order["folder"],
            memory_mib=order["memory_mib"],
            report=cell.report,
        )
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for descriptor in network_fds:
            dialing.install(descriptor)
        progress = memoryview(mmap.mmap(progress_fd, 8))
        worker.run(
            socket.socket(fileno=channel_fd),
            progress,
            payload,
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

"""The clean parent of all workers of one environment. Run as a script, never imported.

    ENV_PYTHON -I zygote.py <control fd> <agent pid> <payload.py> [module to pre-import]…

It holds one thread and one socket, so a fork is cheap and safe. Over the control socket
(SOCK_SEQPACKET, JSON) it is told to fork or kill instances, and tells when one has ended. Told to
branch, it forks a zygote like itself, with a control socket of its own, that imports more modules:
what some functions were seen to import never enters the root.
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
from types import ModuleType

MESSAGE_MAX = 65536
FDS_PER_FORK = 3  # the instance's socket, its log pipe, its progress page


def load(name: str, path: str) -> ModuleType:
    """Import one file under a private name."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Serve until the agent closes the socket or dies."""
    control = socket.socket(fileno=int(sys.argv[1]))
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - keeps start-up small
    sandbox = load("tierwise_sandbox", f"{here}/sandbox.py")
    sandbox.die_with_parent(int(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    payload = load("tierwise_payload", sys.argv[3])
    worker = load("tierwise_worker", f"{here}/worker.py")
    vars(worker)["memfd"] = load(
        "tierwise_memfd",
        f"{os.path.dirname(sys.argv[3])}/memfd.py",  # noqa: PTH120
    )
    prepare(control, sys.argv[4:])
    serve(control, sandbox, payload, worker)


def prepare(control: socket.socket, modules: list[str]) -> None:
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
        "thread_count": len(os.listdir("/proc/self/task")),  # noqa: PTH208
        "private_kib": private_kib,
    }
    control.send(json.dumps(ready).encode())


def serve(
    control: socket.socket, sandbox: ModuleType, payload: ModuleType, worker: ModuleType
) -> None:
    """Fork and reap until the control socket closes."""
    pids: dict[str, int] = {}
    names: dict[int, str] = {}  # pidfd → instance
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor != control.fileno():
                poll.unregister(descriptor)
                os.close(descriptor)
                name = names.pop(descriptor)
                _, status = os.waitpid(pids.pop(name), 0)
                code = os.waitstatus_to_exitcode(status)
                control.send(json.dumps({"ended": name, "code": code}).encode())
                continue
            message, fds = receive(control)
            if not message:
                for pid in pids.values():
                    os.killpg(pid, signal.SIGKILL)
                return
            order = json.loads(message)
            if "kill" in order:
                kill(pids.get(order["kill"]))
                continue
            parent_pid = os.getpid()
            pid = os.fork()
            if pid == 0:
                if "branch" in order:
                    control.detach()  # the number is closed below, and may be given out again
                    branch(order, fds[0], parent_pid, sandbox, payload, worker)
                run_child(order, fds, sandbox, payload, worker)
            for fd in fds:
                os.close(fd)
            name = order.get("fork") or order["branch"]
            pids[name] = pid
            pidfd = os.pidfd_open(pid)
            names[pidfd] = name
            poll.register(pidfd, select.POLLIN)
            control.send(json.dumps({"forked": name, "pid": pid}).encode())


def branch(
    order: dict[str, object],
    control_fd: int,
    parent_pid: int,
    sandbox: ModuleType,
    payload: ModuleType,
    worker: ModuleType,
) -> None:
    """Become a zygote that has imported more; never returns."""
    try:
        os.setsid()
        sandbox.die_with_parent(parent_pid)
        os.closerange(3, control_fd)
        os.closerange(control_fd + 1, 65536)
        control = socket.socket(fileno=control_fd)
        modules = order["modules"]
        assert isinstance(modules, list)
        prepare(control, modules)
        serve(control, sandbox, payload, worker)
    except BaseException as error:
        os.write(2, f"zygote could not start: {error!r}\n".encode())
    finally:
        os._exit(0)


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


def kill(pid: int | None) -> None:
    """Kill a child that is not reaped yet, and its session; others are left alone."""
    if pid is None:
        return
    for send in (os.killpg, os.kill):  # before its setsid it has no group of its own
        try:
            send(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def run_child(
    order: dict[str, object],
    fds: list[int],
    sandbox: ModuleType,
    payload: ModuleType,
    worker: ModuleType,
) -> None:
    """Become the instance; never returns."""
    try:
        channel_fd, log_fd, progress_fd = fds
        sandbox.enter(
            parent_pid=os.getppid(),
            keep=(channel_fd, progress_fd),
            log=log_fd,
            folder=order["folder"],
            memory_mib=order["memory_mib"],
        )
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        progress = memoryview(mmap.mmap(progress_fd, 8))
        worker.run(
            socket.socket(fileno=channel_fd),
            progress,
            payload,
            code_path=order["code_path"],
            code_digest=order["code_digest"],
            result_bytes_max=order["result_bytes_max"],
        )
    except BaseException as error:
        os.write(2, f"worker could not start: {error!r}\n".encode())
    finally:
        os._exit(70)


if __name__ == "__main__":
    main()

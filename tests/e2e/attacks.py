"""Functions that try what a function may not. Each returns "" if it was stopped, else what it got.

They run in instances: everything they need is imported inside, and an OSError means "stopped".
"""

from typing import Any

from agent.runtime import syscalls

NUMBERS = syscalls.BY_MACHINE[__import__("os").uname().machine]


def stopped_is_fine(attack: Any) -> Any:
    """Turn the kernel's refusal into "", so that an attack states only what it does."""

    def attempt(*arguments: Any) -> str:
        try:
            return str(attack(*arguments) or "")
        except (OSError, ValueError):  # `resource` turns EPERM into ValueError
            return ""

    attempt.__name__ = attack.__name__
    return attempt


def kernel_call(name: str, *arguments: Any) -> int:
    """Make a system call by name; return its result, -1 for an error."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(word) if isinstance(word, int) else word for word in arguments]
    return int(libc.syscall(ctypes.c_long(NUMBERS[name]), *words))


# -- files ---------------------------------------------------------------------------------------


def reads_the_passwords(place: dict[str, Any]) -> str:
    return open("/etc/shadow").read(20)


def reads_the_keys_of_the_agent(place: dict[str, Any]) -> str:
    return open(f"{place['state']}/key.pem").read()


def lists_the_folder_of_the_agent(place: dict[str, Any]) -> str:
    import os

    return " ".join(os.listdir(place["state"]))


def reads_the_folder_of_another_instance(place: dict[str, Any]) -> str:
    import os

    return " ".join(os.listdir(f"{place['state']}/runtime/work"))


def reads_another_process_by_proc(place: dict[str, Any]) -> str:
    return open(f"/proc/{place['pid']}/environ").read(40)


def lists_the_root_of_the_host(place: dict[str, Any]) -> str:
    import os

    known = {"root", "home", "boot", "var", "srv", "opt", "sys", "run", "sbin", "bin"}
    found = [name for name in sorted(known & set(os.listdir("/"))) if os.listdir(f"/{name}")]
    # The interpreter may live below one of them: then nothing but the way to it is there.
    way = os.path.realpath(os.__file__).split("/")[1]
    return " ".join(name for name in found if name != way)


def opens_a_disk(place: dict[str, Any]) -> str:
    for name in ("vda", "sda", "nvme0n1", "mem", "kmsg", "port"):
        try:
            open(f"/dev/{name}", "rb").close()
            return name
        except OSError:
            continue
    return ""


def makes_a_device(place: dict[str, Any]) -> str:
    import os
    import stat

    os.mknod("disk", 0o600 | stat.S_IFBLK, os.makedev(254, 0))
    os.unlink("disk")
    return "made a device"


def writes_into_the_environment(place: dict[str, Any]) -> str:
    import os

    import numpy

    path = f"{os.path.dirname(numpy.__file__)}/of_an_attack.py"
    open(path, "w").close()
    os.unlink(path)
    return path


def writes_beside_its_folder(place: dict[str, Any]) -> str:
    import os

    for folder in ("/", "/etc", "/dev", "/var/tmp", "/usr/lib", os.path.dirname(os.__file__)):
        try:
            open(f"{folder}/of_an_attack", "w").close()
            os.unlink(f"{folder}/of_an_attack")
            return folder
        except OSError:
            continue
    return ""


def reads_by_a_link_in_its_folder(place: dict[str, Any]) -> str:
    import os

    os.symlink("/etc/shadow", "link")
    try:
        return open("link").read(20)
    finally:
        os.unlink("link")


def opens_a_file_by_its_handle(place: dict[str, Any]) -> str:
    import ctypes

    handle = ctypes.create_string_buffer(b"\x80" + b"\0" * 7, 136)
    mount_id = ctypes.c_int()
    result = kernel_call("name_to_handle_at", -100, b"/", handle, ctypes.byref(mount_id), 0)
    return "got a handle" if result == 0 else ""


def changes_the_kernel_by_proc(place: dict[str, Any]) -> str:
    with open("/proc/sys/kernel/ostype") as file:
        return file.read()


# -- processes -----------------------------------------------------------------------------------


def sees_other_processes(place: dict[str, Any]) -> str:
    import os

    others = [
        name for name in os.listdir("/proc") if name.isdigit() and int(name) not in (1, os.getpid())
    ]
    return " ".join(others)


def signals_the_agent(place: dict[str, Any]) -> str:
    import os

    os.kill(place["pid"], 0)
    return "could have killed the agent"


def traces_a_child(place: dict[str, Any]) -> str:
    import os
    import signal
    import time

    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    try:
        return "attached" if kernel_call("ptrace", 16, child, 0, 0) == 0 else ""
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def reads_memory_of_a_process(place: dict[str, Any]) -> str:
    import ctypes
    import os

    source = ctypes.create_string_buffer(b"secret")
    target = ctypes.create_string_buffer(6)

    class Part(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    parts = [Part(ctypes.addressof(buffer), 6) for buffer in (target, source)]
    here, there = (ctypes.byref(part) for part in parts)
    kernel_call("process_vm_readv", os.getpid(), here, 1, there, 1, 0)
    return target.value.decode()


def steals_a_descriptor(place: dict[str, Any]) -> str:
    import os

    return "got one" if kernel_call("pidfd_getfd", os.pidfd_open(os.getpid()), 1, 0) >= 0 else ""


def spawns_a_shell(place: dict[str, Any]) -> str:
    import subprocess

    return subprocess.run(["/bin/sh", "-c", "echo shell"], capture_output=True).stdout.decode()


def spawns_an_interpreter(place: dict[str, Any]) -> str:
    import subprocess
    import sys

    command = [sys.executable, "-c", "print('new process')"]
    return subprocess.run(command, capture_output=True).stdout.decode()


def runs_a_program_from_memory(place: dict[str, Any]) -> str:
    import os
    import sys

    program = os.memfd_create("program", 0)
    with open(os.path.realpath(sys.executable), "rb") as file:
        os.write(program, file.read())
    child = os.fork()
    if child == 0:
        try:
            os.execve(program, ["python", "-c", "import os; os._exit(42)"], {})
        finally:
            os._exit(1)
    _, state = os.waitpid(child, 0)
    return "ran" if os.waitstatus_to_exitcode(state) == 42 else ""


def runs_a_program_from_its_folder(place: dict[str, Any]) -> str:
    import os
    import shutil
    import subprocess
    import sys

    shutil.copyfile(os.path.realpath(sys.executable), "program")
    os.chmod("program", 0o755)
    command = ["./program", "-c", "print('ran')"]
    return subprocess.run(command, capture_output=True).stdout.decode()


def becomes_root(place: dict[str, Any]) -> str:
    import os

    os.setuid(0)
    return "root"


def is_not_nobody(place: dict[str, Any]) -> str:
    """On the host it must be a user that owns nothing, and hold no capability."""
    import os

    held = [
        line
        for line in open("/proc/self/status")
        if line.startswith(("CapPrm", "CapEff", "CapBnd", "CapAmb")) and int(line.split()[1], 16)
    ]
    return "".join(held) + ("root" if os.getuid() == 0 else "")


def outlives_its_zygote(place: dict[str, Any]) -> str:
    import ctypes

    done: int = ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG, none
    return "disarmed" if done == 0 else ""


def protects_itself_from_the_kernel(place: dict[str, Any]) -> str:
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1000")
    return "never killed for memory"


# -- network -------------------------------------------------------------------------------------


def connects_to_a_port(place: dict[str, Any]) -> str:
    import socket

    with socket.create_connection(("127.0.0.1", place["port"]), 2):
        return "connected"


def opens_a_raw_socket(place: dict[str, Any]) -> str:
    import socket

    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()
    return "could listen to the wire"


def asks_the_kernel_of_the_network(place: dict[str, Any]) -> str:
    import socket

    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()
    return "netlink"


def connects_to_an_abstract_socket(place: dict[str, Any]) -> str:
    import socket

    with socket.socket(socket.AF_UNIX) as end:
        end.connect(f"\0{place['abstract']}")
    return "connected"


def connects_to_a_local_socket(place: dict[str, Any]) -> str:
    import socket

    with socket.socket(socket.AF_UNIX) as end:
        end.connect(place["socket"])
    return "connected"


def finds_the_control_socket(place: dict[str, Any]) -> str:
    import os
    import socket

    for descriptor in range(3, 256):
        try:
            with socket.socket(fileno=os.dup(descriptor)) as end:
                if end.type == socket.SOCK_SEQPACKET:
                    end.send(b'{"kill": "healthy"}')
                    return "sent an order to the zygote"
        except OSError:
            continue
    return ""


# -- the kernel ----------------------------------------------------------------------------------


def unshares(place: dict[str, Any]) -> str:
    import os

    child = os.fork()  # a user namespace needs a process with one thread
    if child == 0:
        os._exit(0 if kernel_call("unshare", 0x10000000) == 0 else 1)
    _, state = os.waitpid(child, 0)
    return "new user namespace" if state == 0 else ""


def clones_into_namespaces(place: dict[str, Any]) -> str:
    import os

    child = kernel_call("clone", 0x10000000 | 17, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    if child > 0:
        os.waitpid(child, 0)
    return "new user namespace" if child > 0 else ""


def clones_by_the_newer_call(place: dict[str, Any]) -> str:
    import ctypes
    import os

    arguments = (ctypes.c_uint64 * 8)(0x10000000, 0, 0, 0, 17, 0, 0, 0)
    child = kernel_call("clone3", arguments, 64)
    if child == 0:
        os._exit(0)
    if child > 0:
        os.waitpid(child, 0)
    return "new user namespace" if child > 0 else ""


def enters_a_namespace(place: dict[str, Any]) -> str:
    import os

    descriptor = os.open("/proc/self/ns/net", os.O_RDONLY)
    return "entered" if kernel_call("setns", descriptor, 0) == 0 else ""


def mounts(place: dict[str, Any]) -> str:
    import os

    os.makedirs("here", exist_ok=True)
    if kernel_call("mount", b"none", b"here", b"tmpfs", 0, 0) != 0:
        return ""
    kernel_call("umount2", b"here", 2)
    return "mounted"


def unmounts_its_folder(place: dict[str, Any]) -> str:
    result = kernel_call("mount", b"none", b"/", 0, 1 << 18, 0)  # MS_PRIVATE: harmless
    return "changed a mount" if result == 0 else ""


def changes_its_root(place: dict[str, Any]) -> str:
    import os

    child = os.fork()
    if child == 0:
        os._exit(0 if kernel_call("chroot", b"/proc") == 0 else 1)
    _, state = os.waitpid(child, 0)
    return "changed" if state == 0 else ""


def loads_a_program_into_the_kernel(place: dict[str, Any]) -> str:
    import ctypes

    attributes = (ctypes.c_uint32 * 30)(2, 4, 8, 1)  # an array map: key 4, value 8, one entry
    return "made a map" if kernel_call("bpf", 0, attributes, 120) >= 0 else ""


def reads_the_keyring(place: dict[str, Any]) -> str:
    return "has a keyring" if kernel_call("keyctl", 0, -3, 1) >= 0 else ""


def makes_an_io_uring(place: dict[str, Any]) -> str:
    import ctypes

    parameters = ctypes.create_string_buffer(120)
    return "made one" if kernel_call("io_uring_setup", 1, parameters) >= 0 else ""


def handles_page_faults(place: dict[str, Any]) -> str:
    return "made one" if kernel_call("userfaultfd", 0o2000000) >= 0 else ""


def counts_events_of_the_machine(place: dict[str, Any]) -> str:
    import ctypes

    attributes = ctypes.create_string_buffer(b"\1\0\0\0\x80\0\0\0", 128)  # software, 128 bytes
    return "opened" if kernel_call("perf_event_open", attributes, 0, -1, -1, 0) >= 0 else ""


def shares_memory_by_number(place: dict[str, Any]) -> str:
    identity = kernel_call("shmget", 0x7157, 4096, 0o1666)
    if identity < 0:
        return ""
    kernel_call("shmctl", identity, 0, 0)
    return "shared"


def renames_the_host(place: dict[str, Any]) -> str:
    import socket

    name = socket.gethostname()
    if kernel_call("sethostname", name.encode(), len(name)) == 0:
        return "could have renamed it"
    return name if name == place["host"] else ""


def types_into_the_terminal(place: dict[str, Any]) -> str:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.ioctl(0, 0x5412, b"x")
    return "" if ctypes.get_errno() == 1 else f"asked the terminal: error {ctypes.get_errno()}"


# -- taking more than its share ------------------------------------------------------------------


def raises_its_limits(place: dict[str, Any]) -> str:
    import resource

    for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "raised"


def takes_every_descriptor(place: dict[str, Any]) -> str:
    import os

    taken = []
    try:
        for _ in range(5000):
            taken.append(os.dup(1))
    except OSError:
        return ""
    finally:
        for descriptor in taken:
            os.close(descriptor)
    return "5000 descriptors"


def bombs_with_forks(place: dict[str, Any]) -> str:
    import os
    import signal
    import time

    children = []
    try:
        while len(children) < 500:
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)
    except OSError:
        return ""
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return f"{len(children)} children"


def bombs_with_threads(place: dict[str, Any]) -> str:
    import threading

    end = threading.Event()
    threads = []
    threading.stack_size(64 << 10)
    try:
        while len(threads) < 500:
            thread = threading.Thread(target=end.wait)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        return ""
    finally:
        end.set()
    return f"{len(threads)} threads"


def fills_memory_through_its_children(place: dict[str, Any]) -> str:
    """Each child stays within the limit of one process; together they need four times as much."""
    import os
    import signal

    children, held = [], 0
    for _ in range(8):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            block = bytearray(32 << 20)
            block[::4096] = b"x" * len(block[::4096])
            os.write(theirs, b"held")
            signal.pause()
        os.close(theirs)
        children.append(child)
        held += os.read(ours, 4) == b"held"
        os.close(ours)
    alive = sum(os.waitpid(child, os.WNOHANG)[0] == 0 for child in children)
    for child in children:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            continue
    return f"{alive} children hold {32 * alive} MiB" if alive * 32 > 192 else ""


def fills_the_disk(place: dict[str, Any]) -> str:
    import os

    block = b"x" * (1 << 20)
    names = []
    try:
        for number in range(4):
            names.append(f"full{number}")
            with open(names[-1], "wb") as file:
                for _ in range(64):
                    file.write(block)
    except OSError:
        return ""
    finally:
        for name in names:
            os.unlink(name)
    return "256 MiB"


def takes_huge_pages(place: dict[str, Any]) -> str:
    import mmap

    try:
        mmap.mmap(-1, 2 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
    except PermissionError:
        return ""
    except OSError:  # there are none just now
        pass
    return "may ask for huge pages"


def takes_every_inode(place: dict[str, Any]) -> str:
    import os
    import shutil

    os.mkdir("many")
    try:
        for number in range(40_000):
            os.close(os.open(f"many/{number}", os.O_CREAT | os.O_WRONLY))
    except OSError:
        return ""
    finally:
        shutil.rmtree("many")
    return "40,000 files"


ATTACKS = {
    name: stopped_is_fine(value)
    for name, value in list(globals().items())
    if callable(value)
    and getattr(value, "__module__", "") == __name__
    and name not in ("stopped_is_fine", "kernel_call")
}


def reads_then_writes(path: str) -> list[str]:
    from pathlib import Path

    said = [Path(path).read_text()]
    try:
        Path(path).write_text("changed")
    except OSError as error:
        said.append(type(error).__name__)
    return said

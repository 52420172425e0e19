"""One function instance: the loop that runs in a forked child of the zygote.

Stands alone: it sees the standard library, msgspec, cloudpickle and the sibling files that the
zygote loaded by path; never tierwise itself. Frames in both directions are a u32 length and a body.

    agent → worker   u32 item count, u32 MiB that the batch may use less than the instance was
                     started with, then per item u32 length, u32 attachment count and the encoded
                     (args, kwargs)
    worker → agent   msgpack [items, done]; an item is [index, kind, value, type, message, trace,
                     attachment count], done is None or [run seconds, peak MiB, CPU seconds since
                     the fork]; first of all one frame for the start; {"imports": [name, …]}
                     whenever modules were imported

What is larger than 1 MiB comes and goes as a sealed memfd: arrays as attachments, and a blob whose
length is IN_FILE, or whose value is None. The descriptors ride on the length of the frame.
"""

import ctypes
import hashlib
import importlib.abc
import io
import os
import resource
import socket
import struct
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

import cloudpickle
import msgspec

OK, RAISED, OUT_OF_MEMORY, BAD_ARGUMENTS, BAD_RESULT, RESULT_TOO_LARGE, EXITED = range(7)
HIDDEN = frozenset({"tierwise", "agent", "scheduler", "envs", "training"})
MESSAGE_MAX = 4096
TRACEBACK_MAX = 16_384
FLUSH_BYTES = 64 << 10
FLUSH_S = 0.005
TRIM_KIB = 4096  # batches that need more leave something to give back
READ_BYTES = 1 << 16
FDS_MAX = 64  # in one frame
IN_FILE = 0xFFFFFFFF
IN_FILE_BYTES_MIN = 1 << 20
IMPORTS_MAX = 400  # module names that are told
_U32 = struct.Struct("<I")
_ITEM = struct.Struct("<II")

memfd: Any = None  # tierwise/wire/memfd.py, put here by the zygote


class _Hider(importlib.abc.MetaPathFinder):
    """Refuses to import the platform's own packages, even where they are installed."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> None:
        if fullname.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(
                f"{fullname} cannot be imported inside a function: functions see their own "
                "requirements only"
            )


def run(
    channel: socket.socket,
    progress: memoryview,
    payload: ModuleType,
    *,
    code_fd: int,
    code_digest: str,
    result_bytes_max: int,
) -> NoReturn:
    """Load the function, tell the agent, then serve calls until the socket closes.

    Args:
        channel: To the agent, blocking.
        progress: 8 shared bytes: index of the running item.
        payload: The module tierwise/wire/payload.py.
        code_fd: The file with the cloudpickle blob, open; closed here.
        code_digest: Its SHA-256, hex.
        result_bytes_max: Larger results are refused.
    """
    known = frozenset(sys.modules)
    sys.meta_path.insert(0, _Hider())
    for name in [name for name in sys.modules if name.partition(".")[0] in HIDDEN]:
        del sys.modules[name]
    try:
        with open(code_fd, "rb") as file:
            code = file.read()
        if hashlib.sha256(code).hexdigest() != code_digest:
            raise ValueError("the code on disk does not have the digest that was deployed")
        function = cloudpickle.loads(code)
        function, leave = _enter(function)
        if not callable(function):
            raise TypeError(f"the deployed object is a {type(function).__name__}, not a function")
    except BaseException as error:  # whatever user code does at import is reported
        _send(channel, msgspec.msgpack.encode([type(error).__name__, _text(error), _trace(error)]))
        os._exit(1)
    _flush_output()
    _send(channel, msgspec.msgpack.encode(None if leave is None else {"exits": True}))
    imports = _Imports(known)
    imports.tell(channel)
    loaded_kib = _peak_kib()
    frames = _Frames(channel)
    while True:
        try:
            body, fds = frames.read()
        except EOFError:
            break
        _serve(
            channel, progress, payload, function, body, fds, result_bytes_max, imports, loaded_kib
        )
        del body, fds  # may be large, and the next may be far
    if leave is not None:  # the agent kills us if this takes long
        try:
            leave()
        except BaseException as error:
            os.write(2, f"exit() failed: {_trace(error)}".encode())
    _flush_output()
    os._exit(0)


def _enter(code: Any) -> tuple[Any, Callable[[], object] | None]:
    """Return what is called, and what to do at the end; a class is made an object and entered."""
    if not isinstance(code, type):
        return code, None
    made = code()
    if hasattr(made, "enter"):
        made.enter()
    return made, getattr(made, "exit", None)


class _Frames:
    """Reads frames with their descriptors: one system call for a small one, no copy of any."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._buffer = bytearray(READ_BYTES)
        self._start = self._end = 0
        self._fds: list[int] = []

    def read(self) -> tuple[memoryview, list[int]]:
        """Return the next body and its descriptors.

        Raises:
            EOFError: The agent is gone, or wants this process to end.
        """
        while self._end - self._start < 4:
            self._fill()
        (length,) = _U32.unpack_from(self._buffer, self._start)
        start = self._start + 4
        there = min(length, self._end - start)
        body = bytearray(length)
        body[:there] = memoryview(self._buffer)[start : start + there]
        self._start = start + there
        rest = memoryview(body)[there:]
        while rest:
            count = self._channel.recv_into(rest)
            if not count:
                raise EOFError
            rest = rest[count:]
        fds, self._fds = self._fds, []
        return memoryview(body), fds

    def _fill(self) -> None:
        left = self._end - self._start  # under 4 bytes
        self._buffer[:left] = self._buffer[self._start : self._end]
        self._start, self._end = 0, left
        room = memoryview(self._buffer)[self._end :]
        space = socket.CMSG_SPACE(FDS_MAX * 4)
        count, ancillary, _, _ = self._channel.recvmsg_into([room], space, socket.MSG_CMSG_CLOEXEC)
        if not count:
            raise EOFError
        self._end += count
        self._fds += memfd.descriptors(ancillary)


class _Imports:
    """Tells the agent which installed modules the function has made this process import."""

    def __init__(self, known: frozenset[str]) -> None:
        self._known = known
        self._seen_count = 0
        paths = sysconfig.get_paths()
        self._roots = tuple({paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")})

    def tell(self, channel: socket.socket) -> None:
        """Say so if there are new ones."""
        if len(sys.modules) == self._seen_count:
            return
        modules = dict(sys.modules)
        self._seen_count = len(modules)
        names = [
            name
            for name, module in modules.items()
            if name not in self._known and self._is_installed(module)
        ][:IMPORTS_MAX]
        if names:
            _send(channel, msgspec.msgpack.encode({"imports": names}))

    def _is_installed(self, module: Any) -> bool:
        spec = getattr(module, "__spec__", None)
        origin = getattr(spec, "origin", None)
        if not isinstance(origin, str):
            return False
        return origin in ("built-in", "frozen") or origin.startswith(self._roots)


def _limit(less_mib: int) -> None:
    """Set this process's limit for one batch; it may always be set within the hard one.

    A function that sets it back is found by the agent's look at resident memory.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = hard if hard == resource.RLIM_INFINITY else hard - (less_mib << 20)
    if soft != wanted:
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _peak_kib() -> int:
    """Return the peak of resident memory; the agent has it counted anew for each batch."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _give_back() -> None:
    """Return freed memory to the system, or the next batch's peak and limit would include it."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another malloc


def _serve(
    channel: socket.socket,
    progress: memoryview,
    payload: ModuleType,
    function: Any,
    body: memoryview,
    fds: list[int],
    result_bytes_max: int,
    imports: _Imports,
    loaded_kib: int,
) -> None:
    count, less_mib = _ITEM.unpack_from(body)
    offset = _ITEM.size
    _limit(less_mib)
    files = iter([memfd.Memfd(fd, is_live=True) for fd in fds])  # the agent's
    items: list[tuple[int, int, bytes | None, str, str, str, int]] = []
    unsent: list[Any] = []  # files of the items that are not sent yet
    unsent_bytes = 0
    started_s = sent_s = time.monotonic()
    has_exited = False
    for index in range(count):
        length, attachment_count = _ITEM.unpack_from(body, offset)
        offset += _ITEM.size
        if length == IN_FILE:
            blob = next(files).view()
        else:
            blob = body[offset : offset + length]
            offset += length
        attachments = [next(files).view() for _ in range(attachment_count)]
        _U32.pack_into(progress, 0, index)
        item, made = _call(index, payload, function, blob, attachments, result_bytes_max)
        del blob, attachments
        items.append(item)
        unsent += made
        unsent_bytes += len(item[2] or b"")
        if item[1] == EXITED:
            has_exited = True
            break
        if index + 1 < count:
            now_s = time.monotonic()
            if unsent or unsent_bytes > FLUSH_BYTES or now_s - sent_s > FLUSH_S:
                _send(channel, msgspec.msgpack.encode([items, None]), unsent)
                items, unsent, unsent_bytes, sent_s = [], [], 0, now_s
    run_s = time.monotonic() - started_s
    _flush_output()
    imports.tell(channel)
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    if own.ru_maxrss - loaded_kib > TRIM_KIB:
        _give_back()  # before the agent hears of the end, for it then counts the peak anew
    done = [run_s, own.ru_maxrss / 1024, cpu_s]
    _send(channel, msgspec.msgpack.encode([items, done]), unsent)
    if has_exited:
        os._exit(0)


def _call(
    index: int,
    payload: ModuleType,
    function: Any,
    blob: memoryview,
    attachments: list[memoryview],
    result_bytes_max: int,
) -> tuple[tuple[int, int, bytes | None, str, str, str, int], list[Any]]:
    """Run one item; return it, and the files that go with it."""
    kind, value, error_type, message, trace = _result(payload, function, blob, attachments)
    if kind != OK:
        return (index, kind, b"", error_type, message, trace, 0), []
    blob_out, detached = value
    size_bytes = len(blob_out) + sum(part.nbytes for part in detached)
    if size_bytes > result_bytes_max:
        message = (
            f"the result has {size_bytes} bytes; at most {result_bytes_max} may travel: return "
            "less, or a reference"
        )
        return (index, RESULT_TOO_LARGE, b"", "", message, "", 0), []
    if size_bytes <= IN_FILE_BYTES_MIN:
        return (index, OK, blob_out, "", "", "", 0), []
    files: list[Any] = []
    try:
        is_in_file = len(blob_out) > IN_FILE_BYTES_MIN
        if is_in_file:
            files.append(memfd.make([blob_out]))
        files += [memfd.make([part]) for part in detached]
    except OSError:  # the sandbox forbids it, or memory is short: the socket takes everything
        return (index, OK, payload.inline(blob_out, detached), "", "", "", 0), []
    return (index, OK, None if is_in_file else blob_out, "", "", "", len(detached)), files


def _result(
    payload: ModuleType, function: Any, blob: memoryview, attachments: list[memoryview]
) -> tuple[int, Any, str, str, str]:
    """Return (kind, (blob, detached arrays), error type, message, traceback) of one call."""
    try:
        args, kwargs = payload.decode(blob, attachments)
    except (ValueError, TypeError) as error:
        return BAD_ARGUMENTS, None, type(error).__name__, _text(error), ""
    try:
        result = function(*args, **kwargs)
    except MemoryError as error:
        message = ": ".join(filter(None, ("the function ran out of its memory", _text(error))))
        return OUT_OF_MEMORY, None, "MemoryError", message, _trace(error)
    except (SystemExit, KeyboardInterrupt) as error:
        message = f"the function ended its process: {type(error).__name__}({_text(error)})"
        return EXITED, None, type(error).__name__, message, _trace(error)
    except BaseException as error:
        return RAISED, None, type(error).__name__, _text(error), _trace(error)
    detached: list[Any] = []
    try:
        value = payload.encode(result, "the result", detached=detached)
    except ValueError as error:
        return BAD_RESULT, None, type(error).__name__, _text(error), ""
    except MemoryError:
        message = "the result could not be encoded within the function's memory"
        return OUT_OF_MEMORY, None, "MemoryError", message, ""
    return OK, (value, detached), "", "", ""


def _send(channel: socket.socket, body: bytes, files: Sequence[Any] = ()) -> None:
    header = _U32.pack(len(body))
    if files:
        socket.send_fds(channel, [header], [file.fd for file in files])
        channel.sendall(body)
    else:
        channel.sendall(header + body)


def _flush_output() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # the function closed it: what it printed is gone, its result is not


def _text(error: BaseException) -> str:
    try:
        return str(error)[:MESSAGE_MAX]
    except Exception:  # a broken __str__ is the function's business, not ours
        return "(its message cannot be read)"


def _trace(error: BaseException) -> str:
    """Return the traceback without the frames of this file."""
    buffer = io.StringIO()
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    try:
        traceback.print_exception(type(error), error, trace, limit=-20, file=buffer)
    except Exception:  # see _text
        return ""
    return buffer.getvalue()[-TRACEBACK_MAX:]

"""One function instance: the loop that runs in a forked child of the zygote.

Stands alone: it sees the standard library, msgspec, cloudpickle and two sibling files that the
zygote loaded by path; never tierwise itself. Frames in both directions are a u32 length and a body.

    agent → worker   u32 item count, then per item u32 length and the encoded (args, kwargs)
    worker → agent   msgpack [items, done]; an item is [index, kind, value, type, message, trace],
                     done is None or [run seconds, peak MiB]; first of all one frame for the start
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
import time
import traceback
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
_U32 = struct.Struct("<I")


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
    code_path: str,
    code_digest: str,
    result_bytes_max: int,
) -> NoReturn:
    """Load the function, tell the agent, then serve calls until the socket closes.

    Args:
        channel: To the agent, blocking.
        progress: 8 shared bytes: index of the running item.
        payload: The module tierwise/wire/payload.py.
        code_path: File with the cloudpickle blob.
        code_digest: Its SHA-256, hex.
        result_bytes_max: Larger results are refused.
    """
    sys.meta_path.insert(0, _Hider())
    for name in [name for name in sys.modules if name.partition(".")[0] in HIDDEN]:
        del sys.modules[name]
    try:
        with open(code_path, "rb") as file:
            code = file.read()
        if hashlib.sha256(code).hexdigest() != code_digest:
            raise ValueError("the code on disk does not have the digest that was deployed")
        function = cloudpickle.loads(code)
        if not callable(function):
            raise TypeError(f"the deployed object is a {type(function).__name__}, not a function")
    except BaseException as error:  # whatever user code does at import is reported
        _send(channel, msgspec.msgpack.encode([type(error).__name__, _text(error), _trace(error)]))
        os._exit(1)
    _send(channel, msgspec.msgpack.encode(None))
    read = channel.makefile("rb", buffering=1 << 16).read
    loaded_kib = _peak_kib()
    while True:
        header = read(4)
        if len(header) < 4:
            os._exit(0)
        body = read(_U32.unpack(header)[0])
        _serve(channel, progress, payload, function, body, result_bytes_max, loaded_kib)
        del body  # before it waits for the next


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
    body: bytes,
    result_bytes_max: int,
    loaded_kib: int,
) -> None:
    (count,) = _U32.unpack_from(body)
    offset = 4
    items: list[tuple[int, int, bytes, str, str, str]] = []
    unsent_bytes = 0
    started_s = sent_s = time.monotonic()
    has_exited = False
    for index in range(count):
        (length,) = _U32.unpack_from(body, offset)
        blob = memoryview(body)[offset + 4 : offset + 4 + length]
        offset += 4 + length
        _U32.pack_into(progress, 0, index)
        item = _call(index, payload, function, blob, result_bytes_max)
        items.append(item)
        unsent_bytes += len(item[2])
        if item[1] == EXITED:
            has_exited = True
            break
        if index + 1 < count:
            now_s = time.monotonic()
            if unsent_bytes > FLUSH_BYTES or now_s - sent_s > FLUSH_S:
                _send(channel, msgspec.msgpack.encode([items, None]))
                items, unsent_bytes, sent_s = [], 0, now_s
    run_s = time.monotonic() - started_s
    _flush_output()
    peak_kib = _peak_kib()
    if peak_kib - loaded_kib > TRIM_KIB:
        _give_back()  # before the agent hears of the end, for it then counts the peak anew
    peak_mib = peak_kib / 1024
    _send(channel, msgspec.msgpack.encode([items, [run_s, peak_mib]]))
    if has_exited:
        os._exit(0)


def _call(
    index: int, payload: ModuleType, function: Any, blob: memoryview, result_bytes_max: int
) -> tuple[int, int, bytes, str, str, str]:
    try:
        args, kwargs = payload.decode(blob)
    except (ValueError, TypeError) as error:
        return index, BAD_ARGUMENTS, b"", type(error).__name__, _text(error), ""
    try:
        result = function(*args, **kwargs)
    except MemoryError as error:
        message = ": ".join(filter(None, ("the function ran out of its memory", _text(error))))
        return index, OUT_OF_MEMORY, b"", "MemoryError", message, _trace(error)
    except (SystemExit, KeyboardInterrupt) as error:
        message = f"the function ended its process: {type(error).__name__}({_text(error)})"
        return index, EXITED, b"", type(error).__name__, message, _trace(error)
    except BaseException as error:
        return index, RAISED, b"", type(error).__name__, _text(error), _trace(error)
    try:
        value = payload.encode(result, "the result")
    except ValueError as error:
        return index, BAD_RESULT, b"", type(error).__name__, _text(error), ""
    except MemoryError:
        message = "the result could not be encoded within the function's memory"
        return index, OUT_OF_MEMORY, b"", "MemoryError", message, ""
    if len(value) > result_bytes_max:
        message = (
            f"the result has {len(value)} bytes; at most {result_bytes_max} may travel: return "
            "less, or a reference"
        )
        return index, RESULT_TOO_LARGE, b"", "", message, ""
    return index, OK, value, "", "", ""


def _send(channel: socket.socket, body: bytes) -> None:
    channel.sendall(_U32.pack(len(body)) + body)


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

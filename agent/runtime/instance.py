"""One worker process as the agent sees it: its socket, its log, its memory, its current call."""

import asyncio
import contextlib
import fcntl
import mmap
import os
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import msgspec

from agent.runtime.parent import ZygoteProcess
from agent.runtime.pipe import FRAME_BYTES_MAX, FramePipe
from agent.runtime.relay import Relay
from tierwise.wire import memfd
from tierwise.wire.memfd import Memfd

LOG_BYTES_MAX = 8000  # with the note of what was dropped it stays within 8 KiB
LOG_READ_MAX = 4 << 20  # how much is read and dropped in one go before the loop gets its turn
CPU_COUNT = os.cpu_count() or 1
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
DEATH_WAIT_S = 1.0
MORE_MEMORY = "raise memory= or send smaller inputs"
IN_FILE = 0xFFFFFFFF  # see worker.py
IN_FILE_BYTES_MIN = 1 << 20
PEAK_SLACK_MIB = 1.0  # a peak below this may be the next batch's too: counting anew takes 15 µs
EXIT_TIMEOUT_S = 2.0  # for a function's own exit()
IMPORTS_MAX = 400
_U32 = struct.Struct("<I")
_ITEM = struct.Struct("<II")


class ItemKind(IntEnum):
    """What became of one item. The first seven are the worker's words."""

    OK = 0
    RAISED = 1
    OUT_OF_MEMORY = 2
    BAD_ARGUMENTS = 3
    BAD_RESULT = 4
    RESULT_TOO_LARGE = 5
    WORKER_EXITED = 6
    TIMED_OUT = 7
    WORKER_DIED = 8
    CANCELLED = 9
    NOT_RUN = 10
    NO_OBJECT = 11  # of the cache, which the call reads or its result goes into


@dataclass(frozen=True, slots=True)
class ItemResult:
    """The result of one item."""

    kind: ItemKind
    value: bytes = b""
    error_type: str = ""
    message: str = ""
    remote_traceback: str = ""
    attachments: tuple[Memfd, ...] = ()  # the detached arrays of `value`
    error_code: str = ""  # where `kind` does not tell it

    @property
    def size_bytes(self) -> int:
        """Return how much there is to move."""
        return len(self.value) + sum(file.nbytes for file in self.attachments)


NOT_RUN = ItemResult(ItemKind.NOT_RUN)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """How one batch went; `items` has one entry per argument set.

    `peak_memory_mib` is the most that was resident at a time, beyond what the instance had when
    its function was loaded: what its limit is compared with.
    """

    items: tuple[ItemResult, ...]
    run_s: float
    peak_memory_mib: float
    cpu_s: float  # user + system; of a worker that did not live to tell, as last seen from outside
    log: str
    instance_alive: bool
    refused_calls: Mapping[str, int] = field(default_factory=dict)  # system call → how often

    @classmethod
    def never_ran(cls, count: int) -> "RunReport":
        """Return the report of a batch whose instance was gone before it began."""
        return cls(
            items=(NOT_RUN,) * count,
            run_s=0,
            peak_memory_mib=0,
            cpu_s=0,
            log="",
            instance_alive=False,
        )


class StartFailure(Exception):
    """The function could not be loaded."""

    def __init__(self, message: str, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.remote_traceback = remote_traceback


class Worker:
    """Speaks the frames of worker.py; knows at most one running batch."""

    def __init__(
        self,
        instance_id: str,
        memory_mib: int,
        folder: Path,
        cpus: float = 0.0,
        relay: Relay | None = None,
    ) -> None:
        self.folder = folder
        self.on_idle_death: Callable[[str], None] = lambda instance_id: None
        self.on_imports: Callable[[list[str]], None] = lambda names: None
        self._instance_id = instance_id
        self._memory_mib = memory_mib
        self._cpus = cpus
        self._relay = relay
        self._refused: Counter[str] = Counter()
        self._zygote: ZygoteProcess | None = None
        self._pipe: FramePipe | None = None
        self._loop = asyncio.get_running_loop()
        self._has_exit = False  # its function wants to be told of the end
        self._loaded: asyncio.Future[None] = self._loop.create_future()
        self._pid = 0
        self._numbered: asyncio.Future[None] = self._loop.create_future()
        self._baseline_mib = 0.0
        self._used_mib = 0.0  # as last seen, of the running batch
        self._is_peak_high = True  # the kernel should count anew before the next batch
        self._beside_mib = 0.0  # size of the files beside the running batch
        self._limit_mib = memory_mib  # of the running batch, within what the process started with
        self._refs_fd = -1
        self._cpu_s = 0.0  # since the fork: at the end of the last batch
        self._cpu_seen_s = 0.0  # the same, now
        self._progress = mmap.mmap(-1, 8)
        self._log_fd = -1
        self._log = bytearray()
        self._dropped_bytes = 0
        self._exit_code: int | None = None
        self._is_ended = False
        self._is_closing = False
        self._start_failure = ""
        self._killed: tuple[ItemKind, str] | None = None
        self._results: list[ItemResult | None] = []
        self._on_done: Callable[[RunReport], None] | None = None
        self._started_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def fork(
        self, zygote: ZygoteProcess, *, code_path: Path, code_digest: str, result_bytes_max: int
    ) -> None:
        """Have the zygote fork this worker, and wait until its function is loaded.

        Raises:
            StartFailure: The zygote is gone, or the code could not be loaded.
        """
        self._zygote = zygote
        code_fd = os.open(code_path, os.O_RDONLY | os.O_CLOEXEC)
        ours, theirs = socket.socketpair()
        self._log_fd, log_write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(log_write_fd, True)
        progress_fd = os.memfd_create("progress", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(progress_fd, 8)
        # A function that could shrink the page would kill us by SIGBUS at our next look at it.
        fcntl.fcntl(progress_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        self._progress = mmap.mmap(progress_fd, 8)
        network_fds = [] if self._relay is None else [self._relay.theirs.fileno()]
        try:
            zygote.fork(
                self._instance_id,
                {
                    "code_digest": code_digest,
                    "folder": str(self.folder),
                    "memory_mib": self._memory_mib,
                    "cpus": self._cpus,
                    "result_bytes_max": result_bytes_max,
                },
                [theirs.fileno(), log_write_fd, progress_fd, code_fd, *network_fds],
                self,
            )
        except OSError as error:
            ours.close()
            raise StartFailure(f"the worker could not be forked: {error}") from None
        finally:
            theirs.close()
            os.close(log_write_fd)
            os.close(progress_fd)
            os.close(code_fd)
            if self._relay is not None:
                self._relay.theirs.close()
        self._loop.add_reader(self._log_fd, self._read_log)
        self._pipe = FramePipe(ours, self._received, self._lost)
        await self._loaded
        await self._numbered  # the instance may be quicker than its zygote's word of it
        self._baseline_mib = self.memory_mib()
        with contextlib.suppress(OSError):
            self._refs_fd = os.open(f"/proc/{self._pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        self._see_cpu()
        self._cpu_s = self._cpu_seen_s  # what loading took is no call's

    def run(
        self,
        arguments: Sequence[bytes],
        timeout_s: float,
        on_done: Callable[[RunReport], None],
        attachments: Sequence[Memfd] = (),
        memory_mib: int | None = None,
    ) -> None:
        """Send one batch; the instance must be idle.

        Args:
            arguments: One blob per item.
            timeout_s: When it is killed.
            on_done: Gets the report, once.
            attachments: The detached arrays of the only item.
            memory_mib: What this batch may use, if less than the instance was started with.
        """
        assert self._on_done is None, "an instance runs one batch at a time"
        self._limit_mib = min(memory_mib or self._memory_mib, self._memory_mib)
        self._beside_mib = sum(file.nbytes for file in attachments) / 2**20
        self._used_mib = 0.0
        if self._is_peak_high:
            self._reset_peak()
        self._is_peak_high = True
        self._on_done = on_done
        self._results = [None] * len(arguments)
        self._log.clear()
        self._dropped_bytes = 0
        self._started_s = self._loop.time()
        if self._pipe is None or not self._pipe.is_open or self._is_ended:
            self._loop.call_soon(self._finish_dead)
            return
        _U32.pack_into(self._progress, 0, 0)
        parts: list[bytes] = [_ITEM.pack(len(arguments), self._memory_mib - self._limit_mib)]
        files: list[Memfd] = []
        for blob in arguments:
            if len(blob) > IN_FILE_BYTES_MIN and len(files) < memfd.ATTACHMENTS_MAX:
                with contextlib.suppress(OSError):  # without memory for it the socket will do
                    files.append(memfd.make([blob]))
                    parts.append(_ITEM.pack(IN_FILE, len(attachments)))
                    continue
            parts += (_ITEM.pack(len(blob), len(attachments)), blob)
        self._pipe.send(parts, [file.fd for file in (*files, *attachments)])
        self._timer = self._loop.call_later(timeout_s, self._timed_out, timeout_s)

    def kill(self, kind: ItemKind, message: str) -> None:
        """Kill the process; the running item ends as `kind`."""
        if self._killed is None:
            self._killed = (kind, message)
            self._see_cpu()
        if self._zygote is not None:
            self._zygote.kill(self._instance_id)

    @property
    def pid(self) -> int:
        """Return the process id; 0 before the fork."""
        return self._pid

    def memory_mib(self) -> float:
        """Return the resident memory now; 0 if the process is gone."""
        if not self._pid or self._is_ended:
            return 0.0
        try:
            with open(f"/proc/{self._pid}/statm", "rb") as file:
                return int(file.read().split()[1]) * PAGE_BYTES / 2**20
        except (OSError, IndexError):
            return 0.0

    def _reset_peak(self) -> None:
        """Have the kernel count the peak anew: each batch has its own (proc(5), value 5).

        Where it cannot, the peak is that of all batches so far: too high, never too low.
        """
        if self._refs_fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self._refs_fd, b"5")

    def _see_cpu(self) -> None:
        """Read the process's CPU clock from outside, for a worker that dies cannot tell."""
        if self._pid and not self._is_ended:
            with contextlib.suppress(OSError):
                seen_s = time.clock_gettime(_cpu_clock(self._pid))
                self._cpu_seen_s = max(self._cpu_seen_s, seen_s)

    def check_memory(self) -> None:
        """Kill the worker if it has outgrown its limit."""
        if self._on_done is not None and self._killed is None:
            self._see_cpu()
            used_mib = self.memory_mib() - self._baseline_mib
            self._used_mib = max(self._used_mib, used_mib)
            # What is handed over lies in memory that is not the function's.
            if used_mib > self._limit_mib + self._beside_mib:
                self.kill(
                    ItemKind.OUT_OF_MEMORY,
                    f"the function used {used_mib:.0f} MiB; its limit is {self._limit_mib} MiB: "
                    f"{MORE_MEMORY}",
                )

    async def close(self) -> None:
        """End the process and wait until it is gone; an idle one may run its exit() first."""
        self._is_closing = True
        pipe = self._pipe
        if pipe is not None and self._has_exit and self._on_done is None and not self._killed:
            pipe.finish()
            await self._end_within(EXIT_TIMEOUT_S)
        self.kill(ItemKind.CANCELLED, "stopped")
        if pipe is not None:
            pipe.close()
        await self._end_within(DEATH_WAIT_S)
        self._close_log()
        self._close_refs()
        if self._relay is not None:
            self._relay.close()
        if not self._loaded.done():
            self._loaded.cancel()
        if self._on_done is not None:
            self._finish_dead()
        self._progress.close()

    async def _end_within(self, limit_s: float) -> None:
        for _ in range(int(limit_s / 0.005)):
            if self._is_ended or self._zygote is None or not self._zygote.is_alive:
                break
            await asyncio.sleep(0.005)

    def _received(self, body: bytes) -> None:
        try:
            self._frame(body)
        except (ValueError, TypeError, IndexError) as error:
            self.kill(ItemKind.WORKER_DIED, f"the worker sent nonsense: {error}")

    def _lost(self, offence: str) -> None:
        """The worker ended: its exit code follows from the zygote, or never."""
        if offence:
            self.kill(ItemKind.WORKER_DIED, offence)
        if not self._is_ended:
            self._loop.call_later(DEATH_WAIT_S, self.ended, None)

    # -- what the worker says -------------------------------------------------------------------

    def _frame(self, body: bytes) -> None:
        message = msgspec.msgpack.decode(body)
        if not self._loaded.done():
            if message is None or isinstance(message, dict):
                self._has_exit = message is not None
                self._loaded.set_result(None)
            else:
                kind, text, remote_traceback = message
                self._loaded.set_exception(
                    StartFailure(f"the code could not be loaded: {kind}: {text}", remote_traceback)
                )
            return
        if isinstance(message, dict):
            names = message["imports"][:IMPORTS_MAX]
            self.on_imports([name for name in names if isinstance(name, str)])
            return
        items, done = message
        for index, kind, value, error_type, text, remote_traceback, attachment_count in items:
            if kind == ItemKind.OUT_OF_MEMORY:
                text += f"; its limit is {self._limit_mib} MiB: {MORE_MEMORY}"
            if value is None:
                value = self._file().view()
            attachments = tuple(self._file() for _ in range(attachment_count))
            self._results[index] = ItemResult(
                ItemKind(kind), bytes(value), error_type, text, remote_traceback, attachments
            )
        if done is not None:
            run_s, peak_mib, cpu_s = done
            self._cpu_seen_s = max(self._cpu_seen_s, float(cpu_s))
            has_exited = bool(items) and items[-1][1] == ItemKind.WORKER_EXITED
            used_mib = max(0.0, float(peak_mib) - self._baseline_mib)
            self._finish(float(run_s), used_mib, is_alive=not has_exited)

    def _file(self) -> Memfd:
        assert self._pipe is not None
        file = Memfd(self._pipe.take_fd())
        if file.nbytes > FRAME_BYTES_MAX:
            raise ValueError(f"a file of {file.nbytes} bytes")
        return file

    def _finish(self, run_s: float, peak_mib: float, *, is_alive: bool) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        on_done, self._on_done = self._on_done, None
        if on_done is None:
            return
        if self._zygote is not None:
            self._zygote.drain()  # each refusal was told before the function went on
        refused, self._refused = self._refused, Counter()
        self._is_peak_high = peak_mib > PEAK_SLACK_MIB
        cpu_s = self._cpu_seen_s - self._cpu_s
        self._cpu_s = self._cpu_seen_s
        results, self._results = self._results, []  # they may be large, and the next may be far
        self._read_log()
        printed = self._log.decode(errors="replace")
        if self._dropped_bytes:
            printed = f"[{self._dropped_bytes} bytes before this were dropped]\n{printed}"
        on_done(
            RunReport(
                items=tuple(NOT_RUN if item is None else item for item in results),
                run_s=run_s,
                peak_memory_mib=peak_mib,
                cpu_s=min(max(0.0, cpu_s), run_s * CPU_COUNT),
                log=printed,
                # A kill that came too late for this batch must not hit the next one.
                instance_alive=is_alive and self._killed is None,
                refused_calls=refused,
            )
        )

    def _finish_dead(self) -> None:
        """The worker went before its batch ended: the running item is to blame."""
        if self._on_done is None:
            return
        (running,) = _U32.unpack_from(self._progress, 0)
        if running >= len(self._results):  # the function can write there too: believe no nonsense
            running = next((i for i, item in enumerate(self._results) if item is None), 0)
        if running < len(self._results) and self._results[running] is None:
            kind, message = self._killed or (
                ItemKind.WORKER_DIED,
                f"{_in_words(self._exit_code)} before it returned: a function must not end its "
                "process; `tierwise logs` shows what it printed",
            )
            self._results[running] = ItemResult(kind, message=message)
        self._finish(self._loop.time() - self._started_s, self._used_mib, is_alive=False)

    def _timed_out(self, timeout_s: float) -> None:
        self.kill(
            ItemKind.TIMED_OUT,
            f"the function ran longer than its {timeout_s:.3g} s and was killed: raise timeout= or "
            "send smaller inputs",
        )

    # -- what the zygote says (parent.Listener) -------------------------------------------------

    def forked(self, pid: int) -> None:
        """Remember whose memory to watch."""
        self._pid = pid
        if not self._numbered.done():
            self._numbered.set_result(None)

    def fork_failed(self, why: str) -> None:
        """There will be no process."""
        self._start_failure = f"the worker could not be made: {why}"
        self.ended(None)

    def call_refused(self, call: str) -> None:
        """Count what the seal refused; the report of the running batch has it."""
        self._refused[call] += 1

    def ended(self, code: int | None, *, has_run_out_of_memory: bool = False) -> None:
        """Say so to whoever waits."""
        if has_run_out_of_memory and self._killed is None:
            self._killed = (
                ItemKind.OUT_OF_MEMORY,
                "the function, its child processes and its files outgrew their memory; its limit "
                f"is {self._memory_mib} MiB: {MORE_MEMORY}",
            )
        if self._is_ended:
            return
        self._is_ended = True
        self._exit_code = code
        if not self._numbered.done():
            self._numbered.set_result(None)
        if not self._loaded.done():
            self._read_log()
            printed = self._log.decode(errors="replace").strip()
            message = f"the worker ended while loading: {_in_words(code)}"
            if self._killed is not None and self._killed[0] is ItemKind.OUT_OF_MEMORY:
                message = self._killed[1]
            message = self._start_failure or message
            self._loaded.set_exception(StartFailure(f"{message}\n{printed}".strip()))
        elif self._on_done is not None:
            self._finish_dead()
        elif not self._is_closing:
            self.on_idle_death(self._instance_id)
        self._close_log()
        self._close_refs()

    def _close_refs(self) -> None:
        if self._refs_fd >= 0:
            os.close(self._refs_fd)
            self._refs_fd = -1

    # -- what the function prints ---------------------------------------------------------------

    def _read_log(self) -> None:
        """Keep the tail of what is there; a function that prints without end loses the rest."""
        read_bytes = 0
        while self._log_fd >= 0 and read_bytes < LOG_READ_MAX:
            try:
                data = os.read(self._log_fd, 65536)
            except BlockingIOError:
                break
            if not data:
                self._close_log()
                break
            read_bytes += len(data)
            self._log += data
            if len(self._log) > LOG_BYTES_MAX:
                excess = len(self._log) - LOG_BYTES_MAX
                self._dropped_bytes += excess
                del self._log[:excess]

    def _close_log(self) -> None:
        if self._log_fd >= 0:
            self._loop.remove_reader(self._log_fd)
            os.close(self._log_fd)
            self._log_fd = -1


def _cpu_clock(pid: int) -> int:
    """Return the clock of a process's CPU time, as Linux numbers them: clock_getcpuclockid(3)."""
    return (~pid << 3) | 2


def _in_words(code: int | None) -> str:
    if code is None:
        return "its worker process is gone"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " (perhaps the kernel, out of memory)" if name == "SIGKILL" else ""
        return f"its worker process was killed by {name}{hint}"
    return f"its worker process exited with code {code}"

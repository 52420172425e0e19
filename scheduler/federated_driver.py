"""The hands of one federated planner: writes, opens rounds, submits calls, feeds back their ends.

Commands are carried out in order, and what is to be written is on disk before the next one. Calls
are durable work under ids of the planner's choice: to submit one again is to ask what became of it.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from typing import Any, assert_never

import structlog

from scheduler.dispatch import Dispatcher
from scheduler.inventory import Sessions
from scheduler.queue import SUBMISSIONS_MAX, WorkQueue
from scheduler.store import federated as table
from scheduler.store.store import Store
from scheduler.window import WorkWindow
from scheduler.workloads.federated_events import (
    Call,
    CallEnded,
    Cancel,
    Command,
    Event,
    Input,
    OpenRound,
    Save,
    Submit,
    Ticked,
)
from scheduler.workloads.federated_planner import JobPlanner
from tierwise.clock import monotonic_s, wall_s
from tierwise.domain.federated import JobState, RoundRecord, RoundState
from tierwise.domain.ids import RequestId
from tierwise.errors import NotFound, TierwiseError
from tierwise.v1 import cache_pb2, types_pb2, work_pb2
from tierwise.wire import payload
from tierwise.wire.convert_cache import key_to_pb
from tierwise.wire.memfd import ATTACHMENTS_MAX

log = structlog.get_logger()

INBOX_MAX = 20_000
STORE_RETRY_S = 1.0
ENDED_MAX = 64  # rounds that watchers may be behind
OPEN = (RoundState.COLLECTING, RoundState.AGGREGATING)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What every driver works with."""

    store: Store
    queue: WorkQueue
    window: WorkWindow
    dispatcher: Dispatcher
    sessions: Sessions


@dataclass(frozen=True, slots=True)
class _Ref:
    """An input as it stands in the arguments; see payload.py."""

    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 4 * prod(self.shape)

    @property
    def __tierwise_ref__(self) -> tuple[str, tuple[int, ...]]:
        return "<f4", self.shape


_Asked = tuple[Event, "asyncio.Future[None] | None"]


class JobDriver:
    """Drives one job until it has ended. Belongs to one event loop."""

    def __init__(
        self,
        row: table.JobRow,
        planner: JobPlanner,
        around: Surroundings,
        record: RoundRecord | None,
    ) -> None:
        """Take a job.

        Args:
            row: As it is stored.
            planner: Decides.
            around: Stores, runs and sends.
            record: Its newest round, if it has one.
        """
        self.row = row
        self._record = record
        self._ended: deque[RoundRecord] = deque(maxlen=ENDED_MAX)
        self.on_changed: Callable[[], None] = lambda: None
        self._planner = planner
        self._around = around
        self._inbox: asyncio.Queue[_Asked] = asyncio.Queue(INBOX_MAX)
        self._waiting: dict[RequestId, asyncio.Task[None]] = {}

    @property
    def uid(self) -> str:
        """Return what tells the job from others that had its name before."""
        return self.row.uid

    def rounds_since(self, seen: int) -> list[RoundRecord]:
        """Return the rounds that have ended after the one that was `seen`, and the one under way.

        What has ended long ago is left out; −1: only the newest. Nothing is told before it is
        written, but for what has come in the round under way.
        """
        known = [*self._ended]
        if self._record is not None and self._record not in known:
            live = self._planner.record
            is_same = live is not None and live.round == self._record.round
            known.append(live if live is not None and is_same else self._record)
        return known[-1:] if seen < 0 else [each for each in known if each.round > seen]

    def feed(self, event: Event) -> None:
        """Give the planner an event; if thousands wait already, it is dropped, and told again."""
        with suppress(asyncio.QueueFull):
            self._inbox.put_nowait((event, None))

    async def ask(self, event: Event) -> None:
        """Give the planner an event, and return when all that follows from it is done."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        await self._inbox.put((event, done))
        await done

    async def run(self) -> None:
        """Run the job until it has ended, or this is cancelled."""
        try:
            while True:
                event, done = await self._next()
                try:
                    await self._step(event)
                finally:
                    if done is not None and not done.done():
                        done.set_result(None)
                if self._planner.progress.state is not JobState.RUNNING and self._inbox.empty():
                    return
        except Exception as error:  # a bug must not take the daemon, nor other jobs with it
            log.exception("federated.crashed", namespace=self.row.namespace, job=self.row.job)
            message = f"internal error, {type(error).__name__}: {error}"
            failed = replace(self._planner.progress, state=JobState.FAILED, message=message)
            await self._save(Save(progress=failed))
        finally:
            for task in list(self._waiting.values()):
                task.cancel()
            while not self._inbox.empty():
                _, done = self._inbox.get_nowait()
                if done is not None and not done.done():
                    done.set_result(None)

    async def _next(self) -> _Asked:
        """Return the next event; a tick when one is due."""
        due_s = self._planner.due_s
        left_s = None if due_s is None else max(0.0, due_s - monotonic_s())
        if left_s == 0.0 and self._inbox.empty():
            return Ticked(view=self._view()), None
        try:
            async with asyncio.timeout(left_s):
                return await self._inbox.get()
        except TimeoutError:
            return Ticked(view=self._view()), None

    def _view(self) -> Any:
        return self._around.dispatcher.plane.view(monotonic_s())

    async def _step(self, event: Event) -> None:
        if self._planner.is_searching and isinstance(event, Ticked):  # may take a second
            commands = await asyncio.to_thread(self._planner.step, event, monotonic_s())
        else:
            commands = self._planner.step(event, monotonic_s())
        calls: list[Call] = []
        for command in commands:
            if isinstance(command, Submit):  # many at once are written at once
                calls.append(command.call)
                continue
            await self._submit(calls)
            calls = []
            await self._do(command)
        await self._submit(calls)
        self.on_changed()

    async def _do(self, command: Command) -> None:
        match command:
            case Save():
                await self._save(command)
            case OpenRound():
                manifest = replace(command.manifest, owner=self.row.owner)
                self._around.sessions.open_round(command.node_id, manifest, command.base_node)
            case Cancel():
                with suppress(NotFound):
                    await self._around.window.cancel(command.call_id)
            case Submit():
                raise AssertionError("submitted together, see _step")
            case _:
                assert_never(command)

    async def _save(self, command: Save) -> None:
        """Write, however long that takes: nothing that follows may be done before."""
        store, uid, now_unix_s = self._around.store, self.uid, wall_s()

        def write(connection: Any) -> float:
            return table.save(connection, store, uid, command.progress, command.record, now_unix_s)

        while True:
            try:
                ended_unix_s = await store.write(write)
                break
            except TierwiseError as error:
                log.error("federated.not_stored", job=self.row.job, cause=str(error))
                await asyncio.sleep(STORE_RETRY_S)
        self.row = replace(self.row, progress=command.progress, ended_unix_s=ended_unix_s)
        if command.record is not None:
            self._record = command.record
            if command.record.state not in OPEN:
                self._ended.append(command.record)

    # -- calls ----------------------------------------------------------------------------------

    async def _submit(self, calls: Sequence[Call]) -> None:
        for start in range(0, len(calls), SUBMISSIONS_MAX):
            some = calls[start : start + SUBMISSIONS_MAX]
            try:
                await self._around.queue.submit(
                    [_submission(call) for call in some], self.row.owner
                )
            except TierwiseError as error:
                for call in some:
                    self.feed(
                        CallEnded(
                            call_id=call.call_id, error_code=error.code, message=error.message
                        )
                    )
                continue
            for call in some:
                waits = self._wait(call.call_id)
                self._waiting[call.call_id] = asyncio.get_running_loop().create_task(waits)

    async def _wait(self, call_id: RequestId) -> None:
        """Feed the end of a call back when it has come."""
        try:
            while True:
                try:
                    _, blob = await self._around.queue.ended(call_id)
                    break
                except NotFound as error:
                    ended = CallEnded(call_id=call_id, error_code=error.code, message=error.message)
                    await self._inbox.put((ended, None))
                    return
                except TierwiseError as error:
                    log.error("federated.not_read", call_id=call_id, cause=str(error))
                    await asyncio.sleep(STORE_RETRY_S)
            await self._inbox.put((_ended(call_id, blob), None))
        finally:
            self._waiting.pop(call_id, None)


def _submission(call: Call) -> work_pb2.Submission:
    """Return a call as durable work."""
    detached: list[Any] = []
    arrays = [_Ref(each.shape) for each in call.inputs]
    blob = payload.encode(
        ((arrays, dict(call.arguments)), {}),
        "arguments",
        detached=detached,
        detach_max=ATTACHMENTS_MAX,
        only_refs=True,
    )
    invocation = types_pb2.Invocation(
        request_id=call.call_id,
        function=call.function,
        arguments=[blob],
        node_id=call.node_id,
        timeout_s=call.timeout_s,
        inputs=[_input(each) for each in call.inputs],
    )
    if call.output is not None:
        output = call.output
        invocation.output.key.CopyFrom(key_to_pb(output.key))
        invocation.output.node_id = output.node_id
        invocation.output.encoding = output.encoding
        if output.relative_to is not None:
            invocation.output.relative_to.CopyFrom(key_to_pb(output.relative_to))
    return work_pb2.Submission(invocation=invocation)


def _input(each: Input) -> cache_pb2.ObjectRef:
    return cache_pb2.ObjectRef(key=key_to_pb(each.key), node_id=each.node_id or "")


def _ended(call_id: RequestId, blob: bytes | None) -> CallEnded:
    result = types_pb2.InvocationResult.FromString(blob or b"")
    if not result.items:
        return CallEnded(call_id=call_id, error_code="internal", message="there is no result")
    item = result.items[0]
    if item.error_code:
        return CallEnded(call_id=call_id, error_code=item.error_code, message=item.message)
    try:
        value = payload.decode(item.value)
    except payload.PayloadError as error:
        return CallEnded(call_id=call_id, error_code="result_rejected", message=str(error))
    if not isinstance(value, dict):
        message = f"it returned a {type(value).__name__}, not a dict"
        return CallEnded(call_id=call_id, error_code="result_rejected", message=message)
    return CallEnded(call_id=call_id, value=value)

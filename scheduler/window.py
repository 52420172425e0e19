"""Durable work between the store and the machine: leases out, results in, the next work loaded.

The store holds all accepted work, the machine a window of it. Whatever the machine decides is
written first and acted upon after: a lease before the work leaves, a result before it is
acknowledged. So a crash at any point repeats work, and never loses or doubles a result.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy import Connection, Row

from scheduler.backlog import Phase
from scheduler.catalogue import FunctionCatalogue
from scheduler.dispatch import Dispatcher
from scheduler.inventory import Sessions
from scheduler.machine import LOST_AFTER, WINDOW_MAX
from scheduler.store import work as table
from scheduler.store.store import Store
from tierwise.clock import monotonic_s, wall_s
from tierwise.domain.cache import most_bytes
from tierwise.domain.command import Delay, Dispatch
from tierwise.domain.event import CancelAsked, Submitted, WorkFinished
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.outcome import Outcome, OutcomeState
from tierwise.domain.request import Request
from tierwise.errors import NotFound, TierwiseError
from tierwise.v1 import types_pb2
from tierwise.wire import convert
from tierwise.wire.payload import detached_bytes

log = structlog.get_logger()

ORIGIN = NodeId("scheduler")
REFILL_S = 0.25
STORE_RETRY_S = 1.0
PRUNE_S = 10.0
ENDED_KEPT_S = 7 * 86400.0
ENDED_KEPT_MAX = 200_000

WriteCall = Callable[[Connection, types_pb2.Outcome, str, str], None]
OnEnded = Callable[[types_pb2.Outcome], None]


class WorkWindow:
    """Is the WorkSide of the dispatcher. Belongs to one event loop."""

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        sessions: Sessions,
        functions: FunctionCatalogue,
        *,
        write_call: WriteCall,
        on_ended: OnEnded,
        heartbeat_interval_s: float,
        group: asyncio.TaskGroup,
    ) -> None:
        """Find out what the store holds; work that was leased is held back for its nodes.

        Args:
            store: Where work is kept.
            dispatcher: Decides where it goes.
            sessions: The way to the nodes.
            functions: What may be run.
            write_call: Records each end beside its result: outcome, what was printed, who
                submitted it.
            on_ended: Is told of each end that is on disk.
            heartbeat_interval_s: Nodes that are not back 10 of them after a restart are lost.
            group: Owns the tasks that wait for the store.
        """
        self.on_changed: Callable[[str], None] = lambda request_id: None
        self._store = store
        self._dispatcher = dispatcher
        self._sessions = sessions
        self._functions = functions
        self._write_call = write_call
        self._on_ended = on_ended
        self._group = group
        self._results: dict[tuple[str, int], tuple[NodeId, types_pb2.InvocationResult]] = {}
        self._recording: set[tuple[str, int]] = set()
        self._loading = asyncio.Lock()
        self._is_closing = asyncio.Event()
        self._cursor = 0  # position up to which queued work has been loaded
        self.open_count, self._last_position = store.read_now(table.open_count_and_last_position)
        self._is_behind = self.open_count > 0
        self._was_skipped = False
        leased = store.read_now(lambda c: table.oldest(c, table.LEASED, 0, 10 * WINDOW_MAX))
        self._held = {RequestId(row.request_id): row for row in leased}
        self._held_until_s = monotonic_s() + LOST_AFTER * heartbeat_interval_s

    # -- for the servicer -----------------------------------------------------------------------

    def next_position(self) -> int:
        """Return a position behind all others."""
        self._last_position += 1
        return self._last_position

    def data_of(self, invocation: types_pb2.Invocation) -> tuple[tuple[NodeId, ...], int]:
        """Return the nodes that hold most of what a call reads, and how many bytes it reads."""
        sizes = detached_bytes(invocation.arguments[0])
        rows = [
            (self._sessions.holdings.holders(ref.key.namespace, ref.key.job, ref.key.round), size)
            for ref, size in zip(invocation.inputs, sizes, strict=False)
        ]
        return most_bytes(rows), sum(sizes)

    def accepted(self, submitted: Submitted, position: int) -> None:
        """Take on new work that is in the store."""
        self.open_count += 1
        if self._is_behind or self._dispatcher.plane.room == 0:
            self._is_behind = self._was_skipped = True  # it is loaded when its turn comes
        else:
            self._cursor = max(self._cursor, position)
            self._dispatcher.feed(submitted)

    def revived(self, row: Row[Any]) -> None:
        """Take on redriven work."""
        self.open_count += 1
        self._submit(row)

    async def cancel(self, request_id: RequestId) -> None:
        """Cancel work, wherever it is."""
        async with self._loading:
            if self._dispatcher.plane.job(request_id) is not None:
                self._dispatcher.feed(CancelAsked(request_id=request_id))
                return
            row = await self._store.read(lambda c: table.get(c, request_id))
            held = self._held.pop(request_id, None)
            if row.state in table.OPEN:
                outcome = _outcome(row, OutcomeState.CANCELLED, "cancelled", "cancelled")
                await self._record(_result(outcome), table.CANCELLED)
                if held is not None:
                    self._sessions.cancel(NodeId(held.node_id), request_id)

    # -- for the sessions -----------------------------------------------------------------------

    def node_opened(self, node_id: NodeId) -> None:
        """Load the work that a node held before the restart; what it still holds stays with it."""
        for row in [row for row in self._held.values() if row.node_id == node_id]:
            del self._held[RequestId(row.request_id)]
            self._submit(row)

    def finished(self, node_id: NodeId, result: types_pb2.InvocationResult) -> None:
        """Take a result from a node; it is acknowledged once it is on disk, or counts no more."""
        outcome = convert.outcome_from_pb(result.outcome)
        if outcome.request_id != result.request_id:
            log.warning("work.refused_result", node_id=node_id, request_id=result.request_id)
            return
        key = (outcome.request_id, outcome.lease)
        if key in self._recording:
            return  # the acknowledgement follows the commit
        if self._dispatcher.plane.job(outcome.request_id) is None:
            self._spawn(self._finished_unknown(node_id, outcome, result))
            return
        self._results[key] = (node_id, result)
        self._dispatcher.feed(WorkFinished(node_id=node_id, outcome=outcome))
        if self._results.pop(key, None) is not None:
            # It was not recorded (of an old lease, refused, or to be retried).
            self._spawn(self._finished_in_vain(node_id, outcome, result))

    async def _finished_in_vain(
        self, node_id: NodeId, outcome: Outcome, result: types_pb2.InvocationResult
    ) -> None:
        """Acknowledge an attempt whose result does not count; if it ran, it is billed all the same.

        What cannot be stored now is not acknowledged: the node sends it again in its next session.
        """
        if outcome.gb_s > 0.0:

            def write(connection: Connection) -> None:
                submitter = table.get(connection, outcome.request_id).submitted_by
                self._write_call(connection, result.outcome, result.log, submitter)

            with suppress(NotFound):  # removed meanwhile
                await self._store.write(write)
        self._sessions.acknowledge(node_id, outcome.request_id, outcome.lease)

    async def _finished_unknown(
        self, node_id: NodeId, outcome: Outcome, result: types_pb2.InvocationResult
    ) -> None:
        """Handle a result of work that is not in the machine: not loaded yet, or ended."""
        async with self._loading:
            is_loaded = self._dispatcher.plane.job(outcome.request_id) is not None
            is_final = outcome.state in (OutcomeState.OK, OutcomeState.FAILED)
            if not is_loaded and is_final and outcome.request_id not in self._held:
                await self._record(result, _state(outcome, is_dead=False), from_node=node_id)
        if is_loaded:
            self.finished(node_id, result)
        else:
            self._sessions.acknowledge(node_id, outcome.request_id, outcome.lease)

    # -- what the control plane asks for --------------------------------------------------------

    def dispatch(self, command: Dispatch) -> None:
        """Store the lease, then send the work."""
        self._spawn(self._dispatch(command))

    async def _dispatch(self, command: Dispatch) -> None:
        request, node_id = command.request, command.node_id
        request_id, lease = request.request_id, request.lease
        try:
            attempt = command.attempt_count + 1
            blob = await self._store.write(
                lambda c: table.lease(c, request_id, lease, node_id, attempt)
            )
        except TierwiseError as error:
            log.error("lease.not_stored", request_id=request_id, cause=str(error))
            refused = _outcome_of(request, OutcomeState.REFUSED, "unavailable", str(error))
            self._dispatcher.feed(WorkFinished(node_id=node_id, outcome=refused))
            return
        if blob is None:  # it has ended meanwhile: the machine should forget it
            ended = _outcome_of(request, OutcomeState.CANCELLED, "cancelled", "it has ended")
            self._dispatcher.feed(WorkFinished(node_id=node_id, outcome=ended))
            return
        self.on_changed(request_id)
        job = self._dispatcher.plane.job(request_id)
        if job is None or job.phase is not Phase.LEASED or job.lease != lease or job.is_cancelled:
            if job is not None and job.is_cancelled:
                cancelled = _outcome_of(request, OutcomeState.CANCELLED, "cancelled", "cancelled")
                self._dispatcher.feed(WorkFinished(node_id=node_id, outcome=cancelled))
            return  # its node was lost, or it was cancelled, while the lease was being written
        stored = types_pb2.Invocation.FromString(blob)
        invocation = convert.invocation_from_request(request, stored.arguments)
        invocation.inputs.extend(stored.inputs)
        if stored.HasField("output"):
            invocation.output.CopyFrom(stored.output)
        self._sessions.dispatch(node_id, invocation)

    def record(self, outcome: Outcome, *, is_dead: bool) -> None:
        """Store how the work ended, if its lease is still the newest."""
        key = (outcome.request_id, outcome.lease)
        sender, result = self._results.pop(key, (None, _result(outcome)))
        if result.outcome.error_code != outcome.error_code:  # it was stopped: that is its error
            del result.items[:]
            result.items.extend(_result(outcome).items)
        result.outcome.CopyFrom(convert.outcome_to_pb(self._dispatcher.explained(outcome)))
        self._recording.add(key)
        self._spawn(self._record_until_stored(result, _state(outcome, is_dead=is_dead), sender))

    async def _record_until_stored(
        self, result: types_pb2.InvocationResult, state: int, sender: NodeId | None
    ) -> None:
        """Store a result, however long that takes, and then acknowledge it.

        While it fails, the node keeps the result and so do we. That is bounded: no new work
        leaves meanwhile, for leases cannot be stored either.
        """
        key = (result.request_id, result.outcome.lease)
        try:
            while True:
                try:
                    await self._record(result, state)
                    break
                except TierwiseError as error:
                    log.error("result.not_stored", request_id=key[0], cause=str(error))
                    if await self._is_closed_within(STORE_RETRY_S):
                        return
        finally:
            self._recording.discard(key)
        if sender is not None:
            self._sessions.acknowledge(sender, *key)

    async def _record(
        self, result: types_pb2.InvocationResult, state: int, *, from_node: NodeId | None = None
    ) -> None:
        now_unix_s = wall_s()

        def write(connection: Connection) -> str | None:
            submitter = table.end(
                connection, state, result, ended_unix_s=now_unix_s, from_node=from_node
            )
            if submitter is not None:
                self._write_call(connection, result.outcome, result.log, submitter)
            return submitter

        def stored(submitter: str | None) -> None:
            if submitter is not None:
                self.open_count -= 1
                self.on_changed(result.request_id)
                self._on_ended(result.outcome)

        await self._store.write(write, on_stored=stored)

    def delay(self, command: Delay) -> None:
        """Store that an attempt failed."""
        request_id = command.request_id

        async def store() -> None:
            await self._store.write(
                lambda c: table.requeue(c, request_id, command.attempt_count, command.message)
            )
            self.on_changed(request_id)

        self._spawn(store())

    # -- loading --------------------------------------------------------------------------------

    async def run_forever(self) -> None:
        """Load work while the machine has room, and remove what ended long ago."""
        prune_at_s = monotonic_s()
        while True:
            now_s = monotonic_s()
            try:
                if self._held and now_s >= self._held_until_s:
                    held, self._held = self._held, {}
                    await self._load(list(held.values()))
                if self._is_behind and self._dispatcher.plane.room > WINDOW_MAX // 4:
                    await self._refill()
                if now_s >= prune_at_s:
                    prune_at_s = now_s + PRUNE_S
                    await self._store.write(
                        lambda c: table.prune(c, wall_s() - ENDED_KEPT_S, ENDED_KEPT_MAX)
                    )
            except TierwiseError as error:
                log.error("work.not_loaded", cause=str(error))
            await asyncio.sleep(REFILL_S)

    def close(self) -> None:
        """Stop waiting for a store that fails; what is on disk is loaded at the next start."""
        self._is_closing.set()

    async def _refill(self) -> None:
        async with self._loading:
            self._was_skipped = False
            limit, after = self._dispatcher.plane.room, self._cursor
            rows = await self._store.read(lambda c: table.oldest(c, table.QUEUED, after, limit))
            for row in rows:
                self._cursor = row.position
                self._submit(row)
            # Work that was accepted after the read, and skipped, is still in the store only.
            self._is_behind = len(rows) == limit or self._was_skipped

    async def _load(self, rows: Sequence[Row[Any]]) -> None:
        async with self._loading:
            for row in rows:
                self._submit(row)

    def _submit(self, row: Row[Any]) -> None:
        """Give stored work to the machine; what cannot run any more ends with the reason."""
        try:
            submitted = submission(row, self._functions)
        except TierwiseError as error:
            self.record(_outcome(row, OutcomeState.FAILED, error.code, error.message), is_dead=True)
            return
        self._dispatcher.feed(submitted)

    # -- inside ---------------------------------------------------------------------------------

    async def _is_closed_within(self, duration_s: float) -> bool:
        try:
            async with asyncio.timeout(duration_s):
                await self._is_closing.wait()
        except TimeoutError:
            return False
        return True

    def _spawn(self, operation: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await operation
            except TierwiseError as error:
                log.error("work.not_stored", cause=str(error))
            except Exception:  # a bug must not take the daemon with it
                log.exception("work.crashed")

        self._group.create_task(guarded())


def submission(row: Any, functions: FunctionCatalogue) -> Submitted:
    """Return what the machine is told of a row of `work`.

    Each run is bounded by the function's own timeout. How long durable work may wait for one is
    bounded only if its submitter gave a timeout, which counts from the submission.

    Raises:
        InvalidArgument: A field is wrong.
        NotFound: The function is gone.
    """
    header = types_pb2.Invocation.FromString(row.header)
    header.arguments.append(b"")  # the real ones stay in the store
    request = convert.request_from_invocation(
        header, functions.find(row.function_id), origin=ORIGIN
    )
    ends_in_s = None
    if header.timeout_s:
        ends_in_s = max(0.0, row.submitted_unix_s + header.timeout_s - wall_s())
    return Submitted(
        request=replace(
            request,
            item_count=row.item_count,
            request_bytes=row.request_bytes,
            timeout_s=convert.TIMEOUT_S_MAX,
        ),
        # The attempt that a node has is counted already, and has not failed.
        attempt_count=max(0, row.attempt_count - (row.state == table.LEASED)),
        lease=row.lease,
        ends_in_s=ends_in_s,
    )


def _state(outcome: Outcome, *, is_dead: bool) -> int:
    if is_dead:
        return table.DEAD
    if outcome.state is OutcomeState.OK:
        return table.SUCCEEDED
    return table.CANCELLED if outcome.state is OutcomeState.CANCELLED else table.FAILED


def _result(outcome: Outcome) -> types_pb2.InvocationResult:
    """Return a result for an end that no node has sent: every item has the same error."""
    item = types_pb2.Item(error_code=outcome.error_code, message=outcome.message)
    return types_pb2.InvocationResult(
        request_id=outcome.request_id,
        items=[item] * max(1, outcome.item_count),
        outcome=convert.outcome_to_pb(outcome),
    )


def _outcome_of(request: Request, state: OutcomeState, code: str, message: str) -> Outcome:
    return Outcome(
        request_id=request.request_id,
        function_id=request.function_id,
        state=state,
        origin=request.origin,
        node_id=None,
        item_count=request.item_count,
        error_code=code,
        message=message,
        lease=request.lease,
    )


def _outcome(row: Row[Any], state: OutcomeState, code: str, message: str) -> Outcome:
    return Outcome(
        request_id=RequestId(row.request_id),
        function_id=row.function_id,
        state=state,
        origin=ORIGIN,
        node_id=None,
        item_count=row.item_count,
        error_code=code,
        message=message,
        lease=row.lease,
    )

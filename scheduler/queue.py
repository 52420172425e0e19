"""Durable work: accepted means on disk, run at least once, recorded once."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import structlog
from sqlalchemy import Connection, func, select, update

from scheduler.catalogue import FunctionCatalogue
from scheduler.dispatch import Dispatcher
from scheduler.inventory import Sessions
from scheduler.store.store import Store
from scheduler.store.tables import work
from tierwise.clock import wall_s
from tierwise.domain.command import Delay, Dispatch
from tierwise.domain.event import CancelAsked, Submitted, WorkFinished
from tierwise.domain.ids import NodeId, RequestId
from tierwise.domain.outcome import Outcome, OutcomeState
from tierwise.domain.request import Request
from tierwise.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Overloaded,
    TierwiseError,
)
from tierwise.v1 import types_pb2, work_pb2, work_pb2_grpc
from tierwise.wire import convert
from tierwise.wire.identity import peer_identity

log = structlog.get_logger()

WINDOW_MAX = 10_000  # pieces of work in the machine; the rest waits in the store
REFILL_S = 0.5
WAIT_S_MAX = 60.0
SUBMISSIONS_MAX = 1000
QUEUED = work_pb2.WORK_STATE_QUEUED
LEASED = work_pb2.WORK_STATE_LEASED
OPEN_STATES = (QUEUED, LEASED)


class WorkQueue(work_pb2_grpc.WorkServiceServicer):
    """Serves WorkService and is the WorkSide of the dispatcher."""

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        sessions: Sessions,
        functions: FunctionCatalogue,
        *,
        queue_max: int,
        group: asyncio.TaskGroup,
        on_ended: Callable[[Outcome, str], None],
    ) -> None:
        """Keep work.

        Args:
            store: Where it is kept.
            dispatcher: Decides where it goes.
            sessions: The way to the nodes.
            functions: What may be run.
            queue_max: Unfinished work that is accepted at most.
            group: Owns the tasks that wait for the store.
            on_ended: Told once of each piece of work that has ended, with what it printed.
        """
        self._on_ended = on_ended
        self._store = store
        self._dispatcher = dispatcher
        self._sessions = sessions
        self._functions = functions
        self._queue_max = queue_max
        self._group = group
        self._results: dict[tuple[str, int], types_pb2.InvocationResult] = {}
        self._changes: dict[str, set[asyncio.Event]] = {}
        self._open_count = store.read_now(
            lambda c: c.scalar(
                select(func.count()).select_from(work).where(work.c.state.in_(OPEN_STATES))
            )
            or 0
        )
        self._is_behind = self._open_count > 0  # the store holds work that the machine does not

    # -- RPCs -----------------------------------------------------------------------------------

    async def Submit(self, request: work_pb2.SubmitRequest, context: Any) -> work_pb2.SubmitResponse:
        caller = peer_identity(context).uri
        if not 0 < len(request.submissions) <= SUBMISSIONS_MAX:
            raise InvalidArgument(f"submit 1 to {SUBMISSIONS_MAX} pieces of work at a time")
        if self._open_count + len(request.submissions) > self._queue_max:
            raise Overloaded(
                f"{self._open_count} pieces of work are queued, the limit is {self._queue_max}; "
                "wait until some have ended",
                retry_after_s=1.0,
            )
        prepared = [self._prepare(submission, caller) for submission in request.submissions]

        def insert(connection: Connection) -> list[tuple[str, bool]]:
            return [self._insert(connection, row) for row, _ in prepared]

        stored = await self._store.write(insert)
        for (_, run), (_, is_new) in zip(prepared, stored, strict=True):
            if is_new:
                self._open_count += 1
                self._admit(run, 0, 0)
        return work_pb2.SubmitResponse(request_ids=[request_id for request_id, _ in stored])

    async def Watch(
        self, request: work_pb2.WatchRequest, context: Any
    ) -> AsyncIterator[work_pb2.WatchResponse]:
        changed = self._listen(request.request_id)
        last = b""
        try:
            while True:
                changed.clear()
                row = await self._row(request.request_id)
                message = work_pb2.WatchResponse(work=_work(row))
                if (text := message.SerializeToString(deterministic=True)) != last:
                    last = text
                    await context.write(message)
                if row["state"] not in OPEN_STATES:
                    return
                await changed.wait()
        finally:
            self._unlisten(request.request_id, changed)

    async def GetResult(
        self, request: work_pb2.GetResultRequest, context: Any
    ) -> work_pb2.GetResultResponse:
        changed = self._listen(request.request_id)
        try:
            row = await self._row(request.request_id)
            wait_s = min(max(0.0, request.wait_s), WAIT_S_MAX)
            try:
                async with asyncio.timeout(wait_s):
                    while row["state"] in OPEN_STATES and wait_s > 0.0:
                        await changed.wait()
                        changed.clear()
                        row = await self._row(request.request_id)
            except TimeoutError:
                row = await self._row(request.request_id)
        finally:
            self._unlisten(request.request_id, changed)
        response = work_pb2.GetResultResponse(work=_work(row))
        if row["result"] is not None:
            response.result.MergeFromString(row["result"])
        return response

    async def Cancel(self, request: work_pb2.CancelRequest, context: Any) -> work_pb2.CancelResponse:
        row = await self._row(request.request_id)
        if row["state"] in OPEN_STATES:
            request_id = RequestId(request.request_id)
            if self._dispatcher.plane.job(request_id) is None:
                await self._load(row)
            self._dispatcher.feed(CancelAsked(request_id=request_id))
            row = await self._row(request.request_id)
        return work_pb2.CancelResponse(work=_work(row))

    async def ListWork(
        self, request: work_pb2.ListWorkRequest, context: Any
    ) -> work_pb2.ListWorkResponse:
        query = select(work).order_by(work.c.submitted_unix_s.desc())
        if request.state:
            query = query.where(work.c.state == request.state)
        query = query.limit(min(request.limit or 100, 1000))
        rows = await self._store.read(lambda c: c.execute(query).mappings().all())
        return work_pb2.ListWorkResponse(work=[_work(row) for row in rows])

    async def Redrive(
        self, request: work_pb2.RedriveRequest, context: Any
    ) -> work_pb2.RedriveResponse:
        row = await self._row(request.request_id)

        def revive(connection: Connection) -> int:
            return connection.execute(
                update(work)
                .where(work.c.request_id == row["request_id"])
                .where(work.c.state == work_pb2.WORK_STATE_DEAD)
                .values(state=QUEUED, attempt_count=0, message="redriven", result=None)
            ).rowcount

        if not await self._store.write(revive):
            raise FailedPrecondition(
                f"work {row['request_id']} is not dead-lettered; only that can be redriven"
            )
        self._open_count += 1
        row = await self._row(request.request_id)
        await self._load(row)
        return work_pb2.RedriveResponse(work=_work(row))

    # -- what the control plane asks for --------------------------------------------------------

    def dispatch(self, command: Dispatch) -> None:
        """Store the lease, then send the work."""
        request, lease = command.request, command.request.lease

        async def store_and_send() -> None:
            def take(connection: Connection) -> bytes | None:
                return connection.scalar(
                    update(work)
                    .where(work.c.request_id == request.request_id)
                    .where(work.c.lease < lease)
                    .where(work.c.state.in_(OPEN_STATES))
                    .values(state=LEASED, lease=lease, node_id=command.node_id)
                    .returning(work.c.invocation)
                )

            stored = await self._store.write(take)
            if stored is not None:
                arguments = types_pb2.Invocation.FromString(stored).arguments
                invocation = convert.invocation_from_request(request, arguments)
                self._sessions.dispatch(command.node_id, invocation)
                self._notify(request.request_id)

        self._spawn(store_and_send())

    def record(self, outcome: Outcome, *, is_dead: bool) -> None:
        """Store how the work ended, if its lease is still the newest."""
        request_id = outcome.request_id
        result = self._results.pop((request_id, outcome.lease), None)
        if result is None:
            item = types_pb2.Item(error_code=outcome.error_code, message=outcome.message)
            result = types_pb2.InvocationResult(
                request_id=request_id,
                items=[item] * max(1, outcome.item_count),
                outcome=convert.outcome_to_pb(outcome),
            )
        if is_dead:
            state = work_pb2.WORK_STATE_DEAD
        elif outcome.state is OutcomeState.CANCELLED:
            state = work_pb2.WORK_STATE_CANCELLED
        elif outcome.state is OutcomeState.OK:
            state = work_pb2.WORK_STATE_SUCCEEDED
        else:
            state = work_pb2.WORK_STATE_FAILED

        async def store() -> None:
            def end(connection: Connection) -> int:
                return connection.execute(
                    update(work)
                    .where(work.c.request_id == request_id)
                    .where(work.c.lease == outcome.lease)
                    .where(work.c.state.in_(OPEN_STATES))
                    .values(
                        state=state,
                        result=result.SerializeToString(),
                        message=outcome.message,
                        ended_unix_s=wall_s(),
                        node_id=outcome.node_id or "",
                    )
                ).rowcount

            if await self._store.write(end):
                self._open_count -= 1
                self._notify(request_id)
                self._on_ended(outcome, result.log)
            if outcome.node_id is not None:
                self._sessions.acknowledge(outcome.node_id, request_id, outcome.lease)

        self._spawn(store())

    def delay(self, command: Delay) -> None:
        """Store that an attempt failed."""

        async def store() -> None:
            await self._store.write(
                lambda connection: connection.execute(
                    update(work)
                    .where(work.c.request_id == command.request_id)
                    .where(work.c.state.in_(OPEN_STATES))
                    .values(
                        state=QUEUED,
                        attempt_count=command.attempt_count,
                        message=command.message,
                    )
                )
            )
            self._notify(command.request_id)

        self._spawn(store())

    def finished(self, node_id: NodeId, result: types_pb2.InvocationResult) -> None:
        """Take a result from a node; one that no longer counts is acknowledged and forgotten."""
        outcome = convert.outcome_from_pb(result.outcome)
        job = self._dispatcher.plane.job(outcome.request_id)
        if job is None or job.lease != outcome.lease:
            self._sessions.acknowledge(node_id, outcome.request_id, outcome.lease)
            return
        self._results[outcome.request_id, outcome.lease] = result
        self._dispatcher.feed(WorkFinished(node_id=node_id, outcome=outcome))
        if self._results.pop((outcome.request_id, outcome.lease), None) is not None:
            # It was not recorded (refused, or will be retried): the node may forget it.
            self._sessions.acknowledge(node_id, outcome.request_id, outcome.lease)

    async def refill_forever(self) -> None:
        """Feed the machine from the store while it has room; at start that is everything open."""
        while True:
            if self._is_behind and self._dispatcher.plane.job_count < WINDOW_MAX // 2:
                await self._refill()
            await asyncio.sleep(REFILL_S)

    # -- inside ---------------------------------------------------------------------------------

    async def _refill(self) -> None:
        query = (
            select(work)
            .where(work.c.state.in_(OPEN_STATES))
            .order_by(work.c.submitted_unix_s)
            .limit(WINDOW_MAX + self._dispatcher.plane.job_count)
        )
        rows = await self._store.read(lambda c: c.execute(query).mappings().all())
        new_count = 0
        for row in rows:
            if self._dispatcher.plane.job_count >= WINDOW_MAX:
                return
            if self._dispatcher.plane.job(RequestId(row["request_id"])) is None:
                new_count += 1
                await self._load(row)
        if new_count == 0:
            self._is_behind = False

    async def _load(self, row: Any) -> None:
        """Give stored work to the machine; what cannot run any more ends with the reason."""
        invocation = types_pb2.Invocation.FromString(row["invocation"])
        try:
            spec = self._functions.find(row["function_id"])
            request = convert.request_from_invocation(invocation, spec, origin=NodeId("scheduler"))
        except TierwiseError as error:
            await self._store.write(
                lambda c: c.execute(
                    update(work)
                    .where(work.c.request_id == row["request_id"])
                    .values(
                        state=work_pb2.WORK_STATE_DEAD, message=error.message, ended_unix_s=wall_s()
                    )
                )
            )
            self._open_count -= 1
            self._notify(row["request_id"])
            return
        self._admit(request, row["attempt_count"], row["lease"])

    def _admit(self, request: Request, attempt_count: int, lease: int) -> None:
        if self._dispatcher.plane.job_count >= WINDOW_MAX:
            self._is_behind = True
            return
        self._dispatcher.feed(
            Submitted(request=request, attempt_count=attempt_count, lease=lease)
        )

    def _prepare(
        self, submission: work_pb2.Submission, caller: str
    ) -> tuple[dict[str, Any], Request]:
        invocation = submission.invocation
        invocation.hops = 0
        invocation.lease = 0
        spec = self._functions.find(invocation.function)
        invocation.function = spec.function_id
        request = convert.request_from_invocation(invocation, spec, origin=NodeId("scheduler"))
        key = submission.idempotency_key or invocation.request_id
        if len(key) > 256:
            raise InvalidArgument("idempotency_key has more than 256 characters")
        content = hashlib.sha256(spec.function_id.encode())
        for blob in invocation.arguments:
            content.update(len(blob).to_bytes(8, "little") + blob)
        return {
            "request_id": invocation.request_id,
            "idempotency_key": key,
            "content_digest": content.hexdigest(),
            "function_id": spec.function_id,
            "invocation": invocation.SerializeToString(),
            "state": QUEUED,
            "lease": 0,
            "attempt_count": 0,
            "node_id": "",
            "message": "",
            "submitted_unix_s": wall_s(),
            "ended_unix_s": 0.0,
            "submitted_by": caller,
        }, request

    def _insert(self, connection: Connection, row: dict[str, Any]) -> tuple[str, bool]:
        """Insert one piece of work, or find the one with the same key."""
        inserted = connection.execute(
            self._store.insert(work).values(**row).on_conflict_do_nothing()
        )
        if inserted.rowcount:
            return str(row["request_id"]), True
        known = connection.execute(
            select(work.c.request_id, work.c.content_digest).where(
                (work.c.idempotency_key == row["idempotency_key"])
                | (work.c.request_id == row["request_id"])
            )
        ).first()
        if known is None or known.content_digest != row["content_digest"]:
            raise AlreadyExists(
                f"the key {row['idempotency_key']!r} was used for other work; choose another"
            )
        return str(known.request_id), False

    async def _row(self, request_id: str) -> Any:
        query = select(work).where(work.c.request_id == request_id)
        row = await self._store.read(lambda c: c.execute(query).mappings().first())
        if row is None:
            raise NotFound(f"there is no work {request_id!r}; `tierwise get work` lists what is")
        return row

    def _listen(self, request_id: str) -> asyncio.Event:
        changed = asyncio.Event()
        self._changes.setdefault(request_id, set()).add(changed)
        return changed

    def _unlisten(self, request_id: str, changed: asyncio.Event) -> None:
        listeners = self._changes.get(request_id, set())
        listeners.discard(changed)
        if not listeners:
            self._changes.pop(request_id, None)

    def _notify(self, request_id: str) -> None:
        for changed in self._changes.get(request_id, ()):
            changed.set()

    def _spawn(self, work_of_store: Coroutine[Any, Any, None]) -> None:
        """Run a store operation; if the store fails, the work is taken up again from disk."""

        async def guarded() -> None:
            try:
                await work_of_store
            except TierwiseError as error:
                log.error("work.not_stored", cause=str(error))
                self._is_behind = True

        self._group.create_task(guarded())


def _work(row: Any) -> work_pb2.Work:
    return work_pb2.Work(
        request_id=row["request_id"],
        function_id=row["function_id"],
        state=row["state"],
        attempt_count=row["attempt_count"],
        node_id=row["node_id"],
        message=row["message"],
        submitted_unix_s=row["submitted_unix_s"],
        ended_unix_s=row["ended_unix_s"],
        submitted_by=row["submitted_by"],
    )

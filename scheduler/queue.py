"""Serves WorkService: accepted means on disk, run at least once, recorded once."""

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row

from scheduler.budgets import Budgets
from scheduler.catalogue import FunctionCatalogue
from scheduler.store import work as table
from scheduler.store.store import Store
from scheduler.window import WorkWindow, submission
from tierwise.clock import wall_s
from tierwise.domain.event import Submitted
from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import RequestId
from tierwise.errors import InvalidArgument, Overloaded
from tierwise.v1 import types_pb2, work_pb2, work_pb2_grpc
from tierwise.wire.convert_cache import check_objects
from tierwise.wire.identity import peer_identity

WAIT_S_MAX = 60.0
CANCEL_WAIT_S = 1.0
SUBMISSIONS_MAX = 1000
ITEMS_MAX = 4096
KEY_MAX = 256
LISTED_MAX = 1000


@dataclass(slots=True)
class _Prepared:
    """One checked submission: its columns, its payload, what decisions need of it."""

    columns: dict[str, Any]
    arguments: bytes
    submitted: Submitted


class _Columns:
    """A dict of columns with the attributes of a row."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.__dict__ = columns


class WorkQueue(work_pb2_grpc.WorkServiceServicer):
    """Takes work from users and tells them what became of it."""

    def __init__(
        self,
        store: Store,
        window: WorkWindow,
        functions: FunctionCatalogue,
        budgets: Budgets,
        *,
        queue_max: int,
    ) -> None:
        """Serve.

        Args:
            store: Where work is kept.
            window: Carries it to the nodes and back.
            functions: What may be run.
            budgets: Whose new work is refused; what was accepted before waits.
            queue_max: Unfinished work that is accepted at most.
        """
        self._store = store
        self._window = window
        self._functions = functions
        self._budgets = budgets
        self._queue_max = queue_max
        self._being_stored_count = 0
        self._listeners: dict[str, set[asyncio.Event]] = {}
        window.on_changed = self._notify

    async def Submit(
        self, request: work_pb2.SubmitRequest, context: Any
    ) -> work_pb2.SubmitResponse:
        accepted = await self.submit(request.submissions, peer_identity(context).uri)
        return work_pb2.SubmitResponse(request_ids=accepted)

    async def submit(self, submissions: Sequence[work_pb2.Submission], caller: str) -> list[str]:
        """Accept work of somebody; return the id of each piece.

        Raises:
            TierwiseError: As the RPC says; nothing of it is stored then.
        """
        if not 0 < len(submissions) <= SUBMISSIONS_MAX:
            raise InvalidArgument(f"submit 1 to {SUBMISSIONS_MAX} pieces of work at a time")
        prepared = [self._prepare(work, caller) for work in submissions]
        rows = [each.columns for each in prepared]
        blobs = [each.arguments for each in prepared]
        await self._check_budgets([each.submitted.request.spec for each in prepared], rows)
        await self._check_room(rows)
        for row in rows:
            row["position"] = self._window.next_position()

        def stored(accepted: list[table.Accepted]) -> None:
            for each, (_, is_new) in zip(prepared, accepted, strict=True):
                if is_new:
                    self._window.accepted(each.submitted, each.columns["position"])

        self._being_stored_count += len(rows)
        try:
            accepted = await self._store.write(
                lambda c: table.insert(c, rows, blobs), on_stored=stored
            )
        finally:
            self._being_stored_count -= len(rows)
        return [request_id for request_id, _ in accepted]

    async def Watch(  # type: ignore[override]  # grpc.aio also takes coroutines that write
        self, request: work_pb2.WatchRequest, context: Any
    ) -> None:
        last = None
        with self._listening(request.request_id) as changed:
            while True:
                changed.clear()
                row = await self._store.read(lambda c: table.get(c, request.request_id))
                if (work := _work(row)) != last:
                    last = work
                    await context.write(work_pb2.WatchResponse(work=work))
                if row.state not in table.OPEN:
                    return
                await changed.wait()

    async def GetResult(
        self, request: work_pb2.GetResultRequest, context: Any
    ) -> work_pb2.GetResultResponse:
        wait_s = min(max(0.0, request.wait_s), WAIT_S_MAX)
        row, result = await self.ended(request.request_id, wait_s)
        response = work_pb2.GetResultResponse(work=_work(row))
        if result is not None:
            response.result.MergeFromString(result)
        return response

    async def Cancel(
        self, request: work_pb2.CancelRequest, context: Any
    ) -> work_pb2.CancelResponse:
        row = await self._store.read(lambda c: table.get(c, request.request_id))
        if row.state in table.OPEN:
            await self._window.cancel(RequestId(request.request_id))
            row, _ = await self.ended(request.request_id, CANCEL_WAIT_S)
        return work_pb2.CancelResponse(work=_work(row))

    async def ListWork(
        self, request: work_pb2.ListWorkRequest, context: Any
    ) -> work_pb2.ListWorkResponse:
        limit = max(1, min(request.limit or 100, LISTED_MAX))
        rows = await self._store.read(lambda c: table.newest(c, request.state, limit))
        return work_pb2.ListWorkResponse(work=[_work(row) for row in rows])

    async def Redrive(
        self, request: work_pb2.RedriveRequest, context: Any
    ) -> work_pb2.RedriveResponse:
        request_id, position = request.request_id, self._window.next_position()
        now_unix_s = wall_s()

        def revive(connection: Any) -> Row[Any]:
            table.revive(connection, request_id, position, now_unix_s)
            return table.get(connection, request_id)

        row = await self._store.write(revive, on_stored=self._window.revived)
        self._notify(request_id)
        return work_pb2.RedriveResponse(work=_work(row))

    # -- inside ---------------------------------------------------------------------------------

    def _prepare(self, work: work_pb2.Submission, caller: str) -> _Prepared:
        asked = work.invocation
        key = work.idempotency_key or asked.request_id
        if len(key) > KEY_MAX:
            raise InvalidArgument(f"idempotency_key has more than {KEY_MAX} characters")
        if not 0 < len(asked.arguments) <= ITEMS_MAX:
            raise InvalidArgument(
                f"arguments: 1 to {ITEMS_MAX} sets of them, not {len(asked.arguments)}"
            )
        spec = self._functions.find(asked.function)
        check_objects(asked, caller)
        payload = types_pb2.Invocation(arguments=asked.arguments, inputs=asked.inputs)
        if asked.HasField("output"):
            payload.output.CopyFrom(asked.output)
        blob = payload.SerializeToString()
        request_bytes = sum(map(len, asked.arguments))
        item_count = len(asked.arguments)
        if asked.inputs and not asked.data_nodes:
            nodes, asked.data_bytes = self._window.data_of(asked)
            asked.data_nodes.extend(nodes)
        for field in ("arguments", "hops", "lease", "origin", "inputs", "output"):
            asked.ClearField(field)
        asked.function = spec.function_id
        columns = {
            "request_id": asked.request_id,
            "submitted_by": caller,
            "idempotency_key": key,
            "content_digest": hashlib.sha256(spec.function_id.encode() + blob).hexdigest(),
            "function_id": spec.function_id,
            "header": asked.SerializeToString(),
            "item_count": item_count,
            "request_bytes": request_bytes,
            "state": table.QUEUED,
            "lease": 0,
            "attempt_count": 0,
            "node_id": "",
            "message": "",
            "submitted_unix_s": wall_s(),
            "ended_unix_s": 0.0,
        }
        return _Prepared(columns, blob, submission(_Columns(columns), self._functions))

    async def _check_budgets(
        self, specs: Sequence[FunctionSpec], rows: list[dict[str, Any]]
    ) -> None:
        """Refuse new work whose budget is spent; work that is known already is not new.

        Raises:
            BudgetExceeded: The whole submission is refused, nothing of it is stored.
        """
        if not self._budgets.spent:
            return
        now_unix_s = wall_s()
        for spec in specs:
            spent = self._budgets.spent.of(spec.namespace, spec.name, now_unix_s)
            if spent is not None:
                known_count = await self._store.read(lambda c: table.known_count(c, rows))
                if known_count < len(rows):
                    raise spent.error(now_unix_s)

    async def _check_room(self, rows: list[dict[str, Any]]) -> None:
        """Refuse what is over the limit; work that is known already is not new.

        Raises:
            Overloaded: The queue is full.
        """
        open_count = self._window.open_count + self._being_stored_count
        if open_count + len(rows) <= self._queue_max:
            return
        known_count = await self._store.read(lambda c: table.known_count(c, rows))
        open_count = self._window.open_count + self._being_stored_count
        if open_count + len(rows) - known_count > self._queue_max:
            raise Overloaded(
                f"{open_count} pieces of work are queued, the limit is {self._queue_max}; "
                "wait until some have ended",
                retry_after_s=1.0,
            )

    async def ended(
        self, request_id: str, wait_s: float | None = None
    ) -> tuple[Row[Any], bytes | None]:
        """Return the row and result, waiting up to `wait_s` for the end; None: for ever."""
        with self._listening(request_id) as changed:
            try:
                async with asyncio.timeout(wait_s or None):
                    while True:
                        changed.clear()
                        found = await self._store.read(
                            lambda c: table.get_with_result(c, request_id)
                        )
                        if wait_s == 0.0 or found[0].state not in table.OPEN:
                            return found
                        await changed.wait()
            except TimeoutError:
                return await self._store.read(lambda c: table.get_with_result(c, request_id))

    @contextmanager
    def _listening(self, request_id: str) -> Iterator[asyncio.Event]:
        changed = asyncio.Event()
        listeners = self._listeners.setdefault(request_id, set())
        listeners.add(changed)
        try:
            yield changed
        finally:
            listeners.discard(changed)
            if not listeners:
                self._listeners.pop(request_id, None)

    def _notify(self, request_id: str) -> None:
        for changed in self._listeners.get(request_id, ()):
            changed.set()


def _work(row: Row[Any]) -> work_pb2.Work:
    return work_pb2.Work(
        request_id=row.request_id,
        function_id=row.function_id,
        state=row.state,
        attempt_count=row.attempt_count,
        node_id=row.node_id,
        message=row.message,
        submitted_unix_s=row.submitted_unix_s,
        ended_unix_s=row.ended_unix_s,
        submitted_by=row.submitted_by,
    )

"""What finished calls teach: records, bills, and how functions behave. Serves CallService.

Agents report interactive calls with their heartbeats. Durable work is recorded and billed in the
transaction that stores its result: whoever dies, what has succeeded is on the bill, once. Reports
are acknowledged when they are stored and may come twice; they are billed once. A clock that jumps
moves calls to another day and changes no amount: durations come from monotonic clocks.
"""

# ruff: noqa: D102, N802 - gRPC methods are named and described by the protos

import asyncio
import datetime
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Connection, delete, func, select

from scheduler.store import usage
from scheduler.store.store import Store
from scheduler.store.tables import calls, profiles
from tierwise.clock import monotonic_s, wall_s
from tierwise.cost.profiles import Profiles
from tierwise.domain.function import FunctionProfile
from tierwise.domain.ids import FunctionId, NodeId, split_function_id
from tierwise.domain.outcome import Outcome, OutcomeState
from tierwise.domain.topology import NodeState
from tierwise.domain.view import ViewTable
from tierwise.errors import InvalidArgument, NotFound, TierwiseError
from tierwise.v1 import call_pb2, call_pb2_grpc, node_pb2, types_pb2
from tierwise.wire import checks, convert

log = structlog.get_logger()

STORE_INTERVAL_S = 0.25
PROFILES_INTERVAL_S = 5.0
TAKEN_MAX = 50_000  # calls that wait for the store
LOG_MAX = 8192
CALLER_MAX = 200
IDLE_GB_S_MAX = 1e9  # per function and heartbeat
AGO_S_MAX = 30 * 86_400.0  # a node that was offline tells of its calls later


class Telemetry(call_pb2_grpc.CallServiceServicer):
    """Takes call reports, learns profiles, answers questions about calls."""

    def __init__(self, store: Store, table: ViewTable, *, records_max: int) -> None:
        """Load the profiles that were learnt before.

        Args:
            store: Where records are kept.
            table: The view, for the speed of nodes; its profiles are replaced as they change.
            records_max: Older records are removed.
        """
        self._store = store
        self._table = table
        self._records_max = records_max
        self._unstored: set[FunctionId] = set()
        self._taken: list[_Taken] = []
        self._idle: dict[tuple[str, str, str, str], tuple[float, float]] = {}
        self._unacknowledged: dict[NodeId, int] = {}
        # Tells a node that its reports up to a number are stored.
        self.acknowledge: Callable[[NodeId, int], None] = lambda *_: None
        # Stores more of the calls, in the same transaction.
        self.also_store: Callable[[Connection, Sequence[Outcome]], None] = lambda *_: None
        # Learns more from a call; `speed` is that of its node, or None.
        self.also_learn: Callable[[Outcome, float | None], None] = lambda *_: None
        rows = store.read_now(lambda c: c.execute(select(profiles)).mappings().all())
        self._profiles = Profiles(
            {
                FunctionId(row["function_id"]): convert.profile_from_pb(
                    types_pb2.FunctionProfile.FromString(row["profile"])
                )
                for row in rows
            }
        )
        table.profiles = self._profiles.snapshot()

    def profile(self, function: FunctionId) -> FunctionProfile:
        """Return what is known of a function."""
        return self._profiles.get(function)

    def take(self, node_id: NodeId, beat: node_pb2.Heartbeat) -> None:
        """Store and learn from the calls of one heartbeat, and add up what idled."""
        if beat.dropped_call_count:
            log.warning("calls.dropped", node_id=node_id, call_count=beat.dropped_call_count)
        if beat.idle_gb_s:
            self._take_idle(node_id, beat.idle_gb_s)
        if beat.calls:
            self._unacknowledged[node_id] = beat.report_sequence
        for report in beat.calls:
            try:
                self._keep(report)
            except TierwiseError as error:
                log.warning("call.refused", node_id=node_id, cause=str(error))

    def write_work(
        self, connection: Connection, outcome: types_pb2.Outcome, printed: str, submitter: str
    ) -> None:
        """Record durable work that has ended, in the transaction that stores its result."""
        report = node_pb2.CallReport(outcome=outcome, log=printed, caller=submitter)
        try:
            self._write_calls(connection, [_taken(report)])
        except InvalidArgument as error:  # its result counts all the same
            log.warning("call.refused", request_id=outcome.request_id, cause=str(error))

    def learn_work(self, outcome: types_pb2.Outcome) -> None:
        """Learn from durable work that has ended."""
        with suppress(InvalidArgument):
            self._learn(convert.outcome_from_pb(outcome))

    async def store_forever(self) -> None:
        """Store what was taken four times a second; now and then profiles, and prune records."""
        profiles_at_s = monotonic_s() + PROFILES_INTERVAL_S
        while True:
            await asyncio.sleep(STORE_INTERVAL_S)
            await self._store_taken()
            if monotonic_s() >= profiles_at_s:
                profiles_at_s = monotonic_s() + PROFILES_INTERVAL_S
                await self.store_profiles()

    async def store_profiles(self) -> None:
        """Store what has been learnt; what cannot be stored now is stored the next time."""
        await self._store_taken()
        changed, self._unstored = self._unstored, set()
        try:
            await self._store.write(lambda c: self._write_profiles(c, changed))
        except TierwiseError as error:
            self._unstored |= changed
            log.error("profiles.not_stored", cause=str(error))

    def _take_idle(self, node_id: NodeId, idle_gb_s: Mapping[str, float]) -> None:
        row = self._table.get(node_id)
        if row is None:
            return
        usd_per_gb_s = self._table.prices.by_tier[row.node.tier].usd_per_idle_gb_s
        day = usage.day_of(wall_s())
        for function, gb_s in idle_gb_s.items():
            try:
                namespace, name, _ = split_function_id(function)
                checks.number(gb_s, "idle_gb_s", 0.0, IDLE_GB_S_MAX)
            except (ValueError, TierwiseError) as error:
                log.warning("idle.refused", node_id=node_id, cause=str(error))
                continue
            key = (namespace, name, day, node_id)
            old_gb_s, old_usd = self._idle.get(key, (0.0, 0.0))
            self._idle[key] = old_gb_s + gb_s, old_usd + gb_s * usd_per_gb_s

    def _keep(self, report: node_pb2.CallReport) -> None:
        """Take one call in.

        Raises:
            InvalidArgument: A field is wrong, or it is durable work.
        """
        taken = _taken(report)
        if taken.outcome.lease:
            raise InvalidArgument(f"{taken.outcome.request_id} is durable: its result records it")
        if len(self._taken) >= TAKEN_MAX:  # the store fails, or reports come too fast
            log.warning("calls.dropped", call_count=len(self._taken))
            self._taken.clear()
        self._taken.append(taken)
        self._learn(taken.outcome)

    async def _store_taken(self) -> None:
        if self._unstored:
            self._table.profiles = self._profiles.snapshot()
        if not (self._taken or self._idle or self._unacknowledged):
            return
        taken, self._taken = self._taken, []
        idle, self._idle = self._idle, {}
        numbers, self._unacknowledged = self._unacknowledged, {}

        def write(connection: Connection) -> None:
            self._write_calls(connection, taken)
            usage.add_idle(connection, self._store, idle)

        try:
            await self._store.write(write)
        except TierwiseError as error:
            log.error("calls.not_stored", call_count=len(taken), cause=str(error))
            self._taken[:0] = taken
            for key, (gb_s, usd) in idle.items():
                newer = self._idle.get(key, (0.0, 0.0))
                self._idle[key] = newer[0] + gb_s, newer[1] + usd
            self._unacknowledged = {**numbers, **self._unacknowledged}
            return
        for node_id, number in numbers.items():
            self.acknowledge(node_id, number)

    # -- RPCs -----------------------------------------------------------------------------------

    async def ListCalls(
        self, request: call_pb2.ListCallsRequest, context: Any
    ) -> call_pb2.ListCallsResponse:
        query = select(calls).order_by(calls.c.sequence.desc())
        if request.function:
            try:
                namespace, name, version = split_function_id(request.function)
            except ValueError as error:
                raise InvalidArgument(str(error)) from None
            exact = f"{namespace}/{name}@{version if version is not None else '%'}"
            query = query.where(calls.c.function_id.like(exact.replace("_", r"\_"), escape="\\"))
        if request.node_id:
            query = query.where(calls.c.node_id == request.node_id)
        query = query.limit(min(request.limit or 50, 10_000))
        rows = await self._store.read(lambda c: c.execute(query).mappings().all())
        return call_pb2.ListCallsResponse(calls=[_call(row) for row in rows])

    async def GetCall(
        self, request: call_pb2.GetCallRequest, context: Any
    ) -> call_pb2.GetCallResponse:
        prefix = request.request_id
        if len(prefix) < 4:
            raise InvalidArgument("give at least 4 characters of the call's id")
        query = (
            select(calls)
            .where(calls.c.request_id >= prefix)
            .where(calls.c.request_id < prefix + "\U0010ffff")
            .order_by(calls.c.sequence.desc())
            .limit(2)
        )
        rows = await self._store.read(lambda c: c.execute(query).mappings().all())
        if not rows:
            raise NotFound(
                f"there is no record of call {prefix!r} (the newest {self._records_max} are kept, "
                "and agents report once per heartbeat); `tierwise get calls` lists them"
            )
        if len({row["request_id"] for row in rows}) > 1:
            raise InvalidArgument(
                f"more than one call starts with {prefix!r}: give more characters"
            )
        return call_pb2.GetCallResponse(call=_call(rows[0]))

    async def GetUsage(
        self, request: call_pb2.GetUsageRequest, context: Any
    ) -> call_pb2.GetUsageResponse:
        keys = [_KEYS[key] for key in dict.fromkeys(request.by) if key in _KEYS]
        keys = keys or ["namespace", "function"]
        since, until = _iso_day(request.since, "since"), _iso_day(request.until, "until")
        limits = (request.namespace, since, until)

        def read(connection: Connection) -> tuple[Any, Any, Any]:
            rows = usage.sums_by(connection, keys, *limits)
            total = usage.sums_by(connection, (), *limits)
            return rows, total, usage.idle_by_node(connection, *limits)

        rows, total, idle = await self._store.read(read)
        if max(len(rows), len(idle)) > usage.ROWS_MAX:
            raise InvalidArgument(
                f"that is more than {usage.ROWS_MAX} rows: name a namespace, or fewer days"
            )
        return call_pb2.GetUsageResponse(
            usage=[call_pb2.Usage(**row) for row in rows],
            total=call_pb2.Usage(**total[0]) if total else call_pb2.Usage(),
            idle=self._idle_rows(idle, request.namespace),
        )

    def _idle_rows(self, stored: Sequence[Any], namespace: str) -> list[call_pb2.IdleUsage]:
        """Return what idled, with what is warm now as the nodes said last."""
        found = {
            (row.namespace, row.function, row.node_id): call_pb2.IdleUsage(**row._mapping)
            for row in stored
        }
        for row in self._table.rows():
            if row.state is NodeState.LOST:
                continue
            for function, count in row.reading.warm.items():
                owner, name, _ = split_function_id(function)
                if namespace in ("", owner):
                    key = (owner, name, row.node.node_id)
                    if key not in found:
                        found[key] = call_pb2.IdleUsage(
                            namespace=owner, function=name, node_id=row.node.node_id
                        )
                    found[key].warm_count += count
        return [found[key] for key in sorted(found)]

    def _learn(self, outcome: Outcome) -> None:
        row = self._table.get(outcome.node_id) if outcome.node_id is not None else None
        speed = None if row is None else row.node.speed
        if self._profiles.learn(outcome, speed, monotonic_s()):
            self._unstored.add(outcome.function_id)
        self.also_learn(outcome, speed)

    # -- storage --------------------------------------------------------------------------------

    def _write_calls(self, connection: Connection, taken: list["_Taken"]) -> None:
        known = usage.known_reports(connection, [each.report_key for each in taken])
        sums, rows, new = usage.Sums(), [], []
        for each in taken:
            if each.report_key in known:
                continue
            known.add(each.report_key)
            new.append(each)
            outcome, report = each.outcome, each.report
            rows.append(
                {
                    "request_id": outcome.request_id,
                    "function_id": outcome.function_id,
                    "node_id": outcome.node_id or "",
                    "outcome": report.outcome.SerializeToString(),
                    "log": report.log[-LOG_MAX:],
                    "caller": report.caller[:CALLER_MAX],
                    "ended_unix_s": each.ended_unix_s,
                    "report_key": each.report_key,
                }
            )
            sums.add(
                (each.namespace, each.name, usage.day_of(each.ended_unix_s)),
                _amounts(outcome),
                outcome.link,
                outcome.request_bytes + outcome.response_bytes,
            )
        if rows:
            connection.execute(calls.insert(), rows)
            self.also_store(connection, [each.outcome for each in new])
            usage.add(connection, self._store, sums)

    def _write_profiles(self, connection: Connection, names: set[FunctionId]) -> None:
        for function in names:
            blob = convert.profile_to_pb(self._profiles.get(function)).SerializeToString()
            connection.execute(
                self._store.insert(profiles)
                .values(function_id=function, profile=blob)
                .on_conflict_do_update(index_elements=["function_id"], set_={"profile": blob})
            )
        newest = connection.scalar(select(func.max(calls.c.sequence))) or 0
        connection.execute(delete(calls).where(calls.c.sequence <= newest - self._records_max))


@dataclass(frozen=True, slots=True)
class _Taken:
    """A call on its way to the store."""

    namespace: str
    name: str
    outcome: Outcome
    report: node_pb2.CallReport
    ended_unix_s: float

    @property
    def report_key(self) -> str:
        """Return what tells this report from all others: the call, who owned it, which attempt."""
        return f"{self.outcome.request_id}/{self.outcome.origin}/{self.outcome.lease}"


def _taken(report: node_pb2.CallReport) -> _Taken:
    """Return a report that has been checked.

    Raises:
        InvalidArgument: A field is wrong.
    """
    outcome = convert.outcome_from_pb(report.outcome)
    try:
        namespace, name, version = split_function_id(outcome.function_id)
    except ValueError as error:
        raise InvalidArgument(str(error)) from None
    if version is None or not 0 < len(outcome.request_id) <= convert.REQUEST_ID_MAX:
        raise InvalidArgument(f"{outcome.request_id!r} of {outcome.function_id!r} is no call")
    ago_s = checks.number(report.ended_ago_s, "ended_ago_s", 0.0, AGO_S_MAX)
    return _Taken(namespace, name, outcome, report, wall_s() - ago_s)


_KEYS = {
    call_pb2.USAGE_KEY_NAMESPACE: "namespace",
    call_pb2.USAGE_KEY_FUNCTION: "function",
    call_pb2.USAGE_KEY_DAY: "day",
}


def _iso_day(text: str, field: str) -> str:
    """Return a day as it is stored; empty stays so.

    Raises:
        InvalidArgument: It is none.
    """
    try:
        return datetime.date.fromisoformat(text).isoformat() if text else ""
    except ValueError:
        raise InvalidArgument(
            f"{field} {checks.shown(text)} is no day: write for example 2026-01-31"
        ) from None


def _amounts(outcome: Outcome) -> dict[str, float]:
    """Return what one call adds to the bill and the counts."""
    return {
        "call_count": 1,
        "item_count": outcome.item_count,
        "gb_s": outcome.gb_s,
        "gpu_s": outcome.gpu_s,
        "cpu_s": outcome.cpu_s,
        "money_usd": outcome.money_usd,
        "missed_count": int(outcome.is_missed),
        "failed_count": int(outcome.state is not OutcomeState.OK),
        "cold_count": int(outcome.is_cold),
    }


def _call(row: Any) -> call_pb2.Call:
    return call_pb2.Call(
        outcome=types_pb2.Outcome.FromString(row["outcome"]),
        log=row["log"],
        ended_unix_s=row["ended_unix_s"],
        caller=row["caller"],
    )

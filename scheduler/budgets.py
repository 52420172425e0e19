"""What namespaces and functions may spend in a day, and who has. Serves BudgetService.

What is spent is read from the bill, twice a second while there are budgets. So a call that ends is
seen after its report and that pause, and agents hear of it over their sessions: a namespace may go
over its budget by what it calls in some seconds. An agent that is cut off goes by what it heard
last; a spent budget ends there too with its day.
"""

# ruff: noqa: D102, N802 - gRPC methods are named and described by the protos

import asyncio
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Connection, delete, select

from scheduler.store import usage
from scheduler.store.store import Store
from scheduler.store.tables import budgets
from tierwise.clock import wall_s
from tierwise.domain.budget import SpentBudget, SpentBudgets
from tierwise.errors import FailedPrecondition, InvalidArgument, NotFound, TierwiseError
from tierwise.v1 import budget_pb2, budget_pb2_grpc
from tierwise.wire import checks
from tierwise.wire.convert_billing import USD_MAX
from tierwise.wire.identity import peer_identity

log = structlog.get_logger()

CHECK_INTERVAL_S = 0.5
BUDGETS_MAX = 10_000
DAY_S = 86_400.0
_REFUSE = int(budget_pb2.BUDGET_ACTION_REFUSE)
_WARN = int(budget_pb2.BUDGET_ACTION_WARN)
_Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class _Limit:
    usd_per_day: float
    action: int
    set_by: str


class Budgets(budget_pb2_grpc.BudgetServiceServicer):
    """Keeps the budgets in memory, compares them with the bill, tells when one is spent."""

    def __init__(self, store: Store) -> None:
        """Load what the store holds."""
        self._store = store
        self._limits: dict[_Key, _Limit] = {}
        self._spent_usd: dict[_Key, float] = {}
        self._day = ""
        self._said: set[tuple[_Key, float, str]] = set()
        self._check = asyncio.Lock()
        self.refusing: tuple[SpentBudget, ...] = ()
        self.spent = SpentBudgets()  # the same, to look up
        self.on_changed: Callable[[], None] = lambda: None
        for row in store.read_now(lambda c: c.execute(select(budgets)).all()):
            key = (row.namespace, row.function)
            self._limits[key] = _Limit(row.usd_per_day, row.action, row.set_by)
        if self._limits:
            day = _today(wall_s())
            self._spent_usd = store.read_now(lambda c: self._read(c, day))
            self._compare(day)

    async def check_forever(self) -> None:
        """Compare budgets with the bill, twice a second."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            if self._limits or self.refusing:
                try:
                    await self._look()
                except TierwiseError as error:
                    log.error("budgets.not_checked", cause=str(error))

    # -- RPCs -----------------------------------------------------------------------------------

    async def SetBudget(
        self, request: budget_pb2.SetBudgetRequest, context: Any
    ) -> budget_pb2.SetBudgetResponse:
        key = _key(request.namespace, request.function)
        usd_per_day = checks.number(request.usd_per_day, "usd_per_day", 0.0, USD_MAX)
        if request.action not in (_WARN, _REFUSE):
            raise InvalidArgument("action: a budget warns or refuses when it is spent")
        if key not in self._limits and len(self._limits) >= BUDGETS_MAX:
            raise FailedPrecondition(f"there are {BUDGETS_MAX} budgets: remove some first")
        limit = _Limit(usd_per_day, int(request.action), peer_identity(context).uri)
        values = {"usd_per_day": usd_per_day, "action": limit.action, "set_by": limit.set_by}

        def write(connection: Connection) -> None:
            insert = self._store.insert(budgets).values(namespace=key[0], function=key[1], **values)
            keys = ["namespace", "function"]
            connection.execute(insert.on_conflict_do_update(index_elements=keys, set_=values))

        def stored(_: None) -> None:
            self._limits[key] = limit

        await self._store.write(write, on_stored=stored)
        log.info("budget.set", namespace=key[0], function=key[1], **values)
        await self._look()
        return budget_pb2.SetBudgetResponse(budget=self._budget(key))

    async def ListBudgets(
        self, request: budget_pb2.ListBudgetsRequest, context: Any
    ) -> budget_pb2.ListBudgetsResponse:
        await self._look()
        return budget_pb2.ListBudgetsResponse(
            budgets=[
                self._budget(key)
                for key in sorted(self._limits)
                if request.namespace in ("", key[0])
            ]
        )

    async def RemoveBudget(
        self, request: budget_pb2.RemoveBudgetRequest, context: Any
    ) -> budget_pb2.RemoveBudgetResponse:
        key = _key(request.namespace, request.function)
        if key not in self._limits:
            raise NotFound(
                f"there is no budget of {_name(key)!r}; `tierwise budget list` lists what there is"
            )
        where = (budgets.c.namespace == key[0]) & (budgets.c.function == key[1])

        def removed(_: object) -> None:
            self._limits.pop(key, None)

        await self._store.write(
            lambda c: c.execute(delete(budgets).where(where)), on_stored=removed
        )
        log.info("budget.removed", namespace=key[0], function=key[1])
        await self._look()
        return budget_pb2.RemoveBudgetResponse()

    # -- inside ---------------------------------------------------------------------------------

    async def _look(self) -> None:
        async with self._check:
            day = _today(wall_s())
            self._spent_usd = await self._store.read(lambda c: self._read(c, day))
            self._compare(day)

    def _read(self, connection: Connection, day: str) -> dict[_Key, float]:
        return usage.spent_usd(connection, {namespace for namespace, _ in self._limits}, day)

    def _compare(self, day: str) -> None:
        """Find out which budgets are spent; say so once each, and tell the agents what changed."""
        if day != self._day:
            self._day = day
            self._said.clear()
        ends_unix_s = _ends_unix_s(day)
        refusing = []
        for key, limit in sorted(self._limits.items()):
            if not self._is_spent(key):
                continue
            said = (key, limit.usd_per_day, day)
            if said not in self._said:
                self._said.add(said)
                log.warning(
                    "budget.spent",
                    namespace=key[0],
                    function=key[1],
                    usd_per_day=limit.usd_per_day,
                    spent_usd=self._spent_usd.get(key, 0.0),
                    is_refusing=limit.action == _REFUSE,
                )
            if limit.action == _REFUSE:
                refusing.append(
                    SpentBudget(
                        namespace=key[0],
                        function=key[1],
                        usd_per_day=limit.usd_per_day,
                        spent_usd=self._spent_usd.get(key, 0.0),
                        ends_unix_s=ends_unix_s,
                    )
                )
        is_changed = _limits_of(refusing) != _limits_of(self.refusing)
        self.refusing, self.spent = tuple(refusing), SpentBudgets(tuple(refusing))
        if is_changed:
            self.on_changed()

    def _is_spent(self, key: _Key) -> bool:
        return self._spent_usd.get(key, 0.0) >= self._limits[key].usd_per_day

    def _budget(self, key: _Key) -> budget_pb2.Budget:
        limit = self._limits.get(key)
        if limit is None:  # removed meanwhile
            raise NotFound(f"there is no budget of {_name(key)!r} any more")
        return budget_pb2.Budget(
            namespace=key[0],
            function=key[1],
            usd_per_day=limit.usd_per_day,
            action=budget_pb2.BudgetAction.ValueType(limit.action),
            spent_usd=self._spent_usd.get(key, 0.0),
            is_spent=self._is_spent(key),
            set_by=limit.set_by,
        )


def _limits_of(spent: "tuple[SpentBudget, ...] | list[SpentBudget]") -> list[tuple[object, ...]]:
    """Return what agents must know of: that more is spent of a spent budget is no news."""
    return [(each.namespace, each.function, each.usd_per_day, each.ends_unix_s) for each in spent]


def _key(namespace: str, function: str) -> _Key:
    checks.name(namespace, "namespace")
    return namespace, checks.name(function, "function") if function else ""


def _name(key: _Key) -> str:
    return f"{key[0]}/{key[1]}" if key[1] else key[0]


def _today(unix_s: float) -> str:
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).date().isoformat()


def _ends_unix_s(day: str) -> float:
    begins = datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC)
    return begins.timestamp() + DAY_S

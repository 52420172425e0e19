"""Budgets: what is spent is read from the bill, and who may go on is told in time."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select, text

from agent.billing import Billing
from scheduler import budgets as module
from scheduler import machine
from scheduler.budgets import Budgets
from scheduler.machine import UNPLACED_S_MAX, ControlPlane
from scheduler.store import tables
from scheduler.store.store import Store
from scheduler.telemetry import Telemetry
from tests.unit.scheduler_builders import outcome_pb
from tests.unit.test_control_plane import A, node, work
from tests.unit.test_node_machine import spec
from tests.unit.test_work_window import Context, dispatched, running
from tierwise.domain.budget import SpentBudget
from tierwise.domain.command import AskPolicy, DeadLetter, Delay
from tierwise.domain.decision import NotPlaced, Reason
from tierwise.domain.event import Decided, SessionOpened, Ticked
from tierwise.domain.ids import NodeId, PolicyId, RequestId
from tierwise.domain.prices import DEFAULT_PRICES
from tierwise.domain.resources import Resources
from tierwise.domain.view import NodeReading, NodeView, ViewTable
from tierwise.errors import BudgetExceeded, InvalidArgument, NotFound
from tierwise.v1 import budget_pb2, call_pb2, node_pb2, work_pb2
from tierwise.wire import convert

HERE = NodeId("edge-1")
WARN, REFUSE = budget_pb2.BUDGET_ACTION_WARN, budget_pb2.BUDGET_ACTION_REFUSE


class Ledger:
    """A store with a bill and budgets on it."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(f"sqlite:///{folder / 'scheduler.db'}")
        self.table = ViewTable()
        self.telemetry = Telemetry(self.store, self.table, records_max=1000)
        self.budgets = Budgets(self.store)
        self.changes: list[tuple[SpentBudget, ...]] = []
        self.budgets.on_changed = lambda: self.changes.append(self.budgets.refusing)
        self.call_count = 0

    async def spend(self, usd: float, function: str = "default/f@1", ago_s: float = 0.0) -> None:
        self.call_count += 1
        outcome = outcome_pb(
            f"r{self.call_count}", "edge-1", function_id=function, money_usd=usd, gb_s=1.0
        )
        report = node_pb2.CallReport(outcome=outcome, ended_ago_s=ago_s)
        self.telemetry.take(HERE, node_pb2.Heartbeat(calls=[report]))
        await self.telemetry.store_profiles()

    async def set(self, whose: str, usd: float, action: int = REFUSE) -> budget_pb2.Budget:
        namespace, _, function = whose.partition("/")
        request = budget_pb2.SetBudgetRequest(
            namespace=namespace, function=function, usd_per_day=usd, action=action
        )
        return (await self.budgets.SetBudget(request, Context())).budget

    async def list(self) -> list[budget_pb2.Budget]:
        request = budget_pb2.ListBudgetsRequest()
        return list((await self.budgets.ListBudgets(request, None)).budgets)


async def test_a_budget_refuses_when_it_is_spent_and_lets_in_again_when_it_is_raised(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path)
    await ledger.set("default", 1.0)
    await ledger.spend(0.75)
    assert not (await ledger.list())[0].is_spent
    await ledger.spend(0.25, "default/g@2")
    [found] = await ledger.list()
    assert (found.is_spent, found.spent_usd) == (True, pytest.approx(1.0))
    [told] = ledger.changes[-1]
    error = told.error(time.time())
    assert isinstance(error, BudgetExceeded)
    assert "tierwise budget set default" in str(error)
    assert 0 < (error.retry_after_s or 0) <= 86_400
    await ledger.set("default", 2.0)
    assert ledger.changes[-1] == ()
    await ledger.store.close()


async def test_a_function_has_a_budget_of_its_own(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    await ledger.set("default/f", 1.0)
    await ledger.spend(5.0, "default/g@1")
    await ledger.list()
    assert not ledger.budgets.refusing
    await ledger.spend(1.0, "default/f@7")
    await ledger.list()
    assert ledger.budgets.spent.of("default", "f", time.time()) is not None
    assert ledger.budgets.spent.of("default", "g", time.time()) is None
    await ledger.store.close()


async def test_a_budget_that_warns_refuses_nobody(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    await ledger.set("default", 1.0, WARN)
    await ledger.spend(2.0)
    assert (await ledger.list())[0].is_spent
    assert not ledger.budgets.refusing
    await ledger.store.close()


async def test_yesterday_does_not_count_and_a_spent_budget_ends_with_its_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    await ledger.set("default", 1.0)
    await ledger.spend(5.0, ago_s=86_400.0)
    await ledger.list()
    assert not ledger.budgets.refusing
    await ledger.spend(5.0)
    await ledger.list()
    [spent] = ledger.budgets.refusing
    tomorrow = time.time() + 86_400.0
    assert ledger.budgets.spent.of("default", "f", tomorrow) is None
    monkeypatch.setattr(module, "wall_s", lambda: tomorrow)
    await ledger.list()
    assert not ledger.budgets.refusing
    assert ledger.changes[-1] == ()
    assert spent.ends_unix_s <= tomorrow
    await ledger.store.close()


async def test_budgets_outlive_a_restart_with_what_is_spent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    await ledger.set("default", 1.0)
    await ledger.spend(1.5)
    await ledger.store.close()
    again = Ledger(tmp_path)
    assert [each.namespace for each in again.budgets.refusing] == ["default"]
    request = budget_pb2.RemoveBudgetRequest(namespace="default")
    await again.budgets.RemoveBudget(request, None)
    assert not again.budgets.refusing
    with pytest.raises(NotFound):
        await again.budgets.RemoveBudget(request, None)
    await again.store.close()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"namespace": ""}, "namespace"),
        ({"function": "a b"}, "function"),
        ({"usd_per_day": -1.0}, "usd_per_day = -1"),
        ({"usd_per_day": float("nan")}, "usd_per_day = nan"),
        ({"action": 0}, "action"),
    ],
)
async def test_a_wrong_budget_is_refused_by_name(
    fields: dict[str, Any], told: str, tmp_path: Path
) -> None:
    ledger = Ledger(tmp_path)
    good = {"namespace": "default", "usd_per_day": 1.0, "action": REFUSE}
    with pytest.raises(InvalidArgument, match=told):
        await ledger.budgets.SetBudget(budget_pb2.SetBudgetRequest(**{**good, **fields}), Context())
    assert await ledger.list() == []
    await ledger.store.close()


# -- agents ---------------------------------------------------------------------------------------


def told(*spent: SpentBudget) -> node_pb2.Billing:
    return node_pb2.Billing(
        prices=convert.prices_to_pb(DEFAULT_PRICES), spent=map(convert.spent_to_pb, spent)
    )


def spent(function: str = "", ends_in_s: float = 3600.0) -> SpentBudget:
    return SpentBudget(
        namespace="default",
        function=function,
        usd_per_day=1.0,
        spent_usd=1.5,
        ends_unix_s=time.time() + ends_in_s,
    )


def test_an_agent_refuses_what_is_spent_also_after_a_restart_and_until_the_day_is_over(
    tmp_path: Path,
) -> None:
    billing = Billing(tmp_path / "billing.pb")
    billing.check(spec())
    billing.replace(told(spent("f")))
    for each in (billing, Billing(tmp_path / "billing.pb")):
        each.check(spec("g"))
        with pytest.raises(BudgetExceeded, match="default/f has spent"):
            each.check(spec("f"))
    billing.replace(told(spent(ends_in_s=-1.0)))
    billing.check(spec("f"))
    billing.replace(told())
    billing.check(spec("f"))


def test_nonsense_from_the_scheduler_changes_nothing_and_a_broken_file_stops_no_agent(
    tmp_path: Path,
) -> None:
    path = tmp_path / "billing.pb"
    billing = Billing(path)
    billing.replace(told(spent()))
    with pytest.raises(InvalidArgument, match="prices"):
        billing.replace(node_pb2.Billing())
    with pytest.raises(BudgetExceeded):
        billing.check(spec())
    path.write_bytes(b"\xff\xff nonsense")
    Billing(path).check(spec())


# -- durable work ---------------------------------------------------------------------------------


def test_accepted_work_waits_for_its_budget_longer_than_for_a_node_and_is_not_given_up() -> None:
    plane = ControlPlane()
    plane.step(SessionOpened(node=node(A)), 0.0)
    now_s, asked_count = 0.0, 0
    commands = plane.step(work("w"), now_s)
    while now_s < 2 * UNPLACED_S_MAX:
        for command in commands:
            assert not isinstance(command, DeadLetter)
            if isinstance(command, AskPolicy):
                asked_count += 1
                decision = NotPlaced(reasons=((A, Reason.BUDGET_SPENT),))
                refused = Decided(
                    request_id=RequestId("w"), decision=decision, policy_id=PolicyId("p")
                )
                [delay] = plane.step(refused, now_s)
                assert isinstance(delay, Delay) and "budget" in delay.message
        now_s += 1.0
        commands = plane.step(Ticked(), now_s)
    assert asked_count > 100
    assert plane.job(RequestId("w")) is not None


async def test_new_work_is_refused_whole_and_what_was_accepted_runs_when_the_budget_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "BUDGET_TRY_COUNT", 1)
    async with running(tmp_path) as scheduler:
        scheduler.dispatcher.spent = lambda: scheduler.budgets.spent
        await scheduler.deploy()
        await scheduler.submit("before")
        limit = {"namespace": "default", "action": REFUSE}
        request = budget_pb2.SetBudgetRequest(**limit, usd_per_day=0.0)
        await scheduler.budgets.SetBudget(request, Context())
        with pytest.raises(BudgetExceeded):
            await scheduler.submit("before", "after")
        await scheduler.submit("before")  # known already: not new
        session = scheduler.open()
        listed = await scheduler.queue.ListWork(work_pb2.ListWorkRequest(), None)
        assert [each.request_id for each in listed.work] == ["before"]
        await scheduler.until(lambda: scheduler.plane.job(RequestId("before")) is not None)
        assert not session.outbox._queue
        request = budget_pb2.SetBudgetRequest(**limit, usd_per_day=1.0)
        await scheduler.budgets.SetBudget(request, Context())
        ticking = asyncio.ensure_future(scheduler.dispatcher.tick_forever())
        assert (await dispatched(session)).request_id == "before"
        ticking.cancel()


# -- the bill -------------------------------------------------------------------------------------


async def test_a_clock_that_jumps_moves_a_call_to_another_day_and_changes_no_amount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(tmp_path)
    now_s = time.time()
    for jump_s in (0.0, -400 * 86_400.0, +400 * 86_400.0):
        monkeypatch.setattr(time, "time", lambda jump_s=jump_s: now_s + jump_s)
        await ledger.spend(0.5)
    request = call_pb2.GetUsageRequest(by=[call_pb2.USAGE_KEY_DAY])
    response = await ledger.telemetry.GetUsage(request, None)
    assert [(row.call_count, row.money_usd, row.gb_s) for row in response.usage] == [
        (1, 0.5, 1.0)
    ] * 3
    assert response.total.money_usd == pytest.approx(1.5)
    await ledger.store.close()


async def test_idle_instances_are_priced_by_tier_and_shown_apart_from_the_bill(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path)
    reading = NodeReading(sequence=1, free=Resources(cpus=1), warm={spec().function_id: 2})
    ledger.table.put(NodeView(node=node(HERE), reading=reading))  # of tier fog
    ledger.telemetry.take(
        HERE, node_pb2.Heartbeat(idle_gb_s={"default/f@1": 10.0, "bad name": 1.0})
    )
    await ledger.telemetry.store_profiles()
    response = await ledger.telemetry.GetUsage(call_pb2.GetUsageRequest(), None)
    [row] = response.usage
    assert (row.money_usd, row.call_count, row.idle_gb_s) == (0.0, 0, 10.0)
    [idle] = response.idle
    assert (idle.node_id, idle.function, idle.warm_count) == ("edge-1", "f", 2)
    assert idle.idle_usd == pytest.approx(10.0 * 0.5 * 4.1667e-6)
    ledger.table.heard(HERE, NodeReading(sequence=2), 1.0)  # keep-alive is over
    [idle] = (await ledger.telemetry.GetUsage(call_pb2.GetUsageRequest(), None)).idle
    assert (idle.warm_count, idle.idle_gb_s) == (0, 10.0)
    await ledger.store.close()


async def test_reports_are_acknowledged_when_they_are_stored_and_not_before(
    tmp_path: Path,
) -> None:
    ledger = Ledger(tmp_path)
    acknowledged: list[tuple[str, int]] = []
    ledger.telemetry.acknowledge = lambda node_id, number: acknowledged.append((node_id, number))
    pages = await ledger.store.write(lambda c: c.scalar(text("PRAGMA page_count")))
    await ledger.store.write(lambda c: c.execute(text(f"PRAGMA max_page_count = {pages}")))
    outcome = outcome_pb("large", "edge-1", money_usd=1.0, message="x" * 4000)
    reports = [node_pb2.CallReport(outcome=outcome, log="y" * 8000)]
    for number in range(40):
        outcome.request_id = f"large{number}"
        reports.append(node_pb2.CallReport(outcome=outcome, log="y" * 8000))
    ledger.telemetry.take(HERE, node_pb2.Heartbeat(calls=reports, report_sequence=7))
    await ledger.telemetry.store_profiles()
    assert acknowledged == []
    await ledger.store.write(lambda c: c.execute(text("PRAGMA max_page_count = 1000000")))
    await ledger.telemetry.store_profiles()
    assert acknowledged == [("edge-1", 7)]
    total = (await ledger.telemetry.GetUsage(call_pb2.GetUsageRequest(), None)).total
    assert total.call_count == 41
    await ledger.store.close()


async def test_a_day_that_is_none_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(InvalidArgument, match=r"since '31\.1\.'"):
        await ledger.telemetry.GetUsage(call_pb2.GetUsageRequest(since="31.1."), None)
    await ledger.store.close()


# -- older databases ------------------------------------------------------------------------------

SCHEMA_1 = """
CREATE TABLE meta ("key" VARCHAR(40) PRIMARY KEY, value TEXT);
INSERT INTO meta VALUES ('schema', '1');
CREATE TABLE calls (sequence INTEGER PRIMARY KEY AUTOINCREMENT, request_id VARCHAR(128) NOT NULL,
  function_id VARCHAR(200) NOT NULL, node_id VARCHAR(63) NOT NULL, outcome BLOB NOT NULL,
  log TEXT NOT NULL, caller VARCHAR(200) NOT NULL, ended_unix_s FLOAT NOT NULL);
INSERT INTO calls (request_id, function_id, node_id, outcome, log, caller, ended_unix_s)
  VALUES ('same', 'default/f@1', 'n', x'', '', '', 1.0),
    ('same', 'default/f@1', 'n', x'', '', '', 2.0);
CREATE TABLE usage (namespace VARCHAR(63), function VARCHAR(63), day VARCHAR(10),
  call_count BIGINT NOT NULL, item_count BIGINT NOT NULL, gb_s FLOAT NOT NULL, cpu_s FLOAT NOT NULL,
  money_usd FLOAT NOT NULL, missed_count BIGINT NOT NULL, failed_count BIGINT NOT NULL,
  cold_count BIGINT NOT NULL, PRIMARY KEY (namespace, function, day));
INSERT INTO usage VALUES ('default', 'f', '2026-01-01', 2, 2, 0.5, 9.0, 0.25, 0, 0, 1);
"""


async def test_a_database_of_the_version_before_is_brought_up_to_date_with_its_bill(
    tmp_path: Path,
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'scheduler.db'}")
    with engine.begin() as connection:
        for statement in filter(str.strip, SCHEMA_1.split(";\n")):
            connection.execute(text(statement))
    engine.dispose()
    ledger = Ledger(tmp_path)
    await ledger.spend(1.0)
    total = (await ledger.telemetry.GetUsage(call_pb2.GetUsageRequest(), None)).total
    assert (total.call_count, total.money_usd, total.gb_s) == (3, 1.25, 1.5)
    schema = select(tables.meta.c.value).where(tables.meta.c.key == "schema")
    assert await ledger.store.read(lambda c: c.scalar(schema)) == str(tables.SCHEMA_VERSION)
    await ledger.store.close()
    Ledger(tmp_path).store._engine.dispose()  # and opens again as it is

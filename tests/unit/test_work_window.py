"""Durable work between store and machine, in one process: what the daemon's tests cannot reach."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scheduler_builders import invocation, result_pb, spec_pb
from sqlalchemy import text

from scheduler import machine, window
from scheduler.budgets import Budgets
from scheduler.catalogue import FunctionCatalogue
from scheduler.dispatch import Dispatcher
from scheduler.inventory import NodeSession, Sessions
from scheduler.machine import ControlPlane
from scheduler.queue import WorkQueue
from scheduler.store import work as table
from scheduler.store.store import Store
from scheduler.telemetry import Telemetry
from scheduler.window import WorkWindow
from tierwise.domain.event import SessionOpened
from tierwise.domain.function import PRIOR
from tierwise.domain.ids import NodeId
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Node, Tier
from tierwise.placement.policy import create
from tierwise.v1 import function_pb2, node_pb2, types_pb2, work_pb2

NODE = NodeId("n")


class Context:
    """What gRPC tells of the caller."""

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_subject_alternative_name": [b"tierwise://user/u"]}


class Scheduler:
    """The scheduler without its ports: the test takes messages from a session's outbox."""

    def __init__(self, folder: Path, group: asyncio.TaskGroup, queue_max: int) -> None:
        self.store = Store(f"sqlite:///{folder / 'scheduler.db'}")
        self.plane = ControlPlane()
        dispatcher = self.dispatcher = Dispatcher(self.plane, create("ect"), create("ect"))
        self.functions = FunctionCatalogue(self.store, lambda name: PRIOR)
        self.telemetry = Telemetry(self.store, self.plane.table, records_max=1000)
        self.ended: list[str] = []
        self.sessions = Sessions(
            dispatcher,
            heartbeat_interval_s=1.0,
            catalogue=self.functions.to_pb,
            assignment=node_pb2.PolicyAssignment,
            revoked=list,
            on_opened=lambda node_id: self.window.node_opened(node_id),
            on_beat=lambda *_: None,
            billing=node_pb2.Billing,
            on_result=lambda *result: self.window.finished(*result),
        )
        self.window = WorkWindow(
            self.store,
            dispatcher,
            self.sessions,
            self.functions,
            write_call=self.telemetry.write_work,
            on_ended=lambda outcome: self.ended.append(outcome.request_id),
            heartbeat_interval_s=1.0,
            group=group,
        )
        dispatcher.work, dispatcher.nodes = self.window, self.sessions
        self.budgets = Budgets(self.store)
        self.queue = WorkQueue(
            self.store, self.window, self.functions, self.budgets, queue_max=queue_max
        )

    async def deploy(self) -> None:
        request = function_pb2.DeployFunctionRequest(spec=spec_pb(), code=b"code")
        await self.functions.DeployFunction(request, Context())

    async def submit(self, *names: str) -> None:
        submissions = [work_pb2.Submission(invocation=invocation(name)) for name in names]
        await self.queue.Submit(work_pb2.SubmitRequest(submissions=submissions), Context())

    def open(self, cpus: float = 1.0) -> NodeSession:
        session = NodeSession(NODE, node_pb2.Hello())
        self.sessions._sessions[NODE] = session
        capacity = Resources(cpus=cpus, memory_mib=1024)
        node = Node(node_id=NODE, tier=Tier.FOG, capacity=capacity)
        self.dispatcher.feed(SessionOpened(node=node))
        self.window.node_opened(NODE)
        return session

    async def state(self, name: str) -> int:
        return (await self.store.read(lambda c: table.get(c, name))).state

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def running(folder: Path, queue_max: int = 10_000) -> AsyncIterator[Scheduler]:
    async with asyncio.TaskGroup() as group:
        scheduler = Scheduler(folder, group, queue_max)
        loading = group.create_task(scheduler.window.run_forever())
        yield scheduler
        loading.cancel()
        scheduler.window.close()
    await scheduler.store.close()


async def dispatched(session: NodeSession) -> types_pb2.Invocation:
    async with asyncio.timeout(20):
        while True:
            message = session.outbox._next()
            if message is not None and message.HasField("dispatch"):
                return message.dispatch
            if message is None:
                await asyncio.sleep(0.001)


async def test_work_beyond_the_window_is_loaded_when_there_is_room_each_piece_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "WINDOW_MAX", 40)
    monkeypatch.setattr(window, "WINDOW_MAX", 40)
    monkeypatch.setattr(window, "REFILL_S", 0.01)
    async with running(tmp_path) as scheduler:
        await scheduler.deploy()
        names = [f"w{index:03}" for index in range(300)]
        for start in range(0, 300, 30):
            await scheduler.submit(*names[start : start + 30])
        assert scheduler.plane.job_count == 40
        session = scheduler.open()
        seen = []
        for _ in names:
            work = await dispatched(session)
            assert scheduler.plane.job_count <= 40
            seen.append(work.request_id)
            scheduler.window.finished(NODE, result_pb(work, NODE))
        assert sorted(seen) == names
        await scheduler.until(lambda: len(scheduler.ended) == 300)
        assert scheduler.window.open_count == 0


async def test_work_that_is_stored_is_run_although_its_submitter_has_gone(tmp_path: Path) -> None:
    async with running(tmp_path) as scheduler:
        await scheduler.deploy()
        submitting = asyncio.ensure_future(scheduler.submit("w"))
        await asyncio.sleep(0)
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
        await scheduler.store.write(lambda c: None)  # the commit before has been seen through
        session = scheduler.open()
        assert (await dispatched(session)).request_id == "w"


async def test_a_result_that_finds_the_disk_full_is_stored_and_acknowledged_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "STORE_RETRY_S", 0.02)
    async with running(tmp_path) as scheduler:
        await scheduler.deploy()
        await scheduler.submit("w")
        session = scheduler.open()
        work = await dispatched(session)
        pages = await scheduler.store.write(lambda c: c.scalar(text("PRAGMA page_count")))
        limit = text(f"PRAGMA max_page_count = {pages + 2}")
        await scheduler.store.write(lambda c: c.execute(limit))
        scheduler.window.finished(NODE, result_pb(work, NODE, value=b"x" * 1_000_000))
        scheduler.window.finished(NODE, result_pb(work, NODE, value=b"again"))
        await asyncio.sleep(0.1)
        assert await scheduler.state("w") == table.LEASED
        assert session.outbox._next() is None
        await scheduler.store.write(lambda c: c.execute(text("PRAGMA max_page_count = 100000")))
        await scheduler.until(lambda: scheduler.ended == ["w"])
        await asyncio.sleep(0)
        message = session.outbox._next()
        assert message is not None
        assert message.work_ack.request_id == "w"
        _, blob = await scheduler.store.read(lambda c: table.get_with_result(c, "w"))
        assert blob is not None
        stored = types_pb2.InvocationResult.FromString(blob)
        assert stored.items[0].value == b"x" * 1_000_000


async def test_no_work_leaves_while_its_lease_cannot_be_stored(tmp_path: Path) -> None:
    async with running(tmp_path) as scheduler:
        await scheduler.deploy()
        await scheduler.submit("w")
        await scheduler.store.write(lambda c: c.execute(text("PRAGMA query_only = ON")))
        session = scheduler.open()
        await asyncio.sleep(0.1)
        assert session.outbox._next() is None
        await scheduler.store.write(lambda c: c.execute(text("PRAGMA query_only = OFF")))
        from tierwise.clock import monotonic_s
        from tierwise.domain.event import HeartbeatReceived, Ticked
        from tierwise.domain.view import NodeReading

        async with asyncio.timeout(20):
            while (message := session.outbox._next()) is None:
                scheduler.dispatcher.feed(
                    HeartbeatReceived(
                        node_id=NODE, reading=NodeReading(sequence=int(monotonic_s() * 1e6))
                    )
                )
                scheduler.dispatcher.feed(Ticked())
                await asyncio.sleep(0.01)
        assert message.dispatch.request_id == "w"
        assert list(message.dispatch.arguments) == [b"w"]


async def test_a_result_that_comes_before_its_work_is_loaded_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as scheduler:
        await scheduler.deploy()
        await scheduler.submit("w")
        work = await dispatched(scheduler.open())
        # A retry was due when the process ended: the work is queued, not leased.
        await scheduler.store.write(lambda c: table.requeue(c, "w", 0, "node n was lost"))
    monkeypatch.setattr(window, "REFILL_S", 1000.0)
    async with running(tmp_path) as scheduler:
        scheduler.window._is_behind = True
        monkeypatch.setattr(scheduler.window, "_cursor", 10**9)  # it is not loaded yet
        forged = types_pb2.InvocationResult.FromString(result_pb(work, "m").SerializeToString())
        scheduler.window.finished(NodeId("m"), forged)  # not the node that had it
        scheduler.window.finished(NODE, result_pb(work, NODE))
        await scheduler.until(lambda: scheduler.ended)
        assert await scheduler.state("w") == table.SUCCEEDED


async def test_ended_work_is_removed_by_age_and_by_number_open_work_never(tmp_path: Path) -> None:
    async with running(tmp_path) as scheduler:
        await scheduler.deploy()
        names = [f"w{index}" for index in range(10)]
        await scheduler.submit(*names, "open")
        for index, name in enumerate(names):
            result = types_pb2.InvocationResult(request_id=name)
            ended_s = 100.0 + index
            await scheduler.store.write(
                lambda c, r=result, t=ended_s: table.end(c, table.SUCCEEDED, r, ended_unix_s=t)
            )
        write = scheduler.store.write
        assert await write(lambda c: table.prune(c, 103.0, 1000)) == 3
        assert await write(lambda c: table.prune(c, 0.0, 4)) == 3
        left = await scheduler.store.read(lambda c: table.newest(c, 0, 100))
        assert {row.request_id for row in left} == {"w6", "w7", "w8", "w9", "open"}

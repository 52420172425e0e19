"""Invariants of bills, over any history of calls."""

import asyncio
import math
import tempfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.store.store import Store
from scheduler.store.usage import AMOUNTS, KEY_NAMES
from scheduler.telemetry import Telemetry
from tierwise.domain.prices import LINK_CLASSES
from tierwise.domain.view import ViewTable
from tierwise.v1 import call_pb2, node_pb2, types_pb2

GROUPINGS = [keys for size in (1, 2, 3) for keys in combinations(KEY_NAMES, size)]
COUNTS = ("call_count", "item_count", "missed_count", "failed_count", "cold_count")


@dataclass(frozen=True)
class Past:
    """A report, and how often it is delivered."""

    report: node_pb2.CallReport
    delivery_count: int


amounts = st.floats(0.0, 1e3, allow_nan=False)


@st.composite
def pasts(draw: st.DrawFn) -> list[Past]:
    found = []
    for number in range(draw(st.integers(0, 12))):
        outcome = types_pb2.Outcome(
            request_id=f"r{number}",
            function_id=draw(st.sampled_from(["a/f@1", "a/f@2", "a/g@1", "b/f@1"])),
            state=draw(st.sampled_from([1, 2, 3])),
            origin=draw(st.sampled_from(["edge-1", "edge-2"])),
            node_id="cloud-1",
            priority=types_pb2.PRIORITY_NORMAL,
            item_count=draw(st.integers(1, 50)),
            request_bytes=draw(st.integers(0, 10**9)),
            gb_s=draw(amounts),
            gpu_s=draw(amounts),
            cpu_s=draw(amounts),
            money_usd=draw(amounts),
            is_cold=draw(st.booleans()),
            link=draw(st.sampled_from(["", *LINK_CLASSES])),
        )
        ago_s = draw(st.sampled_from([0.0, 86_400.0, 3 * 86_400.0]))
        report = node_pb2.CallReport(outcome=outcome, ended_ago_s=ago_s)
        found.append(Past(report, draw(st.integers(1, 3))))
    return found


def ask(*by: str) -> call_pb2.GetUsageRequest:
    return call_pb2.GetUsageRequest(
        by=[call_pb2.UsageKey.Value(f"USAGE_KEY_{key.upper()}") for key in by]
    )


@settings(max_examples=25, deadline=None)
@given(history=pasts())
def test_every_grouping_sums_to_the_total_and_each_call_counts_once(history: list[Past]) -> None:
    async def check(folder: str) -> None:
        store = Store(f"sqlite:///{Path(folder) / 'scheduler.db'}")
        telemetry = Telemetry(store, ViewTable(), records_max=1000)
        before: call_pb2.Usage | None = None
        for past in history:
            for _ in range(past.delivery_count):  # some within one batch, some in later ones
                telemetry.take("edge-1", node_pb2.Heartbeat(calls=[past.report] * 2))  # type: ignore[arg-type]
                await telemetry.store_profiles()
            total = (await telemetry.GetUsage(ask(), None)).total
            if before is not None:  # a bill never shrinks
                assert all(getattr(total, key) >= getattr(before, key) for key in AMOUNTS)
            before = total
        total = (await telemetry.GetUsage(ask(), None)).total
        assert total.call_count == len(history)
        outcomes = [past.report.outcome for past in history]
        assert total.item_count == sum(outcome.item_count for outcome in outcomes)
        for key in ("money_usd", "gb_s", "gpu_s", "cpu_s"):
            expected = math.fsum(getattr(outcome, key) for outcome in outcomes)
            assert getattr(total, key) == pytest.approx(expected)
        for keys in GROUPINGS:
            rows = (await telemetry.GetUsage(ask(*keys), None)).usage
            for name in AMOUNTS:
                summed = math.fsum(getattr(row, name) for row in rows)
                assert summed == pytest.approx(getattr(total, name))
            for link in LINK_CLASSES:
                moved = sum(row.moved_bytes.get(link, 0) for row in rows)
                assert moved == total.moved_bytes.get(link, 0)
                assert moved == sum(o.request_bytes for o in outcomes if o.link == link)
            named = [tuple(getattr(row, key) for key in keys) for row in rows]
            assert len(set(named)) == len(named)
        await store.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(check(folder))

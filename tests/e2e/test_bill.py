"""What was called is on the bill, and a spent budget stops it: real processes."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tierwise
from tests.e2e.waiting import until
from tierwise.errors import BudgetExceeded
from tierwise.sdk.operator import Operator

app = tierwise.App("shop")


@app.function(memory="128MiB", keep_alive="2s", deadline="5s")
def work(cpu_s: float) -> None:

    ends_s = time.process_time() + cpu_s
    while time.process_time() < ends_s:
        pass


@app.function(memory="64MiB", keep_alive="60s")
def other(text: str) -> int:
    return len(text)


def beats(ask: Operator) -> None:
    """Return when every node has sent two more heartbeats, and what they told is stored."""

    def sequences() -> dict[str, int]:
        return {row["node"]["node_id"]: row["reading"]["sequence"] for row in ask.nodes()}

    before = sequences()
    until(lambda: all(now >= before[name] + 3 for name, now in sequences().items()))


def command(cluster: tierwise.LocalCluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tierwise.cli", *arguments],
        env={**os.environ, "TIERWISE_CONTEXT": str(cluster.context)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_bill_agrees_with_the_records_of_the_calls(
    cluster: tierwise.LocalCluster, client: tierwise.Client, ask: Operator
) -> None:
    app.use(client)
    for _ in range(4):
        work.remote(0.05)
    work.options(tier="cloud").remote(0.02)
    assert list(other.map(["x"] * 20)) == [1] * 20
    assert other.spawn("durable").result() == 7
    until(lambda: ask.bill()["total"]["item_count"] >= 26)
    records = [call["outcome"] for call in ask.calls(limit=1000)]
    by = ("--by", "namespace,function,day")
    found = json.loads(command(cluster, "bill", *by, "-o", "json").stdout)
    total = found["total"]
    assert total["call_count"] == len(records)
    for key in ("money_usd", "gb_s", "cpu_s", "gpu_s"):
        assert total[key] == pytest.approx(math.fsum(record[key] for record in records))
        assert total[key] == pytest.approx(math.fsum(row[key] for row in found["usage"]))
    for record in records:  # whole milliseconds, rounded up
        billed_ms = record["gb_s"] * 1024 / record["memory_mib"] * 1000
        assert billed_ms == pytest.approx(round(billed_ms), abs=1e-6)
        assert billed_ms >= record["latency"]["run_s"] * 1000 - 1e-6
        assert billed_ms < record["latency"]["run_s"] * 1000 + 1.0 + 1e-6
    spent_s = math.fsum(r["cpu_s"] for r in records if r["function_id"].startswith("default/work@"))
    assert spent_s >= 0.2
    moved: dict[str, int] = {}
    for record in records:
        size = record["request_bytes"] + record["response_bytes"]
        moved[record["link"]] = moved.get(record["link"], 0) + size
    assert total["moved_bytes"] == moved
    assert {"scheduler", "edge-cloud"} <= set(moved)
    assert {row["function"] for row in found["usage"]} == {"work", "other"}


def test_idle_cost_is_shown_and_ends_with_keep_alive(
    client: tierwise.Client, ask: Operator
) -> None:
    app.use(client)
    work.remote(0.001)

    def idle() -> list[dict[str, Any]]:
        return [row for row in ask.bill()["idle"] if row["function"] == "work"]

    beats(ask)  # it is warm, or was
    until(lambda: any(row["idle_gb_s"] > 0.0 for row in idle()))
    until(lambda: not any(row["warm_count"] for row in idle()))
    beats(ask)  # what idled until then has been told
    settled, before = idle(), ask.bill()["total"]["money_usd"]
    assert all(row["idle_usd"] > 0.0 for row in settled if row["idle_gb_s"])
    beats(ask)
    assert idle() == settled
    assert ask.bill()["total"]["money_usd"] == before


def test_a_spent_budget_refuses_calls_and_lets_them_in_when_it_is_raised(
    cluster: tierwise.LocalCluster, client: tierwise.Client, ask: Operator
) -> None:
    app.use(client)
    work.remote(0.001)
    until(lambda: ask.bill()["total"]["money_usd"] > 0.0)
    whose = "default/work"
    command(cluster, "budget", "set", whose, "--usd-per-day", "0")

    def refusal() -> BudgetExceeded | None:
        try:
            work.remote(0.001)
        except BudgetExceeded as error:
            return error
        return None

    error = until(refusal)
    assert "tierwise budget set default/work" in str(error)
    assert 0 < error.retry_after_s <= 86_400
    with pytest.raises(BudgetExceeded):
        work.spawn(0.001)
    assert other.remote("not concerned") == 13
    assert "takes no new calls today" in command(cluster, "bill").stderr
    assert [(row["function"], row["is_spent"], row["action"]) for row in ask.budgets()] == [
        ("work", True, "refuse")
    ]
    ask.set_budget("default", "work", 100.0, "refuse")
    until(lambda: refusal() is None)
    command(cluster, "budget", "rm", whose)
    assert ask.budgets() == []


def test_nothing_that_ended_while_the_scheduler_was_away_is_missing_on_the_bill(
    cluster: tierwise.LocalCluster, client: tierwise.Client, ask: Operator
) -> None:
    app.use(client)
    other.remote("x")
    until(lambda: ask.bill()["total"]["call_count"] > 0)

    def count() -> int:
        rows = ask.bill()["usage"]
        return sum(row["call_count"] for row in rows if row["function"] == "other")

    beats(ask)  # what was called before is there
    before = count()
    cluster.kill("scheduler")
    for _ in range(5):
        other.remote("while it is away")
    cluster.restart("scheduler")
    cluster.wait_ready()
    until(lambda: count() >= before + 5)
    assert count() == before + 5


def test_prices_come_from_the_file_that_the_configuration_names(tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text("[edge]\nusd_per_million_requests = 1e6\nusd_per_gb_s = 0.0\n")
    folder = tmp_path / "cluster"
    with tierwise.LocalCluster(folder, "1e", policy="ect", emulate=False) as running:
        config = folder / "scheduler.toml"
        config.write_text(config.read_text().replace('prices = ""', f'prices = "{prices}"'))
        running.kill("scheduler")
        running.restart("scheduler")
        running.wait_ready()
        with tierwise.Client(running.context) as client:
            app.use(client)
            other.remote("x")
            asked = Operator(client)
            until(lambda: asked.bill()["total"]["call_count"])
            assert asked.bill()["total"]["money_usd"] == pytest.approx(1.0)
        prices.write_text("[edge]\nusd_per_request = 1.0\n")
        running.kill("scheduler")
        running.restart("scheduler")
        until(lambda: running.ended() == ["scheduler"])
        told = (folder / "logs/scheduler.log").read_text()
        assert "prices.toml" in told and "usd_per_request" in told

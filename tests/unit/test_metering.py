"""CPU time of real workers, also of those that do not live to tell."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from agent.runtime.runtime import ItemKind
from tests.unit.test_runtime import Bench


def burn(how: str, cpu_s: float = 0.0) -> Any:
    import os
    import subprocess
    import sys
    import time

    if how == "child":
        code = f"import time\nwhile time.process_time() < {cpu_s}: pass"
        return subprocess.run([sys.executable, "-c", code], check=False).returncode
    if how == "sleep":
        time.sleep(0.5)
        return None
    ends_s = time.process_time() + cpu_s
    while time.process_time() < ends_s:
        pass
    if how == "die":
        os.kill(os.getpid(), 9)
    return None


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["burn"]))
    await made.runtime.open()
    try:
        await made.start("w", burn)
        yield made
    finally:
        await made.runtime.close()


async def test_each_batch_is_metered_by_the_cpu_time_that_it_used(bench: Bench) -> None:
    busy = await bench.run("w", ("burn", 0.3), ("burn", 0.1))
    assert 0.38 <= busy.cpu_s <= busy.run_s + 0.05
    idle = await bench.run("w", ("sleep",))
    assert idle.cpu_s < 0.1 < idle.run_s
    again = await bench.run("w", ("burn", 0.2))
    assert 0.18 <= again.cpu_s <= again.run_s + 0.05


async def test_a_run_that_is_killed_has_the_cpu_time_until_then(bench: Bench) -> None:
    killed = await bench.run("w", ("burn", 60.0), timeout_s=0.6)
    assert killed.items[0].kind is ItemKind.TIMED_OUT
    assert 0.02 < killed.cpu_s <= killed.run_s * 1.5


async def test_a_worker_that_dies_by_itself_has_at_least_what_was_seen_of_it(bench: Bench) -> None:
    died = await bench.run("w", ("die", 0.6))
    assert died.items[0].kind is ItemKind.WORKER_DIED
    assert 0.1 < died.cpu_s <= died.run_s + 0.05  # seen ten times a second


async def test_a_wall_clock_that_jumps_changes_no_duration(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_s = time.time
    pending = bench.send("w", ("sleep",))
    monkeypatch.setattr(time, "time", lambda: true_s() - 30 * 86_400.0)
    report = await pending
    assert 0.4 < report.run_s < 20.0

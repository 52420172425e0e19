"""Measures what `bench_memory_sizing` judges by: memory and time of every input, in real workers.

    python -m benchmarks.measure_memory [--repetitions 3] [--only NAME]

Every run has a fresh forked worker on one core: peak resident memory beyond the loaded function,
the smallest limit within which it ends, run time at a full CPU and at half of one (cgroup quota,
where it can be set), start. Writes docs/results/memory_profiles.json after each function.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from agent.runtime.environments import HOST
from agent.runtime.runtime import ItemKind, RunReport, Runtime
from benchmarks.functions.inputs import WORKLOADS, inputs
from benchmarks.report import where
from tierwise.clock import precise_s
from tierwise.sdk.code import pack
from tierwise.wire import payload
from tierwise.wire.measures import measures

RESULT = Path("docs/results/memory_profiles.json")
CEILING_MIB = 4096
STEP_MIB = 4
PERIOD_US = 20_000  # a quota over the usual 100 ms is too coarse for short runs
QUOTAS = (Path("/sys/fs/cgroup/cpu"), "cpu.cfs_quota_us", "cpu.cfs_period_us")


class Bench:
    """Fresh workers of one CPU share."""

    def __init__(self, folder: Path, share: float) -> None:
        self.share = share
        self._folder = folder
        self._count = 0
        self._runtime = Runtime(state_dir=folder / f"runtime-{share}")
        self._group = QUOTAS[0] / f"tierwise-bench-{os.getpid()}"

    async def open(self) -> None:
        """Start the zygote, and hold it to its share if that is less than one CPU.

        Raises:
            OSError: The quota cannot be set here.
        """
        before = set(psutil.Process().children(recursive=True))
        await self._runtime.open()
        await self.run(_nothing, payload.encode(([], {})), CEILING_MIB)
        if self.share < 1.0:
            self._group.mkdir()
            (self._group / QUOTAS[2]).write_text(str(PERIOD_US))
            (self._group / QUOTAS[1]).write_text(str(int(PERIOD_US * self.share)))
            for process in set(psutil.Process().children(recursive=True)) - before:
                (self._group / "cgroup.procs").write_text(str(process.pid))

    async def close(self) -> None:
        """End every process and remove the group."""
        await self._runtime.close()
        with suppress(OSError):
            self._group.rmdir()

    async def run(self, code: Any, encoded: bytes, memory_mib: int) -> tuple[RunReport, float]:
        """Run once in a fresh worker; return its report and how long the worker took to start."""
        blob = pack(code)
        digest = hashlib.sha256(blob).hexdigest()
        path = self._folder / digest
        path.write_bytes(blob)
        self._count += 1
        name = f"i{self._count}"
        started_s = precise_s()
        await self._runtime.start(
            name, code_digest=digest, code_path=path, environment=HOST, memory_mib=memory_mib
        )
        cold_s = precise_s() - started_s
        done: asyncio.Future[RunReport] = asyncio.get_running_loop().create_future()
        self._runtime.run(name, [encoded], timeout_s=120.0, on_done=done.set_result)
        report = await done
        await self._runtime.stop(name)
        return report, cold_s


def _nothing() -> None:
    return None


async def measure(name: str, benches: list[Bench], repetitions: int) -> list[dict[str, Any]]:
    """Return one record per input."""
    workload = WORKLOADS[name]
    code = workload.code
    records = []
    for split, arguments in inputs(name):
        encoded = payload.encode(([], workload.build(**arguments)))
        peaks, times, colds = [], [], []
        for _ in range(repetitions):
            report, cold_s = await benches[0].run(code, encoded, CEILING_MIB)
            if report.items[0].kind is not ItemKind.OK:
                raise SystemExit(f"{name} {arguments}: {report.items[0].message}")
            peaks.append(round(report.peak_memory_mib, 2))
            times.append(round(report.run_s, 5))
            colds.append(round(cold_s, 5))
        need_mib = max(1, math.ceil(min(peaks) / STEP_MIB)) * STEP_MIB
        while True:
            report, _ = await benches[0].run(code, encoded, need_mib)
            if report.items[0].kind is ItemKind.OK:
                break
            need_mib += STEP_MIB
        slow = {}
        for bench in benches[1:]:
            report, _ = await bench.run(code, encoded, CEILING_MIB)
            slow[str(bench.share)] = round(report.run_s, 5)
        records.append(
            {
                "split": split,
                "arguments": arguments,
                "measures": measures(encoded),
                "peak_mib": peaks,
                "need_mib": need_mib,
                "run_s": times,
                "run_s_at_share": slow,
                "cold_start_s": colds,
            }
        )
    return records


async def main() -> None:
    """Measure, and write as functions are done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", choices=list(WORKLOADS))
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    found = {"machine": where(), "step_mib": STEP_MIB, "functions": {}}
    if options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8")) | {"machine": where()}
    with tempfile.TemporaryDirectory() as folder:
        benches = [Bench(Path(folder), 1.0), Bench(Path(folder), 0.5)]
        await benches[0].open()
        try:
            await benches[1].open()
        except OSError as error:
            print(f"no CPU quota here ({error}): half a CPU is not measured")
            await benches.pop().close()
        try:
            for name in [options.only] if options.only else WORKLOADS:
                started_s = precise_s()
                found["functions"][name] = await measure(name, benches, options.repetitions)
                options.out.write_text(_lines(found), encoding="utf-8")
                print(f"{name}: {precise_s() - started_s:.0f} s", flush=True)
        finally:
            for bench in benches:
                await bench.close()


def _lines(found: dict[str, Any]) -> str:
    """Return JSON with one record per line: readable, and a small diff."""
    parts = [f'"machine": {json.dumps(found["machine"])},\n"step_mib": {found["step_mib"]}']
    functions = []
    for name, records in found["functions"].items():
        rows = ",\n".join(json.dumps(record) for record in records)
        functions.append(f"{json.dumps(name)}: [\n{rows}\n]")
    return "{" + ",\n".join([*parts, '"functions": {' + ",\n".join(functions) + "}"]) + "}\n"


if __name__ == "__main__":
    asyncio.run(main())

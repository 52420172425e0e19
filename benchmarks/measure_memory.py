"""Measures what `bench_memory_sizing` judges by: memory and time of every input, in real workers.

    python -m benchmarks.measure_memory [--repetitions 3] [--only NAME]

Every run has a fresh forked worker on one core: peak resident memory beyond the loaded function,
the smallest limit within which it ends, wall and CPU time of the run, start of the worker. Writes
docs/results/memory_profiles.json after each function.
"""

import argparse
import asyncio
import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

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


class Bench:
    """Fresh workers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._runtime = Runtime(state_dir=folder / "runtime")

    async def open(self) -> None:
        """Start the zygote."""
        await self._runtime.open()
        await self.run(_nothing, payload.encode(([], {})), CEILING_MIB)

    async def close(self) -> None:
        """End every process."""
        await self._runtime.close()

    async def run(
        self, code: Any, encoded: bytes, memory_mib: int
    ) -> tuple[RunReport, float, float]:
        """Run once in a fresh worker; return its report, its CPU time and how long it started."""
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
        pid = self._runtime.workers()[name].pid
        before_s = _cpu_s(pid)
        done: asyncio.Future[RunReport] = asyncio.get_running_loop().create_future()
        self._runtime.run(name, [encoded], timeout_s=300.0, on_done=done.set_result)
        report = await done
        cpu_s = _cpu_s(pid) - before_s if report.instance_alive else 0.0
        await self._runtime.stop(name)
        return report, cpu_s, cold_s


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process of one thread, to the nanosecond."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _nothing() -> None:
    return None


async def measure(name: str, bench: Bench, repetitions: int) -> list[dict[str, Any]]:
    """Return one record per input."""
    workload = WORKLOADS[name]
    code = workload.code
    records = []
    for split, arguments in inputs(name):
        encoded = payload.encode(([], workload.build(**arguments)))
        peaks, walls, times, colds = [], [], [], []
        for _ in range(repetitions):
            report, cpu_s, cold_s = await bench.run(code, encoded, CEILING_MIB)
            if report.items[0].kind is not ItemKind.OK:
                raise SystemExit(f"{name} {arguments}: {report.items[0].message}")
            peaks.append(round(report.peak_memory_mib, 2))
            walls.append(round(report.run_s, 5))
            times.append(round(cpu_s, 5))
            colds.append(round(cold_s, 5))
        need_mib = max(1, math.ceil(min(peaks) / STEP_MIB)) * STEP_MIB
        while True:
            report, _, _ = await bench.run(code, encoded, need_mib)
            if report.items[0].kind is ItemKind.OK:
                break
            need_mib += STEP_MIB
        records.append(
            {
                "split": split,
                "arguments": arguments,
                "measures": measures(encoded),
                "peak_mib": peaks,
                "need_mib": need_mib,
                "wall_s": walls,
                "cpu_s": times,
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
        bench = Bench(Path(folder))
        await bench.open()
        try:
            for name in [options.only] if options.only else WORKLOADS:
                started_s = precise_s()
                found["functions"][name] = await measure(name, bench, options.repetitions)
                options.out.write_text(_lines(found), encoding="utf-8")
                print(f"{name}: {precise_s() - started_s:.0f} s", flush=True)
        finally:
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

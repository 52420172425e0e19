"""What does the seal add to the start of an instance, and what is a start against a fresh process?

    python -m benchmarks.bench_seal [--rounds N] [--cycles N]

An instance of a function that needs NumPy, from the order to "loaded": sealed (strict where the
machine allows it, else standard) and with isolation off, both made for the order, and of a spare
that was sealed before. Beside them a fresh interpreter that imports NumPy. One of each per round,
in turns. `--cycles` starts and kills as many sealed instances in a row, and counts what is left of
them.
"""

import argparse
import asyncio
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import uvloop

from agent.runtime.environments import HOST
from agent.runtime.runtime import Runtime
from agent.runtime.sandbox import OFF, STANDARD, STRICT
from benchmarks.report import at_least, at_most, make_table, show, spread
from tierwise.clock import precise_s

ADDED_MS_MAX = 20.0
SPEEDUP_MIN = 10.0
REST_S = 0.15  # a zygote that nobody asks for anything makes a spare


def total(values: list[float]) -> float:
    import numpy as np

    return float(np.array(values).sum())


class Starter:
    """Starts and stops instances of one function in one runtime."""

    def __init__(self, folder: Path, isolation: str) -> None:
        code = cloudpickle.dumps(total)
        self._path = folder / "code"
        folder.mkdir()
        self._path.write_bytes(code)
        self._digest = hashlib.sha256(code).hexdigest()
        self._count = 0
        self.runtime = Runtime(state_dir=folder / "runtime", isolation=isolation)

    async def start(self, *, is_spare_ready: bool = True) -> str:
        """Return the name of a new instance; of a size that none had if there is to be no spare."""
        self._count += 1
        name = f"i{self._count}"
        await self.runtime.start(
            name,
            code_digest=self._digest,
            code_path=self._path,
            environment=HOST,
            memory_mib=128 if is_spare_ready else 128 + self._count,
            cpus=1.0,
        )
        return name

    async def timed_ms(self, *, is_spare_ready: bool = True) -> tuple[float, float]:
        """Return milliseconds of a start, and of its end."""
        begin_s = precise_s()
        name = await self.start(is_spare_ready=is_spare_ready)
        started_s = precise_s()
        await self.runtime.stop(name)
        return (started_s - begin_s) * 1e3, (precise_s() - started_s) * 1e3


def fresh_ms() -> float:
    begin_s = precise_s()
    subprocess.run([sys.executable, "-I", "-c", "import numpy"], check=True)
    return (precise_s() - begin_s) * 1e3


async def measure(folder: Path, rounds: int) -> dict[str, Any]:
    sealed_by = STRICT if os.geteuid() == 0 else STANDARD
    starters = {name: Starter(folder / name, name) for name in (sealed_by, OFF)}
    figures: dict[str, list[float]] = {}
    for starter in starters.values():
        await starter.runtime.open()
        for _ in range(3):  # the zygote comes up with the first
            await starter.timed_ms()
    for _ in range(rounds):
        for name, starter in starters.items():
            title = "off" if name == OFF else "sealed"
            start_ms, end_ms = await starter.timed_ms(is_spare_ready=False)
            figures.setdefault(f"start, {title}", []).append(start_ms)
            figures.setdefault(f"end, {title}", []).append(end_ms)
            if name != OFF:
                await starter.timed_ms()
                await asyncio.sleep(REST_S)  # a spare is made
                start_ms, _ = await starter.timed_ms()
                figures.setdefault("start, spare", []).append(start_ms)
        figures.setdefault("fresh", []).append(await asyncio.to_thread(fresh_ms))
    for starter in starters.values():
        await starter.runtime.close()
    return {name: np.array(values) for name, values in figures.items()}


def left() -> dict[str, int]:
    """Return how much there is of what an instance could leave behind."""
    children = psutil.Process().children(recursive=True)
    return {
        "processes": len(children),
        "groups": sum(
            f"/tierwise-{os.getpid()}-" in path for path, _, _ in os.walk("/sys/fs/cgroup")
        ),
        "mounts": sum(
            len(Path(f"/proc/{pid}/mountinfo").read_text(encoding="utf-8").splitlines())
            for pid in (os.getpid(), *(child.pid for child in children))
        ),
        "descriptors": sum(one.num_fds() for one in (psutil.Process(), *children)),
    }


async def cycle(folder: Path, count: int) -> tuple[float, dict[str, int]]:
    """Return milliseconds per start and kill, and what was left of them all."""
    starter = Starter(folder / "cycles", STRICT if os.geteuid() == 0 else STANDARD)
    await starter.runtime.open()
    await starter.timed_ms()
    await asyncio.sleep(REST_S)
    before = left()
    begin_s = precise_s()
    for _ in range(count):
        await starter.timed_ms()
    each_ms = (precise_s() - begin_s) * 1e3 / count
    await asyncio.sleep(REST_S)
    after = left()
    await starter.runtime.close()
    return each_ms, {name: after[name] - before[name] for name in before}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--cycles", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = uvloop.run(measure(folder, options.rounds))
        sealed, off, fresh = (figures[key] for key in ("start, sealed", "start, off", "fresh"))
        table = make_table(
            "Start of an instance that has NumPy",
            ("", "p50 ms", "against", "target"),
            f"{options.rounds} rounds in turns; a start is from the order to the loaded function.",
        )
        added_ms = float(np.median(sealed - off))
        speedup = float(np.median(fresh / sealed))
        table.add_row("fresh interpreter, import numpy", spread(fresh), "1.00", "")
        table.add_row("instance, isolation off", spread(off), f"{np.median(fresh / off):.1f}×", "")
        target = at_least(speedup, SPEEDUP_MIN, "×")
        table.add_row("instance, sealed", spread(sealed), f"{speedup:.1f}×", target)
        spare = figures["start, spare"]
        table.add_row("instance, of a spare", spread(spare), f"{np.median(fresh / spare):.1f}×", "")
        target = at_most(added_ms, ADDED_MS_MAX, " ms")
        table.add_row("the seal adds", spread(sealed - off), f"{added_ms:+.1f} ms", target)
        table.add_section()
        for title in ("off", "sealed"):
            table.add_row(f"end, {title}", spread(figures[f"end, {title}"]), "", "")
        show(table)
        if options.cycles:
            each_ms, remains = uvloop.run(cycle(folder, options.cycles))
            words = ", ".join(f"{count} {what}" for what, count in remains.items())
            print(f"{options.cycles} starts and kills, {each_ms:.0f} ms each; left behind: {words}")
            if any(remains.values()):
                sys.exit(1)


if __name__ == "__main__":
    main()

"""How heavy is an agent: memory, time from start to ready, and what it would have to install?

    python -m benchmarks.bench_agent

Agents are started by `tierwise up`'s own code, one scheduler and one edge node without emulation.
"""

import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil

import tierwise
from benchmarks.report import at_most, make_table, show, spread
from tierwise.clock import monotonic_s, pause
from tierwise.sdk.operator import Operator

ROUNDS = 5
CALLS = 2000
RSS_MB_MAX = 80.0
READY_S_MAX = 1.0
HEAVY = ("torch", "sklearn", "stable_baselines3", "gymnasium", "flwr", "pandas", "sqlalchemy")

app = tierwise.App("bench")


@app.function(memory="64MiB")
def same(value: int) -> int:
    return value


def measure() -> dict[str, float]:
    """Start a cluster, call it, and return what its agent took."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = tierwise.LocalCluster(Path(folder), "1e", policy="ect", emulate=False)
        with cluster:
            agent = psutil.Process(cluster.pid("edge-1"))
            started = {"rss": agent.memory_info().rss / 1e6}
            with tierwise.Client(cluster.context) as client:
                app.use(client)
                assert sum(same.map(range(CALLS))) == CALLS * (CALLS - 1) // 2
                for index in range(200):
                    assert same.remote(index) == index
            busy_mb = agent.memory_info().rss / 1e6
            cluster.kill("edge-1")
            start_s = monotonic_s()
            cluster.restart("edge-1")
            with tierwise.Client(cluster.context) as client:
                operator = Operator(client)
                while not any(node["state"] == "ready" for node in operator.nodes()):
                    pause(0.01)
            return started | {"busy": busy_mb, "ready": monotonic_s() - start_s}


def heavy_imports() -> str:
    """Return which heavy packages `import agent.daemon` loads, in a clean interpreter."""
    code = "import sys, agent.daemon; print(' '.join(m for m in sys.argv[1:] if m in sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True)
    return ran.stdout.strip() or "none"


def installed_mb() -> float:
    """Return the size on disk of tierwise's own dependencies, all levels, without extras."""
    seen: set[str] = set()
    waiting = ["tierwise"]
    size = 0
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        if name != "tierwise":
            paths = [Path(str(file.locate())) for file in package.files or ()]
            size += sum(path.stat().st_size for path in paths if path.is_file())
        waiting += [
            re.split(r"[\s\[<>=!~;(]", requirement, maxsplit=1)[0].lower()
            for requirement in package.requires or ()
            if "extra ==" not in requirement
        ]
    return size / 1e6


def main() -> None:
    rounds = [measure() for _ in range(ROUNDS)]
    figures = {name: np.array([each[name] for each in rounds]) for name in rounds[0]}
    caption = (
        f"{ROUNDS} starts. Ready: from the start of the process until the scheduler lists the node "
        f"as ready, with its identity at hand. After work: {CALLS} items mapped and 200 "
        "calls. Workers are processes of their own and not counted."
    )
    table = make_table("An agent alone", ("", "median [10 % … 90 %]", "target"), caption)
    for title, name, target, unit in (
        ("resident memory when ready, MB", "rss", RSS_MB_MAX, " MB"),
        ("resident memory after work, MB", "busy", RSS_MB_MAX, " MB"),
        ("start to ready, s", "ready", READY_S_MAX, " s"),
    ):
        verdict = at_most(float(np.median(figures[name])), target, unit)
        table.add_row(title, spread(figures[name]), verdict)
    table.add_row("heavy packages imported", heavy_imports(), "none")
    table.add_row("dependencies on disk, MB", f"{installed_mb():.0f}", "no torch, sklearn")
    show(table)


if __name__ == "__main__":
    main()

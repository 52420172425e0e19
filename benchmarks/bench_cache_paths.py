"""What does each way into, out of and around the caches cost a client?

    python -m benchmarks.bench_cache_paths [--size-mb 47] [--clients 10] [--repeats 5]

Real daemons on this machine (1 cloud, 1 fog, 1 edge, no emulated links), a model and a round of
updates. What is compared with one another takes turns.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tierwise
from benchmarks.report import make_table, show, spread
from tierwise.clock import pause, precise_s

app = tierwise.App("paths")


@app.function(memory="96MiB")
def nothing() -> None:
    pass


@app.function(memory="96MiB")
def first(matrix: Any) -> float:
    return float(matrix[0, 0])


@app.function(memory="400MiB")
def step(base: Any) -> Any:
    return base + base.dtype.type(1), {"example_count": 1}


def measure(
    title: str, repeats: int, size_bytes: int, *ways: tuple[str, Callable[[int], Any]]
) -> None:
    seconds: dict[str, list[float]] = {name: [] for name, _ in ways}
    for index in range(repeats):
        for name, way in ways:
            started_s = precise_s()
            way(index)
            seconds[name].append(precise_s() - started_s)
    table = make_table(title, ("way", "ms", "MB/s"), f"{repeats} times in turns.")
    for name, taken_s in seconds.items():
        ms = 1e3 * np.array(taken_s)
        rate = f"{size_bytes / np.median(ms) / 1e3:,.0f}" if size_bytes else ""
        table.add_row(name, spread(ms), rate)
    show(table)


def run(count: int, clients: int, repeats: int, folder: Path) -> None:
    names = [f"c{index}" for index in range(clients)]
    base = np.random.default_rng(0).normal(size=count).astype(np.float32)
    size_bytes = base.nbytes
    with (
        tierwise.LocalCluster(folder, "1c,1f,1e", policy="ect", emulate=False) as cluster,
        tierwise.Client(cluster.context) as client,
    ):
        app.use(client)
        rounds = tierwise.Rounds(client, "paths", node="edge-1")
        far = tierwise.Rounds(client, "paths", node="fog-1")
        rounds.open(0, [], count)
        rounds.put_aggregate(0, base)
        for number in (1, 2):
            rounds.open(number, names, count, base=0)
        sinks = [f"{kind}{index}" for kind in ("here", "there") for index in range(repeats)]
        rounds.open(3, sinks, count, base=0)
        pause(1.0)

        def put(number: int, durability: str) -> Callable[[int], Any]:
            return lambda index: rounds.put_update(
                number, names[index % clients], base + np.float32(index), durability=durability
            )

        measure(
            f"put {size_bytes / 1e6:g} MB",
            clients,
            size_bytes,
            ("disk", put(1, "disk")),
            ("memory", put(2, "memory")),
        )
        measure(
            f"get {size_bytes / 1e6:g} MB",
            repeats,
            size_bytes,
            ("from the holder", lambda index: rounds.get(1, "update", names[index % clients])),
            ("by way of another node", lambda index: far.get(1, "update", names[index % clients])),
        )
        measure(
            "ask",
            100,
            0,
            ("similarity", lambda _: rounds.ask("similarity", round=1)),
            ("krum", lambda _: rounds.ask("krum", round=1)),
            ("similarity, another node", lambda _: far.ask("similarity", round=1)),
        )
        matrix, model = rounds.ref(1, "matrix"), rounds.ref(0)
        here, there = (lambda f: f.options(node="edge-1")), (lambda f: f.options(node="fog-1"))
        here(first).remote(matrix)
        here(nothing).remote()
        measure(
            f"call on {clients * size_bytes / 1e6:g} MB",
            100,
            0,
            ("no input", lambda _: here(nothing).remote()),
            ("the matrix, where it lies", lambda _: here(first).remote(matrix)),
        )

        def sink(name: str) -> Any:
            return rounds.result(3, "update", name, node="edge-1")

        for where in (here, there):
            where(step).remote(model)
        measure(
            "one step of training",
            repeats,
            size_bytes,
            ("result to the client", lambda _: here(step).remote(model)),
            (
                "result into this node's cache",
                lambda i: step.options(node="edge-1", output=sink(f"here{i}")).remote(model),
            ),
            (
                "result into another node's cache",
                lambda i: step.options(node="fog-1", output=sink(f"there{i}")).remote(model),
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mb", type=float, default=47.0)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        count = int(options.size_mb * 1e6 / 4)
        run(count, options.clients, options.repeats, Path(name))


if __name__ == "__main__":
    main()

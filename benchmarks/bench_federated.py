"""Do federated jobs on a cluster come to what they should, under attack and over less wide area?

    python -m benchmarks.bench_federated [--seeds 3] [--rounds 40] [--out docs/results]

Real processes on this machine: one cloud, one fog, four edges, twenty clients on scikit-learn's
digits, five on each edge, links not emulated. Accuracies are on 360 pictures that no client has;
the reference is FedAvg written out in this process, on the same shares with the same seeds. An
attacker sends its step with the sign flipped and four times as large. Wide area is every byte of
rounds between the cloud and another tier, as the caches meter it.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts its threads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import tierwise
from benchmarks.functions import digits
from benchmarks.report import at_most, make_table, show, spread, where
from tierwise.clock import precise_s
from tierwise.sdk.operator import Record
from tierwise.v1 import cache_pb2

CLIENTS = 20
ATTACKERS = 4
NODES = ("cloud-1", "fog-1", "edge-1", "edge-2", "edge-3", "edge-4")
ALPHAS = (0.1, 0.5, 100.0)
CONFIG: dict[str, Any] = {"epochs": 10, "rate": 0.2, "bad": [], "scale": 4.0}
WIDE_MAX = 1 / 3
KRUM_LOSS_MAX = 2.0  # points
IDLE_ROUNDS = 40
ATTACKED_ROUNDS = 10  # enough to see what becomes of plain FedAvg


class Bench:
    """One cluster, and the jobs that are run on it."""

    def __init__(
        self, cluster: tierwise.LocalCluster, rounds: int, say: Callable[[str], None]
    ) -> None:
        self.client = tierwise.Client(cluster.context)
        self.data = cluster.state / "data"
        self.rounds = rounds
        self._say = say
        self._count = 0

    def shares(self, alpha: float, seed: int) -> tuple[list[str], str]:
        return digits.write_shares(self.data, CLIENTS, alpha, seed)

    def run(
        self, paths: list[str], held: str, seed: int, *, rounds: int = 0, **options: Any
    ) -> tuple[list[Record], list[Any]]:
        """Run one job; return its rounds, and its last model."""
        self._count += 1
        config = {**CONFIG, "seed": seed, "held": held, **options.pop("config", {})}
        job = tierwise.FederatedJob(
            f"bench-{self._count}",
            options.pop("run", digits.client),
            digits.initial(seed),
            {
                f"c{i}": (f"edge-{1 + i % 4}", {"path": path, "index": i})
                for i, path in enumerate(paths)
            },
            config=config,
            rounds=rounds or self.rounds,
            memory="192MiB",
            root="cloud-1",
            **{"encoding": "", "evaluate": digits.evaluate, **options},
            cluster=self.client,
        )
        started_s = precise_s()
        job.start()
        job.wait()
        found = job.state()["rounds"]
        accuracy = found[-1]["metrics"].get("accuracy", 0.0)
        self._say(f"{job.name}: {precise_s() - started_s:.1f} s, accuracy {accuracy:.3f}")
        return found, job.arrays()

    def wide_bytes(self) -> int:
        """Return what caches have sent between the cloud and other tiers, both ways."""
        total = 0
        for node in NODES:

            async def ask(node: str = node) -> cache_pb2.ListObjectsResponse:
                caches = self.client.connection().caches
                request = cache_pb2.ListObjectsRequest(namespace="default", job="none")
                response: cache_pb2.ListObjectsResponse = await caches.ask(
                    node, "ListObjects", request
                )
                return response

            moved = self.client.run(ask).cache.moved_bytes
            total += sum(size for link, size in moved.items() if "cloud" in link)
        return total


def accuracy(rounds: list[Record]) -> float:
    return 100.0 * float(rounds[-1]["metrics"]["accuracy"])


def learning(bench: Bench, alpha: float, seeds: int) -> dict[str, Any]:
    """Return accuracies of one distribution, per seed, without an attack and with one."""
    rows: dict[str, list[float]] = {}
    apart = []
    for seed in range(seeds):
        paths, held = bench.shares(alpha, seed)
        bad = [int(i) for i in np.random.default_rng(seed).permutation(CLIENTS)[:ATTACKERS]]
        names = [f"c{i}" for i in bad]
        ours, model = bench.run(paths, held, seed)
        config = {**CONFIG, "seed": seed}
        reference = digits.average_here(paths, seed, config, bench.rounds)
        honest = digits.average_here(paths, seed, config, bench.rounds, without=bad)
        apart.append(max(float(np.abs(a - b).max()) for a, b in zip(model, reference, strict=True)))
        attack = {"bad": names}
        robust, _ = bench.run(paths, held, seed, config=attack, strategy="multi-krum")
        for name, value in (
            ("ours", accuracy(ours)),
            ("reference", 100.0 * digits.evaluate(reference, {"held": held})["accuracy"]),
            ("honest", 100.0 * digits.evaluate(honest, {"held": held})["accuracy"]),
            ("robust", accuracy(robust)),
        ):
            rows.setdefault(name, []).append(value)
        if seed == 0:
            attacked, _ = bench.run(paths, held, seed, config=attack, rounds=ATTACKED_ROUNDS)
            rows["attacked"] = [accuracy(attacked)]
    return {"alpha": alpha, **rows, "apart": apart}


def wide_area(bench: Bench, seed: int) -> dict[str, Any]:
    """Return bytes over the wide area and accuracy, flat and hierarchical."""
    paths, held = bench.shares(0.5, seed)
    found: dict[str, Any] = {}
    for name, options in (
        ("flat", {}),
        ("hierarchical", {"hierarchical": True}),
        ("hierarchical, int8", {"hierarchical": True, "encoding": "int8"}),
    ):
        before = bench.wide_bytes()
        rounds, _ = bench.run(paths, held, seed, **options)
        # Each byte is metered where it leaves and where it comes.
        moved = (bench.wide_bytes() - before) / 2 / bench.rounds
        found[name] = {"bytes_per_round": moved, "accuracy": accuracy(rounds)}
    return found


def overhead(bench: Bench) -> dict[str, list[float]]:
    """Return milliseconds per round of clients that do nothing, by how many there are."""
    found = {}
    for count in (2, 10, 20):
        paths = ["-"] * count
        rounds, _ = bench.run(paths, "-", 0, run=digits.idle, evaluate=None, rounds=IDLE_ROUNDS)
        starts = [round_["started_unix_s"] for round_ in rounds]
        found[str(count)] = (1e3 * np.diff(starts)[5:]).tolist()
    return found


def print_tables(found: dict[str, Any], rounds: int, seeds: int) -> None:
    table = make_table(
        f"{CLIENTS} clients on digits, {rounds} rounds, {seeds} seeds: accuracy %, mean over seeds",
        ("α", "FedAvg", "one process", "apart", "attacked", "16 honest", "multi-Krum", "loses", ""),
        "α of Dirichlet. FedAvg: ours, beside one process, with the largest difference of a "
        f"parameter. {ATTACKERS} flip signs: FedAvg after {ATTACKED_ROUNDS} rounds, the others "
        "alone (one process), and multi-Krum of all, with what it loses on FedAvg unattacked.",
    )
    for row in found["learning"]:
        lost = float(np.mean(row["ours"]) - np.mean(row["robust"]))
        table.add_row(
            f"{row['alpha']:g}",
            _mean(row["ours"]),
            _mean(row["reference"]),
            f"{max(row['apart']):.0e}",
            f"{row['attacked'][0]:.1f}",
            _mean(row["honest"]),
            _mean(row["robust"]),
            f"{lost:+.1f}",
            at_most(lost, KRUM_LOSS_MAX),
        )
    show(table)
    wide = found["wide_area"]
    table = make_table(
        f"Bytes over the wide area per round, {CLIENTS} clients, the same job",
        ("way", "KB per round", "of flat", "accuracy %", "target"),
        "As the caches meter it, models down and updates up; four edges behind one fog.",
    )
    flat = wide["flat"]["bytes_per_round"]
    for name, row in wide.items():
        share = row["bytes_per_round"] / flat
        target = "" if name == "flat" else at_most(share, round(WIDE_MAX, 3))
        table.add_row(
            name,
            f"{row['bytes_per_round'] / 1e3:.1f}",
            f"{share:.2f}",
            f"{row['accuracy']:.1f}",
            target,
        )
    show(table)
    table = make_table(
        "A round of clients that do nothing: milliseconds, start to start",
        ("clients", "ms per round", "rounds per s"),
        f"{IDLE_ROUNDS} rounds; FedAvg, every step of it durable.",
    )
    for count, figures in found["overhead_ms"].items():
        table.add_row(count, spread(figures), f"{1e3 / float(np.median(figures)):.1f}")
    show(table)


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values):.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_federated", description=__doc__
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, help="folder that takes federated.json")
    flags = parser.parse_args()
    if flags.seeds < 1 or flags.rounds < 1:
        parser.error("seeds and rounds start at 1")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tierwise-")))
        cluster = tierwise.LocalCluster(folder, "1c,1f,4e", policy="ect", emulate=False)
        stack.enter_context(cluster)
        bench = Bench(cluster, flags.rounds, lambda text: print(text, file=sys.stderr))
        stack.callback(bench.client.close)
        found = {
            "where": where(),
            "overhead_ms": overhead(bench),
            "wide_area": wide_area(bench, 0),
            "learning": [learning(bench, alpha, flags.seeds) for alpha in ALPHAS],
        }
    print_tables(found, flags.rounds, flags.seeds)
    if flags.out is not None:
        flags.out.mkdir(parents=True, exist_ok=True)
        path = flags.out / "federated.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

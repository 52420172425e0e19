"""What does aggregating a round cost beside moving its bytes once?

    python -m benchmarks.bench_aggregate [--clients 10] [--megabytes 47]

One thread. The updates of a round lie in one shared file, as a node's cache holds them, and a
worker maps it read-only: "mapped anew" includes that, and the faults of a first touch; "warm" does
not. The yardstick is a memcpy of the same bytes, measured in turns with the rest, from memory that
is just as warm or as new. Rivals: NumPy's average over a stack of the arrays, and a sum of them one
after the other, as aggregators write it that get a list.
"""

import argparse
import mmap
import os
import sys
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy starts its threads
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from benchmarks.report import at_most, interleaved, make_table, show, spread
from tierwise.functions.fl.aggregate import fold
from tierwise.functions.fl.blocks import mean
from tierwise.functions.fl.robust import median, multi_krum, trimmed_mean
from tierwise.wire import memfd

SEED = 7
ROUNDS = 9
RATIO_MAX = 1.5


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_aggregate", description=__doc__
    )
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--megabytes", type=float, default=47.0, help="of one update")
    flags = parser.parse_args()
    count, size = flags.clients, int(flags.megabytes * 1e6 / 4)
    rng = np.random.default_rng(SEED)
    matrix = rng.standard_normal((count, size), dtype=np.float32)
    weights = rng.integers(10, 1000, count).astype(float).tolist()
    rows = list(range(count))
    file = memfd.make([matrix.reshape(-1).view(np.uint8).data])
    goal = np.empty_like(matrix)
    base = matrix[0].copy()

    def anew(use: Callable[[np.ndarray], object]) -> Callable[[], object]:
        def call() -> object:
            fresh = mmap.mmap(file.fd, 0, prot=mmap.PROT_READ)
            view = np.frombuffer(fresh, np.float32).reshape(count, size)
            return use(view)

        return call

    arguments = {"step": "mean", "rows": rows, "weights": weights}
    calls: dict[str, Callable[[], object]] = {
        "memcpy, warm": lambda: np.copyto(goal, matrix),
        "mean, warm": lambda: mean(matrix, rows, weights),
        "memcpy, mapped anew": anew(lambda view: np.copyto(goal, view)),
        "mean, mapped anew": anew(lambda view: mean(view, rows, weights)),
        "as a worker runs it": anew(lambda view: fold([view], arguments)),
        "rival: one after the other": lambda: _summed(matrix, weights),
        "rival: np.average of a stack": lambda: np.average(
            np.stack(list(matrix)), axis=0, weights=weights
        ),
    }
    slow: dict[str, Callable[[], object]] = {
        "median": lambda: median(matrix, rows),
        "trimmed mean": lambda: trimmed_mean(matrix, rows, 0.2),
        "multi-Krum": lambda: multi_krum(matrix, rows, weights, base, count // 5),
    }
    found = interleaved(calls, rounds=ROUNDS, count=1, warm_up=1)
    found |= interleaved(slow, rounds=3, count=1, warm_up=0)
    warm, new = np.median(found["memcpy, warm"]), np.median(found["memcpy, mapped anew"])
    table = make_table(
        f"{count} updates of {flags.megabytes:g} MB: milliseconds",
        ("way", "ms", "of memcpy", "target"),
        "memcpy: the same bytes once, warm for what is warm, mapped anew for the rest.",
    )
    for name, figures in found.items():
        ratio = float(np.median(figures)) / (new if "anew" in name or "worker" in name else warm)
        is_ours = name.startswith(("mean", "as a worker"))
        target = at_most(ratio, RATIO_MAX) if is_ours else ""
        table.add_row(name, spread(figures / 1e3), f"{ratio:.2f}", target)
    show(table)
    return 0


def _summed(matrix: np.ndarray, weights: list[float]) -> np.ndarray:
    total = sum(weights)
    out = np.zeros(matrix.shape[1], dtype=np.float32)
    for row, weight in zip(matrix, weights, strict=True):
        out += np.float32(weight / total) * row
    return out


if __name__ == "__main__":
    sys.exit(main())

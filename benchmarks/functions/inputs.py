"""Inputs of the memory workloads: what a model learns from, and two kinds that it has not seen.

Sizes are log-uniform, so that most calls are small and a few are large, as in production traces.
*Train* and *interpolate* are drawn alike; *extrapolate* has sizes beyond the largest of both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.functions import graphs, numeric, text

COUNTS = {"train": 32, "interpolate": 16, "extrapolate": 6}
BEYOND = (1.15, 1.6)  # of the largest size that was trained on


@dataclass(frozen=True, slots=True)
class Workload:
    """A function and the ranges of what its input is made from; the first grows beyond its range.

    `build` turns the numbers that were drawn into arguments.
    """

    code: Callable[..., Any]
    ranges: dict[str, tuple[int, int]]
    build: Callable[..., dict[str, Any]] = dict


WORKLOADS = {
    "matmul": Workload(numeric.matmul, {"n": (32, 2400)}),
    "linpack": Workload(numeric.linpack, {"n": (32, 2400), "rhs": (1, 1000)}),
    "aes": Workload(
        numeric.aes,
        {"length": (256, 40_000), "rounds": (1, 4)},
        lambda length, rounds: {"message": bytes(i & 255 for i in range(length)), "rounds": rounds},
    ),
    "chameleon": Workload(text.table, {"rows": (100, 16_000), "columns": (4, 40)}),
    "dynamic-html": Workload(text.dynamic_html, {"count": (100, 20_000), "words": (10, 100)}),
    "mst": Workload(graphs.mst, {"nodes": (500, 80_000), "degree": (2, 8)}),
    "bfs": Workload(graphs.bfs, {"nodes": (500, 120_000), "degree": (2, 8)}),
    "pagerank": Workload(
        graphs.pagerank,
        {"nodes": (500, 80_000), "degree": (2, 8)},
        lambda nodes, degree: {"edges": graphs.edge_list(nodes, degree)},
    ),
}


def inputs(name: str, seed: int = 0) -> list[tuple[str, dict[str, int]]]:
    """Return (split, what the input is made from) of a workload; equal seeds, equal inputs."""
    rng = np.random.default_rng([seed, *name.encode()])
    ranges = WORKLOADS[name].ranges
    drawn = []
    for split, count in COUNTS.items():
        for _ in range(count):
            arguments = {}
            for position, (key, (low, high)) in enumerate(ranges.items()):
                if split == "extrapolate" and position == 0:
                    low, high = (int(high * factor) for factor in BEYOND)
                arguments[key] = int(np.exp(rng.uniform(np.log(low), np.log(high))))
            drawn.append((split, arguments))
    return drawn

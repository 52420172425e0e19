"""How long Flower takes to aggregate one round; run by Flower's own environment.

    .venv-flower/bin/python benchmarks/flstore/flower_aggregate.py MB COUNT ROUNDS

Stands alone. Prints JSON: seconds of each round of `flwr.server.strategy.aggregate` (legacy) and of
`aggregate_arrayrecords` (the message API), of COUNT updates of MB each in 62 layers, and the first
elements of the results.
"""

import json
import sys
import time

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.server.strategy.aggregate import aggregate
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

LAYERS = 62


def main() -> None:
    size_mb, count, rounds = (int(text) for text in sys.argv[1:4])
    size = size_mb * 250_000
    rng = np.random.default_rng(0)
    updates = [
        [np.ascontiguousarray(part) for part in np.array_split(vector, LAYERS)]
        for vector in rng.standard_normal((count, size), dtype=np.float32)
    ]
    weights = [100 + number for number in range(count)]
    legacy = [(update, weight) for update, weight in zip(updates, weights, strict=True)]
    records = [
        RecordDict({"arrays": ArrayRecord(update), "metrics": MetricRecord({"n": weight})})
        for update, weight in zip(updates, weights, strict=True)
    ]
    ways = {
        "legacy": lambda: aggregate(legacy),
        "messages": lambda: aggregate_arrayrecords(records, "n"),
    }
    figures: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start_s = time.perf_counter()
            way()
            if number:
                figures[name].append(time.perf_counter() - start_s)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

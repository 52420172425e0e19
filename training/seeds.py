"""How much does a search depend on its seed? Search with several, judge all on the same worlds.

    python -m training.seeds --seeds 10

Every search has the same small budget, so that ten fit into the time of one long one: what they
reach is a lower bound of what `training.search` reaches. λ is 1 and nothing is drawn.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from tierwise.files import write_atomically
from training.evaluate import HELD_OUT, interval, iqm
from training.judge import processes
from training.search import Array, Progress, Settings, find_prices, log_costs

BUDGET = Settings(generations=6, population=12, worlds=16, request_count=200)


def judged(found: list[Array], worlds: int, request_count: int, preset: str) -> Array:
    """Return the log cost of ect and of each policy, shape (1 + policies, worlds)."""
    candidates = [np.zeros_like(found[0]), *found]
    one = partial(log_costs, candidates, preset=preset, request_count=request_count)
    seeds = [range(seed, seed + 1) for seed in range(HELD_OUT, HELD_OUT + worlds)]
    with processes() as pool:
        columns = [np.array(column)[:, 0] for column in pool.map(one, seeds)]
    return np.stack(columns, axis=1)


def to_markdown(gains: Array, settings: Settings, worlds: int) -> str:
    """Return the table: one row per seed, gains of shape (seeds, worlds)."""
    means = np.array([iqm(row) for row in gains])
    low, high = interval(means)
    lines = [
        "# Search seeds, simulated",
        "",
        f"{len(gains)} searches of {settings.generations} generations × {settings.population} "
        f"policies × {settings.worlds} worlds, judged on {worlds} held-out worlds of preset "
        f"{settings.preset}. Cost against `ect`, paired: interquartile mean over worlds with 95 % "
        "bootstrap interval.",
        "",
        "| seed | cost vs ect [95 % CI] |",
        "| --- | --- |",
    ]
    for seed, row in enumerate(gains):
        least, most = interval(row)
        lines.append(f"| {seed} | {iqm(row):+.1%} [{least:+.1%}, {most:+.1%}] |")
    lines += ["", f"Over seeds: {iqm(means):+.1%} [{low:+.1%}, {high:+.1%}].", ""]
    return "\n".join(lines)


def main() -> int:
    """Parse the command line, search, print and write the table; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.seeds", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--worlds", type=int, default=100, help="held-out worlds")
    parser.add_argument("--requests", type=int, default=300, help="per held-out world")
    parser.add_argument("--out", type=Path, help="folder for seeds.md and seeds.json")
    flags = parser.parse_args()
    if min(flags.seeds, flags.worlds, flags.requests) < 1:
        parser.error("counts start at 1")
    found: list[Array] = []
    for seed in range(flags.seeds):
        with tempfile.TemporaryDirectory() as folder:
            print(f"search {seed + 1} of {flags.seeds}", file=sys.stderr)
            prices = find_prices(replace(BUDGET, seed=seed), Path(folder), Progress.fresh())
        if prices is None:
            return 130
        found.append(prices)
    costs = judged(found, flags.worlds, flags.requests, BUDGET.preset)
    gains: Array = np.exp(costs[1:] - costs[0]) - 1.0
    text = to_markdown(gains, BUDGET, flags.worlds)
    print(text)
    if flags.out is not None:
        write_atomically(flags.out / "seeds.md", text.encode())
        record = {"prices": [p.tolist() for p in found], "gains": gains.tolist()}
        write_atomically(flags.out / "seeds.json", json.dumps(record).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

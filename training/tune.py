"""Tune the weights of the base score on validation worlds, one weight after the other.

python -m training.tune --seeds 24
"""

import argparse
import sys
from dataclasses import fields, replace

import numpy as np

from envs.simulator import Simulator
from envs.world import make_world
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.score import DEFAULT_WEIGHTS, ScoreWeights
from training.evaluate import mean_cost_s

VALIDATION = 500_000  # seeds of validation worlds
GRID = {
    "cold_start": (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0),
    "displaced": (0.0, 0.25, 0.5, 1.0, 2.0),
    "per_usd_s": (0.0, 10_000.0, 20_000.0, 40_000.0),
    "per_late_s": (0.0, 0.5, 1.0, 2.0, 4.0),
    "per_miss_s": (0.0, 0.1, 0.25, 0.5, 1.0),
}


def cost_of(weights: ScoreWeights, seeds: range, request_count: int) -> float:
    """Return the mean over worlds of log cost, so that no single world decides."""
    logs = []
    for seed in seeds:
        world = make_world("random", seed, request_count=request_count)
        outcomes = Simulator(world, seed).run(EarliestCompletion(weights))
        logs.append(np.log(mean_cost_s(outcomes)))
    return float(np.mean(logs))


def main() -> int:
    """Parse the command line, tune, print the best weights; return the exit code."""
    parser = argparse.ArgumentParser(prog="tierwise policy tune", description=__doc__)
    parser.add_argument("--seeds", type=int, default=24, help="validation worlds")
    parser.add_argument("--requests", type=int, default=400, help="per world")
    parser.add_argument("--rounds", type=int, default=2, help="passes over all weights")
    flags = parser.parse_args()
    from tqdm import tqdm

    seeds = range(VALIDATION, VALIDATION + flags.seeds)
    best, best_cost = DEFAULT_WEIGHTS, cost_of(DEFAULT_WEIGHTS, seeds, flags.requests)
    start_cost = best_cost
    trials = [(name, value) for _ in range(flags.rounds) for name in GRID for value in GRID[name]]
    for name, value in tqdm(trials, unit="trial", file=sys.stderr):
        if getattr(best, name) == value:
            continue
        candidate = replace(best, **{name: value})
        cost = cost_of(candidate, seeds, flags.requests)
        if cost < best_cost:
            best, best_cost = candidate, cost
    for field in fields(best):
        print(f"{field.name} = {getattr(best, field.name)}")
    print(f"cost {np.exp(best_cost - start_cost) - 1.0:+.1%} against the present defaults")
    return 0


if __name__ == "__main__":
    sys.exit(main())

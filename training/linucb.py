"""Let LinUCB learn on training worlds, and write what it has seen as its prior.

    python -m training.linucb --seed 0 --worlds 60

One bandit lives through all the worlds, one after the other, starting from nothing. What remains is
A and b per observation (see `tierwise.placement.policies.linucb`), in `linucb.npz` with a card next
to it. All worlds are simulated; none is one of those that policies are tuned or judged on.
"""

import argparse
import sys
from pathlib import Path
from typing import Self

import numpy as np

from envs.simulator import Simulator
from envs.world import make_world
from tierwise.cost.estimate import Float
from tierwise.placement import policies
from tierwise.placement.features import SCHEMA
from tierwise.placement.policies.linucb import INPUTS, LinUCB
from training.export import commit, write_pair
from training.tune import TRAINING


class Collector(LinUCB):
    """A bandit that forgets nothing between worlds and keeps the sums."""

    def __init__(self, alpha: float) -> None:
        super().__init__(alpha, 0.0)
        self.gram = np.zeros((INPUTS, INPUTS))
        self.moment = np.zeros(INPUTS)

    def fresh(self) -> Self:
        """Return itself: what one world taught is known in the next."""
        return self

    def _observe(self, x: Float, cost: float) -> None:
        super()._observe(x, cost)
        self.gram += np.outer(x, x)
        self.moment += cost * x


def collect(seed: int, worlds: int, preset: str, request_count: int, alpha: float) -> Collector:
    """Return a bandit that has lived through so many worlds."""
    from tqdm import tqdm

    collector = Collector(alpha)
    first = TRAINING + 100_000 * seed
    for world_seed in tqdm(range(first, first + worlds), unit="world", file=sys.stderr):
        world = make_world(preset, world_seed, request_count=request_count)
        Simulator(world, world_seed).run(collector)
    return collector


def main() -> int:
    """Parse the command line, learn, write the prior and its card; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.linucb", description=__doc__)
    parser.add_argument("--preset", default="random")
    parser.add_argument("--seed", type=int, default=0, help="of the worlds")
    parser.add_argument("--worlds", type=int, default=60)
    parser.add_argument("--requests", type=int, default=300, help="per world")
    parser.add_argument("--alpha", type=float, default=0.5, help="optimism while learning")
    parser.add_argument("--out", type=Path, default=Path(policies.__file__).parent)
    flags = parser.parse_args()
    if min(flags.worlds, flags.requests) < 1:
        parser.error("counts start at 1")
    found = collect(flags.seed, flags.worlds, flags.preset, flags.requests, flags.alpha)
    count = max(1, found.observation_count)
    arrays = {"gram": found.gram / count, "moment": found.moment / count}
    card = {
        "schema": SCHEMA,
        "command": f"python -m training.linucb --preset {flags.preset} --seed {flags.seed} "
        f"--worlds {flags.worlds} --requests {flags.requests} --alpha {flags.alpha}",
        "seed": flags.seed,
        "commit": commit(),
        "data": f"{flags.worlds} simulated worlds of preset {flags.preset}, "
        f"{flags.requests} requests each, seeds from {TRAINING + 100_000 * flags.seed}",
        "observations": found.observation_count,
    }
    print(write_pair(flags.out, "linucb", arrays, card))
    return 0


if __name__ == "__main__":
    sys.exit(main())

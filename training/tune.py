"""Tune a policy's parameters on validation worlds: random search, the same budget for everybody.

The winner of a search has also been lucky. So it meets the defaults once more on other worlds, as
many; `confirmed` is what it gains there, and the defaults stay if that is nothing.

python -m training.tune --policy slowest-fit --trials 40 --seeds 24
python -m training.tune --all --json tuned.json
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.simulator import Simulator
from envs.world import PRESETS, make_world
from tierwise.files import write_atomically
from tierwise.placement.policies.cluster_like import KubernetesLike, NomadLike
from tierwise.placement.policies.defdrel import DefDrel
from tierwise.placement.policies.ect import SOFT_TEMPERATURE, EarliestCompletion
from tierwise.placement.policies.hashing import BoundedHashing
from tierwise.placement.policies.linucb import LinUCB
from tierwise.placement.policies.locality import Locality
from tierwise.placement.policies.power_of_two import PowerOfTwo
from tierwise.placement.policies.probabilistic import Probabilistic
from tierwise.placement.policies.pull_based import PullBased
from tierwise.placement.policies.rollout import Rollout
from tierwise.placement.policies.slowest_fit import SlowestFit
from tierwise.placement.policy import Policy
from tierwise.placement.score import ScoreWeights
from training.figures import mean_cost_s

VALIDATION = 500_000  # seeds of validation worlds
CONFIRMATION = 550_000  # seeds of the worlds that the winner is confirmed on
TRAINING = 2_000_000  # first seed of the worlds that rivals learn from
SEED = 3  # of the search


@dataclass(frozen=True, slots=True)
class Tunable:
    """A policy with parameters, and the values that are tried for each."""

    make: Callable[..., Policy]
    values: Mapping[str, Sequence[Any]]
    defaults: Mapping[str, Any]


def _tunable(make: Any, **values: Sequence[Any]) -> Tunable:
    example = make()
    return Tunable(make, values, {name: getattr(example, name) for name in values})


def _ect(**weights: float) -> Policy:
    return EarliestCompletion(ScoreWeights(**weights))


SHARES = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
TUNABLES: dict[str, Tunable] = {
    "ect": Tunable(
        _ect,
        {
            "cold_start": SHARES,
            "displaced": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
            "per_usd_s": (0.0, 2_000.0, 10_000.0, 20_000.0, 40_000.0),
            "per_late_s": (0.0, 0.5, 1.0, 2.0, 4.0),
            "per_miss_s": (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0),
        },
        asdict(ScoreWeights()),
    ),
    "soft-ect": Tunable(
        lambda temperature: EarliestCompletion(temperature=temperature),
        {"temperature": (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)},
        {"temperature": SOFT_TEMPERATURE},
    ),
    "power-of-two": _tunable(PowerOfTwo, choices=(2, 3, 4, 6, 8), cold_start=SHARES),
    "bounded-hashing": _tunable(
        BoundedHashing,
        bound=(0.0, 0.5, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0),
        floor_s=(0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    ),
    "pull-based": _tunable(
        PullBased,
        half_life_s=(0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 20.0),
        near=(0.0, 1.0, 4.0, 10.0, 30.0, 100.0),
    ),
    "locality": _tunable(Locality, far=(0.0, 1.0, 5.0, 10.0, 30.0, 100.0), cold_start=SHARES),
    "slowest-fit": _tunable(
        SlowestFit, slack=(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0), cold_start=SHARES
    ),
    "probabilistic": _tunable(
        Probabilistic,
        headroom=(0.3, 0.5, 0.7, 0.85, 1.0, 1.5),
        wait=(0.0, 0.5, 1.0, 1.5, 2.0),
        temperature_s=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1),
    ),
    "linucb": _tunable(
        LinUCB,
        alpha=(0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5),
        prior=(0.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0),
    ),
    "defdrel": _tunable(DefDrel, margin=(-0.5, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5)),
    "rollout": _tunable(
        Rollout,
        samples=(4, 8, 16),
        horizon=(8, 12, 16, 24),
        width=(2, 3, 4, 6),
        caution=(0.0, 0.5, 1.0, 2.0),
        hidden=(0.0, 0.3, 1.0),
        trust=(0.1, 0.25, 0.5, 1.0),
    ),
    "kubernetes-like": _tunable(
        KubernetesLike,
        least_allocated=(0.0, 0.5, 1.0, 2.0, 5.0),
        balanced=(0.0, 0.5, 1.0, 2.0),
        image=(0.0, 0.5, 1.0, 2.0, 5.0),
    ),
    "nomad-like": _tunable(
        NomadLike, spread=(0.0, 0.25, 0.5, 0.75, 1.0), image=(0.0, 1.0, 3.0, 9.0, 18.0)
    ),
}


def cost_of(
    make: Callable[[], Policy], presets: Sequence[str], seeds: range, request_count: int
) -> float:
    """Return the mean over worlds of log cost, so that no single world decides.

    Every world gets a policy of its own: nothing that one has learnt is known in the next.
    """
    logs = []
    for preset in presets:
        for seed in seeds:
            world = make_world(preset, seed, request_count=request_count)
            logs.append(np.log(mean_cost_s(Simulator(world, seed).run(make()))))
    return float(np.mean(logs))


def tune(
    name: str,
    *,
    trials: int,
    presets: Sequence[str],
    seeds: range,
    request_count: int,
    on_trial: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Search at random, first the defaults; return the best parameters and by how much they win.

    The first half of the trials draws every parameter, the second half changes one of the best.
    """
    tunable = TUNABLES[name]
    rng = np.random.default_rng(SEED)
    best: dict[str, Any] = dict(tunable.defaults)

    def cost(parameters: Mapping[str, Any], some: range = seeds) -> float:
        on_trial()
        make = functools.partial(tunable.make, **parameters)
        return cost_of(make, presets, some, request_count)

    first = best_cost = cost(best)
    tried = {tuple(best.values())}
    for trial in range(1, trials):
        keys = list(tunable.values)
        drawn = keys if trial < trials // 2 else [keys[int(rng.integers(len(keys)))]]
        candidate = best | {
            key: tunable.values[key][int(rng.integers(len(tunable.values[key])))] for key in drawn
        }
        if tuple(candidate.values()) in tried:
            on_trial()
            continue
        tried.add(tuple(candidate.values()))
        if (found := cost(candidate)) < best_cost:
            best, best_cost = candidate, found
    confirmed = 0.0
    if best != tunable.defaults:
        others = range(CONFIRMATION, CONFIRMATION + len(seeds))
        confirmed = float(np.exp(cost(best, others) - cost(tunable.defaults, others)) - 1.0)
    return {
        "policy": name,
        "parameters": best if confirmed < 0.0 else dict(tunable.defaults),
        "defaults": dict(tunable.defaults),
        "found": best,
        "versus_defaults": float(np.exp(best_cost - first) - 1.0),
        "confirmed": confirmed,
        "log_cost": best_cost,
    }


def main() -> int:
    """Parse the command line, tune, print the best parameters; return the exit code."""
    parser = argparse.ArgumentParser(prog="tierwise policy tune", description=__doc__)
    parser.add_argument("--policy", choices=TUNABLES, default="ect")
    parser.add_argument("--all", action="store_true", help="every tunable policy")
    parser.add_argument("--trials", type=int, default=40, help="parameter sets per policy")
    parser.add_argument("--presets", default="random", help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--seeds", type=int, default=24, help="validation worlds per preset")
    parser.add_argument("--requests", type=int, default=400, help="per world")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    flags = parser.parse_args()
    presets = flags.presets.split(",")
    if set(presets) - set(PRESETS) or min(flags.trials, flags.seeds, flags.requests) < 1:
        parser.error(f"presets are {', '.join(PRESETS)}; counts start at 1")
    from tqdm import tqdm

    chosen = list(TUNABLES) if flags.all else [flags.policy]
    results = []
    with tqdm(total=len(chosen) * (flags.trials + 2), unit="trial", file=sys.stderr) as bar:
        for name in chosen:
            bar.set_postfix_str(name)
            found = tune(
                name,
                trials=flags.trials,
                presets=presets,
                seeds=range(VALIDATION, VALIDATION + flags.seeds),
                request_count=flags.requests,
                on_trial=bar.update,
            )
            results.append(found)
            values = ", ".join(f"{key}={value}" for key, value in found["found"].items())
            verdict = "adopted" if found["confirmed"] < 0.0 else "the defaults stay"
            tqdm.write(
                f"{name}: {values}  cost {found['versus_defaults']:+.1%} against its defaults, "
                f"{found['confirmed']:+.1%} on other worlds: {verdict}",
                file=sys.stdout,
            )
    if flags.json is not None:
        write_atomically(flags.json, json.dumps(results, indent=2).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

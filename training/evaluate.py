"""Compare policies in the simulator: the same worlds, the same seeds, intervals.

    python -m training.evaluate --policies ect,learned --presets small,campus --seeds 20
    python -m training.evaluate --policies ect,learned --scenario FILE

A scenario (docs/scenarios.md) is one world: there seeds draw service times, links and faults only.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs import scenario
from envs.simulator import Simulator
from envs.world import PRESETS, World, make_world
from tierwise.clock import precise_s
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.outcome import Outcome
from tierwise.domain.topology import Tier
from tierwise.errors import TierwiseError
from tierwise.placement.policies import learned
from tierwise.placement.policy import Policy, create

HELD_OUT = 1_000_000  # evaluation seeds start here; training and validation never reach it
POLICIES = ("edge-only", "cloud-only", "edge-first", "least-loaded", "ect", "learned")
BOOTSTRAP = 2000
Maker = Callable[[str, int, int], World]  # preset, seed, requests → world


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Figures of one policy on one world."""

    cost_s: float
    p50_s: float
    p95_s: float
    missed: float
    cold: float
    usd_per_1000: float
    edge: float
    fog: float
    cloud: float
    decision_us: float


def of_preset(preset: str, seed: int, request_count: int) -> World:
    """Return the world of a preset."""
    return make_world(preset, seed, request_count=request_count)


def run(policy: Policy, preset: str, seed: int, request_count: int, make: Maker = of_preset) -> Run:
    """Simulate one world with one policy."""
    world = make(preset, seed, request_count)
    simulator = Simulator(world, seed)
    tier_of = {node.node_id: node.tier for node in world.nodes}
    started_s = precise_s()
    outcomes = simulator.run(policy)
    elapsed_s = precise_s() - started_s
    latency_s = np.array([o.latency.total_s for o in outcomes])
    tiers = [tier_of[o.node_id] for o in outcomes if o.node_id is not None]

    def share(tier: Tier) -> float:
        return sum(t is tier for t in tiers) / max(1, len(tiers))

    return Run(
        cost_s=mean_cost_s(outcomes),
        p50_s=float(np.percentile(latency_s, 50)),
        p95_s=float(np.percentile(latency_s, 95)),
        missed=float(np.mean([o.is_missed for o in outcomes])),
        cold=float(np.mean([o.is_cold for o in outcomes])),
        usd_per_1000=1000.0 * float(np.mean([o.money_usd for o in outcomes])),
        edge=share(Tier.EDGE),
        fog=share(Tier.FOG),
        cloud=share(Tier.CLOUD),
        decision_us=1e6 * elapsed_s / max(1, simulator.decision_count),
    )


def mean_cost_s(outcomes: Sequence[Outcome]) -> float:
    """Return the objective per request, second-equivalents."""
    return float(np.mean([DEFAULT_OBJECTIVE.cost_s(outcome) for outcome in outcomes]))


def iqm(values: NDArray[np.float64]) -> float:
    """Return the interquartile mean (Agarwal et al., NeurIPS 2021): the mean of the middle half."""
    ordered = np.sort(values)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the IQM."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(values), size=(BOOTSTRAP, len(values)))
    ordered = np.sort(values[picks], axis=1)
    cut = len(values) // 4
    means = ordered[:, cut : len(values) - cut].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def compare(
    policies: dict[str, Policy],
    presets: Sequence[str],
    seeds: Sequence[int],
    request_count: int,
    on_progress: Any = lambda done, total: None,
    make: Maker = of_preset,
) -> list[dict[str, Any]]:
    """Run every policy on every world; return one row per preset and policy.

    `versus_ect` is the IQM of the paired relative differences in cost to `ect`, with its interval.
    """
    rows: list[dict[str, Any]] = []
    total = len(presets) * len(policies) * len(seeds)
    done = 0
    for preset in presets:
        costs: dict[str, NDArray[np.float64]] = {}
        for name, policy in policies.items():
            runs = []
            for seed in seeds:
                runs.append(run(policy, preset, seed, request_count, make))
                done += 1
                on_progress(done, total)
            costs[name] = np.array([r.cost_s for r in runs])
            low, high = interval(costs[name])
            row: dict[str, Any] = {
                "preset": preset,
                "policy": name,
                "cost_s": iqm(costs[name]),
                "cost_s_low": low,
                "cost_s_high": high,
            }
            for field in Run.__dataclass_fields__:
                if field != "cost_s":
                    row[field] = float(np.mean([getattr(r, field) for r in runs]))
            rows.append(row)
        if "ect" in costs:
            for row in rows:
                if row["preset"] == preset:
                    ratio = costs[row["policy"]] / costs["ect"] - 1.0
                    row["versus_ect"] = iqm(ratio)
                    row["versus_ect_low"], row["versus_ect_high"] = interval(ratio)
    return rows


def load_policies(names: Sequence[str]) -> dict[str, Policy]:
    """Return policies by name; a name with a '/' or an existing folder is a run folder.

    Raises:
        TierwiseError: A name is unknown or a file is refused.
    """
    found: dict[str, Policy] = {}
    for name in names:
        folder = Path(name)
        if (folder / "policy.npz").exists():
            found[folder.name] = learned.load(
                (folder / "policy.npz").read_bytes(), (folder / "policy.json").read_bytes()
            )
        else:
            found[name] = create(name)
    return found


def print_rows(rows: list[dict[str, Any]], title: str = "simulated worlds") -> None:
    """Print the table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=None)
    for column in (
        "preset",
        "policy",
        "cost s [95 % CI]",
        "vs ect [95 % CI]",
        "p50 ms",
        "p95 ms",
        "missed",
        "cold",
        "$/1000",
        "edge/fog/cloud",
        "µs/decision*",
    ):
        table.add_column(column, justify="left" if column in ("preset", "policy") else "right")
    for row in rows:
        versus = ""
        if "versus_ect" in row:
            versus = (
                f"{row['versus_ect']:+.1%} [{row['versus_ect_low']:+.1%}, "
                f"{row['versus_ect_high']:+.1%}]"
            )
        table.add_row(
            row["preset"],
            row["policy"],
            f"{row['cost_s']:.3f} [{row['cost_s_low']:.3f}, {row['cost_s_high']:.3f}]",
            versus,
            f"{row['p50_s'] * 1e3:.0f}",
            f"{row['p95_s'] * 1e3:.0f}",
            f"{row['missed']:.1%}",
            f"{row['cold']:.1%}",
            f"{row['usd_per_1000']:.4f}",
            f"{row['edge']:.0%}/{row['fog']:.0%}/{row['cloud']:.0%}",
            f"{row['decision_us']:.0f}",
        )
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    console.print("* simulation included; benchmarks/bench_decision.py times decisions alone")


def main() -> int:
    """Parse the command line, evaluate, print; return the exit code."""
    parser = argparse.ArgumentParser(prog="tierwise policy eval", description=__doc__)
    parser.add_argument("--policies", default=",".join(POLICIES), help="names or run folders")
    parser.add_argument("--presets", default="small,campus,factory", help=", ".join(PRESETS))
    parser.add_argument("--seeds", type=int, default=10, help="worlds per preset")
    parser.add_argument("--requests", type=int, default=600, help="per world")
    parser.add_argument("--scenario", type=Path, help="a scenario's file, instead of presets")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    flags = parser.parse_args()
    presets = flags.presets.split(",") if flags.scenario is None else [flags.scenario.stem]
    unknown = set(presets) - set(PRESETS) if flags.scenario is None else set()
    if unknown or flags.seeds < 1 or flags.requests < 1:
        parser.error(f"unknown presets {sorted(unknown)}" if unknown else "counts start at 1")
    try:
        policies = load_policies(flags.policies.split(","))
        given = scenario.read(flags.scenario) if flags.scenario is not None else None
    except TierwiseError as error:
        parser.error(str(error))
    make = of_preset if given is None else lambda preset, seed, count: given
    from tqdm import tqdm

    total = len(presets) * len(policies) * flags.seeds
    try:
        with tqdm(total=total, unit="world", file=sys.stderr) as bar:
            rows = compare(
                policies,
                presets,
                range(HELD_OUT, HELD_OUT + flags.seeds),
                flags.requests,
                on_progress=lambda done, total: bar.update(done - bar.n),
                make=make,
            )
    except TierwiseError as error:  # a world needs what is not installed
        parser.error(str(error))
    if flags.output == "json":
        print(json.dumps(rows, indent=2))
    else:
        what = "simulated worlds, held-out seeds" if given is None else "simulated scenario"
        print_rows(rows, what)
    return 0


if __name__ == "__main__":
    sys.exit(main())

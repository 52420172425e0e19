"""Compare policies in the simulator: the same worlds, the same seeds, intervals.

    tierwise policy eval --policies ect,learned --presets small,campus --seeds 20
    tierwise policy eval --policies ect,learned --scenario FILE
    tierwise policy eval --suite standard          (all policies, loads, shifts; see its own --help)

A scenario (docs/scenarios.md) is one world: there seeds draw service times, links and faults only.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs import scenario
from envs.world import PRESETS, World, make_world
from tierwise.errors import TierwiseError
from tierwise.placement.policies import learned
from tierwise.placement.policy import Policy, create, names
from training.figures import Figures, measure

HELD_OUT = 1_000_000  # evaluation seeds start here; training and validation never reach it
POLICIES = ("edge-only", "cloud-only", "edge-first", "least-loaded", "ect", "learned")
HEURISTICS = frozenset(names()) - {"learned"}
BOOTSTRAP = 2000
Columns = dict[str, NDArray[np.float64]]
Maker = Callable[[str, int, int], World]  # preset, seed, requests → world


def of_preset(preset: str, seed: int, request_count: int) -> World:
    """Return the world of a preset."""
    return make_world(preset, seed, request_count=request_count)


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


def summary(columns: Columns, figures: Mapping[str, Columns]) -> dict[str, Any]:
    """Return one policy's figures over its worlds: IQM and interval of the cost, means of the rest.

    `versus_ect` and `versus_best` are IQMs of the paired relative differences in cost to `ect`,
    and to the heuristic with the lowest IQM in this very case, which nobody knows beforehand.

    Args:
        columns: The policy's figures, each of shape (worlds,).
        figures: Those of every policy, by name, on the same worlds.
    """
    row: dict[str, Any] = {key: float(values.mean()) for key, values in columns.items()}
    row["cost_s"] = iqm(columns["cost_s"])
    row["cost_s_low"], row["cost_s_high"] = interval(columns["cost_s"])
    rivals = {name: each for name, each in figures.items() if name in HEURISTICS}
    others = {"ect": figures.get("ect")}
    if rivals:
        row["heuristics"] = sorted(rivals)
        row["best"] = min(rivals, key=lambda name: iqm(rivals[name]["cost_s"]))
        others["best"] = rivals[row["best"]]
    for name, other in others.items():
        if other is not None:
            ratio = columns["cost_s"] / other["cost_s"] - 1.0
            row[f"versus_{name}"] = iqm(ratio)
            row[f"versus_{name}_low"], row[f"versus_{name}_high"] = interval(ratio)
    return row


def compare(
    policies: Mapping[str, Policy],
    presets: Sequence[str],
    seeds: Sequence[int],
    request_count: int,
    on_progress: Callable[[], object] = lambda: None,
    make: Maker = of_preset,
) -> list[dict[str, Any]]:
    """Run every policy on every world; return one row per preset and policy: its `summary`."""
    rows: list[dict[str, Any]] = []
    for preset in presets:
        figures: dict[str, Columns] = {}
        for name, policy in policies.items():
            worlds = []
            for seed in seeds:
                worlds.append(measure(policy, make(preset, seed, request_count), seed))
                on_progress()
            figures[name] = as_columns(worlds)
        rows += [
            {"preset": preset, "policy": name} | summary(columns, figures)
            for name, columns in figures.items()
        ]
    return rows


def as_columns(worlds: Sequence[Figures]) -> Columns:
    """Return the figures of several worlds, each as an array of shape (worlds,)."""
    return {key: np.array([each[key] for each in worlds]) for key in worlds[0]}


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
        "$/million",
        "edge/fog/cloud",
        "µs/decision",
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
            f"{row['usd_per_million']:.2f}",
            f"{row['edge']:.0%}/{row['fog']:.0%}/{row['cloud']:.0%}",
            f"{row['decision_us']:.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def main() -> int:
    """Parse the command line, evaluate, print; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="tierwise policy eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
                on_progress=bar.update,
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

"""The standard suite: every policy on the same held-out worlds, presets, load curve and shifts.

    tierwise policy eval --suite standard --seeds 20 --out runs/suite

Writes suite.json, suite.md, load.png and presets.png. All worlds are simulated. Differences to
`ect` are paired by world (the same arrivals and noise for each policy); intervals are 95 %
bootstrap intervals of the interquartile mean.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.simulator import Simulator
from envs.world import NAMED, NO_SHIFT, Shift, make_world
from tierwise.errors import TierwiseError
from tierwise.files import write_atomically
from training.bounds import clairvoyant, relaxed_cost_s
from training.evaluate import HELD_OUT, Columns, as_columns, load_policies, summary
from training.figures import Figures, mean_cost_s, measure
from training.judge import processes
from training.report import plot_differences, plot_load, to_markdown

POLICIES = (
    "cloud-only",
    "edge-first",
    "least-loaded",
    "power-of-two",
    "bounded-hashing",
    "pull-based",
    "locality",
    "slowest-fit",
    "kubernetes-like",
    "nomad-like",
    "probabilistic",
    "linucb",
    "defdrel",
    "rollout",
    "soft-ect",
    "ect",
    "learned",
)
LOADS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.1)
LOAD_PRESET = "campus"
PARTS = ("presets", "load", "shifts", "bounds")
BOUND_REQUESTS = 150  # a world with a rollout of every candidate at every decision takes its time
SHIFTS: dict[str, tuple[str, Shift]] = {
    "3x the nodes": ("campus", Shift(node_factor=3)),
    "10x the nodes": ("small", Shift(node_factor=10)),
    "an unseen device": ("campus", Shift(has_new_device=True)),
    "2x the load": ("campus", Shift(load_factor=2.0)),
    "nodes crash": ("factory", Shift(crash_interval_s=6.0)),
    "5 s stale heartbeats": ("campus", Shift(heartbeat_interval_s=5.0)),
    "3x the round trips": ("factory", Shift(rtt_factor=3.0)),
    "late messages": ("campus", Shift(spike=0.05)),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of world in one part of the suite."""

    part: str
    name: str
    preset: str
    shift: Shift


def cases() -> list[Case]:
    """Return the whole suite."""
    return [
        *(Case("presets", preset, preset, NO_SHIFT) for preset in NAMED),
        *(Case("load", f"{load:g}", LOAD_PRESET, Shift(load=load)) for load in LOADS),
        *(Case("shifts", name, preset, shift) for name, (preset, shift) in SHIFTS.items()),
    ]


def measure_case(policy_name: str, case: Case, seed: int, request_count: int) -> Figures:
    """Simulate one world with one policy and return its figures."""
    (policy,) = load_policies([policy_name]).values()
    world = make_world(case.preset, seed, request_count=request_count, shift=case.shift)
    return measure(policy, world, seed)


def run(
    names: Sequence[str],
    some: Sequence[Case],
    seeds: range,
    request_count: int,
    workers: int,
    on_progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Measure every policy on every case and seed; return a row per case and policy."""
    rows = []
    with processes(workers) as pool:
        for case in some:
            waiting = {
                name: [pool.submit(measure_case, name, case, seed, request_count) for seed in seeds]
                for name in names
            }
            figures = {name: _gather(futures, on_progress) for name, futures in waiting.items()}
            rows += [
                {"part": case.part, "case": case.name, "policy": name} | summary(columns, figures)
                for name, columns in figures.items()
            ]
    return rows


def bound(names: Sequence[str], preset: str, seed: int) -> Figures:
    """Return the cost of one shorter world under each policy, and its bounds."""
    world = make_world(preset, seed, request_count=BOUND_REQUESTS)
    costs = {"clairvoyant_s": mean_cost_s(clairvoyant(world, seed))}
    costs["relaxed_s"] = relaxed_cost_s(world, seed)
    for name, policy in load_policies(sorted({*names, "ect"})).items():
        costs[f"{name}_s"] = mean_cost_s(Simulator(world, seed).run(policy))
    return costs


def run_bounds(
    names: Sequence[str],
    seeds: range,
    workers: int,
    on_progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Return one row per preset: mean costs of the policies and of the bounds."""
    rows: list[dict[str, Any]] = []
    with processes(workers) as pool:
        waiting = {
            preset: [pool.submit(bound, names, preset, seed) for seed in seeds] for preset in NAMED
        }
        for preset, futures in waiting.items():
            columns = _gather(futures, on_progress)
            means = {key: float(values.mean()) for key, values in columns.items()}
            rows.append({"part": "bounds", "case": preset} | means)
    return rows


def _gather(futures: Sequence[Future[Figures]], on_progress: Callable[[], None]) -> Columns:
    """Wait for the figures of several worlds."""
    worlds = []
    for future in futures:
        worlds.append(future.result())
        on_progress()
    return as_columns(worlds)


def main() -> int:
    """Parse the command line, run the suite, write and print it; return the exit code."""
    parser = argparse.ArgumentParser(prog="tierwise policy eval --suite", description=__doc__)
    parser.add_argument("--policies", default=",".join(POLICIES), help="names or run folders")
    parser.add_argument("--suite", choices=("standard",), default="standard")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--seeds", type=int, default=20, help="held-out worlds per case")
    parser.add_argument("--requests", type=int, default=400, help="per world")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--bound-seeds", type=int, default=4, help="worlds per preset for bounds")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"))
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    flags = parser.parse_args()
    names, parts = flags.policies.split(","), flags.parts.split(",")
    some = [case for case in cases() if case.part in parts]
    if set(parts) - set(PARTS) or min(flags.seeds, flags.requests, flags.workers) < 1:
        parser.error(f"parts are {', '.join(PARTS)}; counts start at 1")
    try:
        load_policies(names)
    except TierwiseError as error:
        parser.error(str(error))
    from tqdm import tqdm

    bound_count = len(NAMED) * flags.bound_seeds if "bounds" in parts else 0
    total = len(some) * len(names) * flags.seeds + bound_count
    with tqdm(total=total, unit="world", file=sys.stderr) as bar:
        rows = run(
            names,
            some,
            range(HELD_OUT, HELD_OUT + flags.seeds),
            flags.requests,
            flags.workers,
            on_progress=bar.update,
        )
        if bound_count:
            seeds = range(HELD_OUT, HELD_OUT + flags.bound_seeds)
            rows += run_bounds(names, seeds, flags.workers, on_progress=bar.update)
    text = to_markdown(rows, flags.seeds, flags.requests)
    write_atomically(flags.out / "suite.json", json.dumps(rows, indent=1).encode())
    write_atomically(flags.out / "suite.md", text.encode())
    if "load" in parts:
        plot_load(rows, flags.out / "load.png", LOAD_PRESET)
    plot_differences(rows, flags.out / "presets.png")
    print(json.dumps(rows, indent=2) if flags.output == "json" else text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The standard suite: every policy on the same held-out worlds, presets, load curve and shifts.

    python -m training.suite --seeds 20 --out runs/suite

Writes suite.json, suite.md and load.png. All worlds are simulated. Differences to `ect` are paired
by world (the same arrivals and noise for each policy); intervals are 95 % bootstrap intervals of
the interquartile mean.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from envs.simulator import Simulator
from envs.world import NAMED, NO_SHIFT, Shift, make_world
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.function import Priority
from tierwise.domain.topology import Tier
from tierwise.errors import TierwiseError
from tierwise.files import write_atomically
from training.evaluate import HELD_OUT, interval, iqm, load_policies

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


def measure(policy_name: str, case: Case, seed: int, request_count: int) -> dict[str, float]:
    """Simulate one world with one policy and return its figures."""
    (policy,) = load_policies([policy_name]).values()
    world = make_world(case.preset, seed, request_count=request_count, shift=case.shift)
    simulator = Simulator(world, seed)
    outcomes = simulator.run(policy)
    tier_of = {node.node_id: node.tier for node in world.nodes}
    latency_s = np.array([o.latency.total_s for o in outcomes])
    missed = np.array([o.is_missed for o in outcomes])
    priority = np.array([int(o.priority) for o in outcomes])
    tiers = [tier_of[o.node_id] for o in outcomes if o.node_id is not None]
    by_origin: dict[str, list[bool]] = {}
    for outcome in outcomes:
        by_origin.setdefault(outcome.origin, []).append(not outcome.is_missed)
    held = np.array([np.mean(each) for each in by_origin.values()])
    p50, p95, p99 = np.percentile(latency_s, (50, 95, 99))
    found = {
        "cost_s": float(np.mean([DEFAULT_OBJECTIVE.cost_s(o) for o in outcomes])),
        "p50_s": float(p50),
        "p95_s": float(p95),
        "p99_s": float(p99),
        "missed": float(missed.mean()),
        "cold": float(np.mean([o.is_cold for o in outcomes])),
        "usd_per_million": 1e6 * float(np.mean([o.money_usd for o in outcomes])),
        # Jain's index over the users' edges of the share of deadlines held; 1 is equal.
        "fairness": float(held.sum() ** 2 / max(1e-9, len(held) * (held**2).sum())),
    }
    for level in Priority:
        mine = missed[priority == int(level)]
        found[f"missed_{level.name.lower()}"] = float(mine.mean()) if len(mine) else 0.0
    for tier in Tier:
        found[tier.label] = sum(t is tier for t in tiers) / max(1, len(tiers))
    return found


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
    with ProcessPoolExecutor(workers) as pool:
        for case in some:
            waiting = {
                name: [pool.submit(measure, name, case, seed, request_count) for seed in seeds]
                for name in names
            }
            figures: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
            for name, futures in waiting.items():
                worlds = []
                for future in futures:
                    worlds.append(future.result())
                    on_progress()
                figures[name] = {key: np.array([w[key] for w in worlds]) for key in worlds[0]}
            for name, columns in figures.items():
                row: dict[str, Any] = {"part": case.part, "case": case.name, "policy": name}
                row |= {key: float(values.mean()) for key, values in columns.items()}
                row["cost_s"] = iqm(columns["cost_s"])
                if "ect" in figures:
                    ratio = columns["cost_s"] / figures["ect"]["cost_s"] - 1.0
                    row["versus_ect"] = iqm(ratio)
                    row["versus_ect_low"], row["versus_ect_high"] = interval(ratio)
                rows.append(row)
    return rows


def to_markdown(rows: list[dict[str, Any]], seeds: int, requests: int) -> str:
    """Return the tables for people."""
    lines = [
        "# Placement policies, simulated",
        "",
        f"{seeds} held-out worlds per case, {requests} requests each, the same for every policy.",
        "Cost is the objective in second-equivalents (interquartile mean); `vs ect` is the paired",
        "difference to the tuned base score with its 95 % bootstrap interval.",
    ]
    for part in dict.fromkeys(row["part"] for row in rows):
        for case in dict.fromkeys(row["case"] for row in rows if row["part"] == part):
            lines += [
                "",
                f"## {part}: {case}",
                "",
                "| policy | cost | vs ect | p50 ms | p95 ms | p99 ms | missed | of critical | cold "
                "| $/million | fairness | edge/fog/cloud |",
                "|---|---|---|---|---|---|---|---|---|---|---|---|",
            ]
            mine = [row for row in rows if (row["part"], row["case"]) == (part, case)]
            for row in sorted(mine, key=lambda each: float(each["versus_ect"])):
                lines.append(
                    f"| {row['policy']} | {row['cost_s']:.3f} | {row['versus_ect']:+.1%} "
                    f"[{row['versus_ect_low']:+.1%}, {row['versus_ect_high']:+.1%}] "
                    f"| {1e3 * row['p50_s']:.0f} | {1e3 * row['p95_s']:.0f} "
                    f"| {1e3 * row['p99_s']:.0f} | {row['missed']:.1%} "
                    f"| {row['missed_critical']:.1%} | {row['cold']:.1%} "
                    f"| {row['usd_per_million']:.2f} | {row['fairness']:.3f} "
                    f"| {row['edge']:.0%}/{row['fog']:.0%}/{row['cloud']:.0%} |"
                )
    return "\n".join(lines) + "\n"


def plot_load(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw cost over load, one line per policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    loads = [row for row in rows if row["part"] == "load"]
    for name in dict.fromkeys(row["policy"] for row in loads):
        mine = [row for row in loads if row["policy"] == name]
        axes.plot(
            [float(row["case"]) for row in mine],
            [row["cost_s"] for row in mine],
            linewidth=2.5 if name in ("ect", "learned") else 1.0,
            label=name,
        )
    axes.set(xlabel="load (mean CPU demand ÷ capacity)", ylabel="cost per request, s", yscale="log")
    axes.set_title(f"simulated, preset {LOAD_PRESET}")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    """Parse the command line, run the suite, write and print it; return the exit code."""
    parser = argparse.ArgumentParser(prog="tierwise policy eval --suite", description=__doc__)
    parser.add_argument("--policies", default=",".join(POLICIES), help="names or run folders")
    parser.add_argument("--parts", default="presets,load,shifts")
    parser.add_argument("--seeds", type=int, default=20, help="held-out worlds per case")
    parser.add_argument("--requests", type=int, default=400, help="per world")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=Path("runs/suite"))
    flags = parser.parse_args()
    names, parts = flags.policies.split(","), flags.parts.split(",")
    some = [case for case in cases() if case.part in parts]
    if not some or min(flags.seeds, flags.requests, flags.workers) < 1:
        parser.error("parts are presets, load and shifts; counts start at 1")
    try:
        load_policies(names)
    except TierwiseError as error:
        parser.error(str(error))
    from tqdm import tqdm

    with tqdm(total=len(some) * len(names) * flags.seeds, unit="world", file=sys.stderr) as bar:
        rows = run(
            names,
            some,
            range(HELD_OUT, HELD_OUT + flags.seeds),
            flags.requests,
            flags.workers,
            on_progress=bar.update,
        )
    text = to_markdown(rows, flags.seeds, flags.requests)
    write_atomically(flags.out / "suite.json", json.dumps(rows, indent=1).encode())
    write_atomically(flags.out / "suite.md", text.encode())
    if "load" in parts:
        plot_load(rows, flags.out / "load.png")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Which memory does a call get, and what does that cost? tierwise beside eight ways to size.

    python -m benchmarks.bench_memory_sizing [--seeds 10] [--out docs/results]

Judges by docs/results/memory_profiles.json: real peaks, needs and CPU times of real workers
(`python -m benchmarks.measure_memory`). Choices are replayed against that, in seeded order. A first
attempt whose memory is less than the measured need is out of memory: it is billed in full, and
once more at double the memory. Half a CPU is *emulated* as twice the CPU time.
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import make_table, show, where
from benchmarks.sizing_rivals import RIVALS, SHARES, Run, Size, Sizer
from tierwise.domain.prices import PriceTable
from tierwise.domain.sizing import RETRY_FACTOR, in_steps
from tierwise.domain.topology import Tier

PROFILES = Path("docs/results/memory_profiles.json")
SPLITS = ("interpolate", "extrapolate", "skewed")
FOLDS = 4
TRAIN_INPUTS = 24  # of those profiled, drawn anew for each seed
SKEWED_CALLS = 400
ZIPF = 1.0
DEADLINE_FACTOR = 2.0  # × the longest profiled run: room for one retry of an ordinary call
BOOTSTRAPS = 2000
PRICES = PriceTable()


@dataclass(frozen=True, slots=True)
class Score:
    """Sums over the calls of one function, split and seed."""

    gb_s: float
    usd: float
    cpu_s: float
    oom_share: float
    lost_share: float
    miss_share: float
    allocated_mib: float


def load(path: Path) -> dict[str, dict[str, list[list[Run]]]]:
    """Return function → split → input → its repetitions."""
    found = json.loads(path.read_text(encoding="utf-8"))["functions"]
    return {
        name: {
            split: [_runs(r) for r in records if r["split"] == split]
            for split in ("train", "interpolate", "extrapolate")
        }
        for name, records in found.items()
    }


def _runs(record: dict[str, Any]) -> list[Run]:
    slack_mib = max(0.0, record["need_mib"] - in_steps(min(record["peak_mib"])))
    return [
        Run(
            measures=record["measures"],
            peak_mib=peak,
            need_mib=in_steps(peak + slack_mib),
            run_s={share: cpu_s / share for share in SHARES},
        )
        for peak, cpu_s in zip(record["peak_mib"], record["cpu_s"], strict=True)
    ]


def judge(sizer: Sizer | None, calls: Sequence[Run], deadline_s: float) -> Score:
    """Replay calls; without a sizer the exhaustive oracle chooses."""
    gb_s = usd = cpu_s = allocated_mib = 0.0
    oom = lost = missed = 0
    for run in calls:
        size = _oracle(run, deadline_s) if sizer is None else sizer.choose(run.measures)
        run_s = run.run_s[size.share]
        attempts = [size.memory_mib]
        if size.memory_mib < run.need_mib:
            oom += 1
            attempts.append(RETRY_FACTOR * size.memory_mib)
        is_lost = attempts[-1] < run.need_mib
        for memory_mib in attempts:
            allocated_mib += memory_mib
            gb_s += memory_mib / 1024.0 * run_s
            cpu_s += size.share * run_s
            usd += PRICES.call_usd(Tier.CLOUD, memory_mib=memory_mib, billed_s=run_s, moved_usd=0.0)
        lost += is_lost
        missed += is_lost or len(attempts) * run_s > deadline_s
        if sizer is not None:
            sizer.learn(run.measures, run, len(attempts) > 1)
    count = len(calls)
    return Score(gb_s, usd, cpu_s, oom / count, lost / count, missed / count, allocated_mib)


def _oracle(run: Run, deadline_s: float) -> Size:
    """Return the cheapest configuration that ends, and in time if any does."""
    return min(
        (Size(run.need_mib, share) for share in SHARES),
        key=lambda s: (run.run_s[s.share] > deadline_s, s.memory_mib * run.run_s[s.share]),
    )


def tuned(make: type, runs: Sequence[Run], deadline_s: float, seed: int) -> Sizer:
    """Return a sizer trained with the knob that is best in a cross-validation over inputs."""
    chosen = make()
    if len(make.knobs) > 1:
        inputs = list(dict.fromkeys(tuple(sorted(r.measures.items())) for r in runs))
        fold_of = {key: number % FOLDS for number, key in enumerate(inputs)}
        folds = [fold_of[tuple(sorted(r.measures.items()))] for r in runs]
        tried: dict[float, list[Score]] = {knob: [] for knob in make.knobs}
        for fold in range(FOLDS):
            known = [r for r, f in zip(runs, folds, strict=True) if f != fold]
            held_out = [r for r, f in zip(runs, folds, strict=True) if f == fold]
            sizer = make()
            for number, knob in enumerate(make.knobs):
                sizer.knob = knob
                if number == 0 or make.trains_with_knob:
                    sizer.train(known, seed)
                tried[knob].append(judge(sizer, held_out, deadline_s))
        chosen.knob = min(tried, key=lambda knob: _rank(tried[knob]))
    chosen.train(runs, seed)
    return chosen


def _rank(scores: Sequence[Score]) -> tuple[float, float]:
    oom_share = float(np.mean([score.oom_share for score in scores]))
    return max(0.0, oom_share - 0.01), sum(score.usd for score in scores)


def measure(
    functions: Mapping[str, Mapping[str, list[list[Run]]]], seeds: int
) -> dict[str, dict[str, np.ndarray]]:
    """Return way → split → scores of shape (functions, seeds, figures); `oracle` is a way too."""
    figures = len(Score.__dataclass_fields__)
    ways = ["oracle", *RIVALS]
    shape = (len(functions), seeds, figures)
    found = {way: {split: np.zeros(shape) for split in SPLITS} for way in ways}
    for row, (name, splits) in enumerate(functions.items()):
        for seed in range(seeds):
            rng = np.random.default_rng([seed, *name.encode()])
            chosen = rng.permutation(len(splits["train"]))[:TRAIN_INPUTS]
            runs = [run for i in chosen for run in splits["train"][i]]
            deadline_s = DEADLINE_FACTOR * max(
                run.run_s[1.0] for reps in splits["train"] for run in reps
            )
            streams = {split: _stream(splits, split, rng) for split in SPLITS}
            for way in ways:
                made = None if way == "oracle" else tuned(RIVALS[way], runs, deadline_s, seed)
                for split in SPLITS:
                    score = judge(copy.deepcopy(made), streams[split], deadline_s)
                    found[way][split][row, seed] = [
                        getattr(score, f) for f in Score.__dataclass_fields__
                    ]
        print(f"  {name}", file=sys.stderr, flush=True)
    return found


def _stream(
    splits: Mapping[str, list[list[Run]]], split: str, rng: np.random.Generator
) -> list[Run]:
    """Return calls in random order; *skewed* draws inputs with chance ∝ 1 / rank of their need."""
    if split != "skewed":
        calls = [run for reps in splits[split] for run in reps]
        return [calls[i] for i in rng.permutation(len(calls))]
    inputs = sorted(splits["interpolate"], key=lambda reps: (reps[0].need_mib, reps[0].run_s[1.0]))
    odds = 1.0 / np.arange(1, len(inputs) + 1) ** ZIPF
    drawn = rng.choice(len(inputs), SKEWED_CALLS, p=odds / odds.sum())
    return [inputs[i][int(rng.integers(len(inputs[i])))] for i in drawn]


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Return the mean over functions and seeds with its 95 % bootstrap interval, both resampled."""
    rng = np.random.default_rng(0)
    functions, seeds = values.shape
    means = [
        float(
            values[rng.integers(functions, size=functions)][
                :, rng.integers(seeds, size=seeds)
            ].mean()
        )
        for _ in range(BOOTSTRAPS)
    ]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def figures(found: dict[str, dict[str, np.ndarray]], split: str, way: str) -> dict[str, np.ndarray]:
    """Return what the tables show, each of shape (functions, seeds)."""
    mine, best = found[way][split], found["oracle"][split]
    static = found["static max"][split]
    return {
        "GB-s over oracle": mine[..., 0] / best[..., 0] - 1.0,
        "bill over oracle": mine[..., 1] / best[..., 1] - 1.0,
        "out of memory": mine[..., 3],
        "lost": mine[..., 4],
        "missed": mine[..., 5],
        "GB-s saved of static max": 1.0 - mine[..., 0] / static[..., 0],
        "memory saved of it": 1.0 - mine[..., 6] / static[..., 6],
    }


def main() -> None:
    """Print the tables; with --out, write them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--profiles", type=Path, default=PROFILES)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    functions = load(options.profiles)
    found = measure(functions, options.seeds)
    summary: dict[str, Any] = {}
    for split in SPLITS:
        rows = {way: figures(found, split, way) for way in found}
        columns = list(rows["oracle"])
        table = make_table(
            f"{split}: {len(functions)} functions, {options.seeds} seeds, mean [95 % interval]",
            ["way to size", *columns],
        )
        summary[split] = {}
        for way, row in rows.items():
            found_here = {column: interval(values) for column, values in row.items()}
            summary[split][way] = {column: list(v) for column, v in found_here.items()}
            table.add_row(way, *(f"{m:.1%} [{a:.1%}…{b:.1%}]" for m, a, b in found_here.values()))
        show(table)
    verdicts = _verdicts(summary)
    for line in verdicts:
        print(line)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "memory_sizing.json").write_text(
            json.dumps(
                {
                    "run": f"{where()}, {options.seeds} seeds",
                    "verdicts": verdicts,
                    "splits": summary,
                },
                indent=1,
            )
            + "\n",
            "utf-8",
        )


def _verdicts(summary: dict[str, Any]) -> list[str]:
    """Return each goal, the figure and whether it is met, by split."""
    lines = []
    for way in ("tierwise", "tierwise online"):
        for split, rows in summary.items():
            mine, forest, static = rows[way], rows["MemFigLess-RF"], rows["static max"]
            goals = [
                ("GB-s over oracle", mine["GB-s over oracle"][0], "≤", 0.15),
                ("bill over oracle", mine["bill over oracle"][0], "≤", 0.15),
                ("out of memory", mine["out of memory"][0], "≤", 0.01),
                ("missed − static max", mine["missed"][0] - static["missed"][0], "≤", 0.0),
                (
                    "less waste than MemFigLess-RF",
                    1.0 - mine["GB-s over oracle"][0] / max(1e-9, forest["GB-s over oracle"][0]),
                    "≥",
                    0.2,
                ),
            ]
            if split == "skewed":
                saved = mine["GB-s saved of static max"][0]
                goals.append(("GB-s saved of static max", saved, "≥", 0.8))
                saved = mine["memory saved of it"][0]
                goals.append(("memory saved of static max", saved, "≥", 0.8))
            for name, value, sign, goal in goals:
                is_met = value <= goal + 1e-9 if sign == "≤" else value >= goal
                lines.append(
                    f"{way}, {split}: {name} {value:.1%}, asked {sign} {goal:.0%}: "
                    f"{'met' if is_met else 'MISSED'}"
                )
    return lines


if __name__ == "__main__":
    main()

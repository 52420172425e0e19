"""What bench_flstore makes of its samples: plain dicts for JSON, and rows for its tables. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.flstore.prices import BILLS, Cost, Holding, Use, break_even, cost
from benchmarks.flstore.replay import Plan, Replayed
from benchmarks.flstore.results import Change, Sample, change, latency, paired
from benchmarks.flstore.rivals import BOUNDED, EMULATED, REDIS, S3
from benchmarks.flstore.trace import MIX, PER_ROUND

OURS = "tierwise"
LATENCY_TARGETS = {S3: -0.90, REDIS: -0.80, BOUNDED: -0.80}
COST_TARGETS = {S3: -0.92, REDIS: -0.95, BOUNDED: -0.95}


def holding(system: str, plan: Plan) -> Holding:
    """Return what a system keeps of a plan's rounds."""
    whole_gb = plan.rounds * (PER_ROUND + 1) * plan.size_mb / 1e3
    held_gb = plan.cache_mib * 2**20 / 1e9
    if system.startswith(BOUNDED):
        return Holding(kind="redis", held_gb=held_gb, replica_gb=held_gb, stored_gb=whole_gb)
    if system.startswith(REDIS):
        return Holding(kind="redis", held_gb=whole_gb, replica_gb=whole_gb)
    if system.startswith(S3):
        return Holding(kind="s3", stored_gb=whole_gb)
    return Holding(kind="tierwise", held_gb=held_gb, replica_gb=held_gb, stored_gb=whole_gb)


def summary(runs: Sequence[Replayed]) -> dict[str, Any]:
    """Return everything that follows from the samples of all sizes."""
    samples = [sample for run in runs for sample in run.samples]
    plans = {run.plan.size_mb: run.plan for run in runs}
    systems = list(dict.fromkeys(sample.system for sample in samples))
    sizes = sorted(plans)
    return {
        "latency": {
            str(size): {
                system: _latencies([x for x in samples if (x.size_mb, x.system) == (size, system)])
                for system in systems
            }
            for size in sizes
        },
        "changes": {
            system: {
                label: _changes(some, system, plans)
                for label, some in _by_size(samples, sizes).items()
            }
            for system in systems
            if system != OURS
        },
        "costs": {
            str(size): {system: _costs(samples, system, plans[size]) for system in systems}
            for size in sizes
        },
        "break_even_per_hour": {
            str(size): {
                system: _break_even(samples, system, plans[size])
                for system in systems
                if system != OURS
            }
            for size in sizes
        },
        "hits": {
            str(run.plan.size_mb): {"hit_count": run.hit_count, "miss_count": run.miss_count}
            for run in runs
        },
        "answers": {
            "compared": sum(run.compared_count for run in runs),
            "differing": [each for run in runs for each in run.differing],
        },
        "ingest_s": {str(run.plan.size_mb): run.ingest_s for run in runs},
    }


def _by_size(samples: Sequence[Sample], sizes: Sequence[int]) -> dict[str, list[Sample]]:
    found = {str(size): [x for x in samples if x.size_mb == size] for size in sizes}
    if len(sizes) > 1:
        found["all"] = list(samples)
    return found


def _latencies(samples: Sequence[Sample]) -> dict[str, Any]:
    if not samples:
        return {}
    classes = {
        name: latency(some)
        for name in MIX
        if (some := [x for x in samples if x.query_class == name])
    }
    workloads = {
        name: latency([x for x in samples if x.workload == name])
        for name in sorted({x.workload for x in samples})
    }
    return {**latency(samples), "by_class": classes, "by_workload": workloads}


def _changes(samples: Sequence[Sample], system: str, plans: Mapping[int, Plan]) -> dict[str, Any]:
    """Return how much lower our latency and cost are, over the queries that both answered."""
    ours, theirs = paired(samples, OURS, system)
    if not ours:
        return {}
    found = {"n": len(ours), "latency": asdict(_change(ours, theirs))}
    for bill in BILLS:
        sums = [
            np.array([cost([x.use], holding(x.system, plans[x.size_mb]), bill).total for x in some])
            for some in (ours, theirs)
        ]
        found[bill] = asdict(change(sums[0], sums[1]))
    return found


def _change(ours: Sequence[Sample], theirs: Sequence[Sample]) -> Change:
    return change(np.array([x.elapsed_s for x in ours]), np.array([x.elapsed_s for x in theirs]))


def _costs(samples: Sequence[Sample], system: str, plan: Plan) -> dict[str, Any]:
    uses = _uses(samples, system, plan.size_mb)
    if not uses:
        return {}
    return {bill: _as_dict(cost(uses, holding(system, plan), bill)) for bill in BILLS}


def _as_dict(each: Cost) -> dict[str, float]:
    return {**asdict(each), "total": each.total}


def _break_even(samples: Sequence[Sample], system: str, plan: Plan) -> float | None:
    """Return from how many queries per hour on we cost less if all that is held is billed."""
    ours, theirs = paired([x for x in samples if x.size_mb == plan.size_mb], OURS, system)
    if not ours:
        return None
    found = break_even(
        ([x.use for x in ours], holding(OURS, plan)),
        ([x.use for x in theirs], holding(system, plan)),
        "held",
    )
    return found if np.isfinite(found) else None


def _uses(samples: Sequence[Sample], system: str, size_mb: int) -> list[Use]:
    return [x.use for x in samples if (x.system, x.size_mb) == (system, size_mb)]


def verdicts(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row per rival: our latency and costs against it, and whether that will do."""
    rows = []
    for system, by_size in found["changes"].items():
        kind = system.removesuffix(EMULATED)
        overall = by_size.get("all") or next(iter(by_size.values()), {})
        if kind not in LATENCY_TARGETS or not overall:
            continue
        goals = [("latency", LATENCY_TARGETS[kind])]
        goals += [(bill, COST_TARGETS[kind]) for bill in BILLS]
        cells = []
        for key, target in goals:
            value = Change(**overall[key]).value
            cells.append(f"{value:+.1%} {'met' if value <= target else 'MISSED'}")
        targets = f"{LATENCY_TARGETS[kind]:.0%}, {COST_TARGETS[kind]:.0%}"
        rows.append((system, *cells, targets))
    return rows

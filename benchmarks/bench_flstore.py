"""What do questions to rounds of federated learning take and cost, beside S3 and Redis?

    make bench-flstore                     # half an hour; writes docs/results/flstore.*
    python -m benchmarks.bench_flstore --quick

One seeded trace of non-training work after FLStore (Khan, Fountain, Abdelmoniem, Butt and Anwar,
MLSys 2025, arXiv:2503.00323): ten of 250 clients a round, questions of its classes P1 to P4, models
of 10, 47 and 113 MB. It reports −71 % latency and −92 % cost against an aggregator that reads from
an object store, −65 % and −99 % against one with an in-memory cache. Here both rivals are real and
tuned, run beside ours, take turns with it query by query, and answer with the same functions; all
answers are compared. The parts are in benchmarks/flstore: trace.py (what is asked), rivals.py (what
is emulated), stores.py (what tuned means), prices.py (what is billed), measures.py, aggregation.py
and policies.py (what else is measured).
"""

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from benchmarks.flstore.aggregation import aggregation
from benchmarks.flstore.measures import measures
from benchmarks.flstore.policies import hit_rates
from benchmarks.flstore.replay import Plan, Replayed, replay
from benchmarks.flstore.report import report
from benchmarks.flstore.results import latency
from benchmarks.flstore.servers import VENV, find_redis
from benchmarks.flstore.tables import summary
from benchmarks.flstore.trace import SEED
from benchmarks.report import where

ROUNDS = {10: 24, 47: 12, 113: 4}
QUERIES = {10: 120, 47: 60, 113: 40}
PARTS = ("trace", "own", "measures", "aggregation", "policies")
OWN = {  # policy, rounds that fit into memory
    "lru": ("lru", 2.5),
    "lfu": ("lfu", 2.5),
    "fifo": ("fifo", 2.5),
    "adaptive, half the memory": ("adaptive", 1.25),
}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # stops what was started
    options = parsed()
    command = " ".join(["python -m benchmarks.bench_flstore", *sys.argv[1:]])
    found: dict[str, Any] = {"command": command, "where": where(), "seed": options.seed}
    plans = [plan(size, options) for size in options.sizes]
    if "trace" in options.parts:
        if why := missing():
            print(f"without rivals: {why}")
        runs = [_told(each, with_rivals=not why) for each in plans]
        found["trace"] = summary(runs)
        found["samples"] = samples(runs)
    if "own" in options.parts and "trace" in options.parts and not options.quick:
        found["own"] = {
            str(size): {name: own(plan(size, options, *how)) for name, how in OWN.items()}
            for size in options.sizes[:1]
        }
    if "measures" in options.parts:
        size = 10 if options.quick else 47
        found["measures"] = measures(size, options.seed, asks=50 if options.quick else 200)
    if "aggregation" in options.parts:
        found["aggregation"] = aggregation(10 if options.quick else 47)
    if "policies" in options.parts:
        found["policies"] = hit_rates(options.seed)
    report(found, options.out)


def parsed() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(ROUNDS), help="MB of models")
    parser.add_argument("--queries", type=int, default=0, help="per size, instead of the usual")
    parser.add_argument("--rounds", type=int, default=0, help="per size, instead of the usual")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--cache-rounds", type=float, default=2.5, help="that fit into memory")
    parser.add_argument("--naive-every", type=int, default=20, help="queries; 0: never")
    parser.add_argument("--out", type=Path, help="folder for flstore.json and flstore.md")
    parser.add_argument("--quick", action="store_true", help="10 MB, 3 rounds, 24 queries")
    options = parser.parse_args()
    if options.quick:
        options.sizes = [10]
        options.queries, options.rounds = options.queries or 24, options.rounds or 3
    return options


def missing() -> str:
    """Return why the rivals cannot be started; empty if they can."""
    if not (VENV / "bin/weed").exists():
        return f"there is no SeaweedFS in {VENV.name} (make bench-flstore makes it)"
    try:
        find_redis()
    except FileNotFoundError as error:
        return str(error)
    return ""


def plan(
    size_mb: int, options: argparse.Namespace, policy: str = "adaptive", cache_rounds: float = 0.0
) -> Plan:
    """Return what a size is tried with."""
    return Plan(
        size_mb=size_mb,
        rounds=options.rounds or ROUNDS.get(size_mb, 6),
        query_count=options.queries or QUERIES.get(size_mb, 60),
        cache_rounds=cache_rounds or options.cache_rounds,
        naive_every=0 if options.quick else options.naive_every,
        seed=options.seed,
        policy=policy,
    )


def own(each: Plan) -> dict[str, Any]:
    """Return how the trace fares with another policy, without rivals."""
    run = replay(each, with_rivals=False)
    return {**latency(run.samples), "hit_count": run.hit_count, "miss_count": run.miss_count}


def samples(runs: list[Replayed]) -> list[dict[str, Any]]:
    """Return every query, for whoever wants to compute something else from them."""
    return [
        {
            "system": x.system,
            "size_mb": x.size_mb,
            "query": x.number,
            "class": x.query_class,
            "workload": x.workload,
            "elapsed_ms": round(1e3 * x.elapsed_s, 3),
            "fetch_ms": round(1e3 * x.fetch_s, 3),
            "read_bytes": x.read_bytes,
            "gets": x.get_count,
            "hit": x.was_hit,
        }
        for run in runs
        for x in [*run.first, *run.samples]
    ]


def _told(each: Plan, *, with_rivals: bool) -> Replayed:
    print(f"{each.size_mb} MB: {each.rounds} rounds, {each.query_count} queries …", flush=True)
    run = replay(each, with_rivals=with_rivals)
    differing = json.dumps(run.differing[:5]) if run.differing else "none"
    print(f"  {run.compared_count} answers compared, different: {differing}", flush=True)
    return run


if __name__ == "__main__":
    main()

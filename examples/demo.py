"""The demo: a local cluster, three real workloads, four placement policies on the same trace."""

import argparse
import asyncio
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import tierwise
from examples import digits, photos, texts
from tierwise.sdk.operator import Operator, Record

POLICIES = ("edge-only", "cloud-only", "ect", "learned")
LABELS = {"ect": "ect (tuned heuristic)", "learned": "learned (shipped policy)"}
EDGES = ("edge-1", "edge-2")
FL_ROUNDS = 3
REPORT_WAIT_S = 1.3  # two heartbeats: by then every call is recorded
COOL_DOWN_S = 3.5  # longer than the functions are kept warm: each policy starts cold


@dataclass(frozen=True, slots=True)
class Shot:
    """One call of the trace."""

    at_s: float
    edge: str
    kind: str
    payload: Any


def make_trace(seed: int, duration_s: float, rate: float) -> list[Shot]:
    """Draw the calls: Poisson, with a burst at one edge in the middle third."""
    from sklearn.datasets import load_sample_images

    folder = Path(str(load_sample_images().filenames[0])).parent
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    rng = np.random.default_rng(seed)
    documents = texts.documents(rng, 20)
    shots: list[Shot] = []
    now_s = 0.0
    while True:
        is_burst = duration_s / 3 < now_s < 2 * duration_s / 3
        now_s += float(rng.exponential(1.0 / (rate * (2.0 if is_burst else 0.7))))
        if now_s > duration_s:
            return shots
        edge = EDGES[0] if rng.random() < (0.75 if is_burst else 0.5) else EDGES[1]
        if rng.random() < 0.45:
            shots.append(Shot(now_s, edge, "photo", pictures[int(rng.integers(len(pictures)))]))
        else:
            shots.append(Shot(now_s, edge, "text", documents[int(rng.integers(len(documents)))]))


async def drive(
    shots: list[Shot],
    clients: dict[str, tierwise.Client],
    names: dict[str, str],
    on_done: Callable[[], None],
) -> int:
    """Send every call at its time, whether or not earlier ones have ended; count the failures."""
    loop = asyncio.get_running_loop()
    start_s = loop.time() + 0.1
    failed_count = 0

    async def shoot(shot: Shot) -> None:
        nonlocal failed_count
        await asyncio.sleep(max(0.0, start_s + shot.at_s - loop.time()))
        try:
            await clients[shot.edge].function(names[shot.kind]).remote.aio(shot.payload)
        except tierwise.TierwiseError as error:
            failed_count += 1
            print(f"a call failed: {error}", file=sys.stderr)
        on_done()

    await asyncio.gather(*(shoot(shot) for shot in shots))
    for client in clients.values():
        await client.aclose()
    return failed_count


def summarise(calls: list[Record]) -> dict[str, Any]:
    """Return the figures of one policy from the platform's own call records."""
    outcomes = [call["outcome"] for call in calls]
    latency_ms = np.array([1e3 * sum(o["latency"].values()) for o in outcomes])
    missed = [
        o["state"] != "ok" or 1e3 * o["deadline_s"] < ms
        for o, ms in zip(outcomes, latency_ms, strict=True)
    ]
    tiers = [o["node_id"].partition("-")[0] for o in outcomes]
    explained = [o["explanation"] for o in outcomes if o.get("explanation")]
    return {
        "calls": len(outcomes),
        "p50_ms": float(np.percentile(latency_ms, 50)),
        "p95_ms": float(np.percentile(latency_ms, 95)),
        "missed": float(np.mean(missed)),
        "usd_per_million": 1e6 * float(np.mean([o["money_usd"] for o in outcomes])),
        "fallback": float(np.mean([bool(why["fallback"]) for why in explained] or [0.0])),
        "share": {tier: tiers.count(tier) / len(tiers) for tier in ("edge", "fog", "cloud")},
        "slowest": max(outcomes, key=lambda o: sum(o["latency"].values()))["request_id"],
    }


def main() -> int:
    """Run the demo and print its tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=12.0, help="length of the trace")
    parser.add_argument("--rate", type=float, default=45.0, help="calls per second, on average")
    parser.add_argument("--state", type=Path, default=Path(".tierwise/demo"))
    flags = parser.parse_args()
    console = Console(stderr=True)
    out = Console(width=None if sys.stdout.isatty() else 120)
    shots = make_trace(flags.seed, flags.seconds, flags.rate)
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        step = progress.add_task("starting 1 cloud, 1 fog and 2 edge nodes", total=1)
        cluster = tierwise.LocalCluster(flags.state, "1c,1f,2e", policy="ect", seed=flags.seed)
        cluster.clean()
        with cluster:
            progress.update(step, completed=1)
            results, accuracies, example = run_all(cluster, shots, progress, flags.seed)
    print_results(out, results, accuracies, len(shots), flags.seed)
    out.print(example, highlight=False, soft_wrap=True)
    return 0


def run_all(
    cluster: tierwise.LocalCluster, shots: list[Shot], progress: Progress, seed: int
) -> tuple[dict[str, dict[str, Any]], list[float], str]:
    """Deploy, warm the profiles up, drive every policy, train; return everything to print."""
    admin = tierwise.connect(cluster.context)
    ask = Operator(admin)
    try:
        step = progress.add_task("training the text model, deploying three apps", total=1)
        names = {"photo": photos.describe_photo.deploy().function_id}
        names["text"] = texts.make_scorer(texts.train()).deploy().function_id
        digits.app.deploy()
        progress.update(step, completed=1)

        def drive_once(label: str, some: list[Shot]) -> int:
            step = progress.add_task(label, total=len(some))
            clients = {edge: tierwise.Client(cluster.context, entry=edge) for edge in EDGES}
            return asyncio.run(drive(some, clients, names, lambda: progress.advance(step)))

        # So that every policy knows the functions equally well: one short run that is not counted.
        warm_up = [Shot(s.at_s * 0.5, s.edge, s.kind, s.payload) for s in shots[: len(shots) // 4]]
        drive_once("learning what the functions cost (not counted)", warm_up)
        results: dict[str, dict[str, Any]] = {}
        for policy in POLICIES:
            ask.promote(policy)
            asyncio.run(asyncio.sleep(COOL_DOWN_S))
            before = {call["outcome"]["request_id"] for call in ask.calls(limit=10_000)}
            failed_count = drive_once(f"{policy}: {len(shots)} calls from the edges", shots)
            asyncio.run(asyncio.sleep(REPORT_WAIT_S))
            calls = [c for c in ask.calls(limit=10_000) if c["outcome"]["request_id"] not in before]
            results[policy] = summarise(calls) | {"failed": failed_count}
        accuracies = run_rounds(cluster.state / "data", admin, progress)
        example = explain_example(ask, results["learned"]["slowest"])
        return results, accuracies, example
    finally:
        admin.close()


def run_rounds(folder: Path, client: tierwise.Client, progress: Progress) -> list[float]:
    """Run the federated rounds under the learned policy."""
    files, pictures, labels = digits.split(folder, EDGES)
    step = progress.add_task("federated learning, clients pinned to edges", total=FL_ROUNDS)

    async def run() -> list[float]:
        found = []
        async for accuracy in digits.rounds(files, EDGES, pictures, labels, FL_ROUNDS):
            found.append(accuracy)
            progress.advance(step)
        await client.aclose()
        return found

    return asyncio.run(run())


def explain_example(ask: Operator, request_id: str) -> str:
    """Say why one call, the slowest under the learned policy, ran where it did."""
    outcome = ask.call(request_id)["outcome"]
    split = ", ".join(
        f"{name[:-2].replace('_', ' ')} {seconds * 1e3:.0f} ms"
        for name, seconds in outcome["latency"].items()
    )
    rows = (outcome.get("explanation") or {}).get("candidates", [])
    scores = ", ".join(
        f"{row['node_id']} {row['score']:.3f} s (p {row['propensity']:.2f})"
        for row in sorted(rows, key=lambda row: -row["propensity"])
    )
    return (
        f"\nThe slowest call of the learned policy, {request_id}, came to {outcome['origin']} "
        f"and ran on {outcome['node_id']}:\n  {split}\n  base scores: {scores}\n"
        "With a cluster of your own running (tierwise up), any call explains itself:\n"
        "  tierwise get calls;  tierwise explain CALL"
    )


def print_results(
    out: Console,
    results: dict[str, dict[str, Any]],
    accuracies: list[float],
    call_count: int,
    seed: int,
) -> None:
    """Print what the platform recorded."""
    table = Table(
        title=f"{call_count} real calls from two edges, the same (seed {seed}) for each policy",
        caption="Real processes and code; link delays and device speeds are emulated. Missed: the "
        "deadline. Fell back: decided by the base score, for the network did not know such inputs.",
    )
    table.add_column("policy")
    titles = ("p50", "p95", "missed", "$ per million", "edge / fog / cloud", "fell back", "failed")
    for title in titles:
        table.add_column(title, justify="right")
    for policy, found in results.items():
        share = found["share"]
        table.add_row(
            LABELS.get(policy, policy),
            f"{found['p50_ms']:.0f} ms",
            f"{found['p95_ms']:.0f} ms",
            f"{found['missed']:.1%}",
            f"{found['usd_per_million']:.2f}",
            f"{share['edge']:.0%} / {share['fog']:.0%} / {share['cloud']:.0%}",
            f"{found['fallback']:.0%}" if policy == "learned" else "",
            str(found["failed"]),
        )
    out.print(table)
    rounds = ", ".join(f"round {i + 1}: {a:.1%}" for i, a in enumerate(accuracies))
    out.print(f"Federated averaging on digits, accuracy on held-out pictures: {rounds}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

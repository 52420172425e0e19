"""What bench_sim2real prints and writes: one table, the verdicts, and everything as JSON."""

import json
from pathlib import Path
from typing import Any

from benchmarks.report import at_most, make_table, show
from tierwise.files import write_atomically

P50_ERROR_MAX, P95_ERROR_MAX = 0.10, 0.20
COLUMNS = (
    "policy",
    "p50 live",
    "sim",
    "error",
    "p95 live",
    "sim",
    "error",
    "missed live/sim",
    "objective live/sim",
)


def report(result: dict[str, Any], folder: Path) -> None:
    """Print the table and the verdicts; write both, and everything else as JSON."""
    table = make_table("Live agents against the simulator (simulated)", COLUMNS, _caption(result))
    for cells in _cells(result):
        table.add_row(*cells)
    show(table)
    verdicts = _verdicts(result)
    print("\n".join(verdicts))
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "sim2real.json", json.dumps(result, indent=1).encode())
    lines = [
        "# Simulator against live agents",
        "",
        f"`{result['command']}`",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" + "|---:" * (len(COLUMNS) - 1) + "|",
        *("| " + " | ".join(cells) + " |" for cells in _cells(result)),
        "",
        result["where"] + ". " + _caption(result),
        "",
        *(f"- {line}" for line in verdicts),
        "",
    ]
    write_atomically(folder / "sim2real.md", "\n".join(lines).encode())


def _cells(result: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            policy,
            f"{1e3 * row['live_p50_s']:.0f} ms",
            f"{1e3 * row['sim_p50_s']:.0f} ms",
            f"{row['p50_error']:+.1%}",
            f"{1e3 * row['live_p95_s']:.0f} ms",
            f"{1e3 * row['sim_p95_s']:.0f} ms",
            f"{row['p95_error']:+.1%}",
            f"{row['live_missed']:.1%} / {row['sim_missed']:.1%}",
            f"{row['live_cost_s']:.3f} / {row['sim_cost_s']:.3f} s",
        )
        for policy, row in result["rows"].items()
    ]


def _caption(result: dict[str, Any]) -> str:
    used = [a for a in result["attempts"] if a.get("is_used")]
    shares = [a["foreign_share"] for a in used]
    seeds = ", ".join(map(str, result["seeds"]))
    return (
        f"Trace seeds {seeds}, {sum(result['calls'].values())} calls per policy, pooled; fitted on "
        f"one other live run ({result['fit']['policy']}). Live links and device speeds are "
        f"emulated. Simulated: means of {result['simulations']} simulations per seed. Others took "
        f"{min(shares):.0%} to {max(shares):.0%} of the CPUs meanwhile; "
        f"{len(result['attempts']) - len(used)} disturbed runs were repeated."
    )


def _verdicts(result: dict[str, Any]) -> list[str]:
    worst, median, rank = result["worst"], result["median_error"], result["ranking"]
    again = result["repeated"]
    held = {name: 1e2 * worst[name] for name in worst}
    wrong = "".join(f"; live {a} < {b}, simulated not" for a, b in rank["disagreements"])
    order = " < ".join
    waits = [1e3 * (r["client_p50_s"] - r["live_p50_s"]) for r in result["rows"].values()]
    return [
        f"p50: largest error {worst['p50']:.1%} (median of policies {median['p50']:.1%}), goal "
        f"{at_most(held['p50'], 1e2 * P50_ERROR_MAX, ' %')}",
        f"p95: largest error {worst['p95']:.1%} (median of policies {median['p95']:.1%}), goal "
        f"{at_most(held['p95'], 1e2 * P95_ERROR_MAX, ' %')}",
        _one_trace(result["one_trace"]),
        f"ranking by objective, live: {order(rank['live'])}; simulated: {order(rank['simulated'])}",
        f"Kendall's tau {rank['kendall']:.2f}, Spearman {rank['spearman']:.2f}; of {rank['pairs']} "
        f"pairs live runs tell {rank['resolved']} apart (2 standard errors of paired blocks), of "
        f"which the simulator orders {rank['agreed']} alike: goal "
        f"{'met' if result['goals']['ranking'] else 'MISSED'}{wrong}",
        f"two live runs of one trace under {result['fit']['policy']} differ by "
        f"{again['p50_s']:+.1%} in p50, {again['p95_s']:+.1%} in p95, {again['cost_s']:+.1%} in "
        "the objective",
        f"compared is what the platform records; clients measured {min(waits):.1f} to "
        f"{max(waits):.1f} ms more at p50 (their own sending and waking)",
    ]


def _one_trace(errors: dict[str, list[float]]) -> str:
    """Say how far off the simulator is where nothing is pooled."""
    words = []
    for name, bound in (("p50", P50_ERROR_MAX), ("p95", P95_ERROR_MAX)):
        each = errors[name]
        held = sum(error <= bound for error in each)
        words.append(f"{name} within {bound:.0%} in {held} of {len(each)}, worst {max(each):.1%}")
    return f"single traces and policies, not pooled: {'; '.join(words)}"

"""Tables and pictures of a suite's rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TITLES = (
    "policy",
    "cost [95 % CI]",
    "vs ect [95 % CI]",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "missed",
    "low/normal/high/critical",
    "cold",
    "idle GB-s",
    "$/million",
    "fairness",
    "edge/fog/cloud",
    "µs",
)
EMPHASISED = ("ect", "learned")


def to_markdown(rows: Sequence[Row], seeds: int, requests: int) -> str:
    """Return the tables for people."""
    lines = [
        "# Placement policies, simulated",
        "",
        f"{seeds} held-out worlds per case, {requests} requests each, the same for every policy.",
        "Cost is the objective in second-equivalents per request (interquartile mean); `vs ect` is",
        "the paired difference to the tuned base score; both with 95 % bootstrap intervals. Idle",
        "GB-s: memory of warm instances that nobody uses, per request. µs: median of a decision,",
        "features included, in one Python process of the machine that ran the suite.",
    ]
    for part, case in dict.fromkeys((row["part"], row["case"]) for row in rows):
        if part == "bounds":
            continue
        lines += ["", f"## {part}: {case}", "", _line(TITLES), _line(["---"] * len(TITLES))]
        mine = [row for row in rows if (row["part"], row["case"]) == (part, case)]
        lines += [_line(_cells(row)) for row in sorted(mine, key=lambda r: float(r["cost_s"]))]
    bounds = [row for row in rows if row["part"] == "bounds"]
    return "\n".join(lines + _verdict(rows) + _bounds(bounds)) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cells(row: Row) -> list[str]:
    by_priority = [row[f"missed_{level}"] for level in ("low", "normal", "high", "critical")]
    return [
        row["policy"],
        f"{row['cost_s']:.3f} [{row['cost_s_low']:.3f}, {row['cost_s_high']:.3f}]",
        _difference(row, "ect"),
        *(f"{1e3 * row[key]:.0f}" for key in ("p50_s", "p95_s", "p99_s")),
        f"{row['missed']:.1%}",
        "/".join(f"{share:.0%}" for share in by_priority),
        f"{row['cold']:.1%}",
        f"{row['wasted_gb_s']:.2f}",
        f"{row['usd_per_million']:.2f}",
        f"{row['fairness']:.3f}",
        "/".join(f"{row[tier]:.0%}" for tier in ("edge", "fog", "cloud")),
        f"{row['decision_us']:.0f}",
    ]


def _difference(row: Row, other: str) -> str:
    if f"versus_{other}" not in row:
        return ""
    low, high = row[f"versus_{other}_low"], row[f"versus_{other}_high"]
    return f"{row[f'versus_{other}']:+.1%} [{low:+.1%}, {high:+.1%}]"


def _verdict(rows: Sequence[Row]) -> list[str]:
    """Return the learned policies beside the best heuristic of each case."""
    mine = [row for row in rows if "versus_best" in row and row["policy"] not in row["heuristics"]]
    if not mine:
        return []
    titles = ["policy", "part", "case", "vs ect", "best heuristic there", "vs that"]
    lines = ["", "## Learned policies against the best heuristic of each case", ""]
    lines += [_line(titles), _line(["---"] * len(titles))]
    for row in mine:
        cells = [row["policy"], row["part"], row["case"], _difference(row, "ect"), row["best"]]
        lines.append(_line([*cells, _difference(row, "best")]))
    for policy in dict.fromkeys(row["policy"] for row in mine):
        for part in dict.fromkeys(row["part"] for row in mine):
            some = [r for r in mine if (r["policy"], r["part"]) == (policy, part)]
            ect, best = (
                sum(row[f"versus_{other}"] for row in some) / len(some) for other in ("ect", "best")
            )
            worst = max(some, key=lambda row: float(row["versus_ect"]))
            lines += [
                "",
                f"`{policy}`, mean over {part}: {ect:+.1%} against ect, {best:+.1%} against the "
                f"best heuristic of each; worst against ect: {worst['versus_ect']:+.1%} "
                f"({worst['case']}).",
            ]
    return lines


def _bounds(rows: Sequence[Row]) -> list[str]:
    """Return how much of the way from `ect` to a rollout that sees the future each policy goes."""
    if not rows:
        return []
    names = [key.removesuffix("_s") for key in rows[0] if key.endswith("_s")]
    others = [name for name in names if name not in ("ect", "clairvoyant", "relaxed")]
    titles = ["preset", "ect", "clairvoyant", "relaxed", "headroom", *others]
    lines = [
        "",
        "## Bounds",
        "",
        "Mean cost in second-equivalents on shorter worlds; in brackets the share of the gap",
        "between `ect` and the clairvoyant rollout that a policy closes. Headroom: the gap ÷ ect.",
        "",
        _line(titles),
        _line(["---"] * len(titles)),
    ]
    closed: dict[str, list[float]] = {name: [] for name in others}
    for row in rows:
        gap_s = row["ect_s"] - row["clairvoyant_s"]
        headroom = gap_s / row["ect_s"]
        cells = [
            row["case"],
            *(f"{row[f'{name}_s']:.3f}" for name in titles[1:4]),
            f"{headroom:.0%}",
        ]
        for name in others:
            share = (row["ect_s"] - row[f"{name}_s"]) / gap_s if gap_s > 0.0 else 0.0
            cells.append(f"{row[f'{name}_s']:.3f} ({share:+.0%})")
            if headroom >= 0.05:
                closed[name].append(share)
        lines.append(_line(cells))
    lines += [""] + [
        f"`{name}` closes {sum(shares) / len(shares):+.0%} on average over the {len(shares)} "
        "presets with 5 % headroom or more."
        for name, shares in closed.items()
        if shares
    ]
    return lines


def plot_load(rows: Sequence[Row], path: Path, preset: str) -> None:
    """Draw cost over load, one line per policy."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    loads = [row for row in rows if row["part"] == "load"]
    for name in dict.fromkeys(row["policy"] for row in loads):
        mine = [row for row in loads if row["policy"] == name]
        axes.plot(
            [float(row["case"]) for row in mine],
            [row["cost_s"] for row in mine],
            linewidth=2.5 if name in EMPHASISED else 1.0,
            label=name,
        )
    axes.set(xlabel="load (mean CPU demand ÷ capacity)", ylabel="cost per request, s", yscale="log")
    axes.set_title(f"simulated, preset {preset}")
    axes.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_differences(rows: Sequence[Row], path: Path) -> None:
    """Draw each policy's difference to `ect` with its interval, one panel per preset."""
    pyplot = _pyplot()
    presets = [row for row in rows if row["part"] == "presets" and "versus_ect" in row]
    cases = list(dict.fromkeys(row["case"] for row in presets))
    if not cases:
        return
    figure, panels = pyplot.subplots(
        1, len(cases), figsize=(2.1 * len(cases) + 1.5, 4.5), sharey=True, squeeze=False
    )
    for axes, case in zip(panels[0], cases, strict=True):
        mine = [row for row in presets if row["case"] == case]
        for height, row in enumerate(mine):
            low, middle, high = (
                100.0 * row[key] for key in ("versus_ect_low", "versus_ect", "versus_ect_high")
            )
            colour = "tab:red" if row["policy"] in EMPHASISED else "tab:blue"
            axes.plot([low, high], [height, height], color=colour)
            axes.plot(middle, height, "o", color=colour, markersize=4)
        axes.set_yticks(range(len(mine)), [row["policy"] for row in mine], fontsize=7)
        axes.axvline(0.0, color="grey", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=20)
        axes.set_title(case, fontsize=8)
        axes.tick_params(axis="x", labelsize=6)
    figure.supxlabel("cost against ect, % (simulated; 95 % intervals)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

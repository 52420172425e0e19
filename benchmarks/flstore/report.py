"""What bench_flstore prints and writes: the same tables on the terminal, in Markdown, and JSON."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flstore.prices import BILLS, QUERIES_PER_HOUR
from benchmarks.flstore.results import Change
from benchmarks.flstore.tables import OURS, verdicts
from benchmarks.flstore.trace import MIX
from benchmarks.report import make_table, show
from tierwise.files import write_atomically

SHOWN = {"latency": "mean latency", "listed": "cost, listed", "equal": "cost, equal"}
STATISTICS_MS, MEMCPY_RATIO, FLOWER_RATIO, INGEST_SHARE = 1.0, 1.5, 5.0, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """One table."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def report(found: Mapping[str, Any], folder: Path | None) -> None:
    """Print everything; write it if there is a folder."""
    sheets = list(_sheets(found))
    for sheet in sheets:
        table = make_table(sheet.title, sheet.columns, sheet.note)
        for row in sheet.rows:
            table.add_row(*row)
        show(table)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "flstore.json", json.dumps(found, indent=1).encode())
    lines = ["# Questions to rounds of federated learning, beside object store and Redis", ""]
    lines += [f"`{found['command']}`", "", f"{found['where']}, seed {found['seed']}.", ""]
    for sheet in sheets:
        lines += [f"## {sheet.title}", ""]
        lines.append("| " + " | ".join(sheet.columns) + " |")
        lines.append("|---" + "|---:" * (len(sheet.columns) - 1) + "|")
        lines += ["| " + " | ".join(row) + " |" for row in sheet.rows]
        lines += ["", *([sheet.note, ""] if sheet.note else [])]
    write_atomically(folder / "flstore.md", "\n".join(lines).encode())


def _sheets(found: Mapping[str, Any]) -> Sequence[Sheet]:
    sheets = []
    if trace := found.get("trace"):
        sheets += [_verdicts(trace), _latencies(trace), _classes(trace), _changes(trace)]
        sheets += [_costs(trace), _answers(found)]
    if figures := found.get("measures"):
        sheets.append(_measures(figures))
    if figures := found.get("aggregation"):
        sheets.append(_aggregation(figures))
    if figures := found.get("policies"):
        sheets.append(_policies(figures))
    if figures := found.get("own"):
        sheets.append(_own(figures, found["trace"]))
    return sheets


def _verdicts(trace: Mapping[str, Any]) -> Sheet:
    return Sheet(
        title="tierwise against each rival",
        columns=("rival", "mean latency", *(f"cost, {bill}" for bill in BILLS), "targets"),
        rows=verdicts(trace),
        note="Over all sizes, which count alike per query. Intervals and what bills mean: below.",
    )


def _latencies(trace: Mapping[str, Any]) -> Sheet:
    rows = [
        (f"{system}, {size} MB", _ms(x["mean_s"]), _ms(x["p50_s"]), _ms(x["p95_s"]), str(x["n"]))
        for size, by_system in trace["latency"].items()
        for system, x in by_system.items()
        if x
    ]
    return Sheet(
        title="Latency of a query, ms",
        columns=("system, model", "mean", "p50", "p95", "queries"),
        rows=rows,
        note="(emulated): first-byte latency and bandwidth as in benchmarks/flstore/rivals.py; the "
        "others are loopback as it is. The naive rival gets a few of the queries.",
    )


def _classes(trace: Mapping[str, Any]) -> Sheet:
    rows = []
    for size, by_system in trace["latency"].items():
        for system, x in by_system.items():
            if x:
                cells = [
                    f"{_ms(y['p50_s'])} / {_ms(y['p95_s'])}"
                    if (y := x["by_class"].get(name))
                    else ""
                    for name in MIX
                ]
                rows.append((f"{system}, {size} MB", *cells))
    return Sheet(
        title="By class of query, p50 / p95, ms",
        columns=("system, model", *MIX),
        rows=rows,
        note="P1 newest models, P2 all updates of a round, P3 a client's history, P4 metadata.",
    )


def _changes(trace: Mapping[str, Any]) -> Sheet:
    rows = [
        (f"{system}, {_size(size)}", str(x["n"]), *(str(Change(**x[key])) for key in SHOWN))
        for system, by_size in trace["changes"].items()
        for size, x in by_size.items()
        if x
    ]
    return Sheet(
        title="Changes with 95 % intervals",
        columns=("rival, model", "queries", *(SHOWN[key] for key in SHOWN)),
        rows=rows,
        note="Pairs of the same query; bootstrap over queries.",
    )


def _costs(trace: Mapping[str, Any]) -> Sheet:
    rows = []
    for size, by_system in trace["costs"].items():
        for system, bills in by_system.items():
            if bills:
                even = trace["break_even_per_hour"][size].get(system, 0.0)
                cells = [f"{bills[bill]['total']:.4g}" for bill in BILLS]
                text = "" if system == OURS else "never" if even is None else f"{even:,.0f}"
                rows.append((f"{system}, {size} MB", *cells, text))
    return Sheet(
        title="USD per 1,000 queries",
        columns=("system, model", *BILLS, "cheaper from, per h"),
        rows=rows,
        note=f"At {QUERIES_PER_HOUR:.0f} queries per hour. listed: rivals' aggregators as cloud "
        "functions, tierwise at its fog node's price, functions' idle memory free; server: rivals' "
        "aggregator is always there; equal: tierwise at the cloud's price; held: as equal, and all "
        "memory held is billed, with a replica, and the object store. The last column: tierwise is "
        "cheaper from so many queries per hour on if what is held is billed. Formulas in "
        "benchmarks/flstore/prices.py.",
    )


def _answers(found: Mapping[str, Any]) -> Sheet:
    trace = found["trace"]
    differing = trace["answers"]["differing"]
    rows = [
        ("answers compared with tierwise's", f"{trace['answers']['compared']:,}"),
        ("of those different", str(len(differing)) + (f": {differing[:3]}" if differing else "")),
    ]
    for size, hits in trace["hits"].items():
        total = hits["hit_count"] + hits["miss_count"]
        share = hits["hit_count"] / total if total else math.nan
        rows.append((f"reads of the cache that hit, {size} MB", f"{share:.1%} of {total}"))
    return Sheet(title="Answers and hits", columns=("", "figure"), rows=rows)


def _measures(x: Mapping[str, Any]) -> Sheet:
    asked = np.array(x["statistics"]["asker_s"])
    inside = np.array(x["statistics"]["node_s"])
    killed = x["kill"]
    rows = [
        (
            "statistics, p50 as the asker sees it",
            _ms(float(np.median(asked))) + " ms",
            _met(1e3 * float(np.median(asked)), STATISTICS_MS, "≤", " ms"),
        ),
        ("statistics, p50 in the node", _ms(float(np.median(inside))) + " ms", ""),
        *_ingest(x["ingest"]),
        (
            "kill -9: acknowledged updates lost",
            f"{killed['lost']} of {killed['acknowledged']}",
            "0 " + ("met" if killed["lost"] == 0 else "MISSED"),
        ),
        ("kill -9 to statistics answered", f"{killed['statistics_again_s']:.2f} s", ""),
        ("kill -9 to full service", f"{killed['vectors_again_s']:.2f} s", ""),
        ("its round completed afterwards", str(killed["is_complete_afterwards"]), ""),
    ]
    return Sheet(
        title=f"Statistics, ingest and a killed node, {x['size_mb']} MB",
        columns=("", "figure", "target"),
        rows=rows,
        note="Rounds of ten updates over mTLS, until all are on disk and their statistics answer, "
        "beside a server that takes the same messages and does nothing with them. Uplinks: ten at "
        "a time, 72 Mbit/s each (5G low band, SIGCOMM'21), emulated by the senders.",
    )


def _ingest(x: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for way, figures in x.items():
        taken, plain = (np.array(figures[name]) for name in ("tierwise_s", "plain_s"))
        added = float(np.median(taken) / np.median(plain) - 1.0)
        yield (
            f"a round into the cache ÷ bare server, {way}",
            f"{np.median(taken):.2f} ÷ {np.median(plain):.2f} s: {added:+.1%}",
            _met(added, INGEST_SHARE, "<", "") if way == "uplinks" else "",
        )


def _aggregation(x: Mapping[str, Any]) -> Sheet:
    ours, copy = (float(np.median(x[name])) for name in ("tierwise", "memcpy"))
    rows = [
        ("tierwise", _ms(ours), ""),
        ("memcpy of the same bytes", _ms(copy), _met(ours / copy, MEMCPY_RATIO, "≤", "×")),
    ]
    for name, figures in x["flower"].items():
        seconds = float(np.median(figures))
        state = "met" if seconds / ours >= FLOWER_RATIO else "MISSED"
        rows.append(
            (f"Flower, {name}", _ms(seconds), f"{seconds / ours:.1f}× ≥{FLOWER_RATIO:g}× {state}")
        )
    if not x["flower"]:
        rows.append(("Flower", "not installed here", ""))
    return Sheet(
        title=f"Aggregation of 10 × {x['size_mb']} MB, ms",
        columns=("", "median", "against ours"),
        rows=rows,
    )


def _policies(x: Mapping[str, Any]) -> Sheet:
    names = list(next(iter(next(iter(x.values())).values())))
    rows = [
        (f"{way}, {rounds} rounds", *(f"{figures[name]:.1%}" for name in names))
        for way, by_rounds in x.items()
        for rounds, figures in by_rounds.items()
    ]
    return Sheet(
        title="Bytes found in memory, by policy (simulated)",
        columns=("questions read, memory", *names),
        rows=rows,
        note="adaptive is tierwise's; …-reads is filled by reads alone, the others by writes too.",
    )


def _own(x: Mapping[str, Any], trace: Mapping[str, Any]) -> Sheet:
    rows = []
    for size, by_policy in x.items():
        ours = trace["latency"].get(size, {}).get(OURS)
        if ours:
            rows.append(
                (
                    f"adaptive, {size} MB",
                    _ms(ours["mean_s"]),
                    _ms(ours["p95_s"]),
                    _hits(trace["hits"][size]),
                )
            )
        for policy, figures in by_policy.items():
            rows.append(
                (
                    f"{policy}, {size} MB",
                    _ms(figures["mean_s"]),
                    _ms(figures["p95_s"]),
                    _hits(figures),
                )
            )
    return Sheet(
        title="Our own cache with other policies and less memory, live",
        columns=("policy, model", "mean, ms", "p95, ms", "hits"),
        rows=rows,
        note="The same trace without rivals, one after the other.",
    )


def _hits(x: Mapping[str, Any]) -> str:
    total = x["hit_count"] + x["miss_count"]
    return f"{x['hit_count'] / total:.1%}" if total else "none read"


def _met(value: float, target: float, sign: str, unit: str) -> str:
    shown = f"{target:.0%}" if not unit else f"{target:g}{unit}"
    own = f"{value:.2f}{unit} " if unit == "×" else ""
    return f"{own}{sign}{shown} {'met' if value <= target else 'MISSED'}"


def _ms(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _size(text: str) -> str:
    return "all sizes" if text == "all" else f"{text} MB"

"""Memory: what a function should have, and calls that find it out."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tierwise.cli.common import complete_functions, complete_nodes, operator
from tierwise.cli.output import Format, Output, Record, print_table, say, show_value
from tierwise.errors import InvalidArgument, NotFound, TierwiseError

Name = Annotated[str, typer.Argument(help="function", autocompletion=complete_functions)]
INPUTS_MAX = 10_000
REPORTS_WAIT = 40  # looks for the last reports, four a second


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(recommend)
    app.command()(profile)


def recommend(
    function: Name,
    apply: Annotated[
        bool, typer.Option("--apply", help="deploy the function again, as is recommended")
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Say how a function's memory should be declared, and why."""
    with operator() as ask:
        found = ask.recommend_memory(function)
        is_auto = found["is_memory_auto"]
        if apply:
            memory_mib = 0 if is_auto else found["memory_mib"]
            found["applied"] = ask.resize(function, memory_mib=memory_mib, is_memory_auto=is_auto)
    if output is not Format.TABLE:
        if output is Format.NAME:
            print(_declaration(found))
        else:
            show_value(found, output)
        return
    _print(found)
    if apply:
        version = found["applied"]["spec"]["version"]
        done = (
            f"deployed as version {version}" if found["applied"]["is_new"] else "so it is already"
        )
        say(f"{done}; write {_declaration(found)} in its source too, or it deploys the old one")


def profile(
    function: Name,
    inputs: Annotated[
        Path, typer.Option(help="a JSON list of arguments, or object of keywords, per line")
    ],
    repetitions: Annotated[int, typer.Option(help="runs of each input", min=1, max=100)] = 2,
    budget: Annotated[
        int, typer.Option(help="at most this many inputs: those that tell most; 0: all", min=0)
    ] = 0,
    node: Annotated[str, typer.Option(help="run on this node", autocompletion=complete_nodes)] = "",
    output: Output = Format.TABLE,
) -> None:
    """Run a function over inputs, in real workers, and show memory, time and start of each.

    The calls are on record like any other: `tierwise recommend FUNCTION` learns from them. Input
    after input is chosen to be as unlike those before as can be, so that few runs tell much.
    """
    from rich.console import Console
    from rich.progress import track

    from tierwise.clock import pause
    from tierwise.sdk.client import Client
    from tierwise.sdk.operator import Operator
    from tierwise.wire.measures import measures
    from tierwise.wire.payload import encode

    chosen = _read(inputs)
    described = [measures(encode(each, "an input")) for each in chosen]
    order = farthest_first(described, budget or len(chosen))
    with Client() as client:
        ask = Operator(client)
        remote = client.function(function).options(node=node, timeout="10m")
        known = {r["outcome"]["request_id"] for r in ask.calls(function, limit=10_000)}
        failed = 0
        wanted = len(order) * repetitions
        for index in track(
            order * repetitions, f"running {wanted} calls", console=Console(stderr=True)
        ):
            args, kwargs = chosen[index]
            try:
                remote.remote(*args, **kwargs)
            except TierwiseError as error:
                failed += 1
                say(f"input {index + 1}: {error}")
        records: list[Record] = []
        for _ in range(REPORTS_WAIT):  # agents report with their heartbeat
            calls = ask.calls(function, limit=min(10_000, wanted + len(known)))
            records = [c["outcome"] for c in calls if c["outcome"]["request_id"] not in known]
            if len(records) >= wanted:
                break
            pause(0.25)
    records.reverse()
    if output is not Format.TABLE:
        show_value(records, output)
        return
    rows = [
        [
            " ".join(f"{k}={v:g}" for k, v in sorted(r.get("measures", {}).items())),
            r["peak_memory_mib"],
            r["memory_mib"],
            f"{r['latency']['run_s'] * 1e3:.1f} ms",
            f"{r['latency']['cold_start_s'] * 1e3:.1f} ms" if r["is_cold"] else "",
            r["error_code"],
        ]
        for r in records
    ]
    print_table(["input", "peak mib", "allotted", "run", "cold start", "error"], rows)
    if failed:
        say(f"{failed} of {wanted} runs failed")


def farthest_first(described: Sequence[dict[str, float]], count: int) -> list[int]:
    """Return the indices of `count` inputs, each as far as can be from those before it.

    Distances are Euclidean between logarithms of the measures, each scaled to its range. The first
    is the largest input: it is the one whose memory is needed most.
    """
    names = sorted({name for each in described for name in each})
    rows = [[math.log1p(abs(each.get(name, 0.0))) for name in names] for each in described]
    spans = [max(column) - min(column) or 1.0 for column in zip(*rows, strict=True)]
    points = [[value / span for value, span in zip(row, spans, strict=True)] for row in rows]
    chosen = [max(range(len(points)), key=lambda i: sum(points[i]))]
    nearest = [math.dist(point, points[chosen[0]]) for point in points]
    while len(chosen) < min(count, len(points)):
        nearest[chosen[-1]] = -1.0  # never again
        following = max(range(len(points)), key=nearest.__getitem__)
        chosen.append(following)
        nearest = [
            min(old, math.dist(point, points[following]))
            for old, point in zip(nearest, points, strict=True)
        ]
    return chosen


def _read(path: Path) -> list[tuple[list[Any], dict[str, Any]]]:
    """Return (args, kwargs) per line.

    Raises:
        InvalidArgument: A line is neither list nor object, or there are none, or too many.
        NotFound: There is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}") from None
    found: list[tuple[list[Any], dict[str, Any]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise InvalidArgument(f"{path}, line {number}: {error}") from None
        if isinstance(value, dict):
            found.append(([], value))
        elif isinstance(value, list):
            found.append((value, {}))
        else:
            raise InvalidArgument(
                f"{path}, line {number}: write a list of arguments or an object of keywords"
            )
    if not 0 < len(found) <= INPUTS_MAX:
        raise InvalidArgument(f"{path} has {len(found)} inputs; give 1 to {INPUTS_MAX}")
    return found


def _declaration(found: Record) -> str:
    size = "auto" if found["is_memory_auto"] else f"{found['memory_mib']}MiB"
    return f'memory="{size}"'


def _print(found: Record) -> None:
    spec = found["spec"]
    declared = "auto" if spec["is_memory_auto"] else f"{spec['memory_mib']} MiB"
    function = f"{spec['namespace']}/{spec['name']}@{spec['version']}"
    before, after = found["gb_s_declared"], found["gb_s_recommended"]
    saved = 1.0 - after / before if before > 0.0 else 0.0
    rows = [
        ("function", function),
        ("declared", declared),
        ("recommended", _declaration(found)),
        (
            "evidence",
            f"{found['sample_count']} calls, {found['out_of_memory_count']} out of memory",
        ),
        (
            "peak",
            f"p50 {found['peak_mib_p50']:.1f}, p95 {found['peak_mib_p95']:.1f}, "
            f"p99 {found['peak_mib_p99']:.1f}, max {found['peak_mib_max']:.1f} MiB",
        ),
        ("out of memory", f"{found['out_of_memory_share']:.1%} expected, each runs once more"),
        (
            "GB-seconds",
            f"{after:.4g} instead of {before:.4g} at {spec['memory_mib']} MiB ({saved:.0%} saved)",
        ),
        ("best fixed", f"{found['fixed_memory_mib']} MiB: {found['gb_s_fixed']:.4g} GB-seconds"),
        ("memory ≈", _formula(found["sizing"]["memory"])),
        (
            "margin",
            f"× {found['sizing']['margin']:.2f}, beyond what was seen × "
            f"{found['sizing']['margin_beyond']:.2f}",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _formula(terms: Sequence[Record]) -> str:
    """Return a growth as people write it: 5.8 + 1.5e-05·n²."""
    parts = []
    for term in terms:
        factors = [
            f["measure"] + ("" if f["power"] == 1.0 else f"^{f['power']:g}")
            for f in term["factors"]
        ]
        parts.append("·".join([f"{term['coefficient']:.3g}", *factors]))
    return " + ".join(parts) or "0"

"""Looking closer: explain one call, watch the nodes."""

from typing import Annotated

import typer

from tierwise.cli.common import operator
from tierwise.cli.get import NODE_COLUMNS
from tierwise.cli.output import Format, Output, Record, ms, print_table, show, show_value, text, usd
from tierwise.clock import pause


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(explain)
    app.command()(top)


def explain(
    call: Annotated[str, typer.Argument(help="a call's id, or the start of it")],
    output: Output = Format.TABLE,
) -> None:
    """Show why a call ran where it did: candidates, scores, what was predicted and what came."""
    with operator() as ask:
        found = ask.call(call)
    if output is Format.TABLE:
        _explain(found["outcome"])
    else:
        show_value(found, output)


def top(
    once: Annotated[bool, typer.Option("--once", help="print once and end")] = False,
    interval: Annotated[float, typer.Option(help="seconds between updates", min=0.2)] = 1.0,
    output: Output = Format.TABLE,
) -> None:
    """Watch the nodes. Ctrl-C ends it."""
    columns = [
        *NODE_COLUMNS[:-1],
        ("host cpu %", lambda r: (r.get("host") or {}).get("cpu_percent", 0.0)),
        ("agent mib", lambda r: (r.get("host") or {}).get("agent_rss_mib", 0.0)),
    ]
    with operator() as ask:
        if once or output is not Format.TABLE:
            show(ask.nodes(), output, columns, name=lambda r: str(r["node"]["node_id"]))
            return
        from rich.live import Live
        from rich.table import Table

        def table() -> Table:
            drawn = Table(box=None, pad_edge=False, header_style="bold")
            for title, _ in columns:
                drawn.add_column(title.upper(), no_wrap=True)
            for record in ask.nodes():
                drawn.add_row(*(text(cell(record)) for _, cell in columns))
            return drawn

        with Live(table(), auto_refresh=False, screen=False) as live:
            while True:
                pause(interval)
                live.update(table(), refresh=True)


def _explain(outcome: Record) -> None:
    latency = outcome["latency"]
    total_s = sum(latency.values())
    verdict = "missed" if total_s > outcome["deadline_s"] else "met"
    why = outcome.get("explanation")
    print(f"call      {outcome['request_id']}  {outcome['function_id']}  {outcome['priority']} priority")
    print(f"came to   {outcome['origin']}    ran on {outcome['node_id'] or '-'}")
    print(f"decided   {outcome['policy_id']}" + (f"  fallback: {why['fallback']}" if why and why["fallback"] else ""))
    print(f"took      {ms(total_s)}, deadline {ms(outcome['deadline_s'])} {verdict}; {usd(outcome['money_usd'])}")
    if outcome["error_code"]:
        print(f"ended as  {outcome['error_code']}: {outcome['message']}")
    for attempt in outcome["tried"]:
        print(f"refused   {attempt['node_id']}: {attempt['reason']}")
    if why is None:
        print("No explanation was kept: agents send the first 200 of each heartbeat.")
        return
    rows = why["candidates"]
    print()
    print_table(
        ["candidate", "transfer", "wait", "cold", "run", "return", "cost", "score", "residual", "p", ""],
        (
            [
                row["node_id"],
                ms(row["transfer_s"]),
                ms(row["wait_s"]),
                ms(row["cold_start_s"]),
                ms(row["run_s"]),
                ms(row["return_s"]),
                usd(row["money_usd"]),
                f"{row['score']:.4f}",
                f"{row['residual']:+.2f}" if row["residual"] else "",
                f"{row['propensity']:.2f}" if row["propensity"] else "",
                _marks(row["node_id"], outcome["node_id"], why["heuristic_choice"]),
            ]
            for row in sorted(rows, key=lambda row: row["score"])
        ),
    )
    for masked in why["masked"]:
        print(f"masked    {masked['node_id']}: {masked['reason']}")
    chosen = next((row for row in rows if row["node_id"] == outcome["node_id"]), None)
    if chosen is not None:
        parts = ("transfer_s", "cold_start_s", "run_s", "return_s")
        print()
        print_table(
            ["", "wait", "transfer", "cold", "run", "return", "total"],
            [
                [
                    "predicted",
                    ms(chosen["wait_s"]),
                    *(ms(chosen[part]) for part in parts),
                    ms(chosen["wait_s"] + sum(chosen[part] for part in parts)),
                ],
                [
                    "actual",
                    ms(latency["queue_s"]),
                    *(ms(latency[part]) for part in parts),
                    ms(total_s),
                ],
            ],
        )


def _marks(node: str, ran: str, heuristic: str) -> str:
    marks = (["ran here"] if node == ran else []) + (["base score's choice"] if node == heuristic else [])
    return ", ".join(marks)

"""`tierwise top`: the nodes, live."""

import sys
from contextlib import suppress
from typing import Annotated

import typer

from tierwise.cli.common import operator
from tierwise.cli.get import NODE_COLUMNS
from tierwise.cli.output import Column, Format, Output, build_table, show
from tierwise.clock import pause

COLUMNS: list[Column] = [
    *NODE_COLUMNS[:-1],
    ("host cpu %", lambda record: (record.get("host") or {}).get("cpu_percent", 0.0)),
    ("agent mib", lambda record: (record.get("host") or {}).get("agent_rss_mib", 0.0)),
]


def add_to(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(top)


def top(
    watch: Annotated[
        bool, typer.Option("--watch/--once", help="go on until Ctrl-C, or print once")
    ] = True,
    interval: Annotated[float, typer.Option(help="seconds between updates", min=0.2)] = 1.0,
    output: Output = Format.TABLE,
) -> None:
    """Watch the nodes: capacity, load, warm instances, policy, age of the last heartbeat."""
    with operator() as ask:
        if not watch or output is not Format.TABLE:
            show(ask.nodes(), output, COLUMNS, name=lambda r: str(r["node"]["node_id"]))
            return
        if not sys.stdout.isatty():  # a pipe or a file gets whole lines, one table after another
            with suppress(KeyboardInterrupt):
                while True:
                    show(ask.nodes(), output, COLUMNS, name=lambda r: str(r["node"]["node_id"]))
                    sys.stdout.flush()
                    pause(interval)
            return
        from rich.live import Live

        titles = [title for title, _ in COLUMNS]

        def rows() -> list[list[object]]:
            return [[cell(record) for _, cell in COLUMNS] for record in ask.nodes()]

        first = build_table(titles, rows())
        with suppress(KeyboardInterrupt), Live(first, auto_refresh=False) as live:
            while True:
                pause(interval)
                live.update(build_table(titles, rows()), refresh=True)

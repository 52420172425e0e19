"""What calls cost, and what they may cost: bill, budget."""

from typing import Annotated, Any

import typer

from tierwise.cli.common import operator
from tierwise.cli.output import (
    Column,
    Format,
    Output,
    Record,
    print_table,
    say,
    show,
    show_value,
    usd,
)
from tierwise.errors import InvalidArgument

KEYS = ("namespace", "function", "day")
budgets = typer.Typer(help="What namespaces and functions may spend in a day.")
Whose = Annotated[str, typer.Argument(help="namespace, or namespace/function")]


def add_to(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command()(bill)
    app.add_typer(budgets, name="budget")


def bill(
    namespace: Annotated[str, typer.Option(help="this namespace only")] = "",
    by: Annotated[str, typer.Option(help="what to tell apart, of namespace,function,day")] = (
        "namespace,function"
    ),
    since: Annotated[str, typer.Option(help="first UTC day, such as 2026-01-31")] = "",
    until: Annotated[str, typer.Option(help="last UTC day")] = "",
    output: Output = Format.TABLE,
) -> None:
    """Show what was used and billed, and apart from it what idle instances cost."""
    keys = [key.strip() for key in by.split(",")]
    if not set(keys) <= set(KEYS) or len(set(keys)) < len(keys):
        raise InvalidArgument(f"--by {by!r}: one or more of {', '.join(KEYS)}, joined by commas")
    with operator() as ask:
        found = ask.bill(namespace, keys, since, until)
        found["budgets"] = ask.budgets(namespace)
    if output is Format.NAME:
        for row in found["usage"]:
            print("/".join(str(row[key]) for key in keys))
    elif output is not Format.TABLE:
        show_value(found, output)
    elif not found["usage"]:
        say("nothing used yet" + (f" in {namespace}" if namespace else ""))
        _print_idle(found["idle"])
    else:
        _print(found, keys)


@budgets.command(name="set")
def set_budget(
    whose: Whose,
    usd_per_day: Annotated[float, typer.Option(help="in a UTC day", min=0.0)],
    action: Annotated[str, typer.Option(help="warn or refuse, when it is spent")] = "refuse",
) -> None:
    """Set or replace a budget; raising one lets calls in again within seconds."""
    if action not in ("warn", "refuse"):
        raise InvalidArgument(f"--action {action!r}: warn or refuse")
    with operator() as ask:
        made = ask.set_budget(*_split(whose), usd_per_day, action)
    say(f"{whose} may spend {usd(usd_per_day)} a day, has spent {usd(made['spent_usd'])} today")


@budgets.command(name="list")
def list_budgets(
    namespace: Annotated[str, typer.Option(help="this namespace only")] = "",
    output: Output = Format.TABLE,
) -> None:
    """List budgets with what is spent today."""
    with operator() as ask:
        found = ask.budgets(namespace)
    show(found, output, BUDGET_COLUMNS, name=_whose, empty="no budgets: anybody may spend anything")


@budgets.command(name="rm")
def remove_budget(whose: Whose) -> None:
    """Remove a budget."""
    with operator() as ask:
        ask.remove_budget(*_split(whose))
    say(f"{whose} has no budget any more")


def _split(whose: str) -> tuple[str, str]:
    namespace, _, function = whose.partition("/")
    return namespace, function


def _whose(record: Record) -> str:
    return "/".join(filter(None, (record["namespace"], record["function"])))


def _print(found: Record, keys: list[str]) -> None:
    """Print the rows and their total; what idled and which budgets are spent below."""
    rows = [[*(row[key] for key in keys), *_amounts(row)] for row in found["usage"]]
    total = ["total", *[""] * (len(keys) - 1), *_amounts(found["total"])]
    print_table([*keys, *(title for title, _ in BILL_COLUMNS)], [*rows, total])
    _print_idle(found["idle"])
    for budget in found["budgets"]:
        if budget["is_spent"]:
            does = "takes no new calls today" if budget["action"] == "refuse" else "only a warning"
            say(
                f"{_whose(budget)} has spent {usd(budget['spent_usd'])} of its "
                f"{usd(budget['usd_per_day'])} for today: {does}"
            )


def _print_idle(idle: list[Record]) -> None:
    if idle:
        print("\nidle instances, billed to nobody")
        print_table(
            [title for title, _ in IDLE_COLUMNS],
            [[column(row) for _, column in IDLE_COLUMNS] for row in idle],
        )


def _amounts(row: Record) -> list[Any]:
    return [column(row) for _, column in BILL_COLUMNS]


def _size(size_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} GB"


def _moved(moved_bytes: dict[str, int]) -> str:
    return " ".join(f"{link}:{_size(count)}" for link, count in sorted(moved_bytes.items()))


BILL_COLUMNS: list[Column] = [
    ("calls", lambda r: r["call_count"]),
    ("requests", lambda r: r["item_count"]),
    ("gb-s", lambda r: r["gb_s"]),
    ("cpu-s", lambda r: r["cpu_s"]),
    ("gpu-s", lambda r: r["gpu_s"]),
    ("cost", lambda r: usd(r["money_usd"])),
    ("idle gb-s", lambda r: r["idle_gb_s"]),
    ("idle cost", lambda r: usd(r["idle_usd"])),
    ("moved", lambda r: _moved(r["moved_bytes"])),
]
IDLE_COLUMNS: list[Column] = [
    ("function", lambda r: f"{r['namespace']}/{r['function']}"),
    ("node", lambda r: r["node_id"]),
    ("warm now", lambda r: r["warm_count"]),
    ("gb-s", lambda r: r["idle_gb_s"]),
    ("cost", lambda r: usd(r["idle_usd"])),
]
BUDGET_COLUMNS: list[Column] = [
    ("budget", _whose),
    ("per day", lambda r: usd(r["usd_per_day"])),
    ("spent today", lambda r: usd(r["spent_usd"])),
    ("when spent", lambda r: r["action"]),
    ("spent", lambda r: r["is_spent"]),
    ("by", lambda r: r["set_by"]),
]

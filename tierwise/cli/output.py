"""How results are printed: data on standard output, everything else on standard error."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

Record = dict[str, Any]
Column = tuple[str, Callable[[Record], Any]]


class Format(StrEnum):
    """What -o may be."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


Output = Annotated[Format, typer.Option("--output", "-o", help="table, json, yaml or name")]


def say(text: str) -> None:
    """Tell the user something that is not data."""
    print(text, file=sys.stderr)


def complain(text: str) -> None:
    """Tell the user what went wrong: the first line in red where there is colour."""
    first, _, rest = f"tierwise: {text}".partition("\n")
    if sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
        first = f"\x1b[31m{first}\x1b[0m"
    say("\n".join(filter(None, (first, rest))))


def show(
    records: Sequence[Record],
    output: Format,
    columns: Sequence[Column],
    *,
    name: Callable[[Record], str],
    empty: str = "nothing yet",
) -> None:
    """Print a list of records in the chosen format."""
    if output is Format.TABLE:
        if records:
            print_table(
                [title for title, _ in columns], ([c(r) for _, c in columns] for r in records)
            )
        else:
            say(empty)
    elif output is Format.NAME:
        for record in records:
            print(name(record))
    else:
        show_value(list(records), output)


def show_value(value: Any, output: Format) -> None:
    """Print any value as YAML (also for a table) or JSON."""
    if output is Format.JSON:
        print(json.dumps(value, indent=2, ensure_ascii=False))
        return
    import yaml

    print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), end="")


def print_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print aligned columns, numbers to the right; no borders, so that cut and awk work."""
    from rich.console import Console

    console = Console(soft_wrap=True) if sys.stdout.isatty() else Console(width=400)
    console.print(build_table(titles, rows))


def build_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> "Table":
    """Return aligned columns for rich to draw."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    cells = [[text(value) for value in row] for row in rows]
    for index, title in enumerate(titles):
        is_number = all(_is_number(row[index]) for row in cells) and bool(cells)
        table.add_column(title.upper(), justify="right" if is_number else "left", no_wrap=True)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # what users named is no markup
    return table


def text(value: Any) -> str:
    """Return a value as a cell."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def ms(seconds: float) -> str:
    """Return seconds as milliseconds for people."""
    return f"{seconds * 1e3:.1f} ms" if seconds < 10 else f"{seconds:.1f} s"


def usd(amount: float) -> str:
    """Return a price; calls cost millionths."""
    return f"{amount * 1e6:.3f} µ$" if amount < 1e-3 else f"{amount:.4f} $"


def age(seconds: float) -> str:
    """Return a duration in one unit."""
    for limit, unit, scale in ((120, "s", 1), (7200, "m", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / scale:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or not cell

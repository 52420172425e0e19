"""How results are printed: data on standard output, everything else on standard error."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NUMBER = re.compile(
    r"[+-]?\d[\d.]*(e[+-]?\d+)?( ?(ms|s|m|h|d|µ\$|\$|%))?"  # 12, 0.5, 1e+05, 3.1 ms, 7h, 2 $
    r"|[\d.]+/[\d.]+"  # 3/4
)
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
    header, *lines = table_lines(titles, rows)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        header = f"\x1b[1m{header}\x1b[0m"
    print("\n".join([header, *lines]))


def build_table(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> "Text":
    """Return the same for rich to draw, cut at the edge of the terminal."""
    from rich.text import Text

    header, *lines = table_lines(titles, rows)
    drawn = Text("\n".join([header, *lines]), no_wrap=True, overflow="ellipsis")
    drawn.stylize("bold", 0, len(header))
    return drawn


def table_lines(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Return the header and a line per row, without spaces at their ends.

    The first column names the row and stands on the left whatever it looks like.
    """
    from rich.cells import cell_len

    cells = [[title.upper() for title in titles]]
    cells += [[text(value) for value in row] for row in rows]
    columns = []
    for index, column in enumerate(zip(*cells, strict=True)):
        width = max(map(cell_len, column))
        is_number = index > 0 and len(column) > 1 and all(map(_is_number, column[1:]))
        blanks = [" " * (width - cell_len(cell)) for cell in column]
        pairs = zip(column, blanks, strict=True)
        columns.append([blank + cell if is_number else cell + blank for cell, blank in pairs])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def text(value: Any) -> str:
    """Return a value as a cell."""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.3g}"
    return _CONTROL.sub(" ", str(value))  # what users named moves no cursor


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
    return not cell or _NUMBER.fullmatch(cell) is not None

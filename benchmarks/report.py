"""What every benchmark prints around its figures: machine, commit, seed; spreads and verdicts."""

import os
import platform
import subprocess
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from tierwise.clock import precise_s

Key = TypeVar("Key", bound=Hashable)
Figures = Sequence[float] | NDArray[np.float64]


def interleaved(
    calls: Mapping[Key, Callable[[], object]], *, rounds: int, count: int, warm_up: int
) -> dict[Key, NDArray[np.float64]]:
    """Time calls in turns, so that a slow moment of the machine hits all of them.

    Args:
        calls: What to time.
        rounds: How many figures each gets.
        count: Calls per figure.
        warm_up: Rounds before the first figure.

    Returns:
        Microseconds per call, shape (rounds,), of each.
    """
    figures: dict[Key, list[float]] = {key: [] for key in calls}
    for number in range(warm_up + rounds):
        for key, call in calls.items():
            start_s = precise_s()
            for _ in range(count):
                call()
            if number >= warm_up:
                figures[key].append((precise_s() - start_s) / count * 1e6)
    return {key: np.array(values) for key, values in figures.items()}


def make_table(title: str, columns: Sequence[str], caption: str = "") -> Table:
    """Return an empty table; the first column is text, the others are figures."""
    table = Table(
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
        title=title,
        caption=f"{where()}. {caption}".strip(),
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def show(table: Table) -> None:
    """Print a table, 110 columns wide where there is no terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    console.print(table)
    console.print()


def where() -> str:
    """Return the machine, the interpreter and the commit that are measured."""
    return (
        f"{platform.machine()}, {cpu_name()}, Python {platform.python_version()}, "
        f"NumPy {np.__version__}, commit {commit()}"
    )


def spread(figures: Figures) -> str:
    """Return `median [10 % … 90 %]`."""
    low, middle, high = np.percentile(figures, (10, 50, 90))
    digits = 2 if middle < 10.0 else 1 if middle < 100.0 else 0
    return f"{middle:,.{digits}f} [{low:,.{digits}f}…{high:,.{digits}f}]"


def at_most(figure: float, target: float, unit: str = "") -> str:
    """Return the target and whether the figure holds it."""
    return f"≤{target:g}{unit} {'met' if figure <= target else 'MISSED'}"


def at_least(figure: float, target: float, unit: str = "") -> str:
    """Return the target and whether the figure reaches it."""
    return f"≥{target:g}{unit} {'met' if figure >= target else 'MISSED'}"


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells, and the number of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = next((x.split(":", 1)[1].strip() for x in lines if "model name" in x), "")
    except OSError:
        found = platform.processor()
    return f"{found or 'unknown CPU'} × {os.cpu_count()}"


def commit() -> str:
    """Return the short id of the commit that is measured, with `+` if files were changed."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

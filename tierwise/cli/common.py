"""What several verbs need: a client, an operator, names to complete."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from tierwise.errors import TierwiseError

if TYPE_CHECKING:
    from tierwise.sdk.operator import Operator


@contextmanager
def operator() -> "Iterator[Operator]":
    """Open an Operator on the usual context."""
    from tierwise.sdk.client import Client
    from tierwise.sdk.operator import Operator

    with Client() as client:
        yield Operator(client)


def become(module: str, arguments: Sequence[str]) -> NoReturn:
    """Replace this process by a program of ours; the command line stays light that way."""
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def complete_functions(incomplete: str) -> list[str]:
    """Return function names for the shell."""
    try:
        with operator() as ask:
            specs = [f["spec"] for f in ask.functions()]
    except TierwiseError:
        return []
    return [s["name"] for s in specs if s["name"].startswith(incomplete)]


def complete_nodes(incomplete: str) -> list[str]:
    """Return node names for the shell."""
    try:
        with operator() as ask:
            names = [n["node"]["node_id"] for n in ask.nodes()]
    except TierwiseError:
        return []
    return [name for name in names if name.startswith(incomplete)]


def complete_jobs(incomplete: str) -> list[str]:
    """Return names of federated jobs for the shell."""
    try:
        with operator() as ask:
            names = [job["spec"]["job"] for job in ask.federated_jobs()]
    except TierwiseError:
        return []
    return [name for name in names if name.startswith(incomplete)]

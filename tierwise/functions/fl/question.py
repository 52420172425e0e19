"""What a question is, and what every answer is made with. Pure.

An answer is a dict that JSON can hold, with clients' names as keys; only questions that make a
model answer with a NumPy vector in it. Numbers that are not known are None or left out. Whoever
asks wrongly gets a ValueError that says what to ask instead.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tierwise.functions.fl.geometry import Float
from tierwise.functions.fl.statistics import RoundStatistics

Needs = Literal["statistics", "matrix", "vectors"]
Answer = dict[str, Any]
History = Sequence[RoundStatistics]  # oldest round first
NAMES_MAX = 12
OWN_COLUMNS = ("example_count", "norm", "arrival_s")
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int, np.integer), "a whole number"),
    float: ((int, float, np.integer, np.floating), "a finite number"),
    str: ((str,), "text"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Something that rounds can be asked.

    Attributes:
        name: As it is asked: words with hyphens.
        summary: What the answer says, one line.
        needs: "statistics": `function(statistics, **arguments)`, run where they are held.
            "matrix" or "vectors": `function(*arrays, facts=…, **arguments)`, shipped to the node
            that holds the arrays; `facts` is the answer to the question "round".
        function: Pure; its keyword-only parameters are the arguments.
        arguments: What each argument means.
        source: Paper or other origin of the formula.
        rounds: 1: of one round. Otherwise `statistics` is a sequence, oldest round first: of the
            newest so many rounds, or, if 0, of all that are held.
        inputs: The arrays, in order, if any: "matrix" (K × P), "base", "aggregate", "update" (of
            the argument `client`), "model" (the update of `client` if it is given, else the
            aggregate). One that does not exist is None.
        parameters: The arguments as `function` declares them, with kinds and defaults.
    """

    name: str
    summary: str
    needs: Needs
    function: Callable[..., Answer]
    arguments: Mapping[str, str]
    source: str
    rounds: int = 1
    inputs: tuple[str, ...] = ()
    parameters: Mapping[str, inspect.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        """Read the arguments off the function; `facts` is not the asker's."""
        found = {
            name: each
            for name, each in inspect.signature(self.function).parameters.items()
            if each.kind is each.KEYWORD_ONLY and name != "facts"
        }
        object.__setattr__(self, "parameters", found)

    def checked(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments, if the question takes them.

        Raises:
            ValueError: One is unknown, missing or of the wrong kind.
        """
        taken = self.parameters
        for name in arguments:
            if name not in taken:
                known = ", ".join(taken) or "none"
                raise ValueError(f"{self.name} takes no argument {name!r}; it takes: {known}")
        for name, parameter in taken.items():
            if name in arguments:
                _check_kind(self.name, parameter, arguments[name])
            elif parameter.default is parameter.empty:
                raise ValueError(f"{self.name} needs `{name}`: {self.arguments[name]}")
        return dict(arguments)


def by_client(clients: Sequence[str], values: NDArray[Any]) -> dict[str, Any]:
    """Return values by client, those that are not finite as None."""
    found = values.tolist()
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        found = [value if math.isfinite(value) else None for value in found]
    return dict(zip(clients, found, strict=True))


def number(value: float) -> float | None:
    """Return a number as JSON has it: None if it is not finite."""
    return float(value) if math.isfinite(value) else None


def selected(clients: Sequence[str], mask: NDArray[np.bool_]) -> list[str]:
    """Return the clients of a mask."""
    return [clients[row] for row in np.flatnonzero(mask).tolist()]


def check_any(statistics: RoundStatistics, at_least: int = 1) -> None:
    """Raise ValueError if too few updates count."""
    count = len(statistics.clients)
    if count < at_least:
        raise ValueError(
            f"round {statistics.round} of {statistics.job!r} has {count} updates that count, and "
            f"this needs {at_least}: wait for more, or ask of another round"
        )


def check_held(history: History) -> None:
    """Raise ValueError if there is no round to answer from."""
    if not history:
        raise ValueError("no round is held of this job: ask again after the first one")


def row_of(statistics: RoundStatistics, client: str) -> int:
    """Return a client's position among those that count.

    Raises:
        ValueError: It has no update that counts in this round; the message says why.
    """
    try:
        return statistics.clients.index(client)
    except ValueError:
        pass
    where = f"round {statistics.round} of {statistics.job!r}"
    if client in statistics.quarantined:
        why = statistics.quarantined[client]
        raise ValueError(f"the update of {client!r} in {where} is quarantined: {why}")
    if client in statistics.expected:
        raise ValueError(f"{where} has no update of {client!r} yet: ask again later")
    raise ValueError(f"{where} has no client {client!r}; it has {named(statistics.clients)}")


def column(statistics: RoundStatistics, name: str) -> Float:
    """Return numbers of clients' metadata, or of what the cache measured, NaN where missing.

    Raises:
        ValueError: No client sent it.
    """
    if name in statistics.columns:
        return statistics.columns[name]
    if name == "example_count":
        return statistics.example_counts
    if name == "norm":
        return statistics.norms
    if name == "arrival_s":
        return statistics.arrival_s
    known = [*statistics.columns, *(own for own in OWN_COLUMNS if own not in statistics.columns)]
    raise ValueError(
        f"no client of round {statistics.round} sent {name!r} with its update; known are "
        f"{named(known)}"
    )


def known_rows(values: Float, name: str, statistics: RoundStatistics) -> NDArray[np.intp]:
    """Return where a column is known.

    Raises:
        ValueError: Nowhere.
    """
    rows = np.flatnonzero(np.isfinite(values))
    if len(rows) == 0:
        raise ValueError(f"round {statistics.round} has no finite {name!r}: ask of another column")
    return rows


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError if an argument is out of its range."""
    if not low <= value <= high:
        raise ValueError(f"`{name}` is from {low:g} to {high:g}, not {value:g}")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError if an argument is none of the known words."""
    if value not in known:
        raise ValueError(f"`{name}` is one of {', '.join(known)}; not {value!r}")


def generator(seed: int) -> np.random.Generator:
    """Return chance from a seed, the same on every machine."""
    if seed < 0:
        raise ValueError(f"`seed` is 0 or more, not {seed}")
    return np.random.default_rng(seed)


def named(names: Sequence[Any]) -> str:
    """Return names for a message, the first twelve of many."""
    if not names:
        return "none"
    text = ", ".join(str(name) for name in names[:NAMES_MAX])
    more = len(names) - NAMES_MAX
    return f"{text} and {more} more" if more > 0 else text


def _check_kind(question: str, parameter: inspect.Parameter, value: Any) -> None:
    expected = _KINDS.get(parameter.annotation)
    if expected is None:
        return  # the function checks what has structure
    kinds, wanted = expected
    is_kind = isinstance(value, kinds) and (
        parameter.annotation is bool or not isinstance(value, bool)
    )
    if not is_kind or (parameter.annotation is float and not math.isfinite(value)):
        shown = str(value)[:80]
        raise ValueError(f"`{parameter.name}` of {question} must be {wanted}, not {shown!r}")

"""Questions about one round's metadata: what came, from whom, and with which numbers."""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from tierwise.functions.fl.geometry import Float, median, shares
from tierwise.functions.fl.question import (
    OWN_COLUMNS,
    Answer,
    Question,
    by_client,
    check_choice,
    check_range,
    column,
    known_rows,
    number,
    selected,
)
from tierwise.functions.fl.statistics import RoundStatistics

CONDITIONS_MAX = 32
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


def facts(statistics: RoundStatistics) -> Answer:
    """Return what is known of a round; questions on the matrix are given this as their `facts`."""
    clients = statistics.clients
    held = set(clients)
    return {
        "namespace": statistics.namespace,
        "job": statistics.job,
        "round": statistics.round,
        "clients": list(statistics.expected),
        "is_in": [client in held for client in statistics.expected],
        "quarantined": dict(statistics.quarantined),
        "parameter_count": statistics.parameter_count,
        "is_complete": statistics.is_complete,
        "has_ended": statistics.has_ended,
        "example_counts": by_client(clients, statistics.example_counts),
        "columns": {
            name: by_client(clients, values) for name, values in statistics.columns.items()
        },
        "round_metadata": plain(statistics.round_metadata),
        "digests": dict(zip(clients, statistics.digests, strict=True)),
        "base_digest": statistics.base_digest,
        "aggregate_digest": statistics.aggregate_digest,
    }


def metrics(statistics: RoundStatistics, *, only: str = "") -> Answer:
    """Return every column's mean, weighted mean, spread and extremes."""
    names = [only] if only else [*statistics.columns, *_own(statistics)]
    found = {}
    for name in names:
        values = column(statistics, name)
        rows = np.flatnonzero(np.isfinite(values))
        if len(rows):
            found[name] = _summary(statistics, values[rows], rows)
        elif only:
            known_rows(values, name, statistics)
    return {"round": statistics.round, "columns": found}


def rank(
    statistics: RoundStatistics, *, by: str, top: int = 0, is_ascending: bool = False
) -> Answer:
    """Return clients in the order of a column."""
    values = column(statistics, by)
    check_range("top", top, 0, 1_000_000)
    rows = known_rows(values, by, statistics)
    keys = values[rows] if is_ascending else -values[rows]
    order = rows[np.argsort(keys, kind="stable")][: top or None]
    is_known = np.isfinite(values)
    return {
        "column": by,
        "clients": [
            {"client": statistics.clients[row], "value": float(values[row])} for row in order
        ],
        "unknown": selected(statistics.clients, ~is_known),
    }


def matching(statistics: RoundStatistics, *, where: dict[str, str]) -> Answer:
    """Return the clients for whom all conditions hold; one who did not send a column matches none.

    A condition is a comparison and a number, such as `{"loss": "> 1.5", "example_count": ">= 50"}`;
    without a sign it means equal.
    """
    if not isinstance(where, dict) or not 1 <= len(where) <= CONDITIONS_MAX:
        raise ValueError(
            f'`where` is a dict of 1 to {CONDITIONS_MAX} conditions, such as {{"loss": "> 1.5"}}'
        )
    holds = np.ones(len(statistics.clients), dtype=np.bool_)
    shown = {}
    for name, condition in where.items():
        compare, bound = _condition(name, condition)
        values = column(statistics, name)
        holds &= np.isfinite(values) & compare(values, bound)
        shown[name] = values
    rows = np.flatnonzero(holds)
    return {
        "clients": [statistics.clients[row] for row in rows],
        "values": {
            statistics.clients[row]: {name: float(values[row]) for name, values in shown.items()}
            for row in rows
        },
    }


def plain(value: Any, depth: int = 0) -> Any:
    """Return what JSON can hold of metadata; arrays and bytes become a note of their size."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, np.floating)):
        return number(float(value))
    if isinstance(value, np.generic):
        return plain(value.item(), depth + 1)
    if depth < 16 and isinstance(value, Mapping):
        return {str(key): plain(each, depth + 1) for key, each in value.items()}
    if depth < 16 and isinstance(value, (list, tuple)):
        return [plain(each, depth + 1) for each in value]
    if isinstance(value, (bytes, bytearray)):
        return f"({len(value)} bytes)"
    if isinstance(value, np.ndarray):
        return f"({value.dtype} array of shape {list(value.shape)})"
    return str(value)[:256]


def mean_of(statistics: RoundStatistics, name: str) -> float | None:
    """Return a metric of a round: the round's own, else its clients' mean weighted by examples.

    None if neither is known.
    """
    own = statistics.round_metadata.get(name)
    if isinstance(own, (int, float)) and not isinstance(own, bool) and math.isfinite(own):
        return float(own)
    if name not in statistics.columns and name not in OWN_COLUMNS:
        return None
    values = column(statistics, name)
    rows = np.flatnonzero(np.isfinite(values))
    if len(rows) == 0:
        return None
    return _weighted(statistics, values[rows], rows)


def check_goal(goal: str) -> float:
    """Return 1 if the largest value is best, −1 if the smallest is."""
    check_choice("goal", goal, ("max", "min"))
    return 1.0 if goal == "max" else -1.0


def _summary(statistics: RoundStatistics, values: Float, rows: np.ndarray[Any, Any]) -> Answer:
    least, most = int(values.argmin()), int(values.argmax())
    return {
        "count": len(rows),
        "mean": float(values.mean()),
        "weighted_mean": _weighted(statistics, values, rows),
        "median": median(values),
        "std": float(values.std()),
        "min": float(values[least]),
        "min_client": statistics.clients[rows[least]],
        "max": float(values[most]),
        "max_client": statistics.clients[rows[most]],
    }


def _weighted(statistics: RoundStatistics, values: Float, rows: np.ndarray[Any, Any]) -> float:
    return float(shares(statistics.example_counts[rows]) @ values)


def _own(statistics: RoundStatistics) -> list[str]:
    return [name for name in OWN_COLUMNS if name not in statistics.columns]


def _condition(name: str, condition: Any) -> tuple[Callable[[Any, Any], Any], float]:
    text = str(condition).strip()
    sign = next((sign for sign in _COMPARISONS if text.startswith(sign)), "")
    rest = text.removeprefix(sign) if sign else text.removeprefix("=")
    try:
        bound = float(rest)
    except ValueError:
        bound = math.nan
    if isinstance(condition, bool) or not math.isfinite(bound):
        raise ValueError(
            f"the condition on {name!r} is {text[:80]!r}: give one of {' '.join(_COMPARISONS)} and "
            "a number, such as '> 1.5'"
        )
    return _COMPARISONS[sign or "=="], bound


QUESTIONS = (
    Question(
        name="round",
        summary="What is known of a round: who is in, who is not and why, digests, metadata",
        needs="statistics",
        function=facts,
        arguments={},
        source="the cache",
    ),
    Question(
        name="metrics",
        summary="Mean, weighted mean, median, spread and extremes of what clients sent along",
        needs="statistics",
        function=metrics,
        arguments={"only": "one column instead of all"},
        source="the cache",
    ),
    Question(
        name="rank",
        summary="Clients in the order of a column",
        needs="statistics",
        function=rank,
        arguments={
            "by": f"column of the metadata, or {', '.join(OWN_COLUMNS)}",
            "top": "only so many",
            "is_ascending": "smallest first",
        },
        source="the cache",
    ),
    Question(
        name="filter",
        summary="Clients for whom conditions on columns hold",
        needs="statistics",
        function=matching,
        arguments={"where": 'conditions by column, such as {"loss": "> 1.5"}'},
        source="the cache",
    ),
)

"""Rounds of federated learning made from raw vectors, for the tests of the analytics."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tierwise.functions.fl.statistics import RoundStatistics

Float = NDArray[np.float64]


def statistics_of(
    deltas: Float,
    *,
    round_number: int = 3,
    clients: Sequence[str] = (),
    counts: Sequence[float] = (),
    base: Float | None = None,
    step: Float | None = None,
    metadata: Sequence[Mapping[str, object]] = (),
    **changes: Any,
) -> RoundStatistics:
    """Return the statistics that a cache would have taken of these deltas, rows of (n, P)."""
    n, parameter_count = deltas.shape
    names = tuple(clients) or tuple(f"client-{row}" for row in range(n))
    rows = [dict(each) for each in metadata] or [{} for _ in range(n)]
    keys = dict.fromkeys(
        key for row in rows for key, value in row.items() if isinstance(value, (int, float))
    )
    columns = {
        key: np.array([float(row.get(key, np.nan)) for row in rows])  # type: ignore[arg-type]
        for key in keys
    }
    gram = deltas @ deltas.T
    fields: dict[str, Any] = {
        "namespace": "test",
        "job": "digits",
        "round": round_number,
        "clients": names,
        "rows": np.arange(n),
        "expected": names,
        "parameter_count": parameter_count,
        "gram": gram,
        "norms": np.sqrt(np.diagonal(gram)),
        "base_dots": np.zeros(n) if base is None else deltas @ base,
        "base_norm": 0.0 if base is None else float(np.linalg.norm(base)),
        "aggregate_dots": np.full(n, np.nan) if step is None else deltas @ step,
        "aggregate_norm": np.nan if step is None else float(np.linalg.norm(step)),
        "example_counts": np.array(counts, dtype=np.float64) if len(counts) else np.ones(n),
        "arrival_s": np.arange(n, dtype=np.float64),
        "digests": tuple(f"{row:064x}" for row in range(n)),
        "columns": columns,
        "metadata": tuple(rows),
    }
    return RoundStatistics(**{**fields, **changes})


def crowd(n: int = 10, parameter_count: int = 300, *, seed: int = 0, spread: float = 0.5) -> Float:
    """Return deltas that point the same way, more or less, shape (n, P)."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=parameter_count)
    return common + spread * rng.normal(size=(n, parameter_count))


def cosine(left: Float, right: Float) -> float:
    below = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / below if below > 0.0 else 0.0


def in_order(statistics: RoundStatistics, values: Mapping[str, Any]) -> Float:
    """Return an answer's numbers in the order of the clients."""
    return np.array([values[name] for name in statistics.clients])

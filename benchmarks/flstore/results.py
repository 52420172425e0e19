"""What was measured, and what follows: means, quantiles, reductions with intervals. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.flstore.prices import Use

BOOTSTRAPS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One query on one system.

    Attributes:
        system: Its name, with the line: "s3 emulated".
        elapsed_s: As the asker sees it.
        read_bytes: Of the objects that the answer needed.
        was_hit: Whether all of them were in memory; None if nobody said.
    """

    system: str
    size_mb: int
    number: int
    query_class: str
    workload: str
    elapsed_s: float
    read_bytes: int = 0
    get_count: int = 0
    fetch_s: float = 0.0
    was_hit: bool | None = None

    @property
    def use(self) -> Use:
        """Return what it is billed for."""
        gb = self.read_bytes / 1e9
        return Use(busy_s=self.elapsed_s, read_gb=gb, get_count=self.get_count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """How much lower a figure is than a rival's, −1 … ∞: −0.9 is 90 % lower; 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.1%} [{self.low:+.0%}…{self.high:+.0%}]"


def latency(samples: Sequence[Sample]) -> dict[str, float]:
    """Return mean, p50 and p95 in seconds, and how many queries they are of."""
    times = np.array([sample.elapsed_s for sample in samples])
    p50, p95 = np.percentile(times, (50, 95))
    return {
        "mean_s": float(times.mean()),
        "p50_s": float(p50),
        "p95_s": float(p95),
        "n": len(times),
    }


def paired(samples: Sequence[Sample], ours: str, rival: str) -> tuple[list[Sample], list[Sample]]:
    """Return the samples of two systems on the queries that both answered, in one order."""
    found: dict[str, dict[tuple[int, int], Sample]] = {ours: {}, rival: {}}
    for sample in samples:
        if sample.system in found:
            found[sample.system][sample.size_mb, sample.number] = sample
    both = sorted(found[ours].keys() & found[rival].keys())
    return [found[ours][key] for key in both], [found[rival][key] for key in both]


def change(ours: NDArray[np.float64], rival: NDArray[np.float64]) -> Change:
    """Return mean(ours) ÷ mean(rival) − 1 with a bootstrap interval over queries.

    Args:
        ours: A figure of each query, shape (n,).
        rival: Of the same queries.
    """
    rng = np.random.default_rng(0)
    picks = rng.integers(len(ours), size=(BOOTSTRAPS, len(ours)))
    ratios = ours[picks].mean(axis=1) / rival[picks].mean(axis=1) - 1.0
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Change(value=float(ours.mean() / rival.mean() - 1.0), low=float(low), high=float(high))


def is_same(one: object, other: object) -> bool:
    """Return whether two answers are equal, numbers within rounding of sums over vectors."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    if isinstance(one, np.ndarray | Sequence) and isinstance(other, np.ndarray | Sequence):
        return len(one) == len(other) and all(
            is_same(a, b) for a, b in zip(one, other, strict=True)
        )
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other or one == other
    if isinstance(one, int | float | np.number) and isinstance(other, int | float | np.number):
        return bool(np.isclose(one, other, rtol=1e-5, atol=1e-7, equal_nan=True))
    return bool(one == other)

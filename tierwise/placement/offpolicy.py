"""What a policy would have cost, from decisions that another one took and logged. Pure.

    IPS    mean(w·c)                              w = π(a)/μ(a), the target's chance ÷ the logger's
    SNIPS  Σ w·c ÷ Σ w
    DR     mean(Σ_a π(a)·q(a) + w·(c − q(a)))      q: cost predicted for each candidate

Horvitz and Thompson (JASA 1952); Swaminathan and Joachims (NeurIPS 2015); Dudík, Langford and Li
(ICML 2011). DR is unbiased if either the propensities or the predictions are right; with logged
propensities the predictions need only be near to make it narrower.

All three hold for decisions that do not act on each other, and only where the logger might have
done what the target does. Placement breaks the first: a call that goes elsewhere also leaves
another queue to the next call. So the figures compare single decisions in the *logger's* traffic.
"""

import math
from dataclasses import dataclass

import numpy as np

from tierwise.cost.estimate import Float

RESAMPLES = 2000
CHUNK = 100
CAVEATS = (
    "Each figure asks what single calls would have cost in the traffic that the logging policy "
    "made; a policy in charge also changes the queues that later calls meet. A canary measures "
    "that, these estimates do not.",
    "Where the logging policy never chose what the target would, there is no support: IPS "
    "takes these decisions for free, SNIPS leaves them out, DR takes the cost model's word for "
    "them. Policies without a temperature log chances of 0 and 1 and support only what they did.",
    "Agents keep explanations of the first 200 calls of each heartbeat: under more load than that, "
    "the log is not a fair sample.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Decisions in order of time, all arrays of shape (n,).

    Attributes:
        cost: What came of the logged choice, in second-equivalents.
        logged: Chance with which the logger took that choice, > 0.
        target: Chance with which the target would have.
        predicted: Predicted cost of that choice.
        expected: Predicted cost of the target: its mean over candidates.
        unsupported: Share of the target's choice that the logger could not have taken.
    """

    cost: Float
    logged: Float
    target: Float
    predicted: Float
    expected: Float
    unsupported: Float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """An estimate with its 95 % bootstrap interval; NaN where there is no support at all."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicy:
    """Estimated mean cost per call of the target, and how far to trust it."""

    count: int
    logged: Interval  # what the logger's own calls cost
    ips: Interval
    snips: Interval
    dr: Interval
    effective_count: float  # (Σw)² ÷ Σw², Kish
    weight_max: float
    unsupported_share: float


def evaluate(log: Log, *, seed: int = 0) -> OffPolicy:
    """Estimate the target's mean cost.

    Intervals are percentiles of a circular block bootstrap (Politis and Romano, 1992) with blocks
    of n^(1/3) consecutive decisions, for neighbours share queues.

    Raises:
        ValueError: There is no decision, or a logged chance is not in (0, 1].
    """
    n = len(log.cost)
    if n == 0:
        raise ValueError("there is no decision to estimate from")
    if not ((log.logged > 0.0) & (log.logged <= 1.0 + 1e-9)).all():
        raise ValueError("a logged choice must have had a chance in (0, 1]")
    weights = log.target / log.logged
    doubly = log.expected + weights * (log.cost - log.predicted)
    columns = np.stack([log.cost, weights * log.cost, weights, doubly], axis=1)
    resampled = _resampled_means(columns, np.random.default_rng(seed))
    means = columns.mean(axis=0)
    square = float(weights @ weights)
    return OffPolicy(
        count=n,
        logged=_interval(means[0], resampled[:, 0]),
        ips=_interval(means[1], resampled[:, 1]),
        snips=_interval(_divide(means[1], means[2]), _divide(resampled[:, 1], resampled[:, 2])),
        dr=_interval(means[3], resampled[:, 3]),
        effective_count=float(weights.sum() ** 2 / square) if square > 0.0 else 0.0,
        weight_max=float(weights.max()),
        unsupported_share=float(log.unsupported.mean()),
    )


def _resampled_means(columns: Float, rng: np.random.Generator) -> Float:
    """Return the columns' means in each resample, shape (RESAMPLES, columns)."""
    n = len(columns)
    length = max(1, round(n ** (1.0 / 3.0)))
    wrapped = np.concatenate([np.zeros((1, columns.shape[1])), columns, columns[: length - 1]])
    sums = np.cumsum(wrapped, axis=0)
    blocks = sums[length:] - sums[:-length]  # of each start, shape (n, columns)
    count = math.ceil(n / length)
    means = np.empty((RESAMPLES, columns.shape[1]))
    for first in range(0, RESAMPLES, CHUNK):  # all at once would need too much memory
        last = min(RESAMPLES, first + CHUNK)
        drawn = blocks[rng.integers(n, size=(last - first, count))]
        means[first:last] = drawn.sum(axis=1) / (count * length)
    return means


def _divide(sums: Float, weights: Float) -> Float:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(weights > 0.0, sums / weights, np.nan))


def _interval(mean: Float | float, resampled: Float) -> Interval:
    known = resampled[np.isfinite(resampled)]
    if len(known) == 0:
        return Interval(mean=float(mean), low=math.nan, high=math.nan)
    low, high = np.percentile(known, (2.5, 97.5))
    return Interval(mean=float(mean), low=float(low), high=float(high))

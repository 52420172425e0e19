"""The base score: tuned earliest completion time, in second-equivalents. Lower is better.

    score = transfer + wait + α·cold start + run + return
          + displaced (rate × cold start of what must be evicted)
          + usd·per_usd_s + late·max(0, latency − deadline) + miss·[latency > deadline]

Charging only part of a cold start (α < 1) counts it as an investment in the next calls.
The defaults were tuned on validation traces of the simulator: `tierwise policy tune`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tierwise.cost.estimate import Estimates, Float
from tierwise.domain.function import Priority
from tierwise.domain.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreWeights:
    """Weights of the base score; all ≥ 0."""

    cold_start: float = 0.75
    displaced: float = 4.0
    per_usd_s: float = 20_000.0
    per_late_s: float = 0.5
    per_miss_s: float = 0.05


DEFAULT_WEIGHTS = ScoreWeights()


def base_score(
    estimates: Estimates, request: Request, weights: ScoreWeights = DEFAULT_WEIGHTS
) -> Float:
    """Return the score of each candidate, shape (k,), float64, in second-equivalents."""
    vector = (1.0, 1.0, weights.cold_start, 1.0, 1.0, weights.displaced, weights.per_usd_s)
    late_s = estimates.latency_s - request.deadline_s
    urgency = int(request.priority) / 2.0
    scores: Float = estimates.terms @ np.array(vector)
    scores += weights.per_late_s * urgency * np.maximum(late_s, 0.0)
    scores += weights.per_miss_s * urgency * (late_s > 0.0)
    return scores


# Columns of `weighted`: the terms that a score is the sum of.
PARTS = (
    "transfer",
    "wait",
    "cold_start",
    "run",
    "return",
    "displaced",
    "money",
    "late",
    "miss",
)


def weighted(
    terms: Float, deadline_s: float, priority: Priority, weights: ScoreWeights = DEFAULT_WEIGHTS
) -> Float:
    """Return `base_score` term by term, in second-equivalents: its rows sum to the scores.

    Args:
        terms: Shape (k, 7), as in Estimates.
        deadline_s: Of the request.
        priority: Of the request.
        weights: Of the base score.

    Returns:
        Shape (k, 9), columns PARTS.
    """
    vector = (1.0, 1.0, weights.cold_start, 1.0, 1.0, weights.displaced, weights.per_usd_s)
    late_s = np.add.reduce(terms[:, :5], axis=1) - deadline_s
    urgency = int(priority) / 2.0
    parts: Float = np.empty((len(terms), len(PARTS)))
    parts[:, :7] = terms * np.array(vector)
    parts[:, 7] = weights.per_late_s * urgency * np.maximum(late_s, 0.0)
    parts[:, 8] = weights.per_miss_s * urgency * (late_s > 0.0)
    return parts


def sole_score(
    terms: Sequence[float], request: Request, weights: ScoreWeights = DEFAULT_WEIGHTS
) -> float:
    """Return `base_score` of one row of terms without NumPy, whose calls cost more than the sum."""
    transfer_s, wait_s, cold_start_s, run_s, return_s, displaced_s, money_usd = terms
    warm_s = transfer_s + wait_s + run_s + return_s
    late_s = warm_s + cold_start_s - request.deadline_s
    score = (
        warm_s
        + weights.cold_start * cold_start_s
        + weights.displaced * displaced_s
        + weights.per_usd_s * money_usd
    )
    if late_s > 0.0:
        urgency = int(request.priority) / 2.0
        score += urgency * (weights.per_late_s * late_s + weights.per_miss_s)
    return score

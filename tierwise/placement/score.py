"""The base score: tuned earliest completion time, in second-equivalents. Lower is better.

    score = transfer + wait + α·cold start + run + return
          + displaced (rate × cold start of what must be evicted)
          + usd·per_usd_s + late·max(0, latency − deadline) + miss·[latency > deadline]

Charging only part of a cold start (α < 1) counts it as an investment in the next calls.
The defaults were tuned on validation traces of the simulator: `tierwise policy tune`.
"""

from dataclasses import dataclass

import numpy as np

from tierwise.cost.estimate import Estimates, Float
from tierwise.domain.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreWeights:
    """Weights of the base score; all ≥ 0."""

    cold_start: float = 0.3
    displaced: float = 1.0
    per_usd_s: float = 20_000.0
    per_late_s: float = 1.0
    per_miss_s: float = 0.5


DEFAULT_WEIGHTS = ScoreWeights()


def base_score(
    estimates: Estimates, request: Request, weights: ScoreWeights = DEFAULT_WEIGHTS
) -> Float:
    """Return the score of each candidate, shape (k,), float64, in second-equivalents."""
    vector = np.array(
        [
            1.0,
            1.0,
            weights.cold_start,
            1.0,
            1.0,
            weights.displaced,
            weights.per_usd_s,
        ]
    )
    latency_s = estimates.latency_s
    late_s = latency_s - request.deadline_s
    urgency = int(request.priority) / 2.0
    return np.asarray(
        estimates.terms @ vector
        + weights.per_late_s * urgency * np.maximum(late_s, 0.0)
        + weights.per_miss_s * urgency * (late_s > 0.0),
        dtype=np.float64,
    )

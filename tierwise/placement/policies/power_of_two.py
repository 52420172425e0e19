"""Power of d choices: look at a few nodes at random, take the better one (Mitzenmacher, 2001)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import Ranking, rank_or_place


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """Samples `choices` candidates without replacement and orders them by predicted latency.

    The others follow by predicted latency too, for the case that all sampled ones refuse.
    """

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    choices: int = 8
    cold_start: float = 0.75  # share of the cold start that counts
    policy_id: ClassVar[PolicyId] = PolicyId("power-of-two@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the sampled candidates, then the rest."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        estimates = ranking.estimates
        cold_s = estimates.column("cold_start_s")
        latency_s = estimates.latency_s - (1.0 - self.cold_start) * cold_s
        is_left_out = np.ones(len(latency_s), dtype=np.bool_)
        count = min(self.choices, len(latency_s))
        is_left_out[rng.choice(len(latency_s), size=count, replace=False)] = False
        return ranking.placed(self.policy_id, np.lexsort((latency_s, is_left_out)))

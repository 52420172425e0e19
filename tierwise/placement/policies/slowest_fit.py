"""Deadline slowest-fit: the cheapest node that should just hold the deadline keeps others free."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import Ranking, rank_or_place


@dataclass(frozen=True, slots=True)
class SlowestFit:
    """Takes the cheapest candidate predicted to end within `slack` × the deadline.

    Equal prices go to the latest to end. If none fits, the earliest to end is taken.
    """

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    slack: float = 0.2
    cold_start: float = 1.0  # share of the cold start that counts
    policy_id: ClassVar[PolicyId] = PolicyId("slowest-fit@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return those that fit by rising price, then the others by predicted latency."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        estimates = ranking.estimates
        cold_s = estimates.column("cold_start_s")
        latency_s = estimates.latency_s - (1.0 - self.cold_start) * cold_s
        is_late = latency_s > self.slack * request.deadline_s
        usd = estimates.column("money_usd")
        order = np.lexsort(
            (np.where(is_late, 0.0, -latency_s), np.where(is_late, latency_s, usd), is_late)
        )
        return ranking.placed(self.policy_id, order)

"""Least loaded, aware of speed and distance."""

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import Ranking, rank_or_place


class LeastLoaded:
    """Minimises wait + transfer + run + return; blind to cold starts, money and deadlines."""

    policy_id = PolicyId("least-loaded@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the candidates by rising load."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        load_s = ranking.estimates.latency_s - ranking.estimates.column("cold_start_s")
        return ranking.placed(self.policy_id, np.argsort(load_s, kind="stable"))

"""Tuned earliest completion time: the base score, lowest first."""

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import Ranking, rank_or_place
from tierwise.placement.score import DEFAULT_WEIGHTS, ScoreWeights


class EarliestCompletion:
    """Sends each request where it should end first, with money and displacement priced in."""

    policy_id = PolicyId("ect@1")

    def __init__(self, weights: ScoreWeights = DEFAULT_WEIGHTS) -> None:
        self._weights = weights

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the candidates by rising base score."""
        ranking = rank_or_place(self.policy_id, view, request, self._weights)
        if not isinstance(ranking, Ranking):
            return ranking
        return ranking.placed(self.policy_id, ranking.by_score())

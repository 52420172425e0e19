"""Tuned earliest completion time: the base score, lowest first."""

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.features import gaps
from tierwise.placement.ranking import Ranking, rank_or_place, softmax
from tierwise.placement.score import DEFAULT_WEIGHTS, ScoreWeights

SOFT_TEMPERATURE = 0.03  # of "soft-ect"; tuned with the rivals (docs/results/tuned.json)


class EarliestCompletion:
    """Sends each request where it should end first, with money and displacement priced in.

    With a temperature (in deadlines) the node is drawn from the softmax of −gap ÷ temperature, so
    that agents with the same stale view do not all choose the same.
    """

    def __init__(self, weights: ScoreWeights = DEFAULT_WEIGHTS, temperature: float = 0.0) -> None:
        self._weights = weights
        self._temperature = temperature
        self.policy_id = PolicyId("soft-ect@1" if temperature > 0.0 else "ect@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the candidates by rising base score, or drawn by it."""
        ranking = rank_or_place(self.policy_id, view, request, self._weights)
        if not isinstance(ranking, Ranking):
            return ranking
        if self._temperature <= 0.0:
            return ranking.placed(self.policy_id, ranking.by_score())
        logits = gaps(ranking.scores, request.deadline_s) / -self._temperature
        order = np.lexsort((ranking.scores, -(logits + rng.gumbel(size=len(logits)))))
        return ranking.placed(self.policy_id, order, propensities=softmax(logits))

"""The frame that every policy shares: mask, estimate, score; then an order of the candidates."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierwise.cost.estimate import Estimates, Float, estimate
from tierwise.domain.decision import NotPlaced, Placed, Reason
from tierwise.domain.ids import NodeId, PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.explain import explain
from tierwise.placement.feasibility import feasible
from tierwise.placement.score import DEFAULT_WEIGHTS, ScoreWeights, base_score


@dataclass(frozen=True, slots=True)
class Ranking:
    """Feasible candidates with their predicted terms and base scores, all of length k ≥ 1."""

    estimates: Estimates
    scores: Float
    masked: tuple[tuple[NodeId, Reason], ...]

    def placed(
        self,
        policy_id: PolicyId,
        order: NDArray[np.intp],
        *,
        residuals: Float | None = None,
        propensities: Float | None = None,
        fallback: str = "",
    ) -> Placed:
        """Return the decision to run on the candidates in `order`, best first."""
        candidates = self.estimates.candidates
        return Placed(
            node_ids=tuple(candidates[i].node.node_id for i in order.tolist()),
            explanation=explain(
                policy_id,
                self.estimates,
                self.scores,
                self.masked,
                residuals=residuals,
                propensities=propensities,
                fallback=fallback,
            ),
        )


def rank(
    view: ClusterView,
    request: Request,
    weights: ScoreWeights = DEFAULT_WEIGHTS,
    *,
    candidates_max: int | None = None,
) -> Ranking | NotPlaced:
    """Mask and score the nodes of a view.

    Args:
        view: What is known.
        request: What wants a node.
        weights: Of the base score.
        candidates_max: Keep only that many with the best scores (in view order).

    Returns:
        The ranking, or the reasons why no node is feasible.
    """
    candidates, masked = feasible(view, request)
    if not candidates:
        return NotPlaced(reasons=tuple(masked))
    estimates = estimate(view, request, candidates)
    scores = base_score(estimates, request, weights)
    if candidates_max is not None and len(candidates) > candidates_max:
        keep = np.sort(np.argsort(scores, kind="stable")[:candidates_max])
        rows = tuple(candidates[i] for i in keep.tolist())
        estimates, scores = Estimates(rows, estimates.terms[keep]), scores[keep]
    return Ranking(estimates, scores, tuple(masked))


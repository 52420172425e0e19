"""The frame that every policy shares: mask, estimate, score; then an order of the candidates."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tierwise.cost.estimate import Estimates, Float, estimate, predict
from tierwise.domain.decision import Decision, NotPlaced, Placed, Reason
from tierwise.domain.ids import NodeId, PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView, NodeView
from tierwise.placement.explain import explain, explain_sole
from tierwise.placement.feasibility import feasible
from tierwise.placement.score import DEFAULT_WEIGHTS, ScoreWeights, base_score, sole_score


@dataclass(frozen=True, slots=True)
class Ranking:
    """Feasible candidates with their predicted terms and base scores, all of length k ≥ 1.

    `rest` are feasible nodes that were cut off by `candidates_max`, by rising base score.
    """

    estimates: Estimates
    scores: Float
    masked: tuple[tuple[NodeId, Reason], ...]
    rest: tuple[NodeId, ...] = ()

    def by_score(self) -> NDArray[np.intp]:
        """Return the candidates' rows by rising base score, ties in view order."""
        return np.argsort(self.scores, kind="stable")

    def placed(
        self,
        policy_id: PolicyId,
        order: NDArray[np.intp],
        *,
        residuals: Float | None = None,
        propensities: Float | None = None,
        fallback: str = "",
    ) -> Placed:
        """Return the decision to run on the candidates in `order`, best first, then on `rest`."""
        candidates = self.estimates.candidates
        rows = order.tolist()
        return Placed(
            node_ids=(*[candidates[i].node.node_id for i in rows], *self.rest),
            explanation=explain(
                policy_id,
                self.estimates,
                self.scores,
                self.masked,
                chosen=rows[0],
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
    return _ranking(view, request, weights, candidates, masked, candidates_max)


def rank_or_place(
    policy_id: PolicyId,
    view: ClusterView,
    request: Request,
    weights: ScoreWeights = DEFAULT_WEIGHTS,
    *,
    candidates_max: int | None = None,
) -> Ranking | Decision:
    """Return `rank`, or the decision itself if at most one node is feasible.

    Where there is no choice there is nothing to compare, and NumPy's calls would cost more than
    all the rest.
    """
    candidates, masked = feasible(view, request)
    if not candidates:
        return NotPlaced(reasons=tuple(masked))
    if len(candidates) > 1:
        return _ranking(view, request, weights, candidates, masked, candidates_max)
    node_id = candidates[0].node.node_id
    terms = predict(view, request, candidates)[0]
    score = sole_score(terms, request, weights)
    return Placed(
        node_ids=(node_id,),
        explanation=explain_sole(policy_id, node_id, terms, score, masked),
    )


def _ranking(
    view: ClusterView,
    request: Request,
    weights: ScoreWeights,
    candidates: Sequence[NodeView],
    masked: Sequence[tuple[NodeId, Reason]],
    candidates_max: int | None,
) -> Ranking:
    estimates = estimate(view, request, candidates)
    scores = base_score(estimates, request, weights)
    if candidates_max is None or len(candidates) <= candidates_max:
        return Ranking(estimates, scores, tuple(masked))
    order = np.argsort(scores, kind="stable")
    rest = tuple([candidates[i].node.node_id for i in order[candidates_max:].tolist()])
    keep = np.sort(order[:candidates_max])
    rows = tuple([candidates[i] for i in keep.tolist()])
    return Ranking(Estimates(rows, estimates.terms[keep]), scores[keep], tuple(masked), rest)


def softmax(logits: Float) -> Float:
    """Return probabilities, shape (k,), of finite logits."""
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum(), dtype=np.float64)

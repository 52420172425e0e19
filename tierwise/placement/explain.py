"""Turn what a policy computed into what `tierwise explain` shows."""

from collections.abc import Sequence

from tierwise.cost.estimate import Estimates, Float
from tierwise.domain.decision import CandidateScore, Explanation, Reason
from tierwise.domain.ids import NodeId, PolicyId


def explain(
    policy_id: PolicyId,
    estimates: Estimates,
    scores: Float,
    masked: Sequence[tuple[NodeId, Reason]],
    *,
    residuals: Float | None = None,
    propensities: Float | None = None,
    fallback: str = "",
) -> Explanation:
    """Return the explanation of one decision.

    Args:
        policy_id: Who decided.
        estimates: Predicted terms of the k candidates.
        scores: Base scores, shape (k,), second-equivalents.
        masked: Nodes that could not take it.
        residuals: What the learned policy added to the logits, shape (k,); None for heuristics.
        propensities: Probability of each candidate, shape (k,); None if unknown.
        fallback: Why the base score decided instead of the learned policy.
    """
    k = len(scores)
    residual = [0.0] * k if residuals is None else residuals.tolist()
    propensity = [0.0] * k if propensities is None else propensities.tolist()
    score = scores.tolist()
    rows = tuple(
        CandidateScore(view.node.node_id, *terms, s, r, p)
        for view, terms, s, r, p in zip(
            estimates.candidates, estimates.terms.tolist(), score, residual, propensity, strict=True
        )
    )
    best = min(range(k), key=score.__getitem__, default=None)
    return Explanation(
        policy_id=policy_id,
        candidates=rows,
        masked=tuple(masked),
        heuristic_choice=None if best is None else rows[best].node_id,
        fallback=fallback,
    )

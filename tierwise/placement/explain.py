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
    chosen: int | None = None,
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
        chosen: Row of the first choice.
        residuals: What the learned policy added to the logits, shape (k,); None for heuristics.
        propensities: Probability of each candidate, shape (k,); None if `chosen` was certain.
        fallback: Why the base score decided instead of the learned policy.
    """
    k = len(scores)
    score = scores.tolist()
    residual = [0.0] * k if residuals is None else residuals.tolist()
    if propensities is not None:
        propensity = propensities.tolist()
    else:
        propensity = [0.0] * k
        if chosen is not None:
            propensity[chosen] = 1.0
    make = CandidateScore._make
    rows = tuple(
        [
            make((view.node.node_id, *terms, s, r, p))
            for view, terms, s, r, p in zip(
                estimates.candidates,
                estimates.terms.tolist(),
                score,
                residual,
                propensity,
                strict=True,
            )
        ]
    )
    return Explanation(
        policy_id=policy_id,
        candidates=rows,
        masked=tuple(masked),
        heuristic_choice=rows[score.index(min(score))].node_id if rows else None,
        choice=rows[chosen].node_id if chosen is not None else None,
        fallback=fallback,
    )


def explain_sole(
    policy_id: PolicyId,
    node_id: NodeId,
    terms: Sequence[float],
    score: float,
    masked: Sequence[tuple[NodeId, Reason]],
) -> Explanation:
    """Return the explanation of a decision that had one candidate, and so no choice."""
    return Explanation(
        policy_id=policy_id,
        candidates=(CandidateScore._make((node_id, *terms, score, 0.0, 1.0)),),
        masked=tuple(masked),
        heuristic_choice=node_id,
        choice=node_id,
    )

"""What a policy would have done in a decision of which only the record is left. Pure.

A record holds the predicted terms of the candidates, their base scores and, of a learned policy,
the residuals; not the network's inputs. So can be recomputed: the base score with any weights and
temperature, slowest-fit, and the policy that decided with other dials (λ, β, temperature). Of any
other policy, the records tell only if it was in the shadow: then they hold its own odds.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from tierwise.cost.estimate import TERMS, Float
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.decision import CandidateScore, ShadowDecision
from tierwise.domain.function import Priority
from tierwise.domain.ids import NodeId
from tierwise.placement.features import gaps
from tierwise.placement.offpolicy import Log
from tierwise.placement.ranking import softmax
from tierwise.placement.score import DEFAULT_WEIGHTS, ScoreWeights, weighted


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedCall:
    """One call that ended, with the decision that placed it; `rows` has at least one entry."""

    policy_id: str
    rows: tuple[CandidateScore, ...]
    choice: NodeId
    deadline_s: float
    priority: Priority
    cost_s: float
    fallback: str = ""
    shadow: ShadowDecision | None = None


# The chance of each row, shape (k,), summing to 1; None if this record does not tell.
Target = Callable[[LoggedCall], Float | None]


def by_base_score(weights: ScoreWeights = DEFAULT_WEIGHTS, temperature: float = 0.0) -> Target:
    """Return ect (temperature 0) or soft-ect as a target."""

    def chances(call: LoggedCall) -> Float:
        scores = weighted(_terms(call), call.deadline_s, call.priority, weights).sum(axis=1)
        if temperature <= 0.0:
            return _certain(len(scores), int(np.argmin(scores)))
        return softmax(gaps(scores, call.deadline_s) / -temperature)

    return chances


def by_slowest_fit(slack: float = 0.7) -> Target:
    """Return slowest-fit as a target: the cheapest that is predicted in time, then the slowest."""

    def chances(call: LoggedCall) -> Float:
        terms = _terms(call)
        latency_s, usd = terms[:, :5].sum(axis=1), terms[:, TERMS.index("money_usd")]
        is_late = latency_s > slack * call.deadline_s
        order = np.lexsort(
            (np.where(is_late, 0.0, -latency_s), np.where(is_late, latency_s, usd), is_late)
        )
        return _certain(len(terms), int(order[0]))

    return chances


def by_dials(policy_id: str, *, beta: float, lam_factor: float, temperature: float) -> Target:
    """Return the learned policy that decided, with other dials, as a target.

    Args:
        policy_id: Who decided; records of others tell nothing of its network.
        beta: Weight of the gap of the base score.
        lam_factor: Times the logged residual, which holds the logger's own λ.
        temperature: Of the softmax; 0 takes the largest logit.
    """

    def chances(call: LoggedCall) -> Float | None:
        if call.policy_id != policy_id:
            return None
        scores = np.array([row.score for row in call.rows])
        if call.fallback or len(scores) == 1:  # the inputs were out of range, whatever the dials
            return _certain(len(scores), int(np.argmin(scores)))
        residuals = lam_factor * np.array([row.residual for row in call.rows])
        logits = residuals - beta * gaps(scores, call.deadline_s)
        if temperature > 0.0:
            return softmax(logits / temperature)
        return _certain(len(scores), int(np.lexsort((scores, -logits))[0]))

    return chances


def by_shadow(policy_id: str) -> Target:
    """Return a policy that was in the shadow as a target, exactly as it answered then."""

    def chances(call: LoggedCall) -> Float | None:
        shadow = call.shadow
        if shadow is None or shadow.policy_id != policy_id or shadow.error or not shadow.odds:
            return None
        odds = dict(shadow.odds)
        # A candidate that the logger did not compare has no row: its share stays out, unsupported.
        return np.array([odds.get(row.node_id, 0.0) for row in call.rows])

    return chances


def replay(calls: Iterable[LoggedCall], target: Target) -> tuple[Log, int]:
    """Return the log that estimates are made from, and how many calls told nothing of the target.

    Calls whose choice has no row or no chance in their own record are among the latter.
    """
    rows: list[tuple[float, ...]] = []
    skipped_count = 0
    for call in calls:
        chances = target(call)
        index = next((i for i, r in enumerate(call.rows) if r.node_id == call.choice), None)
        if chances is None or index is None or call.rows[index].propensity <= 0.0:
            skipped_count += 1
            continue
        logged = np.array([row.propensity for row in call.rows])
        predicted = np.array(
            [DEFAULT_OBJECTIVE.predicted_s(r, call.deadline_s, call.priority) for r in call.rows]
        )
        unknown = max(0.0, 1.0 - float(chances.sum()))
        rows.append(
            (
                call.cost_s,
                logged[index],
                chances[index],
                predicted[index],
                float(chances @ predicted) + unknown * float(predicted.max()),
                float(chances[logged <= 0.0].sum()) + unknown,
            )
        )
    columns = np.array(rows, dtype=np.float64).reshape(-1, 6).T
    cost, logged, chosen, predicted, expected, unsupported = columns
    log = Log(
        cost=cost,
        logged=logged,
        target=chosen,
        predicted=predicted,
        expected=expected,
        unsupported=unsupported,
    )
    return log, skipped_count


def _terms(call: LoggedCall) -> Float:
    return np.array([row[1 : 1 + len(TERMS)] for row in call.rows], dtype=np.float64)


def _certain(k: int, index: int) -> Float:
    chances = np.zeros(k)
    chances[index] = 1.0
    return chances

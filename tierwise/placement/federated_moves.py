"""Whether aggregators move: only if what every later round saves pays for the move.

    gain  = cost of a round as they are − cost of a round as they would be, all of them warm
    price = for each new aggregator: a cold start, and the way of the model from the root
    moved if gain × min(rounds left, ROUNDS_MAX) > price × MARGIN

Readings are noisy, so a move that hardly pays would be followed by another one back: hence the
margin. No round after the ROUNDS_MAXth is reckoned with, for by then the cluster is another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tierwise.domain.decision import NotPlaced
from tierwise.domain.ids import NodeId
from tierwise.domain.view import ClusterView
from tierwise.placement.federated import search
from tierwise.placement.federated_round import Association, Problem, Round

ROUNDS_MAX = 20
MARGIN = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """What became of the question.

    Attributes:
        aggregators: The aggregator of each client, in the order of the round's.
        cost_s: What a round costs with them, second-equivalents.
        is_moved: They are not those of before.
        gain_s: What a round would cost less with the best aggregators; 0 if there were none before.
        price_s: What the move costs, once.
    """

    aggregators: tuple[NodeId, ...]
    cost_s: float
    is_moved: bool
    gain_s: float = 0.0
    price_s: float = 0.0


def revise(
    view: ClusterView, wanted: Round, current: Sequence[NodeId], rounds_left: int
) -> Revision | NotPlaced:
    """Return the aggregators of the next round.

    Args:
        view: The cluster.
        wanted: The round.
        current: The aggregator of each client as it is; empty: there is none yet.
        rounds_left: How many rounds the job has to go, this one included.

    Raises:
        ValueError: As `Problem.of`.
    """
    problem = Problem.of(view, wanted, are_warm=True)
    if isinstance(problem, NotPlaced):
        return problem
    best = search(problem)
    names, best_s = problem.nodes(best), problem.cost_s(best)
    before = problem.association(current) if current else None
    if before is None:  # the first time, or one of them is gone
        return Revision(aggregators=names, cost_s=best_s, is_moved=bool(current))
    before_s = problem.cost_s(before)
    gain_s = before_s - best_s
    price_s = sum(problem.arrival_s(row) for row in _rows(best) - _rows(before))
    if gain_s * min(rounds_left, ROUNDS_MAX) > price_s * MARGIN and tuple(current) != names:
        return Revision(
            aggregators=names, cost_s=best_s, is_moved=True, gain_s=gain_s, price_s=price_s
        )
    return Revision(
        aggregators=tuple(current),
        cost_s=before_s,
        is_moved=False,
        gain_s=gain_s,
        price_s=price_s,
    )


def _rows(association: Association) -> set[int]:
    return set(association.tolist())

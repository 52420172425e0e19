"""Where a federated round is aggregated: which nodes, and which client sends to which of them.

`federated_round` says what a choice costs. The search is greedy with bounded local improvement: it
starts from the best single aggregator and from everybody's nearest one, then moves and exchanges
the clients that arrive last, adds, drops and swaps aggregators, as long as that lowers the cost.
`optimum` tries everything, for small cases: the yardstick (`python -m training.federated`).
Clients, aggregators and root are the levels of hierarchical averaging (Liu et al.,
"Client-Edge-Cloud Hierarchical Federated Learning", ICC 2020).
"""

from itertools import product

import numpy as np

from tierwise.domain.decision import NotPlaced
from tierwise.domain.view import ClusterView
from tierwise.placement.federated_round import Association, Plan, Problem, Round

MOVES_MAX = 400  # accepted steps of the local search
OPTIMUM_MAX = 2_000_000  # associations that the yardstick will try
GAIN_S_MIN = 1e-9


def place(view: ClusterView, wanted: Round) -> Plan | NotPlaced:
    """Choose aggregators and the association of clients.

    Returns:
        The plan, or the reasons per node if the root or every node may not aggregate.

    Raises:
        ValueError: There is no client, or the view does not know the node of one.
    """
    problem = Problem.of(view, wanted)
    return problem if isinstance(problem, NotPlaced) else problem.plan(search(problem))


def search(problem: Problem) -> Association:
    """Return the best association that the search comes to."""
    starts = [problem.all_to(row) for row in range(problem.count)]
    costs = [problem.cost_s(start) for start in starts]
    best = starts[int(np.argmin(costs))]
    for start in (best, problem.nearest()):
        improved = _improve(problem, start)
        if problem.cost_s(improved) < problem.cost_s(best) - GAIN_S_MIN:
            best = improved
    return best


def optimum(view: ClusterView, wanted: Round) -> Plan | NotPlaced:
    """Return the best plan of all: every set of aggregators with every association.

    Raises:
        ValueError: As `place`, or there are more than OPTIMUM_MAX associations.
    """
    problem = Problem.of(view, wanted)
    if isinstance(problem, NotPlaced):
        return problem
    limit = min(wanted.aggregators_max, problem.count)
    if problem.count ** len(wanted.clients) > OPTIMUM_MAX:
        raise ValueError(
            f"{problem.count} candidates for {len(wanted.clients)} clients: too many to try all"
        )
    every = (
        np.array(rows, dtype=np.intp)
        for rows in product(range(problem.count), repeat=len(wanted.clients))
        if len(set(rows)) <= limit
    )
    best = min(every, key=problem.cost_s)
    return problem.plan(best)


def _improve(problem: Problem, start: Association) -> Association:
    """Return where steps that each lower the cost end, at most MOVES_MAX of them."""
    best, best_s = start, problem.cost_s(start)
    for _ in range(MOVES_MAX):
        for step in problem.neighbours(best):
            step_s = problem.cost_s(step)
            if step_s < best_s - GAIN_S_MIN:
                best, best_s = step, step_s
                break
        else:
            break
    return best

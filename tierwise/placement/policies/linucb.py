"""LinUCB, the contextual bandit (Li et al., WWW 2010), with one linear model for all candidates.

    cost(c) ≈ θ·x(c),   θ = A⁻¹b,   A = Σ x xᵀ + ridge,   b = Σ cost·x

The candidate with the lowest `θ·x − alpha·√(xᵀA⁻¹x)` is taken: optimism where little is known. x is
the house's features (`placement.features`) and a 1; a cost is the objective ÷ deadline, at most
COST_MAX and log-compressed as the features are.

The paper starts from nothing. A trace of some hundred requests is too short for that, so this one
starts warm: `linucb.npz` holds A and b per observation from training worlds (`training.linucb`),
and they count like `prior` observations.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from tierwise.cost.estimate import Float
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.decision import Decision
from tierwise.domain.ids import NodeId, PolicyId, RequestId
from tierwise.domain.outcome import Outcome
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.features import FEATURES, encode
from tierwise.placement.ranking import Ranking, rank_or_place

INPUTS = len(FEATURES) + 1
COST_MAX = 100.0  # of one request, in deadlines
PENDING_MAX = 4096  # decisions whose outcome is awaited; the oldest is forgotten first
RIDGE = 1.0


@dataclass(slots=True, eq=False)
class LinUCB:
    """Takes the candidate whose cost might be lowest, and learns what it was.

    Attributes:
        alpha: Width of the optimism.
        prior: Observations that the training worlds count for; 0 starts from nothing.
    """

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    alpha: float = 0.1
    prior: float = 1000.0
    policy_id: ClassVar[PolicyId] = PolicyId("linucb@1")
    observation_count: int = field(default=0, init=False)
    _inverse: Float = field(init=False, repr=False)
    _moment: Float = field(init=False, repr=False)
    _pending: OrderedDict[RequestId, tuple[tuple[NodeId, ...], Float, int, float]] = field(
        default_factory=OrderedDict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        """Start from the prior."""
        start: Float = RIDGE * np.eye(INPUTS)
        self._moment = np.zeros(INPUTS)
        if self.prior > 0.0:
            gram, moment = _package_prior()
            start, self._moment = start + self.prior * gram, self.prior * moment
        self._inverse = np.asarray(np.linalg.inv(start), dtype=np.float64)

    def fresh(self) -> Self:
        """Return the same policy as it was before its first outcome."""
        return type(self)(self.alpha, self.prior)

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the candidates by rising optimistic cost, and await the outcome."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        rows = ranking.estimates.candidates
        inputs = np.ones((len(rows), INPUTS))
        inputs[:, :-1] = encode(view, request, ranking.estimates, ranking.scores)
        spread = inputs @ self._inverse
        variance = np.maximum(np.einsum("ij,ij->i", spread, inputs), 0.0)
        costs = spread @ self._moment - self.alpha * np.sqrt(variance)
        order = np.lexsort((ranking.scores, costs))
        nodes = tuple([row.node.node_id for row in rows])
        self._pending[request.request_id] = (nodes, inputs, int(order[0]), request.deadline_s)
        if len(self._pending) > PENDING_MAX:
            self._pending.popitem(last=False)
        return ranking.placed(self.policy_id, order)

    def learn(self, outcome: Outcome) -> None:
        """Add what a request cost where it ran (where it was sent first, if it never ran)."""
        known = self._pending.pop(outcome.request_id, None)
        if known is None:
            return
        nodes, inputs, first, deadline_s = known
        row = nodes.index(outcome.node_id) if outcome.node_id in nodes else first
        cost = min(DEFAULT_OBJECTIVE.cost_s(outcome) / max(deadline_s, 1e-3), COST_MAX)
        self._observe(inputs[row], float(np.log1p(4.0 * cost)))

    def _observe(self, x: Float, cost: float) -> None:
        """Add one observation; the inverse follows by Sherman and Morrison's formula."""
        spread = self._inverse @ x
        self._inverse -= np.outer(spread, spread) / (1.0 + float(x @ spread))
        self._moment += cost * x
        self.observation_count += 1


@cache
def _package_prior() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return A, shape (25, 25), and b, shape (25,), of the training worlds, per observation."""
    path = resources.files("tierwise.placement.policies").joinpath("linucb.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return arrays["gram"], arrays["moment"]

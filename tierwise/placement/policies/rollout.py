"""Sampled rollouts: try the best candidates in sampled futures, take the cheapest (MPC).

One step of policy improvement over the base score (rollout: Tesauro and Galperin, 1996), with a
small queue model (`placement.futures`) in the place of the world. It sees what every policy sees:
the view, the learnt profiles, and the requests that it has been asked about.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import ClassVar, Self

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import FunctionId, PolicyId
from tierwise.domain.outcome import Outcome
from tierwise.domain.request import Request
from tierwise.domain.topology import NodeState
from tierwise.domain.view import ClusterView, NodeView
from tierwise.placement.features import gaps
from tierwise.placement.futures import First, Ground, Habit, Model
from tierwise.placement.ranking import Ranking, rank_or_place
from tierwise.placement.score import DEFAULT_WEIGHTS, ScoreWeights

HABITS_MAX = 256  # functions that are remembered, the latest ones
NODES_MAX = 64  # that are modelled
HABIT_SMOOTHING = 0.1


@dataclass(slots=True, eq=False)
class Rollout:
    """Takes the candidate whose sampled futures cost least, if that is sure enough.

    Attributes:
        samples: Futures per decision.
        horizon: Requests that follow in each.
        width: Candidates that are tried, best base scores first.
        caution: Standard errors by which a candidate must beat the base score's choice.
        hidden: Share of the cluster's traffic that may have reached a node since its reading.
        trust: Weight of the futures against the base score, 0 … 1.
        gap_tried: Candidates worse than the best by more deadlines are not tried.
    """

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    samples: int = 8
    horizon: int = 12
    width: int = 3
    caution: float = 1.0
    hidden: float = 1.0
    trust: float = 0.5
    gap_tried: float = 2.0
    weights: ScoreWeights = DEFAULT_WEIGHTS
    policy_id: ClassVar[PolicyId] = PolicyId("rollout@1")
    _habits: OrderedDict[FunctionId, Habit] = field(
        default_factory=OrderedDict, init=False, repr=False
    )
    _ground: Ground | None = field(default=None, init=False, repr=False)

    def fresh(self) -> Self:
        """Return the same policy without what it remembers of requests."""
        return type(self)(
            self.samples,
            self.horizon,
            self.width,
            self.caution,
            self.hidden,
            self.trust,
            self.gap_tried,
            self.weights,
        )

    def learn(self, outcome: Outcome) -> None:
        """Do nothing: the profiles in the view learn from outcomes already."""

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the candidate with the cheapest futures, then the others by base score."""
        self._remember(request)
        ranking = rank_or_place(self.policy_id, view, request, self.weights)
        if not isinstance(ranking, Ranking):
            return ranking
        order = ranking.by_score()
        gap = gaps(ranking.scores, request.deadline_s)
        tried = order[: self.width]
        tried = tried[gap[tried] <= self.gap_tried]
        if len(tried) < 2:
            return ranking.placed(self.policy_id, order)
        costs = self._costs(view, request, ranking, tried, rng)
        scores = ranking.scores[tried][:, None]
        costs = scores + self.trust * (costs - scores)
        saved = costs[0] - costs
        mean = saved.mean(axis=1)
        error = saved.std(axis=1) / max(1.0, (self.samples - 1) ** 0.5)
        best = int((mean - self.caution * error).argmax())
        chosen = tried[best]
        return ranking.placed(self.policy_id, np.concatenate([[chosen], order[order != chosen]]))

    def _costs(
        self,
        view: ClusterView,
        request: Request,
        ranking: Ranking,
        tried: np.ndarray[tuple[int], np.dtype[np.intp]],
        rng: np.random.Generator,
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """Return the costs of the tried candidates in each future, shape (w, samples)."""
        candidates = ranking.estimates.candidates
        rows = self._modelled(view, [candidates[i] for i in tried.tolist()])
        nodes = tuple([row.node for row in rows])
        ground = self._ground
        is_known = ground is not None and ground.links is view.links
        if (
            ground is None
            or not is_known
            or ground.prices is not view.prices
            or (ground.nodes != nodes)
        ):
            ground = self._ground = Ground(view.links, nodes, view.prices)
        model = Model(view, rows, ground, self._habits, self.weights)
        place = ground.place
        terms = np.nan_to_num(ranking.estimates.terms[tried], posinf=1e6)
        first = First(
            node=np.array([place[candidates[i].node.node_id] for i in tried.tolist()]),
            transfer_s=terms[:, 0],
            cold_start_s=terms[:, 2],
            run_s=terms[:, 3],
            return_s=terms[:, 4],
            displaced_s=terms[:, 5],
            money_usd=terms[:, 6],
            function=request.spec.function_id,
            deadline_s=request.deadline_s,
            urgency=int(request.priority) / 2.0,
        )
        return model.costs(
            first, rng, samples=self.samples, horizon=self.horizon, hidden=self.hidden
        )

    def _modelled(self, view: ClusterView, tried: list[NodeView]) -> list[NodeView]:
        """Return the rows of the nodes that take part in the futures."""
        rows = [row for row in view.nodes if row.state is NodeState.READY and row.reachable]
        if len(rows) > NODES_MAX:
            rows = rows[:NODES_MAX]
        known = {row.node.node_id for row in rows}
        return rows + [row for row in tried if row.node.node_id not in known]

    def _remember(self, request: Request) -> None:
        """Note what requests of this function are like."""
        function = request.spec.function_id
        items = max(1, request.item_count)
        size, urgency = request.request_bytes / items, int(request.priority) / 2.0
        old = self._habits.pop(function, None)
        if old is not None:
            size = old.request_bytes + HABIT_SMOOTHING * (size - old.request_bytes)
            urgency = old.urgency + HABIT_SMOOTHING * (urgency - old.urgency)
        self._habits[function] = Habit(
            request.spec.deadline_s, urgency, request.spec.memory_mib, size
        )
        if len(self._habits) > HABITS_MAX:
            self._habits.popitem(last=False)

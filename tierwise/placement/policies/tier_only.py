"""Everything on one tier: the two ends between which placement is worth anything."""

from dataclasses import replace

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.topology import Tier
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import Ranking, rank_or_place


class TierOnly:
    """Uses one tier: the node that took the request if it is of that tier, then the least busy.

    It is strict: with no feasible node on its tier it places nothing. Only a request that is
    pinned, or may not run on this tier at all, is placed by the base score.
    """

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self._tiers = frozenset({tier})
        self.policy_id = PolicyId(f"{tier.label}-only@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return this tier's candidates, the origin first, then by predicted latency."""
        is_strict = (
            request.node_id is None
            and self._tier in request.spec.tiers
            and (request.tiers is None or self._tier in request.tiers)
        )
        if is_strict and request.tiers != self._tiers:
            request = replace(request, tiers=self._tiers)  # the others are masked: wrong tier
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        if not is_strict:
            return ranking.placed(self.policy_id, ranking.by_score())
        origin_id = view.origin.node_id if view.origin is not None else None
        rows = ranking.estimates.candidates
        is_away = np.array([row.node.node_id != origin_id for row in rows])
        order = np.lexsort((ranking.estimates.latency_s, is_away))
        return ranking.placed(self.policy_id, order)

"""Everything on one tier: the two ends between which placement is worth anything."""

import numpy as np

from tierwise.domain.decision import Decision, NotPlaced, Reason
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.topology import Tier
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import rank


class TierOnly:
    """Uses one tier: the node that took the request if it is of that tier, then the least busy.

    A function that may not run on this tier at all is placed by the base score.
    """

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.policy_id = PolicyId(f"{tier.label}-only@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return this tier's candidates, the origin first, then by predicted latency."""
        ranking = rank(view, request)
        if isinstance(ranking, NotPlaced):
            return ranking
        rows = ranking.estimates.candidates
        allowed = request.spec.tiers if request.tiers is None else request.tiers
        order = np.argsort(ranking.scores, kind="stable")
        if self._tier in allowed and request.node_id is None:
            origin = view.origin.node_id if view.origin is not None else None
            latency_s = ranking.estimates.latency_s
            here = [i for i, row in enumerate(rows) if row.node.tier is self._tier]
            here.sort(key=lambda i: (rows[i].node.node_id != origin, latency_s[i]))
            if not here:
                others = tuple((row.node.node_id, Reason.WRONG_TIER) for row in rows)
                return NotPlaced(reasons=(*ranking.masked, *others))
            order = np.array(here, dtype=np.intp)
        return ranking.placed(self.policy_id, order)

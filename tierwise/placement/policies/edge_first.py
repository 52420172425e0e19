"""Edge first, offload when busy: the rule of Serverledge (Russo Russo et al., PerCom 2023)."""

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import Ranking, rank_or_place


class EdgeFirst:
    """Runs here if a CPU is free or the function is warm, else offloads to the next tier up.

    Within a tier the nearest node comes first. Nodes without a free CPU or warm instance come
    last, in the same order; peers on the origin's own tier or below come after those above it.
    """

    policy_id = PolicyId("edge-first@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return here first, then free nodes before busy ones, the next tier before the others."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        function = request.spec.function_id
        cpus = request.spec.cpus
        origin_id, origin_tier = None, 0
        if view.origin is not None:
            origin_id, origin_tier = view.origin.node_id, int(view.origin.tier)
        keys: list[tuple[bool, bool, bool, int, float, int]] = []
        transfers_s = ranking.estimates.column("transfer_s").tolist()
        for index, row in enumerate(ranking.estimates.candidates):
            reading, tier = row.reading, int(row.node.tier)
            is_free = reading.free.cpus >= cpus or reading.warm.get(function, 0) > 0
            is_here = row.node.node_id == origin_id
            # A peer that this node has sent work to since its reading counts as busy.
            is_busy = not is_free or (row.pending_s > 0.0 and not is_here)
            is_sideways = tier <= origin_tier
            keys.append((is_busy, not is_here, is_sideways, tier, transfers_s[index], index))
        keys.sort()
        return ranking.placed(self.policy_id, np.array([key[-1] for key in keys], dtype=np.intp))

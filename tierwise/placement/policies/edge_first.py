"""Edge first, offload when busy: the rule of Serverledge (Russo Russo et al., PerCom 2023)."""

import numpy as np

from tierwise.domain.decision import Decision, NotPlaced
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import rank


class EdgeFirst:
    """Runs here if a CPU is free; otherwise at the nearest node with one, nearest tier first."""

    policy_id = PolicyId("edge-first@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return free nodes before busy ones, near before far."""
        ranking = rank(view, request)
        if isinstance(ranking, NotPlaced):
            return ranking
        origin = view.origin.node_id if view.origin is not None else None
        transfer_s = ranking.estimates.column("transfer_s")
        wait_s = ranking.estimates.column("wait_s")

        def key(index: int) -> tuple[bool, bool, int, float]:
            row = ranking.estimates.candidates[index]
            is_busy = bool(wait_s[index] > 0.0) or row.reading.free.cpus < request.spec.cpus
            return (is_busy, row.node.node_id != origin, int(row.node.tier), transfer_s[index])

        order = sorted(range(len(wait_s)), key=key)
        return ranking.placed(self.policy_id, np.array(order, dtype=np.intp))

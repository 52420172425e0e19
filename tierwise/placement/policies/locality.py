"""Locality, then load: warm nodes with a free CPU are packed, then the least loaded is taken.

Hermod (Kaffes et al., SoCC 2022): early binding; hybrid of least-loaded under high and packing
under low load; among equals the node that has the function warm.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import Ranking, rank_or_place


@dataclass(frozen=True, slots=True)
class Locality:
    """Packs onto the fullest warm node that has a CPU free; without one, goes by load.

    Attributes:
        far: Weight of the way there and back against fullness, per second (the paper has one rack).
        cold_start: Share of the cold start that counts when going by load.
    """

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    far: float = 1.0
    cold_start: float = 1.0
    policy_id: ClassVar[PolicyId] = PolicyId("locality@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return warm free nodes, fullest first, then cold free nodes, then busy ones by load."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        spec = request.spec
        estimates = ranking.estimates
        group = np.empty(len(ranking.scores), dtype=np.int64)
        fullness = np.zeros(len(ranking.scores))
        for index, row in enumerate(estimates.candidates):
            free = row.reading.free
            is_free = free.cpus >= spec.cpus and row.pending_s == 0.0 and row.reading.queued == 0
            is_warm = row.reading.warm.get(spec.function_id, 0) > 0
            group[index] = 0 if is_free and is_warm else 1
            fullness[index] = 1.0 - free.cpus / max(row.node.capacity.cpus, 1e-9)
        cold_s = estimates.column("cold_start_s")
        way_s = estimates.column("transfer_s") + estimates.column("return_s")
        load_s = estimates.latency_s - (1.0 - self.cold_start) * cold_s
        key = np.where(group == 0, self.far * way_s - fullness, load_s)
        return ranking.placed(self.policy_id, np.lexsort((key, group)))

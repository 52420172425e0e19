"""Pull-based: idle instances queue for work (Hiku: Akbari and Hauswirth, 2025), as a view tells.

Our reading: a real puller announces itself the moment it becomes idle; here the heartbeat's count
of warm instances stands for the announcements, older readings being trusted less.
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
class PullBased:
    """Sends work to the node that is most likely still idle and warm, else to the least loaded.

    Attributes:
        half_life_s: Age at which half the announced idle instances are taken to be gone.
        near: Weight of the way there and back against idleness, per second.
    """

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    half_life_s: float = 0.5
    near: float = 30.0
    policy_id: ClassVar[PolicyId] = PolicyId("pull-based@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return nodes with idle warm instances first, then the others by predicted latency."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        function = request.spec.function_id
        estimates = ranking.estimates
        idle = np.zeros(len(ranking.scores))
        for index, row in enumerate(estimates.candidates):
            reading = row.reading
            is_free = reading.free.cpus >= request.spec.cpus and row.pending_s == 0.0
            if is_free and reading.queued == 0:
                age_s = max(0.0, view.now_s - row.received_at_s)
                count = reading.warm.get(function, 0)
                idle[index] = count * 0.5 ** (age_s / self.half_life_s)
        way_s = estimates.column("transfer_s") + estimates.column("return_s")
        eagerness = idle / (1.0 + self.near * way_s)
        order = np.lexsort((estimates.latency_s, -eagerness))
        return ranking.placed(self.policy_id, order)

"""Consistent hashing with bounded loads: a function's calls meet on the same nodes.

Mirrokni, Thorup, Zadimoghaddam, SODA 2018; for serverless Fuerst and Sharma's CH-RLU, HPDC 2022.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import Ranking, rank_or_place


@dataclass(frozen=True, slots=True)
class BoundedHashing:
    """Walks the ring from the function's point; a node above `bound` × the mean load is passed.

    A node's load is its predicted wait. `floor_s` keeps a ring whose mean is near zero from
    calling everybody overloaded. Points on the ring are by rendezvous: every node's distance is
    a hash of (function, node), so no virtual nodes are needed.
    """

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    bound: float = 0.5
    floor_s: float = 0.05
    policy_id: ClassVar[PolicyId] = PolicyId("bounded-hashing@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the nodes within the bound in ring order, then the others by load."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        function = request.spec.function_id
        wait_s = ranking.estimates.column("wait_s")
        is_over = wait_s > self.bound * float(wait_s.mean()) + self.floor_s
        rows = ranking.estimates.candidates
        ring = np.array([_distance(function, row.node.node_id) for row in rows])
        return ranking.placed(
            self.policy_id, np.lexsort((np.where(is_over, wait_s, ring), is_over))
        )


@lru_cache(maxsize=65_536)
def _distance(function: str, node_id: str) -> float:
    digest = hashlib.blake2b(f"{function}\0{node_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48

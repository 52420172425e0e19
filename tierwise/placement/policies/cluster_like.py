"""Scores of general cluster schedulers, which know resources but no latency.

Kubernetes: NodeResourcesLeastAllocated, NodeResourcesBalancedAllocation and ImageLocality, each
0–100 (kube-scheduler's documentation). Nomad: bin packing by Google's BestFit v3, 20 − (10^free CPU
+ 10^free memory), 0–18 (Nomad's documentation). Our reading: a warm instance stands for the image.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tierwise.cost.estimate import Float
from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView, NodeView
from tierwise.placement.ranking import Ranking, rank_or_place


@dataclass(frozen=True, slots=True)
class KubernetesLike:
    """Weighted sum of the three scores; the tie goes to the nearest."""

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    least_allocated: float = 1.0
    balanced: float = 1.0
    image: float = 1.0
    policy_id: ClassVar[PolicyId] = PolicyId("kubernetes-like@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the candidates by falling score."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        rows = ranking.estimates.candidates
        cpu, memory = _free_shares(rows, request)
        function = request.spec.function_id
        warm = np.array([row.reading.warm.get(function, 0) > 0 for row in rows])
        score = (
            self.least_allocated * 50.0 * (cpu + memory)
            + self.balanced * 100.0 * (1.0 - np.abs(cpu - memory) / 2.0)
            + self.image * 100.0 * warm
        )
        return ranking.placed(self.policy_id, _by(ranking, score))


@dataclass(frozen=True, slots=True)
class NomadLike:
    """Packs: the fullest node that still fits; one without a free CPU comes after all that have.

    Attributes:
        spread: 0 packs (Nomad's default), 1 spreads (its other algorithm).
        image: Added for a warm instance, in the score's own unit.
    """

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    spread: float = 0.5
    image: float = 18.0
    policy_id: ClassVar[PolicyId] = PolicyId("nomad-like@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the candidates by falling score."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        rows = ranking.estimates.candidates
        cpu, memory = _free_shares(rows, request)
        total = 10.0**cpu + 10.0**memory
        function = request.spec.function_id
        warm = np.array([row.reading.warm.get(function, 0) > 0 for row in rows])
        score = (1.0 - self.spread) * (20.0 - total) + self.spread * (total - 2.0)
        score = score + self.image * warm - 100.0 * (cpu <= 0.0)
        return ranking.placed(self.policy_id, _by(ranking, score))


def _free_shares(rows: tuple[NodeView, ...], request: Request) -> tuple[Float, Float]:
    """Return the shares of CPU and memory free after placing, each shape (k,), in [0, 1]."""
    cpus = np.array([max(1e-6, row.node.capacity.cpus) for row in rows])
    memory_mib = np.array([max(1.0, row.node.capacity.memory_mib) for row in rows])
    free_cpus = np.array([row.reading.free.cpus for row in rows]) - request.spec.cpus
    free_mib = np.array([row.reading.free.memory_mib for row in rows], dtype=np.float64)
    is_warm = np.array([row.reading.warm.get(request.spec.function_id, 0) > 0 for row in rows])
    free_mib = free_mib - np.where(is_warm, 0.0, request.spec.memory_mib)
    queued = np.array([row.reading.queued for row in rows])
    free_cpus = free_cpus - queued  # what waits there is allocated as good as surely
    with np.errstate(over="ignore"):  # an absurd reading is clipped like any other
        return np.clip(free_cpus / cpus, 0.0, 1.0), np.clip(free_mib / memory_mib, 0.0, 1.0)


def _by(ranking: Ranking, score: Float) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    return np.lexsort((ranking.estimates.column("transfer_s"), -score))

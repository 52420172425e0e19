"""Probabilistic offloading: solve for shares of traffic, then draw (Russo Russo et al., 2024).

The paper solves a linear program for the probabilities with which each class of requests runs here,
goes to a peer or to the cloud, maximising utility under capacity. Our reading: the program is over
(function, node) with the profiles' rates as traffic and CPU time as capacity, and it is solved
approximately by subgradient steps on the prices of the nodes, which needs no solver.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tierwise.cost.estimate import Float
from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import Ranking, rank_or_place

ROUNDS = 16
HOPELESS_S = 1e9


@dataclass(frozen=True, slots=True)
class Probabilistic:
    """Draws the node from the solved shares; the others follow by their shares.

    Attributes:
        headroom: Share of each node's CPU time that may be planned.
        wait: Weight of the wait that is seen now; 0 is the paper's static plan.
        temperature_s: Of the softmax that turns prices into shares, in seconds.
    """

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    headroom: float = 0.7
    wait: float = 1.0
    temperature_s: float = 0.02
    policy_id: ClassVar[PolicyId] = PolicyId("probabilistic@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the drawn node, then the others by falling share."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        estimates = ranking.estimates
        cost_s = ranking.scores + (self.wait - 1.0) * estimates.column("wait_s")
        shares = self._shares(view, ranking, cost_s)
        first = int(rng.choice(len(shares), p=shares))
        is_other = np.arange(len(shares)) != first
        return ranking.placed(self.policy_id, np.lexsort((-shares, is_other)), propensities=shares)

    def _shares(self, view: ClusterView, ranking: Ranking, cost_s: Float) -> Float:
        """Return this request's shares, shape (k,), with the nodes priced by all traffic."""
        nodes = [row.node for row in ranking.estimates.candidates]
        profiles = [p for p in view.profiles.values() if p.rate_per_s > 0.0]
        prices = np.zeros(len(nodes))
        if profiles:
            speed = np.array([node.speed for node in nodes])
            room = self.headroom * speed * [max(1e-3, node.capacity.cpus) for node in nodes]
            run_s = np.array([p.run_s for p in profiles])
            demand = run_s * np.array([p.rate_per_s for p in profiles])  # CPU s per s at speed 1
            way_s = ranking.estimates.column("transfer_s") + ranking.estimates.column("return_s")
            base_s = run_s[:, None] / speed + way_s
            prices = node_prices(base_s, demand, room, self.temperature_s, float(run_s.mean()))
        shares: Float = softmin((cost_s + prices)[None, :], self.temperature_s)[0]
        return shares


def node_prices(
    base_s: Float, demand: Float, room: Float, temperature_s: float, scale_s: float
) -> Float:
    """Return what a call pays for each node in seconds, shape (k,), so that demand fits its room.

    These are about the multipliers of the program: minimise Σ demand·share·base, where a node's
    Σ demand·share is at most its room and every function's shares sum to 1.

    Args:
        base_s: Cost of function f on node n, shape (m, k).
        demand: CPU seconds per second of each function, shape (m,).
        room: CPU seconds per second that each node may give, shape (k,).
        temperature_s: See `Probabilistic`.
        scale_s: What prices are like; sets the steps.
    """
    prices = np.zeros(len(room))
    for round_number in range(1, ROUNDS + 1):
        load = demand @ softmin(base_s + prices, temperature_s)
        step_s = 0.5 * scale_s / round_number**0.5
        prices = np.maximum(0.0, prices + step_s * (load / room - 1.0))
    return prices


def softmin(cost_s: Float, temperature_s: float) -> Float:
    """Return shares that fall with cost; rows sum to 1."""
    cost_s = np.nan_to_num(cost_s, nan=HOPELESS_S, posinf=HOPELESS_S, neginf=0.0)
    best_s: Float = np.minimum.reduce(cost_s, axis=1, keepdims=True)
    powers: Float = np.exp((best_s - cost_s) / temperature_s)
    shares: Float = powers / np.add.reduce(powers, axis=1, keepdims=True)
    return shares

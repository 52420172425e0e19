"""A DeF-DReL-style agent: a deep Q-network says "fog" or "cloud" for each call of a function.

Our reading of DeF-DReL (Dehury, Poojara, Srirama: Systematic Deployment of Serverless Functions in
Fog and Cloud Environments using Deep Reinforcement Learning, arXiv 2110.15702), not the authors'
code. From the paper: the binary decision per function, the DQN, and its inputs, which are distance
and latency of the user from the nearest fog node, the user's priority, the application's priority,
and the demand for resources. Where our world differs from the paper's we chose:

- distance is the round trip from the user's node to the nearest fog node, for a view knows no map;
  latency is what this very call's bytes take there and back;
- the user's priority comes as the request's, which is the rounded mean of the user's and the
  application's;
- the paper's problem is constrained by the fog's resources; we could not verify that its state says
  how many are left. Here it does: a side that is chosen blindly overflows;
- the paper's fog is all that is near the users and scarce: here the edge and fog tiers together;
- the paper does not say which node of a side: the base score does, so the agent gets the best
  heuristic for what it leaves open;
- its reward here is the objective by which every policy is judged.

`defdrel.npz` was trained in the simulator by `training.defdrel`; its card holds command and seed.
"""

import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from tierwise.domain.decision import Decision
from tierwise.domain.ids import PolicyId
from tierwise.domain.request import Request
from tierwise.domain.topology import Tier
from tierwise.domain.view import ClusterView
from tierwise.placement.ranking import Ranking, rank_or_place

Float32 = NDArray[np.float32]

INPUTS = (
    "distance",  # log of the round trip to the nearest fog node
    "latency",  # log of the way of this call's bytes to it and back
    "user_priority",  # 0 … 1
    "application_priority",  # 0 … 1
    "cpus",
    "memory",  # log2 of 128 MiB
    "run",  # log10 of seconds on the reference device
    "fog_free",  # share of the CPUs on the fog side that are free
)
FOG, CLOUD = 0, 1
BOUND = 10.0


@dataclass(frozen=True, slots=True)
class DefDrel:
    """Takes the side with the higher value; within a side the base score decides.

    Attributes:
        margin: By how much the cloud's value must exceed the fog's.
    """

    # Tuned: python -m training.tune --all --trials 12 --seeds 24 --requests 300
    margin: float = 0.0
    policy_id: ClassVar[PolicyId] = PolicyId("defdrel@1")

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        """Return the chosen side's candidates by base score, then the other side's."""
        ranking = rank_or_place(self.policy_id, view, request)
        if not isinstance(ranking, Ranking):
            return ranking
        values = forward(_package_weights(), inputs(view, request))
        side = CLOUD if float(values[CLOUD] - values[FOG]) > self.margin else FOG
        return ranking.placed(self.policy_id, order(ranking, side))


def inputs(view: ClusterView, request: Request) -> Float32:
    """Return what the agent sees of a call, shape (8,), within ±BOUND; columns are INPUTS."""
    spec = request.spec
    profile = view.profile(spec.function_id)
    distance_s = latency_s = 0.0
    if view.origin is not None:
        fogs = [row.node for row in view.nodes if row.node.tier is Tier.FOG]
        links = [view.links.between(view.origin, fog) for fog in fogs]
        if links:
            link = min(links, key=lambda each: each.rtt_s)
            distance_s = link.rtt_s
            latency_s = link.transfer_s(request.request_bytes)
            latency_s += link.transfer_s(profile.response_bytes * request.item_count)
    near = [row for row in view.nodes if row.node.tier is not Tier.CLOUD]
    cpus = sum(row.node.capacity.cpus for row in near)
    free = sum(row.reading.free.cpus - row.reading.queued for row in near)
    values = (
        math.log1p(100.0 * distance_s),
        math.log1p(100.0 * latency_s),
        (int(request.priority) - 1) / 3.0,
        (int(spec.priority) - 1) / 3.0,
        spec.cpus,
        math.log2(max(1, spec.memory_mib) / 128.0),
        math.log10(max(1e-4, profile.run_s * request.item_count)),
        min(1.0, max(0.0, free / cpus)) if cpus > 0.0 else 0.0,
    )
    return np.clip(np.array(values, dtype=np.float64), -BOUND, BOUND).astype(np.float32)


def order(ranking: Ranking, side: int) -> NDArray[np.intp]:
    """Return the candidates' rows: those on `side` first, each side by base score."""
    is_cloud = np.array([row.node.tier is Tier.CLOUD for row in ranking.estimates.candidates])
    return np.lexsort((ranking.scores, is_cloud != (side == CLOUD)))


def forward(weights: tuple[Float32, ...], x: Float32) -> Float32:
    """Return the values of fog and cloud, shape (2,): linear layers with ReLU between them.

    Args:
        weights: Matrix (in, out) and bias (out,) of each layer, in turn.
        x: Shape (8,).
    """
    *hidden, last, bias = weights
    for matrix, shift in zip(hidden[::2], hidden[1::2], strict=True):
        x = np.maximum(x @ matrix + shift, 0.0)
    return x @ last + bias


@cache
def _package_weights() -> tuple[Float32, ...]:
    path = resources.files("tierwise.placement.policies").joinpath("defdrel.npz")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return tuple([arrays[f"a{i}"] for i in range(len(arrays.files))])

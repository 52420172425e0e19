"""What a policy answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from tierwise.domain.ids import NodeId, PolicyId


class Reason(IntEnum):
    """Why a node cannot or did not take a request."""

    NODE_LOST = 1
    NODE_DRAINING = 2
    NODE_UNREACHABLE = 3
    WRONG_TIER = 4
    PINNED_ELSEWHERE = 5
    TOO_LITTLE_MEMORY = 6
    TOO_FEW_CPUS = 7
    NO_GPU = 8
    OVER_BUDGET = 9
    EXCLUDED = 10  # it refused or failed this request before
    QUEUE_FULL = 11
    UNKNOWN_FUNCTION = 12
    EXPIRED = 13
    TOO_MANY_HOPS = 14
    NO_NODES = 15
    START_FAILED = 16
    STALE_VIEW = 17  # it is busier than the sender believed, who has others to ask
    WRONG_PYTHON = 24  # the code was pickled by another minor version
    QUARANTINED = 25  # the function has killed its workers there
    BUDGET_SPENT = 30  # of the day, by its namespace or function

    @property
    def label(self) -> str:
        """Return the words that people read."""
        return self.name.lower().replace("_", " ")

    @property
    def is_permanent(self) -> bool:
        """Return whether the node as it is could never take the request: waiting is of no use."""
        return self in _PERMANENT


_PERMANENT = frozenset(
    {
        Reason.WRONG_TIER,
        Reason.PINNED_ELSEWHERE,
        Reason.TOO_LITTLE_MEMORY,
        Reason.TOO_FEW_CPUS,
        Reason.NO_GPU,
        Reason.OVER_BUDGET,
        Reason.WRONG_PYTHON,
    }
)


class CandidateScore(NamedTuple):
    """One row of an explanation: the predicted terms of one feasible node, in seconds and USD.

    `score` is the base score in second-equivalents, `residual` what the learned policy added to
    the logit (0 for heuristics), `propensity` the probability with which it was chosen. A named
    tuple, for sixteen of them are made in every decision.
    """

    node_id: NodeId
    transfer_s: float
    wait_s: float
    cold_start_s: float
    run_s: float
    return_s: float
    displaced_s: float
    money_usd: float
    score: float
    residual: float = 0.0
    propensity: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Everything that `tierwise explain` prints of one decision."""

    policy_id: PolicyId
    candidates: tuple[CandidateScore, ...]
    masked: tuple[tuple[NodeId, Reason], ...]
    heuristic_choice: NodeId | None
    choice: NodeId | None = None  # first in line; where it ran may be another, if that one refused
    fallback: str = ""  # why the base score decided instead of the learned policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowDecision:
    """What a policy in the shadow would have done with the same request and view.

    `gain_s` is predicted cost of the choice that was made minus that of the shadow's, in
    second-equivalents: positive if the cost model prefers the shadow's. `odds` are the shadow's
    chances of each node, where above 0: what a policy is estimated from without being in charge.
    """

    policy_id: PolicyId
    node_id: NodeId | None = None  # None: it would have placed nothing, or failed
    is_same: bool = False
    gain_s: float = 0.0
    odds: tuple[tuple[NodeId, float], ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Run it on the first of `node_ids`; the others are next in line if that one refuses."""

    node_ids: tuple[NodeId, ...]
    explanation: Explanation | None = None
    keep_alive_s: float | None = None  # from now on, of the function's idle instances here


@dataclass(frozen=True, slots=True, kw_only=True)
class NotPlaced:
    """No node may run it; `reasons` has one entry per node of the view."""

    reasons: tuple[tuple[NodeId, Reason], ...]


Decision = Placed | NotPlaced


def is_hopeless(reasons: Sequence[tuple[NodeId, Reason]]) -> bool:
    """Return whether no node that there is could ever take the request."""
    return bool(reasons) and all(reason.is_permanent for _, reason in reasons)


def summary(reasons: Sequence[tuple[NodeId, Reason]]) -> str:
    """Return `node: reason` pairs for an error message, at most eight of them."""
    shown = ", ".join(f"{node}: {reason.label}" for node, reason in reasons[:8])
    more = len(reasons) - 8
    return f"{shown} and {more} more" if more > 0 else shown or "the cluster has no nodes"

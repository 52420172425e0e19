"""One unfinished request on a node. Pure."""

from dataclasses import dataclass, field
from enum import Enum

from agent.pool import Instance
from tierwise.domain.decision import Explanation, Reason
from tierwise.domain.ids import NO_POLICY, NodeId, PolicyId
from tierwise.domain.request import Request
from tierwise.domain.sizing import RETRY_FACTOR


class Phase(Enum):
    """Where an unfinished request stands on this node."""

    ASKED = 1
    FORWARDED = 2
    QUEUED = 3
    RUNNING = 4
    RECALLED = 5  # told to stop where it was forwarded to, and asked what it ran
    ENDED = 6


@dataclass(slots=True)
class Ticket:
    """An unfinished request."""

    request: Request
    arrived_at_s: float
    sequence: int
    transfer_s: float = 0.0
    phase: Phase = Phase.ASKED
    next_nodes: list[NodeId] = field(default_factory=list)
    tried: list[tuple[NodeId, Reason]] = field(default_factory=list)
    failure_count: int = 0
    stale_count: int = 0  # decisions that a node refused because it was busier than believed
    node_id: NodeId | None = None
    sent_at_s: float = 0.0
    work_s: float = 0.0  # expected run time here
    start_s: float = 0.0  # expected cold start here
    run_at_s: float = 0.0
    cold_start_s: float = 0.0
    is_cold: bool = False
    is_cancelled: bool = False
    is_late: bool = False  # its time was over while it ran here, or elsewhere
    recall_ends_at_s: float = 0.0
    instance: Instance | None = None
    explanation: Explanation | None = None
    policy_id: PolicyId = NO_POLICY
    retried_gb_s: float = 0.0  # of an attempt that ran out of memory, and what it cost
    retried_gpu_s: float = 0.0
    retried_cpu_s: float = 0.0
    retried_usd: float = 0.0

    @property
    def is_host(self) -> bool:
        """Return whether somebody else placed the request here."""
        return self.request.hops > 0 or self.request.lease > 0

    @property
    def ends_at_s(self) -> float:
        """Return when the caller gives up."""
        return self.arrived_at_s + self.request.timeout_s

    @property
    def over_at_s(self) -> float:
        """Return when this node stops waiting for it."""
        return self.recall_ends_at_s if self.phase is Phase.RECALLED else self.ends_at_s

    @property
    def has_callers_limit(self) -> bool:
        """Return whether its run ends when the caller gives up, before the function's own time."""
        return self.ends_at_s - self.run_at_s < self.request.spec.timeout_s

    def larger_mib(self, capacity_mib: int, now_s: float) -> int:
        """Return with how much memory to run once more what ran out of it; 0 for not at all.

        Only where memory is chosen per call, once, and while somebody waits.
        """
        spec = self.request.spec
        is_over = self.is_cancelled or self.is_late or self.ends_at_s <= now_s
        larger_mib = min(RETRY_FACTOR * spec.memory_mib, capacity_mib)
        if is_over or self.retried_gb_s > 0.0 or larger_mib <= spec.memory_mib:
            return 0
        return larger_mib if spec.is_memory_auto else 0

    def start_on(self, instance: Instance, now_s: float) -> None:
        """Note that the request runs from `now_s` on; the first run of an instance is cold."""
        self.phase = Phase.RUNNING
        self.instance = instance
        self.run_at_s = now_s
        if instance.run_count == 1:
            waited_s = now_s - self.arrived_at_s
            self.is_cold = waited_s > 0.0
            self.cold_start_s = min(waited_s, instance.cold_start_s)

"""How a request ended."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from tierwise.domain.decision import Explanation, Reason, ShadowDecision
from tierwise.domain.function import Priority
from tierwise.domain.ids import NO_POLICY, FunctionId, NodeId, PolicyId, RequestId


class OutcomeState(IntEnum):
    """The end of a request; `error_code` of each but OK and REFUSED is in `tierwise.errors`."""

    OK = 1  # every item ran; single items may still have raised
    FAILED = 2  # the function, its start or its process failed
    EXPIRED = 3  # its time was over before it had run to its end
    CANCELLED = 4
    REFUSED = 5  # this node would not take it: the caller tries the next candidate
    UNPLACEABLE = 6  # no node would


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySplit:
    """Where the time went, in seconds. The sum is what the caller waited."""

    queue_s: float = 0.0
    transfer_s: float = 0.0
    cold_start_s: float = 0.0
    run_s: float = 0.0
    return_s: float = 0.0

    @property
    def total_s(self) -> float:
        """Return the sum of the parts."""
        return self.queue_s + self.transfer_s + self.cold_start_s + self.run_s + self.return_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One finished request, as recorded, billed and learnt from.

    `gb_s` and `gpu_s` are billed amounts: memory and GPU slots × the billed seconds, in whole
    milliseconds. `cpu_s` is what its processes really used. `link` is one of LINK_CLASSES, the way
    that request and response took; empty if it did not run, or nobody knows.
    """

    request_id: RequestId
    function_id: FunctionId
    state: OutcomeState
    origin: NodeId
    node_id: NodeId | None  # where it ran, if it ran
    latency: LatencySplit = LatencySplit()
    deadline_s: float = 0.0
    priority: Priority = Priority.NORMAL
    item_count: int = 1
    failed_item_count: int = 0
    memory_mib: int = 0  # billed
    peak_memory_mib: float = 0.0
    request_bytes: int = 0
    response_bytes: int = 0
    gb_s: float = 0.0
    gpu_s: float = 0.0
    cpu_s: float = 0.0
    link: str = ""
    money_usd: float = 0.0
    energy_j: float = 0.0
    is_cold: bool = False
    error_code: str = ""
    message: str = ""
    reason: Reason | None = None  # for REFUSED
    tried: tuple[tuple[NodeId, Reason], ...] = ()
    policy_id: PolicyId = NO_POLICY
    explanation: Explanation | None = None
    lease: int = 0
    shadow: ShadowDecision | None = None
    trial_id: int = 0  # of the canary's trial during which it was decided, 0 for none
    refused_calls: tuple[tuple[str, int], ...] = ()  # by the seal: system call and count, by name
    block: int = 0  # of that trial, from 1; 0 if the call does not count
    measures: Mapping[str, float] = field(default_factory=dict)  # of the input
    retried_gb_s: float = 0.0  # of a first attempt that ran out of memory; in `money_usd` too

    @property
    def is_missed(self) -> bool:
        """Return whether the caller got nothing, or got it after the deadline."""
        return self.state is not OutcomeState.OK or self.latency.total_s > self.deadline_s

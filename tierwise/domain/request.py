"""One request to run a function. Payload bytes stay in the shells; this is what decisions see."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tierwise.domain.function import FunctionSpec, Priority
from tierwise.domain.ids import FunctionId, NodeId, RequestId
from tierwise.domain.topology import Tier

HOPS_MAX = 2
TRIES_MAX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What placement and admission need to know.

    `deadline_s` and `timeout_s` are *remaining* seconds, counted from the moment this node
    received the request. `hops` counts the agents that passed it on already. `item_count` is
    how many argument sets ride in it (a `.map` chunk is one request). If the function's memory is
    chosen per call, `spec` has what was chosen.
    """

    request_id: RequestId
    spec: FunctionSpec
    origin: NodeId
    priority: Priority = Priority.NORMAL
    deadline_s: float = 1.0
    timeout_s: float = 60.0
    budget_usd: float | None = None
    request_bytes: int = 0
    item_count: int = 1
    data_nodes: tuple[NodeId, ...] = ()  # nodes that hold the data it reads
    data_bytes: int = 0
    tiers: frozenset[Tier] | None = None  # narrows the function's own tiers
    node_id: NodeId | None = None  # pinned
    hops: int = 0
    excluded: frozenset[NodeId] = field(default=frozenset())
    lease: int = 0  # fencing token of durable work; 0 for interactive calls
    expected_wait_s: float | None = None  # the sender's belief, if it has others to ask
    measures: Mapping[str, float] = field(default_factory=dict)  # of its input; see wire/measures

    def with_memory(self, memory_mib: int) -> "Request":
        """Return the request with this memory in place of what its function declares."""
        return replace(self, spec=replace(self.spec, memory_mib=memory_mib))

    @property
    def function_id(self) -> FunctionId:
        """Return the id of the function version that is called."""
        return self.spec.function_id

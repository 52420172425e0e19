"""What happens to the machines. Times come beside an event, never inside it."""

from dataclasses import dataclass

from tierwise.domain.cache import HeldRounds
from tierwise.domain.decision import Decision
from tierwise.domain.function import Catalogue, FunctionProfile
from tierwise.domain.ids import FunctionId, InstanceId, NodeId, PolicyId, RequestId
from tierwise.domain.outcome import Outcome
from tierwise.domain.prices import PriceTable
from tierwise.domain.request import Request
from tierwise.domain.topology import LinkTable, Node, NodeState
from tierwise.domain.view import NodeReading


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrived:
    """A request came: from a user (`hops` 0), a peer, or the scheduler (`lease` > 0)."""

    request: Request
    transfer_s: float = 0.0  # what the previous hop cost, if known


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """The policy answered `AskPolicy`."""

    request_id: RequestId
    decision: Decision
    policy_id: PolicyId


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAsked:
    """The caller does not want the result any more."""

    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceStarted:
    """An instance is ready for its first call."""

    instance_id: InstanceId
    cold_start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceFailed:
    """An instance could not be started."""

    instance_id: InstanceId
    error_code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceDied:
    """An idle instance ended by itself."""

    instance_id: InstanceId


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFinished:
    """A call ended on an instance; `error_code` is empty if the batch as a whole ran."""

    instance_id: InstanceId
    request_id: RequestId
    run_s: float
    is_instance_alive: bool = True
    failed_item_count: int = 0
    peak_memory_mib: float = 0.0
    cpu_s: float = 0.0  # user + system, of the worker and its own children
    response_bytes: int = 0
    error_code: str = ""
    message: str = ""
    is_out_of_memory: bool = False  # the batch, or an item of it
    refused_calls: tuple[tuple[str, int], ...] = ()  # system calls that the seal refused, by name


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepAliveSet:
    """Keep idle instances of a function so long from now on; None: as its author said."""

    function_id: FunctionId
    keep_alive_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerReplied:
    """The node a request was forwarded to has answered, with a result or a refusal."""

    request_id: RequestId
    node_id: NodeId
    outcome: Outcome
    reading: NodeReading | None = None  # of the node when it answered


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerFailed:
    """The node a request was forwarded to cannot be reached, or the connection broke."""

    request_id: RequestId
    node_id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueReceived:
    """The scheduler sent the functions that may be called."""

    catalogue: Catalogue


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSeen:
    """The scheduler's latest word of one node; `age_s` is how old the reading was when sent.

    `held` is all that its cache holds, None if there is no news of that.
    """

    node: Node
    state: NodeState
    reading: NodeReading
    age_s: float
    held: tuple[HeldRounds, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewReceived:
    """The scheduler sent its view. With `is_full`, nodes not named in it are forgotten."""

    peers: tuple[PeerSeen, ...]
    links: LinkTable | None = None
    profiles: dict[FunctionId, FunctionProfile] | None = None
    is_full: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PricesReceived:
    """The scheduler sent what calls cost from now on."""

    prices: PriceTable


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainAsked:
    """Take nothing new (`is_on`), or take work again."""

    is_on: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time has passed: warm instances may be stale, queued requests may have expired."""


NodeEvent = (
    Arrived
    | Decided
    | CancelAsked
    | InstanceStarted
    | InstanceFailed
    | InstanceDied
    | KeepAliveSet
    | RunFinished
    | PeerReplied
    | PeerFailed
    | CatalogueReceived
    | ViewReceived
    | PricesReceived
    | DrainAsked
    | Ticked
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOpened:
    """An agent connected; `leases` are the durable requests it still holds."""

    node: Node
    leases: tuple[tuple[RequestId, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionClosed:
    """The agent's stream ended; the agent may still be running, unless it said that it stops."""

    node_id: NodeId
    has_left: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRemembered:
    """A node that joined before the scheduler restarted; it was heard of `age_s` ago."""

    node: Node
    age_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatReceived:
    """A node's reading came in."""

    node_id: NodeId
    reading: NodeReading


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """Durable work, already safe in the store, wants a node. `attempt_count` attempts failed."""

    request: Request
    attempt_count: int = 0
    lease: int = 0  # highest fencing token given out so far
    ends_in_s: float | None = None  # when its submitter gives up; None means never


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkFinished:
    """A node sent the outcome of leased work (a REFUSED outcome asks for another node)."""

    node_id: NodeId
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRemoved:
    """The operator took a node out of the cluster."""

    node_id: NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDrainAsked:
    """The operator drains a node, or takes it back (`is_on` False)."""

    node_id: NodeId
    is_on: bool


ControlEvent = (
    SessionOpened
    | SessionClosed
    | NodeRemembered
    | HeartbeatReceived
    | Submitted
    | Decided
    | WorkFinished
    | CancelAsked
    | CatalogueReceived
    | NodeRemoved
    | NodeDrainAsked
    | Ticked
)

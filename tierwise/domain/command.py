"""What the machines ask their shells to do."""

from dataclasses import dataclass

from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import InstanceId, NodeId, RequestId
from tierwise.domain.outcome import Outcome
from tierwise.domain.request import Request
from tierwise.domain.topology import NodeState
from tierwise.domain.view import ClusterView, NodeReading


@dataclass(frozen=True, slots=True, kw_only=True)
class AskPolicy:
    """Call `policy.decide(view, request)` and feed `Decided` back at once."""

    request: Request
    view: ClusterView


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """Send the request, with its payload, to a peer; `request` carries the remaining times."""

    node_id: NodeId
    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAt:
    """Tell the peer that runs the request to stop."""

    node_id: NodeId
    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class StartInstance:
    """Start a worker and answer with `InstanceStarted` or `InstanceFailed`."""

    instance_id: InstanceId
    spec: FunctionSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StopInstance:
    """End a worker. Its memory counts as free from now on."""

    instance_id: InstanceId


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOn:
    """Give the request's payload to an idle instance and answer with `RunFinished`."""

    instance_id: InstanceId
    request_id: RequestId
    timeout_s: float
    memory_mib: int  # what the batch may use


@dataclass(frozen=True, slots=True, kw_only=True)
class KillRun:
    """Kill the instance that runs this request; `RunFinished` with code `cancelled` follows."""

    instance_id: InstanceId
    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Answer whoever brought the request here: user, peer or scheduler.

    A peer also gets this node's newest reading: so those who send most know most.
    """

    outcome: Outcome
    reading: NodeReading | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyAgain:
    """A finished request came a second time: repeat its answer if it is still held."""

    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Tell the control plane of a finished request (only its first node reports it)."""

    outcome: Outcome


NodeCommand = (
    AskPolicy
    | Forward
    | CancelAt
    | StartInstance
    | StopInstance
    | RunOn
    | KillRun
    | Reply
    | ReplyAgain
    | Report
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Lease the request to a node and send it down that node's session.

    The lease is written before the message leaves, and only if the stored one is smaller.
    `attempt_count` attempts have failed before.
    """

    node_id: NodeId
    request: Request  # carries the lease
    attempt_count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Store the one result of a request, if `outcome.lease` is still the newest."""

    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """Note a failed attempt. The machine itself tries again after `retry_in_s`."""

    request_id: RequestId
    attempt_count: int
    retry_in_s: float
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """Give up: keep the request with its last error until somebody redrives it."""

    request_id: RequestId
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeChanged:
    """A node's state changed; agents and people should know."""

    node_id: NodeId
    state: NodeState


@dataclass(frozen=True, slots=True, kw_only=True)
class TellDrain:
    """Send the drain order down the node's session."""

    node_id: NodeId
    is_on: bool


ControlCommand = (
    AskPolicy | Dispatch | CancelAt | Record | Delay | DeadLetter | NodeChanged | TellDrain
)

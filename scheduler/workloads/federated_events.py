"""What a federated planner is told, and what it asks its shell to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tierwise.domain.cache import ObjectKey, RoundManifest
from tierwise.domain.federated import JobProgress, RoundRecord
from tierwise.domain.ids import FunctionId, NodeId, RequestId
from tierwise.domain.view import ClusterView

# -- events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticked:
    """Time has passed; this is what the cluster looks like."""

    view: ClusterView


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOpened:
    """A node answered to `OpenRound`; an error code means that it did not open it."""

    node_id: NodeId
    round: int
    error_code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallEnded:
    """A call that was submitted has ended, now or before the scheduler was started again.

    Attributes:
        value: What it returned, or the receipt of what it put into a cache.
        error_code: Of the table in tierwise/errors.py; empty if it succeeded.
    """

    call_id: RequestId
    value: Mapping[str, object] = field(default_factory=dict)
    error_code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """Somebody wants the job to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeAsked:
    """Somebody wants the job to go on, to this many rounds in all; 0: as many as before."""

    round_count: int = 0


Event = Ticked | RoundOpened | CallEnded | StopAsked | ResumeAsked

# -- commands -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Write how far the job is, and its newest round, before anything that follows is done."""

    progress: JobProgress
    record: RoundRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRound:
    """Tell a node what its cache will get; answer with `RoundOpened`.

    It fetches the model that the round begins with from `base_node`, if it has not got it.
    """

    node_id: NodeId
    manifest: RoundManifest
    base_node: NodeId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A cached object that a call reads as one array, float32."""

    key: ObjectKey
    node_id: NodeId | None
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where the vector that a call returns is put, and how it travels there.

    `relative_to` names a vector that the taker has: the difference from it is what travels.
    """

    key: ObjectKey
    node_id: NodeId
    encoding: str = ""
    relative_to: ObjectKey | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One durable invocation: `function([inputs…], arguments)` on one node."""

    call_id: RequestId
    function: FunctionId
    node_id: NodeId
    inputs: tuple[Input, ...]
    arguments: Mapping[str, object]
    output: Output | None = None
    timeout_s: float = 0.0  # from now, 0: as long as it takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Submit a call, or find out what became of it; answer with `CallEnded` once."""

    call: Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop a call; its end is told all the same."""

    call_id: RequestId


Command = Save | OpenRound | Submit | Cancel

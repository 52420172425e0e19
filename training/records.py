"""What the commands print of a live cluster, as far as a scenario needs it.

Fields that are not named here are passed over: newer clusters may print more.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from envs.scenario.tables import FUNCTIONS_MAX, NODES_MAX
from tierwise.domain.function import PRIOR
from tierwise.errors import InvalidArgument, NotFound

FILE_BYTES_MAX = 1 << 30
CALLS_MAX = 1_000_000
RUN_S_MIN = 1e-6

Some = Annotated[float, msgspec.Meta(ge=-1, le=1e9)]  # a part of a split may be a little below 0
Number = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Whole = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Label = str | int  # names of digits alone are printed as numbers
Rows = TypeVar("Rows")


class LatencyRecord(msgspec.Struct, frozen=True):
    """Where a call's time went; the sum is what its caller waited."""

    queue_s: Some = 0.0
    transfer_s: Some = 0.0
    cold_start_s: Some = 0.0
    run_s: Some = 0.0
    return_s: Some = 0.0

    @property
    def total_s(self) -> float:
        """Return the sum of the parts."""
        return self.queue_s + self.transfer_s + self.cold_start_s + self.run_s + self.return_s


class OutcomeRecord(msgspec.Struct, frozen=True):
    """How a call ended."""

    function_id: str
    state: str
    origin: Label = ""
    node_id: Label = ""
    latency: LatencyRecord = LatencyRecord()
    deadline_s: Some = 0.0
    priority: str = "normal"
    item_count: Annotated[int, msgspec.Meta(ge=1, le=4_096)] = 1
    memory_mib: Whole = 0
    request_bytes: Whole = 0
    response_bytes: Whole = 0
    is_cold: bool = False
    lease: Whole = 0


class CallRecord(msgspec.Struct, frozen=True):
    """One row of `tierwise get calls -o json`."""

    outcome: OutcomeRecord
    ended_unix_s: Number


class CapacityRecord(msgspec.Struct, frozen=True):
    """What a node has."""

    cpus: Annotated[float, msgspec.Meta(gt=0, le=1e6)]
    memory_mib: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    gpu_slots: Whole = 0


class NodeRecord(msgspec.Struct, frozen=True):
    """A node."""

    node_id: Label
    tier: str
    capacity: CapacityRecord
    speed: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 1.0
    zone: Label = ""


class NodeInfoRecord(msgspec.Struct, frozen=True):
    """One row of `tierwise get nodes -o json`."""

    node: NodeRecord


class SpecRecord(msgspec.Struct, frozen=True):
    """What is declared of a function."""

    namespace: Label
    name: Label
    memory_mib: Annotated[int, msgspec.Meta(ge=1)] = 256
    cpus: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    gpu_slots: Whole = 0
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0
    deadline_s: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    priority: str = "normal"
    tiers: tuple[str, ...] = ()
    instances_max: Annotated[int, msgspec.Meta(ge=1)] = 16
    keep_alive_s: Number = 300.0
    budget_usd: Number | None = None
    retries_max: Whole = 2


class ProfileRecord(msgspec.Struct, frozen=True):
    """What the cluster has learnt of a function."""

    run_s: Number = PRIOR.run_s
    cold_start_s: Number = PRIOR.cold_start_s


class FunctionRecord(msgspec.Struct, frozen=True):
    """One row of `tierwise get functions -o json`."""

    spec: SpecRecord
    profile: ProfileRecord = ProfileRecord()


class PathRecord(msgspec.Struct, frozen=True):
    """A path between two tiers."""

    rtt_s: Number
    bandwidth_bytes_per_s: Annotated[float, msgspec.Meta(gt=0, le=1e15)]
    jitter_s: Number = 0.0


class TierLinkRecord(msgspec.Struct, frozen=True):
    """A path and its ends."""

    source: str
    target: str
    link: PathRecord


class LinksRecord(msgspec.Struct, frozen=True):
    """The links of the cluster's view."""

    by_tier: tuple[TierLinkRecord, ...] = ()
    default: PathRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """What was read from files; `training.dataset` makes a world of it."""

    calls: tuple[CallRecord, ...]
    nodes: tuple[NodeInfoRecord, ...]
    functions: tuple[FunctionRecord, ...] = ()
    links: LinksRecord = field(default_factory=LinksRecord)


def load(calls: Path, nodes: Path, functions: Path | None, links: Path | None) -> Records:
    """Read files of records; fields that are not needed are passed over.

    Raises:
        NotFound: A file is missing.
        InvalidArgument: One is too large, no JSON, or lacks a field; the message names both.
    """
    return Records(
        calls=_decode(calls, tuple[CallRecord, ...], CALLS_MAX),
        nodes=_decode(nodes, tuple[NodeInfoRecord, ...], NODES_MAX),
        functions=_decode(functions, tuple[FunctionRecord, ...], FUNCTIONS_MAX)
        if functions
        else (),
        links=_decode(links, LinksRecord, 0) if links else LinksRecord(),
    )


def _decode(path: Path, kind: type[Rows], count_max: int) -> Rows:
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise InvalidArgument(f"{path}: larger than {FILE_BYTES_MAX >> 20} MiB")
        rows = msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        raise NotFound(f"there is no file {path}") from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}") from None
    if isinstance(rows, tuple) and len(rows) > count_max:
        raise InvalidArgument(f"{path}: {len(rows)} records, at most {count_max}")
    return rows

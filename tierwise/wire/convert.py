"""Domain ⇄ protobuf, both ways. Whatever comes in is checked before it becomes a domain value."""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

from tierwise.domain.decision import CandidateScore, Explanation, Reason
from tierwise.domain.event import PeerSeen, ViewReceived
from tierwise.domain.function import ALL_TIERS, Catalogue, FunctionProfile, FunctionSpec, Priority
from tierwise.domain.ids import FunctionId, NodeId, PolicyId, RequestId, is_name
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.topology import Link, LinkTable, Node, NodeState, Tier
from tierwise.domain.view import NodeReading
from tierwise.errors import InvalidArgument
from tierwise.v1 import node_pb2, types_pb2

REQUEST_ID_MAX = 128
TIMEOUT_S_MAX = 7 * 86400.0
Enum = TypeVar("Enum", Tier, Priority, NodeState, OutcomeState, Reason)


def _enum(kind: type[Enum], value: int, name: str) -> Enum:
    try:
        return kind(value)
    except ValueError:
        raise InvalidArgument(f"{name}: {value} is no {kind.__name__}") from None


def _number(value: float, name: str, low: float, high: float) -> float:
    if not low <= value <= high:  # also refuses NaN
        raise InvalidArgument(f"{name} = {value}: it must be between {low:g} and {high:g}")
    return value


def resources_to_pb(value: Resources) -> types_pb2.Resources:
    """Translate."""
    return types_pb2.Resources(
        cpus=value.cpus, memory_mib=value.memory_mib, gpu_slots=value.gpu_slots
    )


def resources_from_pb(pb: types_pb2.Resources) -> Resources:
    """Translate."""
    return Resources(cpus=pb.cpus, memory_mib=pb.memory_mib, gpu_slots=pb.gpu_slots)


# -- topology ---------------------------------------------------------------------------------------


def node_to_pb(node: Node) -> types_pb2.Node:
    """Translate."""
    return types_pb2.Node(
        node_id=node.node_id,
        tier=types_pb2.Tier.ValueType(node.tier),
        capacity=resources_to_pb(node.capacity),
        speed=node.speed,
        address=node.address,
        zone=node.zone,
        labels=dict(node.labels),
    )


def node_from_pb(pb: types_pb2.Node) -> Node:
    """Translate, or raise InvalidArgument naming the field."""
    if not is_name(pb.node_id):
        raise InvalidArgument(f"node_id {pb.node_id!r} is no name")
    _number(pb.speed, "speed", 1e-3, 1e3)
    _number(pb.capacity.cpus, "capacity.cpus", 0, 1e4)
    _number(pb.capacity.memory_mib, "capacity.memory_mib", 0, 1e9)
    return Node(
        node_id=NodeId(pb.node_id),
        tier=_enum(Tier, pb.tier, "tier"),
        capacity=resources_from_pb(pb.capacity),
        speed=pb.speed,
        address=pb.address,
        zone=pb.zone,
        labels=tuple(sorted(pb.labels.items())),
    )


def reading_to_pb(reading: NodeReading) -> types_pb2.NodeReading:
    """Translate."""
    return types_pb2.NodeReading(
        sequence=reading.sequence,
        free=resources_to_pb(reading.free),
        running=reading.running,
        queued=reading.queued,
        backlog_s=reading.backlog_s,
        warm={str(key): count for key, count in reading.warm.items()},
        eviction_price_s_per_mib=reading.eviction_price_s_per_mib,
    )


def reading_from_pb(pb: types_pb2.NodeReading) -> NodeReading:
    """Translate, or raise InvalidArgument naming the field."""
    return NodeReading(
        sequence=pb.sequence,
        free=resources_from_pb(pb.free),
        running=pb.running,
        queued=pb.queued,
        backlog_s=_number(pb.backlog_s, "backlog_s", 0, 1e9),
        warm={FunctionId(key): count for key, count in pb.warm.items()},
        eviction_price_s_per_mib=_number(pb.eviction_price_s_per_mib, "eviction_price", 0, 1e9),
    )


def link_to_pb(link: Link) -> types_pb2.Link:
    """Translate."""
    return types_pb2.Link(
        rtt_s=link.rtt_s,
        bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
        jitter_s=link.jitter_s,
    )


def link_from_pb(pb: types_pb2.Link) -> Link:
    """Translate, or raise InvalidArgument naming the field."""
    return Link(
        rtt_s=_number(pb.rtt_s, "rtt_s", 0, 1e4),
        bandwidth_bytes_per_s=_number(pb.bandwidth_bytes_per_s, "bandwidth", 1, math.inf),
        jitter_s=_number(pb.jitter_s, "jitter_s", 0, 1e4),
    )


def links_to_pb(table: LinkTable) -> types_pb2.LinkTable:
    """Translate the links between tiers; pairs of nodes are not sent."""
    return types_pb2.LinkTable(
        by_tier=[
            types_pb2.TierLink(
                source=types_pb2.Tier.ValueType(source),
                target=types_pb2.Tier.ValueType(target),
                link=link_to_pb(link),
            )
            for (source, target), link in table.by_tier.items()
        ],
        default=link_to_pb(table.default),
    )


def links_from_pb(pb: types_pb2.LinkTable) -> LinkTable:
    """Translate, or raise InvalidArgument naming the field."""
    return LinkTable(
        by_tier={
            (_enum(Tier, row.source, "source"), _enum(Tier, row.target, "target")): link_from_pb(
                row.link
            )
            for row in pb.by_tier
        },
        default=link_from_pb(pb.default),
    )


def peer_to_pb(peer: PeerSeen) -> node_pb2.PeerView:
    """Translate."""
    return node_pb2.PeerView(
        node=node_to_pb(peer.node),
        state=types_pb2.NodeState.ValueType(peer.state),
        reading=reading_to_pb(peer.reading),
        age_s=peer.age_s,
    )


def peer_from_pb(pb: node_pb2.PeerView) -> PeerSeen:
    """Translate, or raise InvalidArgument naming the field."""
    return PeerSeen(
        node=node_from_pb(pb.node),
        state=_enum(NodeState, pb.state, "state"),
        reading=reading_from_pb(pb.reading),
        age_s=_number(pb.age_s, "age_s", 0, 1e9),
    )


def view_to_pb(view: ViewReceived) -> node_pb2.View:
    """Translate."""
    return node_pb2.View(
        peers=[peer_to_pb(peer) for peer in view.peers],
        links=None if view.links is None else links_to_pb(view.links),
        profiles={str(k): profile_to_pb(v) for k, v in (view.profiles or {}).items()},
        is_full=view.is_full,
    )


def view_from_pb(pb: node_pb2.View) -> ViewReceived:
    """Translate, or raise InvalidArgument naming the field."""
    return ViewReceived(
        peers=tuple(peer_from_pb(peer) for peer in pb.peers),
        links=links_from_pb(pb.links) if pb.HasField("links") else None,
        profiles={FunctionId(k): profile_from_pb(v) for k, v in pb.profiles.items()} or None,
        is_full=pb.is_full,
    )


# -- functions --------------------------------------------------------------------------------------


def spec_to_pb(spec: FunctionSpec) -> types_pb2.FunctionSpec:
    """Translate."""
    return types_pb2.FunctionSpec(
        namespace=spec.namespace,
        name=spec.name,
        version=spec.version,
        code_digest=spec.code_digest,
        requirements=spec.requirements,
        memory_mib=spec.memory_mib,
        cpus=spec.cpus,
        gpu_slots=spec.gpu_slots,
        timeout_s=spec.timeout_s,
        deadline_s=spec.deadline_s,
        priority=types_pb2.Priority.ValueType(spec.priority),
        tiers=tiers_to_pb(spec.tiers),
        instances_max=spec.instances_max,
        keep_alive_s=spec.keep_alive_s,
        budget_usd=spec.budget_usd,
        retries_max=spec.retries_max,
        description=spec.description,
    )


def spec_from_pb(pb: types_pb2.FunctionSpec) -> FunctionSpec:
    """Translate, or raise InvalidArgument naming the field."""
    for label, name in (("namespace", pb.namespace), ("name", pb.name)):
        if not is_name(name):
            raise InvalidArgument(
                f"{label} {name!r}: use a-z, 0-9, '-', '.', '_', at most 63, starting with one "
                "of a-z, 0-9"
            )
    if len(pb.requirements) > 100 or any(len(line) > 300 for line in pb.requirements):
        raise InvalidArgument("requirements: at most 100 of at most 300 characters")
    return FunctionSpec(
        namespace=pb.namespace,
        name=pb.name,
        version=pb.version,
        code_digest=pb.code_digest,
        requirements=tuple(pb.requirements),
        memory_mib=int(_number(pb.memory_mib, "memory_mib", 1, 1e7)),
        cpus=_number(pb.cpus, "cpus", 0.01, 1024),
        gpu_slots=int(_number(pb.gpu_slots, "gpu_slots", 0, 1024)),
        timeout_s=_number(pb.timeout_s, "timeout_s", 1e-3, TIMEOUT_S_MAX),
        deadline_s=_number(pb.deadline_s, "deadline_s", 1e-3, TIMEOUT_S_MAX),
        priority=_enum(Priority, pb.priority, "priority"),
        tiers=tiers_from_pb(pb.tiers) or ALL_TIERS,
        instances_max=int(_number(pb.instances_max, "instances_max", 1, 10_000)),
        keep_alive_s=_number(pb.keep_alive_s, "keep_alive_s", 0, TIMEOUT_S_MAX),
        budget_usd=_number(pb.budget_usd, "budget_usd", 0, 1e9)
        if pb.HasField("budget_usd")
        else None,
        retries_max=int(_number(pb.retries_max, "retries_max", 0, 20)),
        description=pb.description[:1000],
    )


def tiers_to_pb(tiers: Iterable[Tier]) -> list[types_pb2.Tier.ValueType]:
    """Translate, sorted."""
    return [types_pb2.Tier.ValueType(tier) for tier in sorted(tiers)]


def tiers_from_pb(values: Iterable[int]) -> frozenset[Tier]:
    """Translate, or raise InvalidArgument."""
    return frozenset(_enum(Tier, value, "tiers") for value in values)


def profile_to_pb(profile: FunctionProfile) -> types_pb2.FunctionProfile:
    """Translate."""
    return types_pb2.FunctionProfile(
        run_s=profile.run_s,
        cold_start_s=profile.cold_start_s,
        response_bytes=profile.response_bytes,
        rate_per_s=profile.rate_per_s,
        call_count=profile.call_count,
    )


def profile_from_pb(pb: types_pb2.FunctionProfile) -> FunctionProfile:
    """Translate, or raise InvalidArgument naming the field."""
    return FunctionProfile(
        run_s=_number(pb.run_s, "run_s", 0, 1e9),
        cold_start_s=_number(pb.cold_start_s, "cold_start_s", 0, 1e9),
        response_bytes=pb.response_bytes,
        rate_per_s=_number(pb.rate_per_s, "rate_per_s", 0, 1e9),
        call_count=pb.call_count,
    )


def catalogue_to_pb(catalogue: Catalogue) -> types_pb2.Catalogue:
    """Translate."""
    return types_pb2.Catalogue(
        revision=catalogue.revision,
        functions=[spec_to_pb(spec) for spec in catalogue.functions.values()],
        profiles={str(k): profile_to_pb(v) for k, v in catalogue.profiles.items()},
    )


def catalogue_from_pb(pb: types_pb2.Catalogue) -> Catalogue:
    """Translate, or raise InvalidArgument naming the field."""
    specs = [spec_from_pb(spec) for spec in pb.functions]
    return Catalogue(
        revision=pb.revision,
        functions={spec.function_id: spec for spec in specs},
        profiles={FunctionId(k): profile_from_pb(v) for k, v in pb.profiles.items()},
    )


# -- requests ---------------------------------------------------------------------------------------


def request_from_invocation(
    pb: types_pb2.Invocation, spec: FunctionSpec, *, origin: NodeId
) -> Request:
    """Return the request that an invocation of `spec` asks for; zeroes take the function's own.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    if not 0 < len(pb.request_id) <= REQUEST_ID_MAX:
        raise InvalidArgument(f"request_id must have 1 to {REQUEST_ID_MAX} characters")
    if not pb.arguments:
        raise InvalidArgument("arguments: a call needs at least one set of them")
    # An empty time means the default; a forwarded call whose time is over arrives with less than 0.
    deadline_s, timeout_s = pb.deadline_s, pb.timeout_s
    if not (abs(deadline_s) <= TIMEOUT_S_MAX and abs(timeout_s) <= TIMEOUT_S_MAX):
        raise InvalidArgument("deadline_s and timeout_s must be finite and at most 7 days")
    return Request(
        request_id=RequestId(pb.request_id),
        spec=spec,
        origin=origin,
        priority=_enum(Priority, pb.priority, "priority") if pb.priority else spec.priority,
        deadline_s=deadline_s or spec.deadline_s,
        timeout_s=timeout_s or spec.timeout_s + 30.0,
        budget_usd=pb.budget_usd if pb.HasField("budget_usd") else spec.budget_usd,
        request_bytes=sum(map(len, pb.arguments)),
        item_count=len(pb.arguments),
        data_nodes=tuple(NodeId(name) for name in pb.data_nodes),
        data_bytes=pb.data_bytes,
        tiers=tiers_from_pb(pb.tiers) if pb.tiers else None,
        node_id=NodeId(pb.node_id) if pb.node_id else None,
        hops=pb.hops,
        lease=pb.lease,
    )


def invocation_from_request(request: Request, arguments: Sequence[bytes]) -> types_pb2.Invocation:
    """Return the message that passes `request` on to another node."""
    return types_pb2.Invocation(
        request_id=request.request_id,
        function=request.spec.function_id,
        arguments=arguments,
        deadline_s=request.deadline_s,
        timeout_s=request.timeout_s,
        priority=types_pb2.Priority.ValueType(request.priority),
        budget_usd=request.budget_usd,
        tiers=tiers_to_pb(request.tiers) if request.tiers is not None else (),
        node_id=request.node_id or "",
        data_nodes=request.data_nodes,
        data_bytes=request.data_bytes,
        hops=request.hops,
        origin=request.origin,
        lease=request.lease,
    )


# -- outcomes ---------------------------------------------------------------------------------------


def outcome_to_pb(outcome: Outcome, *, with_explanation: bool = True) -> types_pb2.Outcome:
    """Translate; the explanation is the largest part and may be left out."""
    latency = outcome.latency
    pb = types_pb2.Outcome(
        request_id=outcome.request_id,
        function_id=outcome.function_id,
        state=types_pb2.OutcomeState.ValueType(outcome.state),
        origin=outcome.origin,
        node_id=outcome.node_id or "",
        latency=types_pb2.LatencySplit(
            queue_s=latency.queue_s,
            transfer_s=latency.transfer_s,
            cold_start_s=latency.cold_start_s,
            run_s=latency.run_s,
            return_s=latency.return_s,
        ),
        deadline_s=outcome.deadline_s,
        priority=types_pb2.Priority.ValueType(outcome.priority),
        item_count=outcome.item_count,
        failed_item_count=outcome.failed_item_count,
        memory_mib=outcome.memory_mib,
        peak_memory_mib=outcome.peak_memory_mib,
        request_bytes=outcome.request_bytes,
        response_bytes=outcome.response_bytes,
        money_usd=outcome.money_usd,
        energy_j=outcome.energy_j,
        is_cold=outcome.is_cold,
        error_code=outcome.error_code,
        message=outcome.message,
        policy_id=outcome.policy_id,
        lease=outcome.lease,
    )
    if outcome.reason is not None:
        pb.reason = types_pb2.Reason.ValueType(outcome.reason)
    for node_id, reason in outcome.tried:
        pb.tried.add(node_id=node_id, reason=types_pb2.Reason.ValueType(reason))
    if with_explanation and outcome.explanation is not None:
        pb.explanation.CopyFrom(explanation_to_pb(outcome.explanation))
    return pb


def outcome_from_pb(pb: types_pb2.Outcome) -> Outcome:
    """Translate, or raise InvalidArgument naming the field."""
    latency = pb.latency
    return Outcome(
        request_id=RequestId(pb.request_id),
        function_id=FunctionId(pb.function_id),
        state=_enum(OutcomeState, pb.state, "state"),
        origin=NodeId(pb.origin),
        node_id=NodeId(pb.node_id) if pb.node_id else None,
        latency=LatencySplit(
            queue_s=_number(latency.queue_s, "queue_s", -1, 1e9),
            transfer_s=_number(latency.transfer_s, "transfer_s", -1, 1e9),
            cold_start_s=_number(latency.cold_start_s, "cold_start_s", -1, 1e9),
            run_s=_number(latency.run_s, "run_s", -1, 1e9),
            return_s=_number(latency.return_s, "return_s", -1, 1e9),
        ),
        deadline_s=pb.deadline_s,
        priority=_enum(Priority, pb.priority, "priority"),
        item_count=pb.item_count,
        failed_item_count=pb.failed_item_count,
        memory_mib=pb.memory_mib,
        peak_memory_mib=pb.peak_memory_mib,
        request_bytes=pb.request_bytes,
        response_bytes=pb.response_bytes,
        money_usd=_number(pb.money_usd, "money_usd", 0, 1e9),
        energy_j=_number(pb.energy_j, "energy_j", 0, 1e12),
        is_cold=pb.is_cold,
        error_code=pb.error_code,
        message=pb.message,
        reason=_enum(Reason, pb.reason, "reason") if pb.reason else None,
        tried=tuple((NodeId(t.node_id), _enum(Reason, t.reason, "tried")) for t in pb.tried),
        policy_id=PolicyId(pb.policy_id),
        explanation=explanation_from_pb(pb.explanation) if pb.HasField("explanation") else None,
        lease=pb.lease,
    )


def explanation_to_pb(value: Explanation) -> types_pb2.Explanation:
    """Translate."""
    return types_pb2.Explanation(
        policy_id=value.policy_id,
        candidates=[
            types_pb2.CandidateScore(
                node_id=row.node_id,
                transfer_s=row.transfer_s,
                wait_s=row.wait_s,
                cold_start_s=row.cold_start_s,
                run_s=row.run_s,
                return_s=row.return_s,
                displaced_s=row.displaced_s,
                money_usd=row.money_usd,
                score=row.score,
                residual=row.residual,
                propensity=row.propensity,
            )
            for row in value.candidates
        ],
        masked=[
            types_pb2.NodeReason(node_id=node, reason=types_pb2.Reason.ValueType(reason))
            for node, reason in value.masked
        ],
        heuristic_choice=value.heuristic_choice or "",
        fallback=value.fallback,
    )


def explanation_from_pb(pb: types_pb2.Explanation) -> Explanation:
    """Translate, or raise InvalidArgument naming the field."""
    return Explanation(
        policy_id=PolicyId(pb.policy_id),
        candidates=tuple(
            CandidateScore(
                node_id=NodeId(row.node_id),
                transfer_s=row.transfer_s,
                wait_s=row.wait_s,
                cold_start_s=row.cold_start_s,
                run_s=row.run_s,
                return_s=row.return_s,
                displaced_s=row.displaced_s,
                money_usd=row.money_usd,
                score=row.score,
                residual=row.residual,
                propensity=row.propensity,
            )
            for row in pb.candidates
        ),
        masked=tuple((NodeId(m.node_id), _enum(Reason, m.reason, "masked")) for m in pb.masked),
        heuristic_choice=NodeId(pb.heuristic_choice) if pb.heuristic_choice else None,
        fallback=pb.fallback,
    )

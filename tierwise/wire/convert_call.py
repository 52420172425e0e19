"""Calls ⇄ protobuf: requests, how they ended, and why they went where they did."""

from collections.abc import Mapping, Sequence

from tierwise.domain.decision import CandidateScore, Explanation, Reason, ShadowDecision
from tierwise.domain.function import FunctionSpec, Priority
from tierwise.domain.ids import FunctionId, NodeId, PolicyId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.prices import LINK_CLASSES
from tierwise.domain.request import Request
from tierwise.domain.sizing import MEMORY_MIB_MAX
from tierwise.errors import InvalidArgument
from tierwise.v1 import types_pb2
from tierwise.wire import checks
from tierwise.wire.convert_function import (
    INT32_MAX,
    INT64_MAX,
    TIMEOUT_S_MAX,
    tiers_from_pb,
    tiers_to_pb,
)

REQUEST_ID_MAX = 128
ITEMS_MAX = 4_096
DATA_NODES_MAX = 256
NODES_MAX = 10_000  # rows of an explanation, and nodes tried
MESSAGE_LENGTH_MAX = 4_096
POLICY_ID_MAX = 128
ERROR_CODE_MAX = 64
REFUSED_CALLS_MAX = 500  # names; there are not many more system calls
CALL_NAME_MAX = 128
# A part of the split is a remainder between two nodes' figures: it may fall a little below zero.
PART_MIN_S = -1.0
HUGE = 1e12
MEASURES_MAX = 64
MEASURE_LENGTH_MAX = 128
HUGE_MEASURE = 1e15
_FIGURES = ("peak_memory_mib", "money_usd", "energy_j", "gb_s", "gpu_s", "cpu_s")
_LINKS = frozenset(("", *LINK_CLASSES))
START_GRACE_S = 30.0  # beyond its timeout, a call without one of its own may wait this long


def request_from_invocation(
    pb: types_pb2.Invocation, spec: FunctionSpec, *, origin: NodeId
) -> Request:
    """Return the request that an invocation of `spec` asks for; zeroes take the function's own.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    request_id, arguments = pb.request_id, pb.arguments
    if not (0 < len(request_id) <= REQUEST_ID_MAX and request_id.isprintable()):
        raise InvalidArgument(
            f"request_id {checks.shown(request_id)}: use 1 to {REQUEST_ID_MAX} printable characters"
        )
    if not 0 < len(arguments) <= ITEMS_MAX:
        raise InvalidArgument(
            f"arguments: {len(arguments)} sets of them; a call takes 1 to {ITEMS_MAX}"
        )
    # An empty time means the default; a forwarded call whose time is over arrives with less than 0.
    deadline_s, timeout_s = pb.deadline_s, pb.timeout_s
    if deadline_s:
        checks.number(deadline_s, "deadline_s", -TIMEOUT_S_MAX, TIMEOUT_S_MAX)
    if timeout_s:
        checks.number(timeout_s, "timeout_s", -TIMEOUT_S_MAX, TIMEOUT_S_MAX)
    budget_usd = spec.budget_usd
    if pb.HasField("budget_usd"):
        budget_usd = checks.number(pb.budget_usd, "budget_usd", 0, 1e9)
    node_id, data_nodes = pb.node_id, pb.data_nodes
    if data_nodes:
        checks.at_most(data_nodes, "data_nodes", DATA_NODES_MAX)
        for name in data_nodes:
            checks.name(name, "data_nodes")
    request = Request(
        request_id=RequestId(request_id),
        spec=spec,
        origin=NodeId(checks.name(origin, "origin") if origin else origin),
        priority=checks.member(Priority, pb.priority, "priority") if pb.priority else spec.priority,
        deadline_s=deadline_s or spec.deadline_s,
        timeout_s=timeout_s or spec.timeout_s + START_GRACE_S,
        budget_usd=budget_usd,
        request_bytes=sum(map(len, arguments)),
        item_count=len(arguments),
        data_nodes=tuple(map(NodeId, data_nodes)) if data_nodes else (),
        data_bytes=checks.integer(pb.data_bytes, "data_bytes", 0, INT64_MAX),
        tiers=tiers_from_pb(pb.tiers) if pb.tiers else None,
        node_id=NodeId(checks.name(node_id, "node_id")) if node_id else None,
        hops=checks.integer(pb.hops, "hops", 0, INT32_MAX),
        lease=checks.integer(pb.lease, "lease", 0, INT64_MAX),
        expected_wait_s=(
            checks.number(pb.expected_wait_s, "expected_wait_s", 0, HUGE)
            if pb.HasField("expected_wait_s")
            else None
        ),
    )
    if pb.memory_mib and spec.is_memory_auto:
        return request.with_memory(checks.integer(pb.memory_mib, "memory_mib", 1, MEMORY_MIB_MAX))
    return request


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
        expected_wait_s=request.expected_wait_s,
        memory_mib=request.spec.memory_mib if request.spec.is_memory_auto else 0,
    )


def outcome_to_pb(outcome: Outcome, *, with_explanation: bool = True) -> types_pb2.Outcome:
    """Return the message of an outcome.

    Args:
        outcome: What ended.
        with_explanation: The explanation is by far the largest part and may be left out.
    """
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
        gb_s=outcome.gb_s,
        gpu_s=outcome.gpu_s,
        cpu_s=outcome.cpu_s,
        link=outcome.link,
        money_usd=outcome.money_usd,
        energy_j=outcome.energy_j,
        is_cold=outcome.is_cold,
        error_code=outcome.error_code,
        message=checks.clean(outcome.message, MESSAGE_LENGTH_MAX) if outcome.message else "",
        policy_id=outcome.policy_id,
        lease=outcome.lease,
        trial_id=outcome.trial_id,
        block=outcome.block,
        measures=outcome.measures,
        retried_gb_s=outcome.retried_gb_s,
        refused_calls=dict(outcome.refused_calls),
    )
    if outcome.reason is not None:
        pb.reason = types_pb2.Reason.ValueType(outcome.reason)
    for node_id, reason in outcome.tried:
        pb.tried.add(node_id=node_id, reason=types_pb2.Reason.ValueType(reason))
    if outcome.shadow is not None:
        _fill_shadow(pb.shadow, outcome.shadow)
    if with_explanation and outcome.explanation is not None:
        _fill_explanation(pb.explanation, outcome.explanation)
    return pb


def outcome_from_pb(pb: types_pb2.Outcome) -> Outcome:
    """Return the outcome of a message; text that is too long is cut, it is for people only.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    latency = pb.latency
    parts_s = (
        latency.queue_s,
        latency.transfer_s,
        latency.cold_start_s,
        latency.run_s,
        latency.return_s,
    )
    # One look at all figures of a kind, for a forwarded call waits for this: a NaN or an infinity
    # makes the sum one too, and the protobuf types bound the counts from above.
    if not (sum(parts_s) <= HUGE and min(parts_s) >= PART_MIN_S):
        _refuse(latency, ("queue_s", "transfer_s", "cold_start_s", "run_s", "return_s"), PART_MIN_S)
    figures = (pb.peak_memory_mib, pb.money_usd, pb.energy_j, pb.gb_s, pb.gpu_s, pb.cpu_s)
    if not (sum(figures) <= HUGE and min(figures) >= 0.0):
        _refuse(pb, _FIGURES, 0.0)
    item_count, failed_item_count = pb.item_count, pb.failed_item_count
    counts = (failed_item_count, pb.memory_mib, pb.request_bytes, pb.response_bytes, pb.lease)
    if min(counts) < 0 or failed_item_count > item_count:
        checks.integer(item_count, "item_count", 0, INT32_MAX)
        checks.integer(failed_item_count, "failed_item_count", 0, item_count)
        _refuse(pb, ("memory_mib", "request_bytes", "response_bytes", "lease"), 0)
    if pb.link not in _LINKS:
        raise InvalidArgument(f"link {checks.shown(pb.link)}: use one of {', '.join(LINK_CLASSES)}")
    request_id, node_id, origin = pb.request_id, pb.node_id, pb.origin
    if not request_id:
        raise InvalidArgument("request_id is empty: an outcome is of some request")
    return Outcome(
        request_id=RequestId(checks.text(request_id, "request_id", REQUEST_ID_MAX)),
        function_id=FunctionId(checks.function_id(pb.function_id, "function_id")),
        state=checks.member(OutcomeState, pb.state, "state"),
        origin=NodeId(checks.name(origin, "origin") if origin else ""),
        node_id=NodeId(checks.name(node_id, "node_id")) if node_id else None,
        latency=LatencySplit(
            queue_s=parts_s[0],
            transfer_s=parts_s[1],
            cold_start_s=parts_s[2],
            run_s=parts_s[3],
            return_s=parts_s[4],
        ),
        deadline_s=checks.number(pb.deadline_s, "deadline_s", -HUGE, HUGE),
        priority=checks.member(Priority, pb.priority, "priority"),
        item_count=item_count,
        failed_item_count=failed_item_count,
        memory_mib=counts[1],
        peak_memory_mib=figures[0],
        request_bytes=counts[2],
        response_bytes=counts[3],
        gb_s=figures[3],
        gpu_s=figures[4],
        cpu_s=figures[5],
        link=pb.link,
        money_usd=figures[1],
        energy_j=figures[2],
        is_cold=pb.is_cold,
        error_code=checks.text(pb.error_code, "error_code", ERROR_CODE_MAX),
        message=pb.message[:MESSAGE_LENGTH_MAX],
        reason=checks.member(Reason, pb.reason, "reason") if pb.reason else None,
        tried=_reasons_from_pb(pb.tried, "tried") if pb.tried else (),
        policy_id=PolicyId(checks.text(pb.policy_id, "policy_id", POLICY_ID_MAX)),
        explanation=explanation_from_pb(pb.explanation) if pb.HasField("explanation") else None,
        lease=counts[4],
        shadow=_shadow_from_pb(pb.shadow) if pb.HasField("shadow") else None,
        trial_id=checks.integer(pb.trial_id, "trial_id", 0, INT64_MAX),
        block=checks.integer(pb.block, "block", 0, INT64_MAX),
        measures=_measures_from_pb(pb.measures) if pb.measures else {},
        retried_gb_s=checks.number(pb.retried_gb_s, "retried_gb_s", 0.0, HUGE),
        refused_calls=_refused_calls_from_pb(pb.refused_calls) if pb.refused_calls else (),
    )


def _refused_calls_from_pb(pb: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    checks.at_most(pb, "refused_calls", REFUSED_CALLS_MAX)
    return tuple(
        (
            checks.text(name, "refused_calls", CALL_NAME_MAX),
            checks.integer(count, f"refused_calls[{name!r}]", 0, INT32_MAX),
        )
        for name, count in sorted(pb.items())
    )


def _measures_from_pb(found: Mapping[str, float]) -> dict[str, float]:
    checks.at_most(found, "measures", MEASURES_MAX)
    return {
        checks.text(name, "measures", MEASURE_LENGTH_MAX): checks.number(
            value, f"measures.{name}", -HUGE_MEASURE, HUGE_MEASURE
        )
        for name, value in found.items()
    }


def _refuse(
    pb: types_pb2.LatencySplit | types_pb2.Outcome, fields: Sequence[str], low: float
) -> None:
    """Raise InvalidArgument for the first of the fields that is out of bounds."""
    for field in fields:
        checks.number(getattr(pb, field), field, low, HUGE)


def explanation_to_pb(value: Explanation) -> types_pb2.Explanation:
    """Return the message of an explanation."""
    pb = types_pb2.Explanation()
    _fill_explanation(pb, value)
    return pb


def _fill_explanation(pb: types_pb2.Explanation, value: Explanation) -> None:
    """Write into the message in place, which saves a copy of every row."""
    pb.policy_id = value.policy_id
    pb.heuristic_choice = value.heuristic_choice or ""
    pb.fallback = checks.clean(value.fallback, MESSAGE_LENGTH_MAX)
    pb.choice = value.choice or ""
    add = pb.candidates.add
    for row in value.candidates:
        add(
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
    for node_id, reason in value.masked:
        pb.masked.add(node_id=node_id, reason=types_pb2.Reason.ValueType(reason))


def explanation_from_pb(pb: types_pb2.Explanation) -> Explanation:
    """Return the explanation of a message.

    Raises:
        InvalidArgument: A field is wrong; the message names it.
    """
    checks.at_most(pb.candidates, "candidates", NODES_MAX)
    heuristic_choice, choice = pb.heuristic_choice, pb.choice
    return Explanation(
        policy_id=PolicyId(checks.text(pb.policy_id, "policy_id", POLICY_ID_MAX)),
        candidates=tuple(map(_candidate_from_pb, pb.candidates)),
        masked=_reasons_from_pb(pb.masked, "masked"),
        heuristic_choice=(
            NodeId(checks.name(heuristic_choice, "heuristic_choice")) if heuristic_choice else None
        ),
        choice=NodeId(checks.name(choice, "choice")) if choice else None,
        fallback=pb.fallback[:MESSAGE_LENGTH_MAX],
    )


def _fill_shadow(pb: types_pb2.ShadowDecision, value: ShadowDecision) -> None:
    pb.policy_id = value.policy_id
    pb.node_id = value.node_id or ""
    pb.is_same = value.is_same
    pb.gain_s = value.gain_s
    pb.error = checks.clean(value.error, MESSAGE_LENGTH_MAX)
    for node_id, chance in value.odds:
        pb.odds.add(node_id=node_id, chance=chance)


def _shadow_from_pb(pb: types_pb2.ShadowDecision) -> ShadowDecision:
    checks.at_most(pb.odds, "shadow.odds", NODES_MAX)
    node_id = pb.node_id
    return ShadowDecision(
        policy_id=PolicyId(checks.text(pb.policy_id, "shadow.policy_id", POLICY_ID_MAX)),
        node_id=NodeId(checks.name(node_id, "shadow.node_id")) if node_id else None,
        is_same=pb.is_same,
        gain_s=checks.number(pb.gain_s, "shadow.gain_s", -HUGE, HUGE),
        odds=tuple(
            (
                NodeId(checks.name(row.node_id, "shadow.odds.node_id")),
                checks.number(row.chance, "shadow.odds.chance", 0.0, 1.0),
            )
            for row in pb.odds
        ),
        error=pb.error[:MESSAGE_LENGTH_MAX],
    )


def _candidate_from_pb(row: types_pb2.CandidateScore) -> CandidateScore:
    terms = (
        row.transfer_s,
        row.wait_s,
        row.cold_start_s,
        row.run_s,
        row.return_s,
        row.displaced_s,
        row.money_usd,
        row.score,
        row.residual,
        row.propensity,
    )
    if not -HUGE <= sum(terms) <= HUGE:  # so does a NaN or an infinity in any of them
        for field, term in zip(CandidateScore._fields[1:], terms, strict=True):
            checks.number(term, f"candidates.{field}", -HUGE, HUGE)
    return CandidateScore(NodeId(checks.name(row.node_id, "candidates.node_id")), *terms)


def _reasons_from_pb(
    rows: Sequence[types_pb2.NodeReason], field: str
) -> tuple[tuple[NodeId, Reason], ...]:
    checks.at_most(rows, field, NODES_MAX)
    return tuple(
        (
            NodeId(checks.name(row.node_id, f"{field}.node_id")),
            checks.member(Reason, row.reason, f"{field}.reason"),
        )
        for row in rows
    )

"""How the end of a request on a node is put into an outcome. Pure."""

from dataclasses import replace

from agent.ticket import Ticket
from tierwise.cost.energy import call_j
from tierwise.cost.money import PriceTable
from tierwise.domain.decision import Reason, summary
from tierwise.domain.event import RunFinished
from tierwise.domain.ids import NodeId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.topology import Node, Tier


def ran(
    ticket: Ticket, event: RunFinished, now_s: float, node: Node, prices: PriceTable
) -> Outcome:
    """Return the outcome of a run on this node, with its latency split and its bill."""
    run_s = now_s - ticket.run_at_s
    spec = ticket.request.spec
    state = OutcomeState.FAILED if event.error_code else OutcomeState.OK
    if ticket.is_cancelled:
        state = OutcomeState.CANCELLED
    return _outcome(
        ticket,
        state,
        now_s,
        node_id=node.node_id,
        latency=LatencySplit(
            queue_s=ticket.run_at_s - ticket.arrived_at_s - ticket.cold_start_s,
            transfer_s=ticket.transfer_s,
            cold_start_s=ticket.cold_start_s,
            run_s=run_s,
        ),
        failed_item_count=event.failed_item_count,
        memory_mib=spec.memory_mib,
        peak_memory_mib=event.peak_memory_mib,
        response_bytes=event.response_bytes,
        money_usd=prices.call_usd(
            node.tier,
            memory_mib=spec.memory_mib,
            billed_s=run_s,
            moved_bytes=0,
            gpu_slots=spec.gpu_slots,
            item_count=ticket.request.item_count,
        ),
        energy_j=call_j(node.tier, cpus=spec.cpus, run_s=run_s, moved_bytes=0),
        error_code="cancelled" if ticket.is_cancelled else event.error_code,
        message=event.message,
    )


def answered(
    ticket: Ticket, there: Outcome, latency: LatencySplit, tier: Tier, prices: PriceTable
) -> Outcome:
    """Return a peer's outcome as the owner tells it: with the way, and what moving cost.

    Args:
        ticket: The forwarded request; its `node_id` is the peer.
        there: What the peer answered.
        latency: The whole split, seen from here.
        tier: Of the peer.
        prices: Of moving bytes.
    """
    request = ticket.request
    moved_bytes = request.request_bytes + there.response_bytes
    moved_usd = prices.call_usd(
        tier, memory_mib=0, billed_s=0.0, moved_bytes=moved_bytes, item_count=0
    )
    return replace(
        there,
        request_id=request.request_id,
        origin=request.origin,
        node_id=ticket.node_id,
        latency=latency,
        deadline_s=request.deadline_s,
        money_usd=there.money_usd + moved_usd,
        energy_j=there.energy_j + call_j(tier, cpus=0, run_s=0, moved_bytes=moved_bytes),
        tried=tuple(ticket.tried),
        policy_id=ticket.policy_id,
        explanation=ticket.explanation,
    )


def not_started(ticket: Ticket, now_s: float, here: NodeId, code: str, message: str) -> Outcome:
    """Return the failure of a request whose instance did not come up."""
    return _outcome(
        ticket, OutcomeState.FAILED, now_s, node_id=here, error_code=code, message=message
    )


def cancelled(ticket: Ticket, now_s: float) -> Outcome:
    """Return the outcome of a request that was cancelled before it ran here."""
    return _outcome(
        ticket, OutcomeState.CANCELLED, now_s, error_code="cancelled", message="cancelled"
    )


def expired(ticket: Ticket, now_s: float, here: NodeId) -> Outcome:
    """Return the outcome of a request whose caller has given up before it ran."""
    waited_s = now_s - ticket.arrived_at_s
    return _outcome(
        ticket,
        OutcomeState.EXPIRED,
        now_s,
        error_code="deadline_exceeded",
        message=(
            f"its time of {ticket.request.timeout_s:.3g} s was over after {waited_s:.3g} s, "
            f"before it ran on {ticket.node_id or here}; allow a longer timeout"
        ),
    )


def refused(ticket: Ticket, reason: Reason, now_s: float, here: NodeId) -> Outcome:
    """Return what the one who placed a request here gets if it cannot be taken."""
    return _outcome(
        ticket,
        OutcomeState.REFUSED,
        now_s,
        reason=reason,
        error_code="overloaded" if reason is Reason.QUEUE_FULL else "unplaceable",
        message=f"{here} refused: {reason.label}",
    )


def untaken(ticket: Ticket, now_s: float) -> Outcome:
    """Return the outcome of a request that no candidate took."""
    reasons = {reason for _, reason in ticket.tried}
    if ticket.failure_count > ticket.request.spec.retries_max:
        code, state = "unavailable", OutcomeState.FAILED
    else:
        state = OutcomeState.UNPLACEABLE
        code = "overloaded" if Reason.QUEUE_FULL in reasons else "unplaceable"
    return _outcome(
        ticket,
        state,
        now_s,
        error_code=code,
        message=f"no node took {ticket.request.function_id}: {summary(ticket.tried)}",
    )


def _outcome(
    ticket: Ticket,
    state: OutcomeState,
    now_s: float,
    *,
    node_id: NodeId | None = None,
    latency: LatencySplit | None = None,
    failed_item_count: int = 0,
    memory_mib: int = 0,
    peak_memory_mib: float = 0.0,
    response_bytes: int = 0,
    money_usd: float = 0.0,
    energy_j: float = 0.0,
    error_code: str = "",
    message: str = "",
    reason: Reason | None = None,
) -> Outcome:
    """Fill in what every end has; without a latency all the time was spent waiting."""
    request = ticket.request
    return Outcome(
        request_id=request.request_id,
        function_id=request.spec.function_id,
        state=state,
        origin=request.origin,
        node_id=node_id,
        latency=latency or LatencySplit(queue_s=now_s - ticket.arrived_at_s),
        deadline_s=request.deadline_s,
        priority=request.priority,
        item_count=request.item_count,
        failed_item_count=failed_item_count,
        memory_mib=memory_mib,
        peak_memory_mib=peak_memory_mib,
        request_bytes=request.request_bytes,
        response_bytes=response_bytes,
        money_usd=money_usd,
        energy_j=energy_j,
        is_cold=ticket.is_cold,
        error_code=error_code,
        message=message,
        reason=reason,
        tried=tuple(ticket.tried),
        policy_id=ticket.policy_id,
        explanation=ticket.explanation,
        lease=request.lease,
    )

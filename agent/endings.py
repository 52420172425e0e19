"""How the end of a request on a node is put into an outcome. Pure."""

from dataclasses import replace

from agent.ticket import Ticket
from tierwise.cost.energy import call_j
from tierwise.domain.decision import Reason, is_hopeless, summary
from tierwise.domain.event import RunFinished
from tierwise.domain.ids import NodeId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.prices import FROM_SCHEDULER, LOCAL, PriceTable, link_class
from tierwise.domain.topology import Node


def ran(
    ticket: Ticket, event: RunFinished, now_s: float, node: Node, prices: PriceTable
) -> Outcome:
    """Return the outcome of a run on this node, with its latency split and its bill."""
    run_s = now_s - ticket.run_at_s
    spec = ticket.request.spec
    billed_s = prices.billed_s(run_s, ticket.cold_start_s)
    state = OutcomeState.FAILED if event.error_code else OutcomeState.OK
    error_code, message = event.error_code, event.message
    is_timed_out = event.error_code == "function_timed_out" and ticket.has_callers_limit
    if ticket.is_cancelled:
        state, error_code = OutcomeState.CANCELLED, "cancelled"
    elif event.error_code and (ticket.is_late or is_timed_out):
        state, error_code = OutcomeState.EXPIRED, "deadline_exceeded"
        message = _over(ticket, now_s, f"of which it ran {run_s:.3g} s on {node.node_id}")
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
        gb_s=spec.memory_mib / 1024.0 * billed_s,
        gpu_s=spec.gpu_slots * billed_s,
        cpu_s=event.cpu_s,
        link=FROM_SCHEDULER if ticket.request.lease else LOCAL,
        money_usd=prices.call_usd(
            node.tier,
            memory_mib=spec.memory_mib,
            billed_s=billed_s,
            gpu_slots=spec.gpu_slots,
            item_count=ticket.request.item_count,
        ),
        energy_j=call_j(node.tier, cpus=spec.cpus, run_s=run_s, moved_bytes=0),
        error_code=error_code,
        message=message,
        refused_calls=event.refused_calls,
    )


def charge(
    ticket: Ticket, event: RunFinished, now_s: float, node: Node, prices: PriceTable
) -> None:
    """Note what a run that is out of memory has cost; the call's own bill comes on top."""
    spec = ticket.request.spec
    billed_s = prices.billed_s(now_s - ticket.run_at_s, ticket.cold_start_s)
    ticket.retried_gb_s += spec.memory_mib / 1024.0 * billed_s
    ticket.retried_gpu_s += spec.gpu_slots * billed_s
    ticket.retried_cpu_s += event.cpu_s
    ticket.retried_usd += prices.call_usd(
        node.tier,
        memory_mib=spec.memory_mib,
        billed_s=billed_s,
        gpu_slots=spec.gpu_slots,
        item_count=0,
    )


def answered(
    ticket: Ticket,
    there: Outcome,
    latency: LatencySplit,
    way: tuple[Node, Node],
    prices: PriceTable,
) -> Outcome:
    """Return a peer's outcome as the owner tells it: with the way, and what moving cost.

    Args:
        ticket: The forwarded request; its `node_id` is the peer.
        there: What the peer answered.
        latency: The whole split, seen from here.
        way: This node and the peer.
        prices: Of moving bytes.
    """
    request = ticket.request
    moved_bytes = request.request_bytes + there.response_bytes
    here, peer = way
    moved_usd = prices.round_trip_usd(
        here.tier, peer.tier, request.request_bytes, there.response_bytes
    )
    return replace(
        there,
        request_id=request.request_id,
        origin=request.origin,
        node_id=ticket.node_id,
        latency=latency,
        deadline_s=request.deadline_s,
        link=link_class(here.tier, peer.tier),
        money_usd=there.money_usd + moved_usd,
        energy_j=there.energy_j + call_j(peer.tier, cpus=0, run_s=0, moved_bytes=moved_bytes),
        tried=tuple(ticket.tried),
        policy_id=ticket.policy_id,
        explanation=ticket.explanation,
        measures=request.measures,
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
    return _outcome(
        ticket,
        OutcomeState.EXPIRED,
        now_s,
        error_code="deadline_exceeded",
        message=_over(ticket, now_s, f"before it ran on {ticket.node_id or here}"),
    )


def stopped(ticket: Ticket, answer: Outcome, now_s: float) -> Outcome:
    """Return the outcome of a forwarded request that its host has stopped, or let expire.

    Args:
        ticket: The request.
        answer: What `answered` makes of the host's outcome: the split and the bill of what it ran.
        now_s: The present.
    """
    has_run = answer.latency.run_s > 0.0
    if ticket.is_cancelled:
        state, code, message = OutcomeState.CANCELLED, "cancelled", "cancelled"
    else:
        state, code = OutcomeState.EXPIRED, "deadline_exceeded"
        where = f"before it ran on {ticket.node_id}"
        if has_run:
            where = f"of which it ran {answer.latency.run_s:.3g} s on {ticket.node_id}"
        message = _over(ticket, now_s, where)
    return replace(
        answer,
        state=state,
        node_id=ticket.node_id if has_run else None,
        error_code=code,
        message=message,
        reason=None,
    )


def unanswered(ticket: Ticket, now_s: float) -> Outcome:
    """Return the outcome of a recalled request whose host has not said whether it ran.

    Nobody knows what to bill, so nothing is billed; the time since it was sent is the network's.
    """
    where = f"while it was on {ticket.node_id}, which did not say whether it ran"
    is_cancelled = ticket.is_cancelled
    return _outcome(
        ticket,
        OutcomeState.CANCELLED if is_cancelled else OutcomeState.EXPIRED,
        now_s,
        node_id=ticket.node_id,
        latency=LatencySplit(
            queue_s=ticket.sent_at_s - ticket.arrived_at_s, transfer_s=now_s - ticket.sent_at_s
        ),
        error_code="cancelled" if is_cancelled else "deadline_exceeded",
        message=f"cancelled {where}" if is_cancelled else _over(ticket, now_s, where),
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


def untaken(ticket: Ticket, now_s: float, *, is_pin_known: bool) -> Outcome:
    """Return the outcome of a request that no candidate took.

    Args:
        ticket: The request.
        now_s: The present.
        is_pin_known: Whether the node that it is pinned to, if to any, is known here.
    """
    reasons = [*ticket.tried, *_masked(ticket)]
    function = ticket.request.function_id
    state = OutcomeState.UNPLACEABLE
    message = f"no node took {function}: {summary(reasons)}"
    if not is_pin_known:
        code = "not_found"
        message = (
            f"there is no node {ticket.request.node_id!r}; `tierwise get nodes` lists those "
            "there are"
        )
    elif ticket.failure_count > ticket.request.spec.retries_max:
        code, state = "unavailable", OutcomeState.FAILED
    elif any(reason is Reason.QUEUE_FULL for _, reason in reasons):
        code = "overloaded"
    elif is_hopeless(reasons):
        code = "infeasible"
        message = f"no node can ever run {function} as it is asked for: {summary(reasons)}"
    else:
        code = "unplaceable"
        if any(reason is Reason.QUARANTINED for _, reason in reasons):
            message += (
                "; where it is quarantined it has killed its workers: deploy a corrected version, "
                "or wait and send it again"
            )
    return _outcome(ticket, state, now_s, error_code=code, message=message)


def put_out(left_s: float) -> str:
    """Return what is said of a function that has killed its workers too often."""
    return (
        f"it has killed its workers here again and again, and is not run on this node for "
        f"{left_s:.0f} s: `tierwise logs` shows what it printed; deploy a corrected version, which "
        "runs at once"
    )


def _masked(ticket: Ticket) -> tuple[tuple[NodeId, Reason], ...]:
    """Return why the last decision found no candidate, if it found none."""
    why = ticket.explanation
    return why.masked if why is not None and not why.candidates else ()


def _over(ticket: Ticket, now_s: float, where: str) -> str:
    """Return the message of a request whose caller has given up."""
    waited_s = now_s - ticket.arrived_at_s
    return (
        f"its time of {ticket.request.timeout_s:.3g} s was over after {waited_s:.3g} s, {where}; "
        "allow a longer timeout"
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
    gb_s: float = 0.0,
    gpu_s: float = 0.0,
    cpu_s: float = 0.0,
    link: str = "",
    money_usd: float = 0.0,
    energy_j: float = 0.0,
    error_code: str = "",
    message: str = "",
    reason: Reason | None = None,
    refused_calls: tuple[tuple[str, int], ...] = (),
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
        gb_s=gb_s + ticket.retried_gb_s,
        gpu_s=gpu_s + ticket.retried_gpu_s,
        cpu_s=cpu_s + ticket.retried_cpu_s,
        link=link,
        money_usd=money_usd + ticket.retried_usd,
        energy_j=energy_j,
        is_cold=ticket.is_cold,
        error_code=error_code,
        message=message,
        reason=reason,
        tried=tuple(ticket.tried),
        policy_id=ticket.policy_id,
        explanation=ticket.explanation,
        lease=request.lease,
        refused_calls=refused_calls,
        measures=request.measures,
        retried_gb_s=ticket.retried_gb_s,
    )

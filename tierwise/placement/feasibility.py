"""Which nodes may run a request at all, with a reason for each that may not."""

from tierwise.domain.decision import Reason
from tierwise.domain.function import FunctionSpec
from tierwise.domain.ids import NodeId
from tierwise.domain.request import HOPS_MAX, Request
from tierwise.domain.topology import Node, NodeState
from tierwise.domain.view import ClusterView, NodeView


def feasible(
    view: ClusterView, request: Request
) -> tuple[list[NodeView], list[tuple[NodeId, Reason]]]:
    """Split the view's nodes into candidates and (node, reason) pairs, both in view order.

    Only hard limits mask: whether a node could ever hold the function, may by its tier, pin or
    budget, and is alive. Being busy does not mask: waiting is a cost. Reasons that no waiting
    removes come first, for they decide whether the caller should try again.
    """
    candidates: list[NodeView] = []
    masked: list[tuple[NodeId, Reason]] = []
    for row in view.nodes:
        reason = _reason(view, request, row)
        if reason is None:
            candidates.append(row)
        else:
            masked.append((row.node.node_id, reason))
    return candidates, masked


def hard_limit(node: Node, spec: FunctionSpec, reserved_mib: int) -> Reason | None:
    """Return what of the node itself keeps a function off it, however idle it is.

    Args:
        node: Where it would run.
        spec: The function.
        reserved_mib: What floors hold there; the function's own is open to it.
    """
    if spec.python_version and node.python_version not in ("", spec.python_version):
        return Reason.WRONG_PYTHON
    capacity = node.capacity
    if reserved_mib and spec.instances_min:
        reserved_mib = max(0, reserved_mib - spec.instances_min * spec.memory_mib)
    if spec.memory_mib > capacity.memory_mib - reserved_mib:
        return Reason.TOO_LITTLE_MEMORY
    if spec.cpus > capacity.cpus:
        return Reason.TOO_FEW_CPUS
    if spec.gpu_slots > capacity.gpu_slots:
        return Reason.NO_GPU
    return None


def _reason(view: ClusterView, request: Request, row: NodeView) -> Reason | None:
    node = row.node
    spec = request.spec
    is_here = view.origin is not None and view.origin.node_id == node.node_id
    if request.node_id is not None and request.node_id != node.node_id:
        return Reason.PINNED_ELSEWHERE
    if node.tier not in spec.tiers or (
        request.tiers is not None and node.tier not in request.tiers
    ):
        return Reason.WRONG_TIER
    if (reason := hard_limit(node, spec, row.reading.reserved_mib)) is not None:
        return reason
    if request.budget_usd is not None:
        moved_usd = 0.0
        if view.origin is not None and not is_here:
            moved_usd = view.prices.moved_usd(view.origin.tier, node.tier, request.request_bytes)
        usd = view.prices.call_usd(
            node.tier,
            memory_mib=spec.memory_mib,
            billed_s=view.profile(spec.function_id).run_s * request.item_count / node.speed,
            moved_usd=moved_usd,
            gpu_slots=spec.gpu_slots,
            item_count=request.item_count,
        )
        if usd > request.budget_usd:
            return Reason.OVER_BUDGET
    if row.state is not NodeState.READY:
        if row.state is NodeState.DRAINING:
            return Reason.NODE_DRAINING
        if row.state is NodeState.LOST and not is_here:
            return Reason.NODE_LOST
    if node.node_id in request.excluded:
        return Reason.EXCLUDED
    if not is_here:
        if not row.reachable:
            return Reason.NODE_UNREACHABLE
        if request.hops + 1 > HOPS_MAX:
            return Reason.TOO_MANY_HOPS
    return None

"""The hands of the ControlPlane: carries out its commands and feeds back what happened."""

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, assert_never

import numpy as np
import structlog

from scheduler.machine import ControlPlane
from tierwise.clock import monotonic_s, wall_s
from tierwise.domain.budget import SpentBudgets
from tierwise.domain.command import (
    AskPolicy,
    CancelAt,
    ControlCommand,
    DeadLetter,
    Delay,
    Dispatch,
    NodeChanged,
    Record,
    TellDrain,
)
from tierwise.domain.decision import Explanation, NotPlaced, Placed, Reason
from tierwise.domain.event import ControlEvent, Decided, Ticked
from tierwise.domain.ids import NodeId, PolicyId, RequestId
from tierwise.domain.outcome import Outcome
from tierwise.placement.policy import Policy

log = structlog.get_logger()
TICK_S = 0.1
HERE = NodeId("scheduler")


class WorkSide(Protocol):
    """Where durable work is kept; the commands of one request arrive in order."""

    def dispatch(self, command: Dispatch) -> None:
        """Store the lease, then send the work."""
        ...

    def record(self, outcome: Outcome, *, is_dead: bool) -> None:
        """Store how the work ended, if its lease is still the newest."""
        ...

    def delay(self, command: Delay) -> None:
        """Store that an attempt failed."""
        ...


class NodeSide(Protocol):
    """The open sessions."""

    def cancel(self, node_id: NodeId, request_id: RequestId) -> None:
        """Tell a node to stop a piece of work."""
        ...

    def drain(self, node_id: NodeId, *, is_on: bool) -> None:
        """Tell a node to drain."""
        ...

    def changed(self) -> None:
        """The view has changed; agents should hear of it."""
        ...


class Dispatcher:
    """Drives one ControlPlane. All calls come from the event loop."""

    work: WorkSide
    nodes: NodeSide

    def __init__(
        self, plane: ControlPlane, policy: Policy, fallback: Policy, seed: int = 0
    ) -> None:
        self.plane = plane
        self.policy = policy
        self._fallback = fallback
        self.spent: Callable[[], SpentBudgets] = SpentBudgets  # whose work waits
        self._rng = np.random.default_rng(seed)
        self._events: deque[ControlEvent] = deque()
        self._is_stepping = False
        # Why each unfinished piece of work is where it is: policy and explanation.
        self._reasons: dict[RequestId, tuple[PolicyId, Explanation | None]] = {}

    def feed(self, event: ControlEvent) -> None:
        """Give the machine one event and carry out what it asks for."""
        self._events.append(event)
        if self._is_stepping:
            return
        self._is_stepping = True
        try:
            while self._events:
                for command in self.plane.step(self._events.popleft(), monotonic_s()):
                    self._execute(command)
        finally:
            self._is_stepping = False

    def explained(self, outcome: Outcome) -> Outcome:
        """Return the outcome of ended work with the decision that placed it, and forget that."""
        reason = self._reasons.pop(outcome.request_id, None)
        if reason is None:
            return outcome
        return replace(outcome, policy_id=reason[0], explanation=reason[1])

    async def tick_forever(self) -> None:
        """Tell the machine of the time, ten times a second."""
        while True:
            await asyncio.sleep(TICK_S)
            self.feed(Ticked())

    def _execute(self, command: ControlCommand) -> None:
        match command:
            case AskPolicy():
                self._decide(command)
            case Dispatch():
                self.work.dispatch(command)
            case Record():
                self.work.record(command.outcome, is_dead=False)
            case DeadLetter():
                self.work.record(command.outcome, is_dead=True)
            case Delay():
                self.work.delay(command)
            case CancelAt():
                self.nodes.cancel(command.node_id, command.request_id)
            case TellDrain():
                self.nodes.drain(command.node_id, is_on=command.is_on)
            case NodeChanged():
                log.info("node.changed", node_id=command.node_id, state=command.state.name.lower())
                self.nodes.changed()
            case _:
                assert_never(command)

    def _decide(self, command: AskPolicy) -> None:
        policy = self.policy
        spec = command.request.spec
        spent = self.spent()
        if spent and spent.of(spec.namespace, spec.name, wall_s()) is not None:
            reasons = ((HERE, Reason.BUDGET_SPENT),)
            self._events.appendleft(
                Decided(
                    request_id=command.request.request_id,
                    decision=NotPlaced(reasons=reasons),
                    policy_id=policy.policy_id,
                )
            )
            return
        try:
            decision = policy.decide(command.view, command.request, self._rng)
        except Exception:  # a policy comes from outside: whatever it does, the work goes on
            log.exception("policy.failed", policy_id=policy.policy_id)
            policy = self._fallback
            decision = policy.decide(command.view, command.request, self._rng)
        if isinstance(decision, Placed):
            request_id = command.request.request_id
            self._reasons[request_id] = (policy.policy_id, decision.explanation)
        self._events.appendleft(
            Decided(
                request_id=command.request.request_id,
                decision=decision,
                policy_id=policy.policy_id,
            )
        )

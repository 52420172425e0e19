"""Who decides on this node: the policy in use, a canary in its blocks, the base score if need be.

Each policy has a circuit breaker. A policy comes from outside: whatever it does, the call goes on.
A policy in the shadow is asked too, after the call was sent on its way and with a generator of its
own, so that it changes nothing; but it shares the process, and one that sleeps holds up the node
once, before its breaker drops it.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import structlog

from tierwise.clock import precise_s
from tierwise.cost.objective import DEFAULT_OBJECTIVE
from tierwise.domain.decision import (
    CandidateScore,
    Decision,
    Explanation,
    NotPlaced,
    Placed,
    ShadowDecision,
)
from tierwise.domain.ids import NodeId, PolicyId, RequestId
from tierwise.domain.outcome import Outcome, OutcomeState
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement.breaker import CircuitBreaker
from tierwise.placement.canary import Schedule
from tierwise.placement.policies.learned import LearnedPolicy
from tierwise.placement.policy import Policy
from tierwise.v1 import types_pb2

log = structlog.get_logger()
ERROR_LENGTH_MAX = 200
NOTES_MAX = 20_000  # calls that are under way


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A policy that decides in some time blocks; `started_at_s` is on this node's own clock."""

    policy: Policy
    trial_id: int
    schedule: Schedule
    started_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Duties:
    """Which policies are on duty; `refused` are those that could not be loaded: duty, id, cause."""

    active: Policy
    canary: Canary | None = None
    shadow: Policy | None = None
    refused: tuple[tuple[str, str, str], ...] = ()


class _Guarded:
    """A policy on duty, with its breaker and its counts."""

    __slots__ = ("breaker", "decision_count", "error", "fallbacks", "policy", "policy_id")

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.policy_id = PolicyId(policy.policy_id)
        self.breaker = CircuitBreaker(watches_misses=isinstance(policy, LearnedPolicy))
        self.decision_count = 0
        self.fallbacks: Counter[str] = Counter()
        self.error = ""

    def failed(self, error: Exception, now_s: float) -> None:
        log.exception("policy.failed", policy_id=self.policy_id)
        self.error = f"{type(error).__name__}: {error}"[:ERROR_LENGTH_MAX]
        self.breaker.failed(now_s)


@dataclass(slots=True)
class _Note:
    """What is recorded of a decision beside its explanation."""

    trial_id: int = 0
    block: int = 0
    question: tuple[ClusterView, Request, Decision] | None = None  # not put to the shadow yet
    shadow: ShadowDecision | None = None


class Decider:
    """Answers every AskPolicy of one node."""

    def __init__(self, duties: Duties, *, fallback: Policy, seed: int = 0) -> None:
        """Begin with some policies on duty.

        Args:
            duties: Who decides.
            fallback: The base score; it decides whenever the one on duty should not.
            seed: Of the generators that policies draw from.
        """
        self._fallback = fallback
        self._fallback_id = PolicyId(fallback.policy_id)
        self._rng = np.random.default_rng(seed)
        self._shadow_rng = np.random.default_rng((seed, 1))
        self._notes: dict[RequestId, _Note] = {}
        self.duties = duties
        self._active = _Guarded(duties.active)
        self._canary: _Guarded | None = None
        self._shadow: _Guarded | None = None
        self.use(duties)

    def use(self, duties: Duties) -> None:
        """Put policies on duty; one that is on the same duty already keeps its breaker."""
        self.duties = duties
        canary = duties.canary.policy if duties.canary is not None else None
        self._active = _guarded(duties.active, self._active)
        self._canary = _guarded(canary, self._canary) if canary is not None else None
        self._shadow = _guarded(duties.shadow, self._shadow) if duties.shadow is not None else None

    @property
    def active_id(self) -> PolicyId:
        """Return the policy in use."""
        return self._active.policy_id

    @property
    def has_shadow(self) -> bool:
        """Return whether `ask_shadow` should be called after each decision."""
        return self._shadow is not None

    def decide(self, view: ClusterView, request: Request) -> tuple[Decision, PolicyId]:
        """Return the decision and who took it."""
        if self._canary is None and self._shadow is None:
            return self._ask(self._active, view, request)
        note = self._notes[request.request_id] = _Note()
        if len(self._notes) > NOTES_MAX:  # should a call ever end without a report
            del self._notes[next(iter(self._notes))]
        on_duty = self._turn(note, view.now_s)
        decision, policy_id = self._ask(on_duty, view, request)
        shadow = self._shadow
        if shadow is not None and shadow.policy_id != on_duty.policy_id:  # not in its own blocks
            note.question = (_standing_still(view), request, decision)
        return decision, policy_id

    def _ask(
        self, on_duty: _Guarded, view: ClusterView, request: Request
    ) -> tuple[Decision, PolicyId]:
        if on_duty.policy_id == self._fallback_id:  # nothing to fall back to
            on_duty.decision_count += 1
            return self._fallback.decide(view, request, self._rng), self._fallback_id
        breaker = on_duty.breaker
        if not breaker.allows(view.now_s):
            return self._fall_back(on_duty, view, request)
        started_s = precise_s()
        try:
            decision = _checked(on_duty.policy.decide(view, request, self._rng))
        except Exception as error:
            on_duty.failed(error, view.now_s)
            return self._fall_back(on_duty, view, request)
        took_s = precise_s() - started_s
        on_duty.decision_count += 1
        why = ""
        if isinstance(decision, Placed) and decision.explanation is not None:
            why = decision.explanation.fallback
            if why:
                on_duty.fallbacks["range" if "range" in why else "number"] += 1
        opened_count = breaker.opened_count
        breaker.decided(took_s, view.now_s + took_s, is_out_of_range=why != "")
        if breaker.opened_count != opened_count:
            _log_opened(on_duty)
        return decision, on_duty.policy_id

    def ask_shadow(self, request_id: RequestId) -> None:
        """Ask the shadow what it would have done; its answer goes into the call's record."""
        note = self._notes.get(request_id)
        if note is not None:
            self._put(note)

    def _put(self, note: _Note) -> None:
        guarded = self._shadow
        if note.question is None or guarded is None:
            return
        (view, request, decision), note.question = note.question, None
        policy_id, breaker = guarded.policy_id, guarded.breaker
        now_s = view.now_s
        if not breaker.allows(now_s):
            guarded.fallbacks["dropped"] += 1
            cause = breaker.cause.value if breaker.cause is not None else ""
            note.shadow = ShadowDecision(policy_id=policy_id, error=f"not asked: {cause}")
            return
        started_s = precise_s()
        try:
            answer = _checked(guarded.policy.decide(view, request, self._shadow_rng))
        except Exception as error:
            guarded.failed(error, now_s)
            note.shadow = ShadowDecision(policy_id=policy_id, error=guarded.error)
            return
        took_s = precise_s() - started_s
        guarded.decision_count += 1
        breaker.decided(took_s, now_s + took_s)
        note.shadow = _compared(policy_id, answer, decision, request)

    def reported(self, outcome: Outcome, now_s: float) -> Outcome:
        """Learn from a call that has ended here; return its outcome with what was noted of it."""
        if outcome.explanation is not None:
            self._learn(outcome, outcome.explanation, now_s)
        note = self._notes.pop(outcome.request_id, None) if self._notes else None
        if note is None:
            return outcome
        self._put(note)  # it may have ended before the shadow's turn came
        return replace(outcome, shadow=note.shadow, trial_id=note.trial_id, block=note.block)

    def health(self) -> Iterator[types_pb2.PolicyHealth]:
        """Yield how each policy on duty does."""
        for duty, guarded in (
            ("active", self._active),
            ("canary", self._canary),
            ("shadow", self._shadow),
        ):
            if guarded is not None:
                breaker = guarded.breaker
                yield types_pb2.PolicyHealth(
                    policy_id=guarded.policy_id,
                    duty=duty,
                    breaker=breaker.state.value,
                    cause=breaker.cause.value if breaker.cause is not None else "",
                    opened_count=breaker.opened_count,
                    decision_count=guarded.decision_count,
                    fallbacks=guarded.fallbacks,
                    error=guarded.error,
                )
        for duty, policy_id, cause in self.duties.refused:
            yield types_pb2.PolicyHealth(policy_id=policy_id, duty=duty, error=cause)

    def _turn(self, note: _Note, now_s: float) -> _Guarded:
        """Return whose turn it is, and note the block."""
        canary = self.duties.canary
        if canary is None or self._canary is None:
            return self._active
        elapsed_s = now_s - canary.started_at_s
        block = canary.schedule.block(elapsed_s)
        note.trial_id = canary.trial_id
        note.block = block if canary.schedule.is_settled(elapsed_s) else 0
        return self._canary if canary.schedule.is_canary(block) else self._active

    def _fall_back(
        self, on_duty: _Guarded, view: ClusterView, request: Request
    ) -> tuple[Decision, PolicyId]:
        cause = on_duty.breaker.cause
        assert cause is not None
        on_duty.fallbacks[cause.name.lower()] += 1
        decision = self._fallback.decide(view, request, self._rng)
        if isinstance(decision, Placed) and decision.explanation is not None:
            why = f"instead of {on_duty.policy_id}: {cause.value}"
            decision = replace(decision, explanation=replace(decision.explanation, fallback=why))
        return decision, self._fallback_id

    def _learn(self, outcome: Outcome, why: Explanation, now_s: float) -> None:
        """Compare how late the call was with what was predicted for the base score's choice."""
        if outcome.state not in (OutcomeState.OK, OutcomeState.EXPIRED):
            return  # a function that raised says nothing of where it ran
        row = _row(why, why.heuristic_choice)
        if row is None:
            return
        was_predicted = sum(row[1:6]) > outcome.deadline_s  # transfer to return
        for guarded in (self._active, self._canary):
            if guarded is not None:
                by_base = outcome.policy_id == self._fallback_id
                if not by_base and outcome.policy_id != guarded.policy_id:
                    continue
                opened_count = guarded.breaker.opened_count
                guarded.breaker.ended(
                    now_s,
                    is_missed=outcome.is_missed,
                    was_predicted=was_predicted,
                    by_base=by_base,
                )
                if guarded.breaker.opened_count != opened_count:
                    _log_opened(guarded)


def _standing_still(view: ClusterView) -> ClusterView:
    """Return the view with an own row that no longer follows the pool: it can be kept."""
    here = view.origin
    if here is None:
        return view
    return replace(
        view,
        nodes=tuple(
            [
                replace(row, reading=row.reading.standing_still())
                if row.node.node_id == here.node_id
                else row
                for row in view.nodes
            ]
        ),
    )


def _guarded(policy: Policy, before: _Guarded | None) -> _Guarded:
    if before is not None and before.policy_id == policy.policy_id:
        return before
    return _Guarded(policy)


def _checked(decision: Decision) -> Decision:
    """Return what a policy answered, if it is an answer at all.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(decision, Placed | NotPlaced):
        raise TypeError(f"the policy answered {type(decision).__name__} instead of a decision")
    return decision


def _compared(
    policy_id: PolicyId, answer: Decision, decision: Decision, request: Request
) -> ShadowDecision:
    """Return the shadow's answer beside the decision that was taken."""
    is_same = _choice(answer) == _choice(decision)
    if not isinstance(answer, Placed):
        error = "" if is_same else "it would have placed the call nowhere"
        return ShadowDecision(policy_id=policy_id, is_same=is_same, error=error)
    node_id = answer.node_ids[0]
    why = answer.explanation
    odds = () if why is None else tuple((r.node_id, r.propensity) for r in why.candidates)
    mine = None if why is None else _row(why, node_id)
    taken = None
    if isinstance(decision, Placed) and decision.explanation is not None:
        taken = _row(decision.explanation, decision.node_ids[0])
    gain_s = 0.0
    if mine is not None and taken is not None and not is_same:
        predicted_s = DEFAULT_OBJECTIVE.predicted_s
        gain_s = predicted_s(taken, request.deadline_s, request.priority) - predicted_s(
            mine, request.deadline_s, request.priority
        )
    return ShadowDecision(
        policy_id=policy_id,
        node_id=node_id,
        is_same=is_same,
        gain_s=gain_s,
        odds=tuple((node, chance) for node, chance in odds if chance > 0.0),
    )


def _choice(decision: Decision) -> NodeId | None:
    return decision.node_ids[0] if isinstance(decision, Placed) else None


def _row(why: Explanation, node_id: NodeId | None) -> CandidateScore | None:
    for row in why.candidates:
        if row[0] == node_id:
            return row
    return None


def _log_opened(guarded: _Guarded) -> None:
    cause = guarded.breaker.cause
    log.warning(
        "policy.breaker_opened",
        policy_id=guarded.policy_id,
        cause=cause.value if cause is not None else "",
    )

"""Who decides on a node: fallbacks, the shadow, and the canary's blocks."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agent.decider import Canary, Decider, Duties
from agent.policies import PolicySlots
from tests.unit.test_learned import REQUEST, card, network, view
from tierwise.domain.decision import Decision, NotPlaced, Placed
from tierwise.domain.ids import PolicyId, RequestId
from tierwise.domain.outcome import LatencySplit, Outcome, OutcomeState
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.errors import NotFound
from tierwise.placement.canary import Schedule
from tierwise.placement.features import FEATURES
from tierwise.placement.policies.learned import LearnedPolicy, save
from tierwise.placement.policy import create
from tierwise.v1 import node_pb2

F = len(FEATURES)


class Scripted:
    """A policy that does what it is told."""

    def __init__(self, act: Callable[[ClusterView, Request], Decision], name: str = "odd") -> None:
        self.policy_id = PolicyId(f"{name}@1")
        self.asked_count = 0
        self._act = act

    def decide(self, view: ClusterView, request: Request, rng: np.random.Generator) -> Decision:
        self.asked_count += 1
        return self._act(view, request)


def raises(view: ClusterView, request: Request) -> Decision:
    raise ZeroDivisionError("a bug")


def sleeps(view: ClusterView, request: Request) -> Decision:
    time.sleep(0.3)
    return worst(view, request)


def worst(view: ClusterView, request: Request) -> Decision:
    decision = ect(view, request)
    assert isinstance(decision, Placed) and decision.explanation is not None
    last = decision.node_ids[-1]
    return replace(
        decision,
        node_ids=decision.node_ids[::-1],
        explanation=replace(decision.explanation, choice=last),
    )


def ect(view: ClusterView, request: Request) -> Decision:
    return create("ect").decide(view, request, np.random.default_rng(0))


def decider(active: object, **duties: object) -> Decider:
    return Decider(Duties(active=active, **duties), fallback=create("ect"))  # type: ignore[arg-type]


def call(name: str) -> Request:
    return replace(REQUEST, request_id=RequestId(name))


def ended(
    decision: Decision, policy_id: str, *, latency_s: float = 0.01, name: str = "r"
) -> Outcome:
    assert isinstance(decision, Placed)
    return Outcome(
        request_id=RequestId(name),
        function_id=REQUEST.spec.function_id,
        state=OutcomeState.OK,
        origin=REQUEST.origin,
        node_id=decision.node_ids[0],
        latency=LatencySplit(run_s=latency_s),
        deadline_s=1.0,
        policy_id=PolicyId(policy_id),
        explanation=decision.explanation,
    )


def fallback_of(decision: Decision) -> str:
    assert isinstance(decision, Placed) and decision.explanation is not None
    return decision.explanation.fallback


# -- fallbacks ----------------------------------------------------------------------------------


def test_a_policy_that_raises_costs_no_call_and_is_not_asked_again() -> None:
    policy = Scripted(raises)
    who = decider(policy)
    for _ in range(20):
        decision, policy_id = who.decide(view(4), REQUEST)
        assert policy_id == "ect@1"
        assert isinstance(decision, Placed)
        assert decision.node_ids == ect(view(4), REQUEST).node_ids  # type: ignore[union-attr]
        assert fallback_of(decision) == "instead of odd@1: it raised"
    assert policy.asked_count == 1
    (health,) = who.health()
    assert (health.breaker, health.fallbacks["error"]) == ("open", 20)
    assert health.error == "ZeroDivisionError: a bug"


@pytest.mark.parametrize("answer", [None, "n-0", ("n-0",)])
def test_an_answer_that_is_no_decision_counts_as_an_error(answer: object) -> None:
    who = decider(Scripted(lambda *_: answer))  # type: ignore[arg-type, return-value]
    decision, policy_id = who.decide(view(4), REQUEST)
    assert policy_id == "ect@1"
    assert "it raised" in fallback_of(decision)


def test_a_policy_that_sleeps_is_not_asked_again() -> None:
    policy = Scripted(sleeps)
    who = decider(policy)
    _, policy_id = who.decide(view(4), REQUEST)
    assert policy_id == "odd@1"  # late, but an answer
    second, policy_id = who.decide(view(4), REQUEST)
    assert (policy_id, policy.asked_count) == ("ect@1", 1)
    assert fallback_of(second).endswith("it was late")


def test_inputs_out_of_range_are_counted_and_open_the_breaker_when_they_prevail() -> None:
    low, high = [-8.0] * F, [8.0] * F
    low[FEATURES.index("speed")] = high[FEATURES.index("speed")] = 8.0
    who = decider(LearnedPolicy(network(), card(low=low, high=high)))
    kinds = [fallback_of(who.decide(view(6), REQUEST)[0]) for _ in range(60)]
    assert kinds[0] == "speed is outside the trained range"
    assert kinds[-1] == "instead of mine@3: its inputs were out of the trained range"
    (health,) = who.health()
    assert health.fallbacks["range"] == 60


def test_calls_that_end_later_than_predicted_open_the_breaker() -> None:
    who = decider(LearnedPolicy(network(), card()))
    decision, policy_id = who.decide(view(4), REQUEST)
    for _ in range(100):
        who.reported(ended(decision, policy_id, latency_s=0.5), 1.0)
    assert next(who.health()).breaker == "closed"
    for _ in range(100):
        who.reported(ended(decision, policy_id, latency_s=9.0), 1.0)
    assert next(who.health()).cause == "it missed more deadlines than predicted"


def test_a_policy_that_chooses_nodes_predicted_to_be_late_is_found_out() -> None:
    who = decider(LearnedPolicy(network(), card()))
    decision, policy_id = who.decide(view(2), REQUEST)
    assert isinstance(decision, Placed) and decision.explanation is not None
    good, bad = (
        row._replace(run_s=run_s, wait_s=0.0)
        for row, run_s in zip(decision.explanation.candidates, (0.1, 9.0), strict=True)
    )
    why = replace(
        decision.explanation,
        candidates=(good, bad),
        heuristic_choice=good.node_id,
        choice=bad.node_id,
    )
    late = replace(ended(decision, policy_id, latency_s=9.0), explanation=why)
    for _ in range(100):
        who.reported(late, 1.0)
    assert next(who.health()).breaker == "open"


def test_if_the_base_scores_choice_would_be_late_too_the_policy_is_not_blamed() -> None:
    who = decider(LearnedPolicy(network(), card()))
    decision, policy_id = who.decide(view(2), REQUEST)
    assert isinstance(decision, Placed) and decision.explanation is not None
    rows = tuple(row._replace(run_s=9.0) for row in decision.explanation.candidates)
    why = replace(decision.explanation, candidates=rows)
    late = replace(ended(decision, policy_id, latency_s=9.0), explanation=why)
    for _ in range(100):
        who.reported(late, 1.0)
    assert next(who.health()).breaker == "closed"


def test_functions_that_fail_are_not_blamed_on_the_policy() -> None:
    who = decider(LearnedPolicy(network(), card()))
    decision, policy_id = who.decide(view(4), REQUEST)
    failed = replace(ended(decision, policy_id), state=OutcomeState.FAILED)
    for _ in range(200):
        who.reported(failed, 1.0)
    assert next(who.health()).breaker == "closed"


def test_the_base_score_itself_is_never_taken_off_duty() -> None:
    who = decider(create("ect"))
    decision, policy_id = who.decide(view(4), REQUEST)
    for _ in range(200):
        who.reported(ended(decision, policy_id, latency_s=9.0), 1.0)
    assert fallback_of(who.decide(view(4), REQUEST)[0]) == ""


def test_a_view_without_a_node_gives_no_decision_whatever_the_policy_does() -> None:
    who = decider(Scripted(raises))
    decision, _ = who.decide(ClusterView(now_s=0.0, origin=None, nodes=()), REQUEST)
    assert decision == NotPlaced(reasons=())


def test_assigning_the_same_policy_again_does_not_close_its_breaker() -> None:
    policy = Scripted(raises)
    who = decider(policy)
    who.decide(view(4), REQUEST)
    who.use(Duties(active=policy))
    assert next(who.health()).breaker == "open"
    who.use(Duties(active=Scripted(worst, "sound")))
    assert next(who.health()).breaker == "closed"


# -- shadow -------------------------------------------------------------------------------------


def test_a_shadow_changes_no_decision_and_its_answer_is_in_the_record() -> None:
    active = LearnedPolicy(network(), card(temperature=1.0))
    alone, shadowed = decider(active), decider(active, shadow=Scripted(worst))
    for i in range(30):
        request = call(f"r-{i}")
        decision, policy_id = alone.decide(view(6), request)
        assert shadowed.decide(view(6), request) == (decision, policy_id)
        shadowed.ask_shadow(request.request_id)
        shadow = shadowed.reported(ended(decision, policy_id, name=f"r-{i}"), 1.0).shadow
        assert shadow is not None and isinstance(decision, Placed)
        assert shadow.node_id == worst(view(6), request).node_ids[0]  # type: ignore[union-attr]
        assert shadow.is_same == (shadow.node_id == decision.node_ids[0])
        assert sum(chance for _, chance in shadow.odds) == pytest.approx(1.0)
    assert not shadowed._notes


def test_the_gain_is_the_difference_of_predicted_costs() -> None:
    who = decider(Scripted(worst), shadow=create("ect"))
    decision, policy_id = who.decide(view(6), REQUEST)
    who.ask_shadow(REQUEST.request_id)
    shadow = who.reported(ended(decision, policy_id), 1.0).shadow
    assert shadow is not None and not shadow.is_same
    assert isinstance(decision, Placed) and decision.explanation is not None
    rows = {row.node_id: row for row in decision.explanation.candidates}

    def cost_s(node_id: object) -> float:
        row = rows[node_id]  # type: ignore[index]
        latency_s = sum(row[1:6])
        missed = latency_s > REQUEST.deadline_s
        return latency_s + 20_000.0 * row.money_usd + int(REQUEST.priority) / 2.0 * missed

    expected_s = cost_s(decision.node_ids[0]) - cost_s(shadow.node_id)
    assert shadow.gain_s == pytest.approx(expected_s)
    assert expected_s > 0.0


@pytest.mark.parametrize(("act", "word"), [(raises, "a bug"), (sleeps, "late")])
def test_a_shadow_that_fails_is_counted_and_dropped(
    act: Callable[..., Decision], word: str
) -> None:
    policy = Scripted(act)
    who = decider(create("ect"), shadow=policy)
    errors = []
    for i in range(5):
        decision, policy_id = who.decide(view(4), call(f"r-{i}"))
        who.ask_shadow(RequestId(f"r-{i}"))
        shadow = who.reported(ended(decision, policy_id, name=f"r-{i}"), 1.0).shadow
        assert shadow is not None
        errors.append(shadow.error)
    assert policy.asked_count == 1
    assert all(error.startswith("not asked") for error in errors[1:])
    assert word in errors[0] or word in errors[1]
    active, health = who.health()
    assert (active.breaker, health.breaker, health.fallbacks["dropped"]) == ("closed", "open", 4)


def test_a_call_that_ended_before_the_shadows_turn_has_its_answer_too() -> None:
    policy = Scripted(worst)
    who = decider(create("ect"), shadow=policy)
    decision, policy_id = who.decide(view(4), REQUEST)
    shadow = who.reported(ended(decision, policy_id), 1.0).shadow
    assert shadow is not None and shadow.node_id is not None
    who.ask_shadow(REQUEST.request_id)
    assert (policy.asked_count, who._notes) == (1, {})


def test_the_shadow_sees_the_view_as_it_was_when_the_call_was_placed() -> None:
    seen = []

    def look(view: ClusterView, request: Request) -> Decision:
        seen.append(dict(view.nodes[0].reading.warm))
        return ect(view, request)

    warm = {REQUEST.spec.function_id: 1}
    who = decider(create("ect"), shadow=Scripted(look))
    who.decide(view(3, warm=warm), REQUEST)
    warm.clear()  # an instance was taken
    who.ask_shadow(REQUEST.request_id)
    assert seen == [{REQUEST.spec.function_id: 1}]


# -- canary -------------------------------------------------------------------------------------


def test_in_its_blocks_the_canary_decides_and_the_record_says_so() -> None:
    canary = Canary(
        policy=Scripted(worst, "new"),
        trial_id=7,
        schedule=Schedule(0.5, 10.0, 3),
        started_at_s=100.0,
    )
    who = decider(create("ect"), canary=canary)
    for step in range(200):
        now_s = 100.0 + step
        decision, policy_id = who.decide(replace(view(4), now_s=now_s), REQUEST)
        outcome = who.reported(ended(decision, policy_id), now_s)
        block = 1 + step // 10
        assert policy_id == ("new@1" if canary.schedule.is_canary(block) else "ect@1")
        assert outcome.trial_id == 7
        assert outcome.block == (0 if step % 10 == 0 else block)  # its first tenth does not count


def test_a_shadow_is_not_compared_with_itself_in_its_own_blocks() -> None:
    policy = Scripted(worst, "new")
    canary = Canary(policy=policy, trial_id=7, schedule=Schedule(0.5, 10.0, 3), started_at_s=100.0)
    who = decider(create("ect"), canary=canary, shadow=policy)
    for step in range(0, 200, 5):
        decision, policy_id = who.decide(replace(view(4), now_s=100.0 + step), REQUEST)
        outcome = who.reported(ended(decision, policy_id), 100.0 + step)
        assert (outcome.shadow is None) == (policy_id == "new@1")


# -- on disk ------------------------------------------------------------------------------------


async def test_duties_outlive_a_restart_and_a_canarys_blocks_go_on(tmp_path: Path) -> None:
    weights, about = save(network(), card())

    async def fetch(policy_id: str) -> tuple[bytes, bytes]:
        if policy_id == "mine@3":
            return weights, about
        raise NotFound(policy_id)

    assignment = node_pb2.PolicyAssignment(
        policy_id="ect",
        builtin="ect",
        shadow=node_pb2.PolicyRef(policy_id="edge-first", builtin="edge-first"),
        canary=node_pb2.CanaryAssignment(
            policy=node_pb2.PolicyRef(policy_id="mine@3"),
            trial_id=4,
            share=0.5,
            block_s=10.0,
            seed=9,
            elapsed_s=25.0,
        ),
    )
    slots = PolicySlots(tmp_path)
    active = create("soft-ect")
    given = await slots.assign(assignment, fetch, active, now_s=1000.0, wall_s=5e8)
    restored = PolicySlots(tmp_path).restore("soft-ect", now_s=3.0, wall_s=5e8 + 60.0)
    for duties, now_s, elapsed_s in ((given, 1000.0, 25.0), (restored, 3.0, 85.0)):
        assert duties.active.policy_id == "ect@1"
        assert duties.shadow is not None and duties.shadow.policy_id == "edge-first@1"
        assert duties.canary is not None and duties.canary.policy.policy_id == "mine@3"
        assert duties.canary.trial_id == 4
        assert now_s - duties.canary.started_at_s == pytest.approx(elapsed_s)
        assert duties.canary.schedule.is_canary(2) == Schedule(0.5, 10.0, 9).is_canary(2)

    assignment.ClearField("shadow")
    assignment.canary.policy.policy_id = "gone@1"
    duties = await slots.assign(assignment, fetch, active, now_s=1001.0, wall_s=5e8)
    assert (duties.canary, duties.shadow) == (None, None)
    assert duties.refused == (("canary", "gone@1", "gone@1"),)
    restored = PolicySlots(tmp_path).restore("soft-ect", now_s=3.0, wall_s=5e8)
    assert (restored.canary, restored.shadow) == (None, None)


async def test_an_active_policy_that_is_refused_leaves_the_one_before(tmp_path: Path) -> None:
    async def fetch(policy_id: str) -> tuple[bytes, bytes]:
        return b"\x80\x04.", b"{}"

    slots = PolicySlots(tmp_path)
    before = create("soft-ect")
    assignment = node_pb2.PolicyAssignment(policy_id="evil@1")
    duties = await slots.assign(assignment, fetch, before, now_s=0.0, wall_s=0.0)
    assert duties.active is before
    assert duties.refused[0][:2] == ("active", "evil@1")
    assert PolicySlots(tmp_path).restore("ect", now_s=0.0, wall_s=0.0).active.policy_id == "ect@1"

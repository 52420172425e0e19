"""Off-policy estimates: on bandits whose truth is known, and on records of real decisions."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from tests.property.test_placement import learned as learned_policy
from tests.property.test_placement import requests, views
from tests.unit.test_learned import REQUEST, card, network, view
from tierwise.cost.estimate import estimate
from tierwise.domain.decision import Placed, ShadowDecision
from tierwise.domain.ids import NodeId, PolicyId
from tierwise.domain.request import Request
from tierwise.domain.view import ClusterView
from tierwise.placement import offpolicy
from tierwise.placement.offpolicy import Log, evaluate
from tierwise.placement.policies.ect import SOFT_TEMPERATURE
from tierwise.placement.policies.learned import LearnedPolicy
from tierwise.placement.policy import Policy, create
from tierwise.placement.ranking import softmax
from tierwise.placement.replay import (
    LoggedCall,
    Target,
    by_base_score,
    by_dials,
    by_shadow,
    by_slowest_fit,
    replay,
)
from tierwise.placement.score import ScoreWeights, base_score, weighted

# -- a bandit whose truth is known ---------------------------------------------------------------


def bandit(
    rng: np.random.Generator, n: int, *, model: str = "right", off: float = 0.0
) -> tuple[Log, float]:
    """Return a log of n decisions among 4 candidates, and the target's true mean cost.

    Costs depend on a context; the logger prefers what the target does not.

    Args:
        rng: Draws everything.
        n: Decisions.
        model: Of the predictions: right, or wrong.
        off: Logged propensities are this far from the true ones (towards uniform).
    """
    context = rng.normal(size=(n, 1))
    means = 1.0 + 0.3 * np.arange(4) + 0.2 * context * np.array([1.0, -1.0, 0.5, 0.0])
    logger = np.apply_along_axis(softmax, 1, 0.8 * means)
    target = np.apply_along_axis(softmax, 1, -3.0 * means)
    choice = (logger.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
    index = (np.arange(n), choice)
    cost = means[index] + 0.3 * rng.normal(size=n)
    predicted = means if model == "right" else 3.0 - means**2
    said = (1.0 - off) * logger + off * 0.25
    log = Log(
        cost=cost,
        logged=said[index],
        target=target[index],
        predicted=predicted[index],
        expected=(target * predicted).sum(axis=1),
        unsupported=np.zeros(n),
    )
    return log, float((target * means).sum(axis=1).mean())


@pytest.mark.parametrize("estimator", ["ips", "snips", "dr"])
def test_intervals_cover_the_truth_as_often_as_they_say(estimator: str) -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(100):
        log, truth = bandit(rng, 400)
        found = getattr(evaluate(log), estimator)
        covered += found.low <= truth <= found.high
    assert covered / 100 >= 0.88


def test_what_the_logger_itself_cost_is_not_the_answer() -> None:
    log, truth = bandit(np.random.default_rng(1), 5000)
    found = evaluate(log)
    assert found.logged.low > truth + 0.1


def bias_of(pick: Callable[[Log], float], **how: object) -> tuple[float, float]:
    """Return the mean error over many logs, and its standard error."""
    rng = np.random.default_rng(5)
    errors = []
    for _ in range(300):
        log, truth = bandit(rng, 200, **how)  # type: ignore[arg-type]
        errors.append(pick(log) - truth)
    return float(np.mean(errors)), float(np.std(errors) / np.sqrt(len(errors)))


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offpolicy, "RESAMPLES", 2)


@pytest.mark.usefixtures("few_resamples")
def test_dr_is_unbiased_with_a_wrong_model_and_right_propensities() -> None:
    bias, error = bias_of(lambda log: evaluate(log).dr.mean, model="wrong")
    assert abs(bias) < 3.0 * error


@pytest.mark.usefixtures("few_resamples")
def test_dr_is_unbiased_with_wrong_propensities_and_a_right_model() -> None:
    bias, error = bias_of(lambda log: evaluate(log).dr.mean, off=0.8)
    assert abs(bias) < 3.0 * error
    bias, error = bias_of(lambda log: evaluate(log).ips.mean, off=0.8)
    assert abs(bias) > 5.0 * error  # which these propensities do to IPS


@pytest.mark.usefixtures("few_resamples")
def test_dr_is_biased_if_both_are_wrong() -> None:
    bias, error = bias_of(lambda log: evaluate(log).dr.mean, model="wrong", off=0.8)
    assert abs(bias) > 5.0 * error


def test_a_right_model_makes_dr_narrower_than_ips() -> None:
    log, _ = bandit(np.random.default_rng(2), 3000)
    found = evaluate(log)
    assert found.dr.high - found.dr.low < 0.5 * (found.ips.high - found.ips.low)


def test_calls_that_resemble_their_neighbours_give_wider_intervals() -> None:
    rng = np.random.default_rng(3)
    log, _ = bandit(rng, 3000)
    drifting = np.repeat(rng.normal(size=60), 50)  # busy times and quiet ones
    plain, busy = (evaluate(replace(log, cost=log.cost + extra)) for extra in (0.0, drifting))
    shuffled = evaluate(replace(log, cost=log.cost + rng.permutation(drifting)))
    assert busy.logged.high - busy.logged.low > 1.5 * (shuffled.logged.high - shuffled.logged.low)
    assert plain.effective_count == busy.effective_count < 3000


def test_a_log_that_cannot_be_is_refused() -> None:
    log, _ = bandit(np.random.default_rng(2), 10)
    with pytest.raises(ValueError, match="chance"):
        evaluate(replace(log, logged=np.zeros(10)))
    with pytest.raises(ValueError, match="no decision"):
        evaluate(Log(**{name: np.zeros(0) for name in Log.__dataclass_fields__}))


# -- replaying records ---------------------------------------------------------------------------


def logged(
    policy: Policy, of: ClusterView, request: Request, *, cost_s: float = 1.0, seed: int = 0
) -> LoggedCall | None:
    decision = policy.decide(of, request, np.random.default_rng(seed))
    if not isinstance(decision, Placed) or decision.explanation is None:
        return None
    assert decision.explanation.choice is not None
    return LoggedCall(
        policy_id=policy.policy_id,
        rows=decision.explanation.candidates,
        choice=decision.explanation.choice,
        deadline_s=request.deadline_s,
        priority=request.priority,
        cost_s=cost_s,
        fallback=decision.explanation.fallback,
    )


def odds_of(policy: Policy, of: ClusterView, request: Request) -> dict[NodeId, float]:
    decision = policy.decide(of, request, np.random.default_rng(1))
    assert isinstance(decision, Placed) and decision.explanation is not None
    return {row.node_id: row.propensity for row in decision.explanation.candidates}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("ect", by_base_score()),
        ("soft-ect", by_base_score(temperature=SOFT_TEMPERATURE)),
        ("slowest-fit", by_slowest_fit()),
    ],
)
@given(view=views(nodes_min=1), request=requests)
@settings(max_examples=50, deadline=None)
def test_a_record_tells_what_a_heuristic_would_have_done(
    name: str, target: Target, view: ClusterView, request: Request
) -> None:
    call = logged(create("edge-first"), view, request)
    if call is None:
        return
    expected = odds_of(create(name), view, request)
    chances = target(call)
    assert chances is not None
    for row, chance in zip(call.rows, chances.tolist(), strict=True):
        assert chance == pytest.approx(expected[row.node_id], abs=1e-6)


@pytest.mark.parametrize(
    "dials", [(4.0, 1.0, 0.0), (4.0, 0.5, 0.7), (1.0, 0.0, 1.0), (2.0, 3.0, 0)]
)
def test_a_record_tells_what_the_policy_would_have_done_with_other_dials(
    dials: tuple[float, float, float],
) -> None:
    beta, lam, temperature = dials
    call = logged(LearnedPolicy(network(), card(temperature=0.5)), view(12), REQUEST)
    assert call is not None
    other = LearnedPolicy(network(), card(beta=beta, lam=lam, temperature=temperature))
    chances = by_dials("mine@3", beta=beta, lam_factor=lam, temperature=temperature)(call)
    assert chances is not None
    expected = odds_of(other, view(12), REQUEST)
    for row, chance in zip(call.rows, chances.tolist(), strict=True):
        assert chance == pytest.approx(expected[row.node_id], abs=1e-3)  # residuals are rounded
    assert by_dials("other@1", beta=1.0, lam_factor=1.0, temperature=0.0)(call) is None


def test_out_of_range_the_policy_falls_back_whatever_its_dials() -> None:
    call = logged(learned_policy(bound=1e-3), view(6), REQUEST)
    assert call is not None and call.fallback
    chances = by_dials("test@1", beta=0.0, lam_factor=9.0, temperature=1.0)(call)
    assert chances is not None
    assert call.rows[int(chances.argmax())].score == min(row.score for row in call.rows)
    assert sorted(chances)[:-1] == [0.0] * 5


def test_a_shadow_is_taken_at_its_word_and_what_it_did_not_say_is_unsupported() -> None:
    call = logged(create("soft-ect"), view(3), REQUEST)
    assert call is not None
    said = ShadowDecision(
        policy_id=PolicyId("new@1"), odds=((NodeId("n-1"), 0.75), (NodeId("elsewhere"), 0.25))
    )
    with_shadow = replace(call, shadow=said)
    log, skipped_count = replay([call, with_shadow], by_shadow("new@1"))
    assert skipped_count == 1
    assert log.unsupported[0] >= 0.25
    failed = replace(call, shadow=replace(said, error="it raised"))
    assert by_shadow("new@1")(failed) is None
    assert by_shadow("old@1")(with_shadow) is None


def test_the_loggers_own_odds_give_back_what_its_calls_cost() -> None:
    rng = np.random.default_rng(0)
    calls = []
    for seed in range(400):
        call = logged(create("soft-ect"), view(5), REQUEST, cost_s=rng.exponential(), seed=seed)
        assert call is not None
        calls.append(call)
    log, skipped_count = replay(calls, by_base_score(temperature=SOFT_TEMPERATURE))
    found = evaluate(log)
    assert skipped_count == 0
    assert found.ips.mean == pytest.approx(found.logged.mean)
    assert found.snips.mean == pytest.approx(found.logged.mean)
    assert found.effective_count == pytest.approx(400)
    assert found.unsupported_share == pytest.approx(0.0)


def test_a_logger_without_chance_supports_only_what_it_did() -> None:
    call = logged(create("ect"), view(5), REQUEST, cost_s=2.0)
    assert call is not None
    elsewhere = replace(
        call, shadow=ShadowDecision(policy_id=PolicyId("x@1"), odds=((call.rows[0].node_id, 1.0),))
    )
    if call.choice == call.rows[0].node_id:
        elsewhere = replace(
            call,
            shadow=ShadowDecision(policy_id=PolicyId("x@1"), odds=((call.rows[1].node_id, 1.0),)),
        )
    found = evaluate(replay([elsewhere] * 10, by_shadow("x@1"))[0])
    assert found.unsupported_share == 1.0
    assert found.effective_count == 0.0
    assert np.isnan(found.snips.mean)


@given(view=views(nodes_min=1), request=requests)
@settings(max_examples=50, deadline=None)
def test_the_weighted_terms_sum_to_the_score(view: ClusterView, request: Request) -> None:
    weights = ScoreWeights(cold_start=0.3, displaced=1.5, per_miss_s=0.7)
    estimates = estimate(view, request, view.nodes)
    parts = weighted(estimates.terms, request.deadline_s, request.priority, weights)
    np.testing.assert_allclose(
        parts.sum(axis=1), base_score(estimates, request, weights), rtol=1e-9
    )

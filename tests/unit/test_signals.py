"""Signals and their prices: what each column means, what a price does, which cards are refused."""

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.unit.test_features import CLOUD, EDGE, REQUEST, row, view
from tests.unit.test_learned import RNG, card, network
from tests.unit.test_learned import view as many
from tierwise.cost.estimate import estimate
from tierwise.domain.decision import Explanation, Placed
from tierwise.domain.function import Priority
from tierwise.domain.request import Request
from tierwise.domain.resources import Resources
from tierwise.domain.view import ClusterView, NodeReading
from tierwise.errors import InvalidArgument
from tierwise.placement.policies.ect import EarliestCompletion
from tierwise.placement.policies.learned import Card, LearnedPolicy, Price, initial, load, save
from tierwise.placement.signals import BOUND, SIGNALS, encode

NOTHING = initial(8, np.random.default_rng(0))
READING = NodeReading(
    free=Resources(cpus=1, memory_mib=250),
    queued=8,
    backlog_s=0.9,
    overtaken_s=(0.0, 0.1, 0.3, 0.6),
)


def signal(name: str, of: ClusterView, request: Request = REQUEST) -> list[float]:
    seen = encode(of, request, estimate(of, request, of.nodes))
    return [float(x) for x in seen[:, SIGNALS.index(name)]]


def prices(**weights: float) -> dict[str, Price]:
    return {name: Price(weight=w, low=0.0, high=BOUND) for name, w in weights.items()}


def explained(policy: LearnedPolicy, of: ClusterView, request: Request = REQUEST) -> Explanation:
    decision = policy.decide(of, request, RNG)
    assert isinstance(decision, Placed) and decision.explanation is not None
    return decision.explanation


def test_the_terms_of_the_base_score_are_signals_in_deadlines() -> None:
    request = replace(REQUEST, deadline_s=0.5)
    terms = estimate(view(), request, view().nodes)
    for name in ("run", "cold_start", "wait"):
        expected = terms.column(f"{name}_s") / 0.5
        assert signal(name, view(), request) == pytest.approx(expected.tolist())
    path_s = terms.column("transfer_s") + terms.column("return_s")
    assert signal("path", view(), request) == pytest.approx((path_s / 0.5).tolist())


def test_a_busy_node_and_its_queue_multiply_what_the_request_takes() -> None:
    of = view(row(EDGE, reading=READING), row(CLOUD))
    run, start = signal("run", of), signal("cold_start", of)
    assert signal("busy_run", of) == pytest.approx([0.75 * each for each in run])
    assert signal("busy_start", of)[0] == pytest.approx(0.75 * start[0])
    assert signal("queued_run", of) == pytest.approx([2.0 * run[0], 0.0])
    assert signal("queued_start", of) == pytest.approx([2.0 * start[0], 0.0])


def test_old_readings_and_unheard_sendings_are_told() -> None:
    of = view(row(EDGE, reading=READING, received_at_s=8.0, pending_s=0.4), row(CLOUD))
    request = replace(REQUEST, deadline_s=2.0, priority=Priority.LOW)
    assert signal("pending", of, request) == pytest.approx([0.2, 0.0])
    # The backlog of 0.9 s has had 2 s to drain: only what is pending is left to wait for.
    assert signal("old_wait", of, request) == pytest.approx([2.0 * 0.4 / 2.0, 0.0])


def test_overtaking_is_told_by_priority() -> None:
    of = view(row(EDGE, reading=READING), row(CLOUD))
    (run,) = set(signal("run", of)[:1])
    for priority, overtaken_s in zip(Priority, READING.overtaken_s, strict=True):
        request = replace(REQUEST, priority=priority)
        assert signal("overtaken_run", of, request)[0] == pytest.approx(overtaken_s * run)


def test_a_miss_is_likelier_the_later_and_a_half_at_the_deadline() -> None:
    latency_s = float(estimate(view(), REQUEST, view().nodes).latency_s[0])
    chances = [
        signal("miss", view(), replace(REQUEST, deadline_s=latency_s * share))[0]
        * latency_s
        * share
        for share in (2.0, 1.0, 0.5)
    ]
    assert chances[0] < 1e-3
    assert chances[1] == pytest.approx(0.5)
    assert chances[2] == pytest.approx(1.0, abs=1e-5)
    urgent = replace(REQUEST, deadline_s=latency_s, priority=Priority.CRITICAL)
    assert signal("miss", view(), urgent)[0] * latency_s == pytest.approx(1.0)


def test_signals_are_bounded_also_where_readings_are_not_numbers() -> None:
    broken = NodeReading(
        free=Resources(cpus=float("nan"), memory_mib=0),
        queued=10**9,
        backlog_s=float("inf"),
        overtaken_s=(float("nan"),) * 4,
    )
    of = view(row(EDGE, reading=broken, received_at_s=float("nan")), row(CLOUD))
    seen = encode(of, REQUEST, estimate(of, REQUEST, of.nodes))
    assert seen.shape == (2, len(SIGNALS))
    assert ((seen >= 0.0) & (seen <= BOUND)).all()


def test_a_price_moves_work_away_from_what_it_prices() -> None:
    of = view(row(EDGE, reading=replace(READING, backlog_s=0.0)), row(CLOUD))
    base = EarliestCompletion().decide(of, REQUEST, RNG)
    assert isinstance(base, Placed)
    seen = {name: signal(name, of) for name in SIGNALS}
    worse = base.node_ids[0] == CLOUD.node_id
    name = next(n for n, (here, there) in seen.items() if (there > here) == worse and here != there)
    policy = LearnedPolicy(NOTHING, card(prices=prices(**{name: 1e3})))
    why = explained(policy, of)
    decision = policy.decide(of, REQUEST, RNG)
    assert isinstance(decision, Placed)
    assert why.heuristic_choice == base.node_ids[0] != decision.node_ids[0]


def test_the_residual_is_the_price_of_the_signals_times_lambda_and_beta() -> None:
    of = view(row(EDGE, reading=READING), row(CLOUD))
    priced = card(prices=prices(wait=0.5, queued_run=0.25), lam=0.5, beta=8.0)
    why = explained(LearnedPolicy(NOTHING, priced), of)
    expected = [
        -0.5 * 8.0 * (0.5 * wait + 0.25 * queued)
        for wait, queued in zip(signal("wait", of), signal("queued_run", of), strict=True)
    ]
    assert [c.residual for c in why.candidates] == pytest.approx(expected, abs=1e-4)


def test_prices_and_network_add_up() -> None:
    of = many(5)
    both, wide, deep = (
        [c.residual for c in explained(LearnedPolicy(net, card(prices=cost)), of).candidates]
        for net, cost in (
            (network(), prices(run=0.3)),
            (NOTHING, prices(run=0.3)),
            (network(), {}),
        )
    )
    sums = [a + b for a, b in zip(wide, deep, strict=True)]
    assert both == pytest.approx(sums, abs=2e-4)


def test_signals_outside_the_trained_range_let_the_base_score_decide() -> None:
    narrow = {"queued_run": Price(weight=1e3, low=0.0, high=0.01)}
    of = view(row(EDGE, reading=READING), row(CLOUD))
    why = explained(LearnedPolicy(NOTHING, card(prices=narrow)), of)
    assert why.fallback == "queued_run is outside the trained range"
    assert [c.residual for c in why.candidates] == [0.0, 0.0]


def test_a_priced_policy_survives_its_file() -> None:
    of = view(row(EDGE, reading=READING), row(CLOUD))
    policy = LearnedPolicy(NOTHING, card(prices=prices(wait=0.5)))
    again = load(*save(policy.network, policy.card))
    assert again.card == policy.card
    assert explained(again, of) == explained(policy, of)


def refused(words: str, **price: Any) -> None:
    changed = {"wait": {"weight": 0.1, "low": 0.0, "high": 1.0} | price}
    text = msgspec.json.decode(save(NOTHING, card())[1]) | {"prices": changed}
    with pytest.raises(InvalidArgument, match=words):
        load(save(NOTHING, card())[0], msgspec.json.encode(text))


def test_prices_without_sense_are_refused() -> None:
    refused("price of wait", weight=1e9)
    refused("price of wait", low=2.0)
    refused("price of wait", low=-1.0)
    refused("not valid", weight="much")
    unknown = {"speed": {"weight": 0.1, "low": 0.0, "high": 1.0}}
    text = msgspec.json.decode(save(NOTHING, card())[1]) | {"prices": unknown}
    with pytest.raises(InvalidArgument, match="'speed', which is no signal"):
        load(save(NOTHING, card())[0], msgspec.json.encode(text))


def test_a_card_without_prices_is_one_from_before_and_loads() -> None:
    text = msgspec.json.decode(save(NOTHING, card())[1])
    del text["prices"]
    weights = save(NOTHING, card())[0]
    assert load(weights, msgspec.json.encode(text)).card == Card(**{**text, "prices": {}})

"""Weights for one client's model, and whom to ask next: against formulas written out."""

import math

import numpy as np
import pytest
from rounds_builders import crowd, in_order, statistics_of

from tierwise.functions.fl import personalisation, scheduling
from tierwise.functions.fl.answers import choice
from tierwise.functions.fl.statistics import RoundStatistics


def round_of(number: int, rows: dict[str, dict[str, float]]) -> RoundStatistics:
    """Return a round in which clients sent these numbers along."""
    counts = [row.get("example_count", 1.0) for row in rows.values()]
    return statistics_of(
        crowd(len(rows), 8, seed=number),
        round_number=number,
        clients=list(rows),
        counts=counts,
        metadata=list(rows.values()),
    )


# -- weights ------------------------------------------------------------------------------------


def test_weights_follow_accuracy() -> None:
    statistics = round_of(1, {"a": {"accuracy": 0.8}, "b": {"accuracy": 0.4}, "c": {}})
    found = choice.accuracy_weights(statistics)
    assert found["weights"] == pytest.approx({"a": 2 / 3, "b": 1 / 3, "c": 0.0})
    sharp = choice.accuracy_weights(statistics, sharpness=2.0)
    assert sharp["weights"] == pytest.approx({"a": 0.8, "b": 0.2, "c": 0.0})
    nobody = round_of(1, {"a": {"accuracy": 0.0}, "b": {"accuracy": -1.0}})
    assert choice.accuracy_weights(nobody)["weights"] == {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match=r"no client of round 1 sent 'f1'.*known are accuracy"):
        choice.accuracy_weights(statistics, metric="f1")


def test_weights_fall_with_the_distance_to_ones_own_model() -> None:
    deltas = crowd(4, 20)
    statistics = statistics_of(deltas)
    found = choice.similar_weights(statistics, client="client-1", scale=30.0)
    raised = np.exp(-((deltas - deltas[1]) ** 2).sum(axis=1) / 30.0)
    assert np.allclose(in_order(statistics, found["weights"]), raised / raised.sum())
    usual = choice.similar_weights(statistics, client="client-1")
    apart = ((deltas - deltas[1]) ** 2).sum(axis=1)
    assert usual["scale"] == pytest.approx(np.median(apart[[0, 2, 3]]))
    alone = choice.similar_weights(statistics_of(deltas[:1]), client="client-0")
    assert alone["weights"] == {"client-0": 1.0}


def test_fomo_weights_are_gains_by_distance() -> None:
    deltas = crowd(4, 20)
    statistics = statistics_of(deltas)
    losses = {"client-0": 0.5, "client-1": 0.9, "client-2": 1.4}
    found = choice.fomo_weights(statistics, client="client-3", losses=losses, loss_before=1.0)
    gains = np.array([0.5, 0.1, 0.0, 0.0]) / np.linalg.norm(deltas, axis=1)
    assert np.allclose(in_order(statistics, found["weights"]), gains / gains.sum())
    assert found["is_any_better"]
    own = choice.fomo_weights(
        statistics, client="client-3", losses=losses, loss_before=1.0, start="own"
    )
    gains = np.array([0.5, 0.1, 0.0]) / np.linalg.norm(deltas[:3] - deltas[3], axis=1)
    assert np.allclose(in_order(statistics, own["weights"])[:3], gains / gains.sum())
    none = choice.fomo_weights(statistics, client="client-3", losses=losses, loss_before=0.1)
    assert not none["is_any_better"]
    assert set(none["weights"].values()) == {0.0}


def test_fomo_weights_need_finite_losses_of_clients_in_the_round() -> None:
    statistics = statistics_of(crowd(2, 8))
    for losses in ({}, {"client-0": math.nan}, {"client-0": "low"}, [1.0]):
        with pytest.raises(ValueError, match="losses"):
            choice.fomo_weights(
                statistics,
                client="client-1",
                losses=losses,  # type: ignore[arg-type]
                loss_before=1.0,
            )
    with pytest.raises(ValueError, match="no client 'eve'"):
        choice.fomo_weights(statistics, client="client-1", losses={"eve": 1.0}, loss_before=1.0)


def test_dittos_mean_is_where_its_steps_end() -> None:
    rng = np.random.default_rng(0)
    update, shared = rng.normal(size=(2, 50)).astype(np.float32)
    personal = shared.astype(np.float64)
    for _ in range(300):
        personal = personalisation.ditto_step(
            personal, personal - update, shared, pull=0.7, learning_rate=0.1
        )
    found = personalisation.ditto_mean(update, shared, pull=0.7)
    assert np.allclose(found, personal, atol=1e-6)
    assert np.allclose(found, (update + 0.7 * shared) / 1.7, atol=1e-6)
    assert (personalisation.ditto_mean(update, shared, pull=0.0) == update).all()


def test_a_dittos_step_without_pull_is_gradient_descent() -> None:
    found = personalisation.ditto_step(
        [1.0, 2.0], [1.0, -1.0], [0.0, 0.0], pull=0.0, learning_rate=0.5
    )
    assert found.tolist() == [0.5, 2.5]


# -- whom to ask --------------------------------------------------------------------------------


def test_oort_ranks_by_gain_doubt_and_time() -> None:
    history = [
        round_of(0, {"old": {"loss": 1.0, "duration_s": 2.0, "example_count": 10.0}}),
        round_of(
            4,
            {
                "rich": {"loss": 2.0, "duration_s": 2.0, "example_count": 50.0},
                "slow": {"loss": 2.0, "duration_s": 8.0, "example_count": 50.0},
                "poor": {"loss": 0.1, "duration_s": 1.0, "example_count": 10.0},
            },
        ),
    ]
    found = choice.oort(history, count=2, preferred_s=4.0)
    utility = np.array([10.0, 100.0, 100.0, 1.0])
    capped = np.minimum(utility, np.quantile(utility, 0.95))
    scaled = (capped - capped.min()) / (capped.max() - capped.min())
    last = np.array([1.0, 5.0, 5.0, 5.0])  # rounds, counted from 1
    direct = (scaled + np.sqrt(0.1 * math.log(6) / last)) * np.array([1.0, 1.0, 0.25, 1.0])
    assert list(found["scores"]) == ["old", "rich", "slow", "poor"]
    assert np.allclose(list(found["scores"].values()), direct)
    assert found["clients"] == ["rich", "old"]
    assert choice.oort(history, count=1)["preferred_s"] == 2.0  # the median


def test_oort_lets_newcomers_in_and_fills_up_with_them() -> None:
    history = [round_of(0, {c: {"loss": 1.0, "duration_s": 1.0} for c in "abcd"})]
    some = choice.oort(history, count=4, newcomers=["x", "y", "a"], explore=0.25)
    assert len(some["explored"]) == 1
    assert set(some["explored"]) <= {"x", "y"}
    assert len(some["clients"]) == 4
    more = choice.oort(history, count=6, newcomers=["x", "y"], explore=0.0)
    assert set(more["clients"]) == set("abcdxy")
    with pytest.raises(ValueError, match="1 to 5 are known, not 6"):
        choice.oort(history, count=6, newcomers=["x"])


def test_oort_needs_losses_and_durations() -> None:
    with pytest.raises(ValueError, match="sent 'duration_s'"):
        choice.oort([round_of(0, {"a": {"loss": 1.0}})], count=1)
    with pytest.raises(ValueError, match="sent all of loss, duration_s"):
        rows = {"a": {"loss": 1.0}, "b": {"duration_s": 1.0}}
        choice.oort([round_of(0, rows)], count=1)
    with pytest.raises(ValueError, match="above 0"):
        choice.oort([round_of(0, {"a": {"loss": 1.0, "duration_s": 0.0}})], count=1)
    with pytest.raises(ValueError, match="no round is held"):
        choice.oort([], count=1)


def test_tifl_groups_by_speed_and_serves_the_worst_tier_most() -> None:
    rows = {
        f"c{i}": {"duration_s": float(i), "accuracy": 0.9 - 0.1 * (i // 2)} for i in range(1, 7)
    }
    found = choice.tifl([round_of(0, rows)], count=2, tiers=3)
    assert [tier["clients"] for tier in found["tiers"]] == [
        ["c1", "c2"],
        ["c3", "c4"],
        ["c5", "c6"],
    ]
    assert [tier["duration_s"] for tier in found["tiers"]] == [1.5, 3.5, 5.5]
    # Sorted by accuracy, ascending, tiers get (n − i) ÷ (n(n − 1)÷2).
    assert [tier["chance"] for tier in found["tiers"]] == pytest.approx([0.0, 1 / 3, 2 / 3])
    assert set(found["clients"]) == set(found["tiers"][found["tier"]]["clients"])
    draws = [choice.tifl([round_of(0, rows)], count=1, tiers=3, seed=s)["tier"] for s in range(300)]
    assert np.bincount(draws, minlength=3)[0] == 0
    assert np.bincount(draws)[2] / 300 == pytest.approx(2 / 3, abs=0.1)


def test_equal_speeds_share_a_tier_and_one_tier_is_certain() -> None:
    assert scheduling.tiers(np.array([3.0, 3.0, 3.0, 3.0]), 2).tolist() == [0, 0, 0, 0]
    assert scheduling.tiers(np.array([3.0, 1.0, 1.0]), 3).tolist() == [1, 0, 0]
    assert scheduling.tier_chances([None]).tolist() == [1.0]
    unknown_is_worst = scheduling.tier_chances([0.4, None, 0.9])
    assert unknown_is_worst.argmax() == 1
    assert unknown_is_worst.sum() == pytest.approx(1.0)


def test_diverse_clients_stand_for_all_greedily() -> None:
    deltas = np.random.default_rng(3).normal(size=(8, 20))
    statistics = statistics_of(deltas)
    apart = np.linalg.norm(deltas[:, None] - deltas[None], axis=2)
    chosen: list[int] = []
    for _ in range(3):
        costs = [
            apart[:, [*chosen, row]].min(axis=1).sum() if row not in chosen else math.inf
            for row in range(8)
        ]
        chosen.append(int(np.argmin(costs)))
    found = choice.diverse(statistics, count=3)
    assert found["clients"] == [f"client-{row}" for row in chosen]
    assert found["distance_sum"] == pytest.approx(apart[:, chosen].min(axis=1).sum())
    assert found["stands_for"][f"client-{chosen[0]}"] == f"client-{chosen[0]}"
    assert set(choice.diverse(statistics, count=8)["clients"]) == set(statistics.clients)
    same = choice.diverse(statistics_of(np.ones((3, 4))), count=2)
    assert same["clients"] == ["client-0", "client-1"]


def test_the_highest_losses_are_asked_among_all_or_among_candidates() -> None:
    rows = {f"c{i}": {"loss": float(i), "example_count": 1.0 + i} for i in range(6)}
    history = [round_of(0, rows), round_of(1, {"c0": {"loss": 9.0}})]
    assert choice.by_loss(history, count=2)["clients"] == ["c0", "c5"], "the newest loss counts"
    drawn = [choice.by_loss(history, count=1, candidates=2, seed=s)["clients"] for s in range(50)]
    assert len({tuple(each) for each in drawn}) > 1
    with pytest.raises(ValueError, match="`candidates` is from `count`"):
        choice.by_loss(history, count=3, candidates=2)


def test_candidates_are_drawn_by_their_data() -> None:
    losses, weights = np.array([1.0, 1.0, 5.0]), np.array([0.5, 0.5, 0.0])
    rng = np.random.default_rng(0)
    found = [scheduling.power_of_choice(losses, weights, 1, 2, rng)[0] for _ in range(20)]
    assert 2 not in found

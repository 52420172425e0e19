"""Contribution and payment, against enumeration on the vectors."""

import itertools
import math

import numpy as np
import pytest
from rounds_builders import Float, cosine, crowd, in_order, statistics_of

from tierwise.functions.fl import contribution, incentives
from tierwise.functions.fl.answers import worth
from tierwise.functions.fl.geometry import shares


def alignment(deltas: Float, counts: Float, members: tuple[int, ...]) -> float:
    """Return v(S) of the vectors themselves."""
    if not members or counts[list(members)].sum() == 0:
        return 0.0
    mean = np.average(deltas, axis=0, weights=counts)
    part = np.average(deltas[list(members)], axis=0, weights=counts[list(members)])
    return cosine(part, mean)


def shapley_directly(deltas: Float, counts: Float) -> Float:
    """Return the mean marginal utility over all orders."""
    n = len(deltas)
    found = np.zeros(n)
    for order in itertools.permutations(range(n)):
        for place, client in enumerate(order):
            before, after = tuple(order[:place]), tuple(order[: place + 1])
            found[client] += alignment(deltas, counts, after) - alignment(deltas, counts, before)
    return found / math.factorial(n)


DELTAS = np.random.default_rng(7).normal(size=(5, 40)) + 0.4
COUNTS = np.array([10.0, 40.0, 25.0, 5.0, 20.0])


def test_leave_one_out_is_the_utility_without_each_client() -> None:
    statistics = statistics_of(DELTAS, counts=COUNTS.tolist())
    found = worth.leave_one_out(statistics)
    rest = [tuple(j for j in range(5) if j != i) for i in range(5)]
    direct = [1.0 - alignment(DELTAS, COUNTS, some) for some in rest]
    assert np.allclose(in_order(statistics, found["alignment"]), direct, atol=1e-12)
    mean = np.average(DELTAS, axis=0, weights=COUNTS)
    linear = [n * (row @ mean) for n, row in zip(COUNTS / 100.0, DELTAS, strict=True)] / (
        mean @ mean
    )
    assert np.allclose(in_order(statistics, found["linear"]), linear)
    assert sum(found["linear"].values()) == pytest.approx(1.0)
    moved = [
        np.linalg.norm(mean - np.average(DELTAS[list(s)], axis=0, weights=COUNTS[list(s)]))
        for s in rest
    ]
    assert np.allclose(in_order(statistics, found["influence"]), moved)


def test_shapley_values_are_mean_marginals_over_all_orders() -> None:
    statistics = statistics_of(DELTAS, counts=COUNTS.tolist())
    found = worth.shapley(statistics)
    assert found["is_exact"]
    direct = shapley_directly(DELTAS, COUNTS)
    assert np.allclose(in_order(statistics, found["values"]), direct, atol=1e-12)
    assert found["sum"] == pytest.approx(1.0), "all of v(N) is handed out"


def test_estimated_shapley_values_come_near_the_exact_ones() -> None:
    deltas = crowd(8, 60, spread=1.5)
    gram, weights = deltas @ deltas.T, shares(np.arange(1, 9))
    coalitions = contribution.all_coalitions(8)
    values = contribution.alignments(gram, weights, coalitions)
    exact = contribution.shapley_coefficients(coalitions) @ values
    found, permutations = contribution.gtg_shapley(
        contribution.alignment_prefixes(gram, weights), 8, 1.0, np.random.default_rng(0)
    )
    assert permutations % 8 == 0
    assert found.sum() == pytest.approx(1.0, abs=2e-3)  # truncated within 0.001
    assert np.corrcoef(found, exact)[0, 1] > 0.95
    thorough, _ = contribution.gtg_shapley(
        contribution.alignment_prefixes(gram, weights),
        8,
        1.0,
        np.random.default_rng(0),
        within=0.0,
        permutations_max=1600,
    )
    assert thorough.sum() == pytest.approx(1.0)
    # Guided permutations put everybody in front equally often: that is the exact sampling of
    # first places, and unbiased.
    assert np.allclose(thorough, exact, atol=0.03)


def test_prefixes_are_the_utilities_of_growing_coalitions() -> None:
    order = np.array([3, 1, 4, 0, 2])
    values = list(contribution.alignment_prefixes(DELTAS @ DELTAS.T, shares(COUNTS))(order))
    direct = [alignment(DELTAS, COUNTS, tuple(order[: n + 1])) for n in range(5)]
    assert np.allclose(values, direct)


def test_prefixes_of_many_clients_are_joined_where_they_were_cut() -> None:
    deltas, counts = crowd(150, 20, spread=3.0), np.arange(1.0, 151.0)
    order = np.random.default_rng(1).permutation(150)
    values = list(contribution.alignment_prefixes(deltas @ deltas.T, shares(counts))(order))
    direct = [alignment(deltas, counts, tuple(order[: n + 1])) for n in range(150)]
    assert np.allclose(values, direct)


def test_a_round_that_changed_nothing_gives_nobody_anything() -> None:
    asked = []

    def prefixes(order: np.ndarray) -> list[float]:  # type: ignore[type-arg]
        asked.append(order)
        return []

    found = contribution.gtg_shapley(prefixes, 4, 0.01, np.random.default_rng(0), between=0.02)
    assert found[1] == 0
    assert (found[0] == 0.0).all()
    assert not asked


def test_a_permutation_ends_once_the_rest_adds_nothing() -> None:
    taken = []

    def prefixes(order: np.ndarray):  # type: ignore[no-untyped-def,type-arg]
        for place in range(len(order)):
            taken.append(place)
            yield min(1.0, 0.5 * (place + 1))

    found, permutations = contribution.gtg_shapley(
        prefixes, 6, 1.0, np.random.default_rng(0), permutations_max=6
    )
    assert permutations == 6
    assert max(taken) == 1, "the third place is never asked for"
    assert found.sum() == pytest.approx(1.0)


def test_many_clients_are_estimated_within_a_bound() -> None:
    statistics = statistics_of(crowd(40, 60, spread=2.0))
    found = worth.shapley(statistics, seed=3)
    assert not found["is_exact"]
    assert 0 < found["permutations"] <= contribution.PERMUTATIONS_MAX
    assert found["sum"] == pytest.approx(1.0, abs=2e-3)
    assert found == worth.shapley(statistics, seed=3)


@pytest.mark.parametrize(
    "deltas", [np.zeros((4, 10)), np.ones((1, 10)), np.zeros((1, 10)), np.ones((4, 10))]
)
def test_contribution_bears_one_client_no_move_and_identical_updates(deltas: Float) -> None:
    statistics = statistics_of(deltas)
    n, has_moved = len(deltas), bool(deltas.any())
    values = in_order(statistics, worth.shapley(statistics)["values"])
    assert np.allclose(values, 1 / n if has_moved else 0.0)
    loo = worth.leave_one_out(statistics)
    assert np.allclose(in_order(statistics, loo["linear"]), 1 / n if has_moved else 0.0)
    alone = 1.0 if n == 1 and has_moved else 0.0
    assert np.allclose(in_order(statistics, loo["alignment"]), alone)


def test_payments_follow_merit_to_the_last_unit() -> None:
    statistics = statistics_of(DELTAS, counts=COUNTS.tolist())
    for basis in worth.BASES:
        found = worth.payments(statistics, budget=1000, basis=basis)
        assert sum(found["payments"].values()) == 1000
        merits = in_order(statistics, found["merits"])
        good = np.maximum(merits, 0.0)
        paid = in_order(statistics, found["payments"])
        assert (np.abs(paid - 1000 * good / good.sum()) < 1.0).all()
    assert worth.payments(statistics, budget=100, basis="examples")["payments"] == dict(
        zip(statistics.clients, COUNTS.astype(int).tolist(), strict=True)
    )


def test_payments_may_go_by_any_column() -> None:
    statistics = statistics_of(
        crowd(3, 8), metadata=[{"accuracy": 0.9}, {"accuracy": 0.1}, {"other": 1}]
    )
    found = worth.payments(statistics, budget=100, quality="accuracy")
    assert found["payments"] == {"client-0": 90, "client-1": 10, "client-2": 0}
    assert found["basis"] == "accuracy"
    with pytest.raises(ValueError, match="`basis` is one of linear"):
        worth.payments(statistics, budget=1, basis="luck")


def test_harm_is_not_paid_and_equal_shares_are() -> None:
    merits = np.array([3.0, -1.0, 1.0])
    assert incentives.split(100, merits).tolist() == [75, 0, 25]
    assert incentives.split(100, merits, equal_share=0.3).tolist() == [63, 10, 27]
    assert incentives.split(90, merits, power=2.0).tolist() == [81, 0, 9]
    assert incentives.split(10, np.array([-1.0, 0.0, -2.0])).tolist() == [4, 3, 3]
    assert incentives.split(0, merits).sum() == 0


def test_large_budgets_are_split_without_loss() -> None:
    rng = np.random.default_rng(0)
    for budget in (incentives.CENTS_MAX, 999_999_999_999_989, 7):
        paid = incentives.split(budget, rng.random(250))
        assert paid.sum() == budget
        assert paid.min() >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": -1}, "`budget`"),
        ({"budget": 10**16}, "`budget`"),
        ({"equal_share": 1.5}, "`equal_share`"),
        ({"power": 0.0}, "`power`"),
    ],
)
def test_a_split_out_of_range_is_refused(changes: dict[str, float], message: str) -> None:
    arguments = {"budget": 10, **changes}
    with pytest.raises(ValueError, match=message):
        incentives.split(int(arguments.pop("budget")), np.ones(2), **arguments)

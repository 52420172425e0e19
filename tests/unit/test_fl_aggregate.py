"""Aggregation against the textbook, written out directly in float64."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tierwise.functions.fl import aggregate, blocks, robust

PARAMETERS = 5_003  # no multiple of anything


def updates(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, PARAMETERS)).astype(np.float32)


@pytest.fixture(autouse=True, params=[4 << 20, 1 << 14])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, and in many."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", request.param)


def test_the_mean_weighs_by_examples() -> None:
    matrix, counts = updates(7), [3.0, 1.0, 0.0, 40.0, 2.0, 9.0, 5.0]
    wanted = np.average(matrix.astype(np.float64), axis=0, weights=counts)
    found = blocks.mean(matrix, range(7), counts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_count_are_not_even_read() -> None:
    matrix = updates(6)
    matrix[[1, 4]] = np.nan
    rows, counts = [0, 2, 3, 5], [1.0, 2.0, 3.0, 4.0]
    picked = matrix[rows].astype(np.float64)
    found = {
        "mean": blocks.mean(matrix, rows, counts),
        "median": robust.median(matrix, rows),
        "trimmed": robust.trimmed_mean(matrix, rows, 0.25),
        "krum": robust.multi_krum(matrix, rows, counts, matrix[0], 1)[0],
    }
    assert all(np.isfinite(vector).all() for vector in found.values())
    np.testing.assert_allclose(found["mean"], np.average(picked, axis=0, weights=counts), atol=1e-6)


def test_the_input_may_be_read_only_and_is_left_alone() -> None:
    matrix = updates(5)
    before = matrix.copy()
    matrix.flags.writeable = False
    robust.median(matrix, range(5))
    robust.trimmed_mean(matrix, range(5), 0.2)
    robust.multi_krum(matrix, range(5), [1.0] * 5, matrix[0], 1)
    blocks.mean(matrix, range(5), [1.0] * 5)
    aggregate.buffered(matrix[0], [(matrix[1], matrix, [2], [1.0])], 1)
    assert (matrix == before).all()


@pytest.mark.parametrize("count", [1, 2, 3, 8, 11, 24, 25, 40])
def test_median_and_trimmed_mean_are_those_of_each_coordinate(count: int) -> None:
    matrix = updates(count, seed=count)
    np.testing.assert_allclose(
        robust.median(matrix, range(count)), np.median(matrix, axis=0), rtol=1e-6, atol=1e-6
    )
    cut = int(0.2 * count)
    wanted = np.sort(matrix, axis=0)[cut : count - cut].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(
        robust.trimmed_mean(matrix, range(count), 0.2), wanted, rtol=1e-5, atol=1e-6
    )


def test_krums_scores_are_sums_of_squared_distances_to_the_nearest() -> None:
    matrix, bad = updates(9).astype(np.float64), 2
    wanted = []
    for i in range(9):
        apart = sorted(float(((matrix[i] - matrix[j]) ** 2).sum()) for j in range(9) if j != i)
        wanted.append(sum(apart[: 9 - bad - 2]))
    found = robust.krum_scores(matrix @ matrix.T, bad)
    np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_multi_krum_leaves_out_clients_that_flip_signs() -> None:
    base = updates(1, seed=3)[0]
    matrix = base + 0.5 + 0.1 * updates(10)
    matrix[[2, 7]] = base - 5.0 * (matrix[[2, 7]] - base)
    vector, kept = robust.multi_krum(matrix, range(10), [1.0] * 10, base, 2)
    assert kept == [0, 1, 3, 4, 5, 6, 8, 9]
    np.testing.assert_allclose(vector, matrix[kept].mean(axis=0), rtol=1e-5, atol=1e-5)
    _, one = robust.multi_krum(matrix, range(10), [1.0] * 10, base, 2, kept_count=1)
    scores = robust.krum_scores(robust.gram_of(matrix, range(10), base), 2)
    assert one == [int(np.argmin(scores))]


def test_adam_is_that_of_the_paper_round_after_round() -> None:
    base = updates(1, seed=1)[0]
    exact: NDArray[np.float64] = base.astype(np.float64)
    m, v = np.zeros(PARAMETERS), np.zeros(PARAMETERS)
    first = second = None
    for round_number in range(4):
        target = base + updates(1, seed=10 + round_number)[0]
        delta = target.astype(np.float64) - base
        m, v = 0.9 * m + 0.1 * delta, 0.99 * v + 0.01 * delta**2
        exact = base + 0.05 * m / (np.sqrt(v) + 1e-3)
        first = aggregate.adam_first(base, target, first)
        second = aggregate.adam_second(base, target, second)
        base = aggregate.adam_step(base, first, second, rate=0.05)
        np.testing.assert_allclose(base, exact, rtol=1e-4, atol=1e-5)


def test_a_buffer_adds_each_difference_from_what_its_client_began_with() -> None:
    base, old, older, a, b = updates(5)
    weights = [aggregate.staleness_weight(tau) for tau in (0, 3)]
    assert weights == [1.0, 0.5]
    matrix = np.stack([a, np.full_like(a, np.nan), b])
    groups = [(old, matrix, [0], weights[:1]), (older, matrix, [2], weights[1:])]
    found = aggregate.buffered(base, groups, 2, rate=0.8)
    wanted = base.astype(np.float64) + 0.8 * ((a - old) * 1.0 + (b - older) * 0.5) / 2
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_buffer_without_staleness_is_the_plain_mean() -> None:
    matrix, base = updates(4), updates(1, seed=9)[0]
    found = aggregate.buffered(base, [(base, matrix, range(4), [1.0] * 4)], 4)
    np.testing.assert_allclose(found, matrix.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_parts_of_a_hierarchy_combine_to_the_mean_of_all() -> None:
    matrix, counts = updates(9), np.arange(1.0, 10.0)
    parts, totals = [], []
    for rows in ([0, 1, 2], [3, 4, 5, 6, 7], [8]):
        vector, said = aggregate.fold(
            [matrix], {"step": "mean", "rows": rows, "weights": counts[rows].tolist()}
        )
        parts.append(vector)
        totals.append(float(counts[rows].sum()))
        assert said == {}
    found, _ = aggregate.fold(parts, {"step": "combine", "weights": totals})
    np.testing.assert_allclose(
        found, np.average(matrix, axis=0, weights=counts), rtol=1e-5, atol=1e-6
    )


def test_fedprox_pulls_towards_the_base() -> None:
    weights, base = updates(2)
    numeric = [
        (_proximal_loss(weights + e, base) - _proximal_loss(weights - e, base)) / 2e-3
        for e in np.eye(5, PARAMETERS) * 1e-3
    ]
    np.testing.assert_allclose(
        aggregate.proximal(weights, base, 0.3)[:5], numeric, rtol=1e-3, atol=1e-4
    )


def _proximal_loss(weights: NDArray[Any], base: NDArray[Any]) -> float:
    return float(0.3 / 2 * ((weights - base).astype(np.float64) ** 2).sum())


@pytest.mark.parametrize(
    ("step", "arrays", "given", "words"),
    [
        ("guess", 1, {}, "one of mean, median"),
        ("mean", 1, {"rows": [], "weights": []}, "nothing to aggregate"),
        ("mean", 1, {"rows": [0, 1], "weights": [1.0]}, "one weight per update"),
        ("mean", 1, {"rows": [0, 1], "weights": [0.0, 0.0]}, "not all zero"),
        ("mean", 1, {"rows": [0, 1], "weights": [1.0, -1.0]}, "not negative"),
        ("mean", 1, {"rows": [0, 1], "weights": [1.0, float("nan")]}, "finite"),
        ("median", 1, {"rows": []}, "nothing to aggregate"),
        ("trimmed-mean", 1, {"rows": [0, 1], "share": 0.5}, "less than half"),
        ("mean", "nan", {"rows": [0, 1], "weights": [1.0, 1.0]}, "not finite"),
    ],
)
def test_what_cannot_be_aggregated_is_refused_in_words(
    step: str, arrays: object, given: dict[str, Any], words: str
) -> None:
    matrix = updates(4)
    if arrays == "nan":
        matrix[1, 7] = np.nan
    with pytest.raises(ValueError, match=words):
        aggregate.fold([matrix], {"step": step, **given})


def test_krum_says_how_many_updates_it_needs() -> None:
    matrix = updates(5)
    with pytest.raises(ValueError, match="3 bad clients needs 6 updates or more, there are 5"):
        robust.multi_krum(matrix, range(5), [1.0] * 5, matrix[0], 3)


def test_every_step_runs_as_a_node_runs_it() -> None:
    matrix = updates(6)
    base, a, b = matrix[0], matrix[1], matrix[2]
    calls: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "mean": ([matrix], {"rows": [1, 2], "weights": [1.0, 3.0]}),
        "median": ([matrix], {"rows": [1, 2, 4]}),
        "trimmed-mean": ([matrix], {"rows": [1, 2, 4], "share": 0.34}),
        "multi-krum": (
            [matrix, base],
            {"rows": [1, 2, 3, 4], "weights": [1.0] * 4, "byzantine_count": 1, "kept_count": 0},
        ),
        "combine": ([a, b], {"weights": [1.0, 2.0]}),
        "adam-first": ([base, a], {"beta": 0.9}),
        "adam-second": ([base, a, b], {"beta": 0.9}),
        "adam-step": ([base, a, b * b], {"rate": 0.1, "floor": 1e-3}),
        "buffer": (
            [base, a, matrix],
            {"groups": [{"rows": [2, 3], "weights": [1, 1]}], "count": 2, "rate": 1.0},
        ),
        "copy": ([a], {}),
    }
    assert calls.keys() == aggregate.STEPS.keys()
    for step, (arrays, given) in calls.items():
        vector, said = aggregate.fold(arrays, {"step": step, "metadata": {"x": 1}, **given})
        assert vector.shape == (PARAMETERS,) and vector.dtype == np.float32
        assert said["x"] == 1
    np.testing.assert_allclose(
        aggregate.fold(*calls["buffer"][:1], {"step": "buffer", **calls["buffer"][1]})[0],
        base + ((b - a) + (matrix[3] - a)) / 2,
        rtol=1e-5,
        atol=1e-6,
    )

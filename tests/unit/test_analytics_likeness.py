"""Answers from the Gram matrix are those of a direct computation on the vectors."""

import itertools

import numpy as np
import pytest
from rounds_builders import Float, cosine, crowd, in_order, statistics_of
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from tierwise.functions.fl import clustering, filtering
from tierwise.functions.fl.answers import likeness
from tierwise.functions.fl.geometry import (
    distances_squared,
    embedding,
    norms,
    robust_scores,
    shares,
    similarities,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def flipped(deltas: Float, *rows: int, by: float = -1.0) -> Float:
    changed = deltas.copy()
    changed[list(rows)] *= by
    return changed


# -- geometry -----------------------------------------------------------------------------------


def test_lengths_angles_and_distances_are_those_of_the_vectors() -> None:
    deltas = crowd(7)
    gram = deltas @ deltas.T
    assert np.allclose(norms(gram), np.linalg.norm(deltas, axis=1), **CLOSE)
    direct = [[cosine(a, b) for b in deltas] for a in deltas]
    assert np.allclose(similarities(gram), direct, **CLOSE)
    apart = ((deltas[:, None] - deltas[None]) ** 2).sum(axis=2)
    assert np.allclose(distances_squared(gram), apart, rtol=1e-9, atol=1e-9)


def test_an_embedding_has_the_distances_of_the_vectors_and_few_axes() -> None:
    deltas = crowd(6, 50)
    deltas[5] = deltas[0] + deltas[1]  # rank 5
    points = embedding(deltas @ deltas.T)
    assert points.shape == (6, 5)
    assert np.allclose(points @ points.T, deltas @ deltas.T, rtol=1e-9, atol=1e-7)


def test_a_zero_delta_is_like_nobody_and_divides_nothing() -> None:
    deltas = crowd(4)
    deltas[2] = 0.0
    found = similarities(deltas @ deltas.T)
    assert (found[2] == [0.0, 0.0, 1.0, 0.0]).all()
    assert (embedding(np.zeros((3, 3))) == 0.0).all()


def test_equal_weights_are_used_where_no_examples_are_counted() -> None:
    assert shares([1, 3]).tolist() == [0.25, 0.75]
    assert shares([0, 0]).tolist() == [0.5, 0.5]
    assert len(shares([])) == 0


def test_robust_scores_do_not_see_rounding() -> None:
    assert (robust_scores(np.array([2.0, 2.0 + 1e-12, 2.0, 2.0])) == 0.0).all()
    scores = robust_scores(np.array([2.0, 2.0, 2.0, 9.0]))
    assert scores[:3].tolist() == [0.0] * 3
    assert scores[3] == pytest.approx(7.0 / (1.253314 * 7.0 / 4.0))
    values = np.array([1.0, 2.0, 4.0, 7.0, 30.0])
    assert np.allclose(robust_scores(values), 0.6745 * (values - 4.0) / 3.0)


# -- similarity ---------------------------------------------------------------------------------


def test_similarity_with_others_the_mean_and_the_last_step() -> None:
    deltas = crowd(5)
    counts = [10, 20, 30, 40, 50]
    step = np.random.default_rng(9).normal(size=deltas.shape[1])
    statistics = statistics_of(deltas, counts=counts, step=step)
    found = likeness.similarity(statistics, is_pairwise=True)
    mean = np.average(deltas, axis=0, weights=counts)
    others = [
        np.mean([cosine(a, b) for j, b in enumerate(deltas) if j != i])
        for i, a in enumerate(deltas)
    ]
    assert np.allclose(in_order(statistics, found["with_others"]), others, **CLOSE)
    with_mean = [cosine(row, mean) for row in deltas]
    assert np.allclose(in_order(statistics, found["with_mean"]), with_mean, **CLOSE)
    with_step = [cosine(row, step) for row in deltas]
    assert np.allclose(in_order(statistics, found["with_last_step"]), with_step, **CLOSE)
    assert found["pairs"]["client-1"]["client-3"] == pytest.approx(cosine(deltas[1], deltas[3]))
    one = likeness.similarity(statistics, client="client-1")
    assert one["cosines"] == pytest.approx(found["pairs"]["client-1"])


def test_one_client_has_no_others_to_be_like() -> None:
    found = likeness.similarity(statistics_of(crowd(1)))
    assert found["with_others"] == {"client-0": None}
    assert found["mean"] is None
    assert found["with_mean"]["client-0"] == pytest.approx(1.0)
    assert "with_last_step" not in found  # it is not known here


# -- filters ------------------------------------------------------------------------------------


def adaptive_directly(deltas: Float, weights: Float) -> list[int]:
    """Adaptive federated averaging on the vectors, as its paper writes it."""
    stays, slack = list(range(len(deltas))), 2.0
    while True:
        aggregate = weights[stays] @ deltas[stays]
        cosines = np.array([cosine(deltas[row], aggregate) for row in stays])
        median, spread = np.median(cosines), cosines.std()
        if cosines.mean() < median:
            goes = cosines < median - slack * spread
        else:
            goes = cosines > median + slack * spread
        if not goes.any():
            return stays
        stays = [row for row, is_out in zip(stays, goes, strict=True) if not is_out]
        slack += 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_cosine_filter_is_adaptive_federated_averaging(seed: int) -> None:
    deltas = flipped(crowd(12, seed=seed, spread=1.0), 3, 8)
    counts = np.random.default_rng(seed).integers(10, 100, 12)
    statistics = statistics_of(deltas, counts=counts.tolist())
    found = likeness.cosine_filter(statistics)
    direct = adaptive_directly(deltas, counts / counts.sum())
    assert found["kept"] == [f"client-{row}" for row in direct]
    assert found["rejected"] == ["client-3", "client-8"]
    aggregate = counts[direct] @ deltas[direct]
    cosines = [cosine(row, aggregate) for row in deltas]
    assert np.allclose(in_order(statistics, found["scores"]), cosines, **CLOSE)


def krum_directly(deltas: Float, faulty: int) -> Float:
    scores = []
    for i, row in enumerate(deltas):
        apart = sorted(((row - other) ** 2).sum() for j, other in enumerate(deltas) if j != i)
        scores.append(sum(apart[: len(deltas) - faulty - 2]))
    return np.array(scores)


def test_krum_scores_are_sums_of_the_nearest_distances() -> None:
    deltas = flipped(crowd(9), 4)
    statistics = statistics_of(deltas)
    found = likeness.krum(statistics, faulty=2, keep=5)
    direct = krum_directly(deltas, 2)
    assert np.allclose(in_order(statistics, found["scores"]), direct, rtol=1e-9)
    assert found["chosen"] == f"client-{direct.argmin()}"
    assert set(found["kept"]) == {f"client-{row}" for row in np.argsort(direct)[:5]}
    assert "client-4" in found["rejected"]
    assert len(likeness.krum(statistics)["kept"]) == 8  # a fifth of 9 is 1


@pytest.mark.parametrize(("count", "faulty"), [(3, 1), (4, 1), (5, 2), (10, 4)])
def test_krum_refuses_more_faulty_clients_than_it_can_bear(count: int, faulty: int) -> None:
    with pytest.raises(ValueError, match="Krum tells"):
        filtering.krum_scores(crowd(count) @ crowd(count).T, faulty)


def foolsgold_directly(deltas: Float) -> Float:
    """FoolsGold on the vectors, loop by loop as in its algorithm."""
    n = len(deltas)
    cs = np.array([[cosine(a, b) for b in deltas] for a in deltas])
    v = [max([cs[i, j] for j in range(n) if j != i] + [0.0]) for i in range(n)]
    pardoned = cs.copy()
    for i, j in itertools.permutations(range(n), 2):
        if v[j] > v[i]:
            pardoned[i, j] = cs[i, j] * v[i] / v[j]
    alpha = np.array([1.0 - max(pardoned[i, j] for j in range(n) if j != i) for i in range(n)])
    alpha = np.clip(alpha, 0.0, 1.0)
    alpha = np.clip(alpha / alpha.max(), 1e-12, 0.99)
    return np.clip(np.log(alpha / (1.0 - alpha)) + 0.5, 0.0, 1.0)


def test_foolsgold_finds_accomplices_among_honest_clients_that_differ() -> None:
    rng = np.random.default_rng(2)
    deltas = rng.normal(size=(8, 400))
    deltas[5:] = rng.normal(size=400) + 0.05 * rng.normal(size=(3, 400))
    statistics = statistics_of(deltas)
    found = likeness.foolsgold(statistics)
    direct = foolsgold_directly(deltas)
    assert np.allclose(in_order(statistics, found["scores"]), direct, rtol=1e-7, atol=1e-9)
    assert found["rejected"] == ["client-5", "client-6", "client-7"]


def test_foolsgold_takes_identical_updates_for_one_attacker_and_believes_a_single_one() -> None:
    same = np.tile(crowd(1), (4, 1))
    assert likeness.foolsgold(statistics_of(same))["kept"] == []
    nearly = same * (1.0 + 1e-12 * np.random.default_rng(0).normal(size=same.shape))
    assert likeness.foolsgold(statistics_of(nearly))["kept"] == []
    assert likeness.foolsgold(statistics_of(same[:1]))["kept"] == ["client-0"]


def test_a_long_update_is_out_of_the_ordinary() -> None:
    deltas = flipped(crowd(10), 6, by=20.0)
    found = likeness.norm_outliers(statistics_of(deltas))
    assert found["rejected"] == ["client-6"]
    direct = robust_scores(np.linalg.norm(deltas, axis=1))
    assert found["scores"]["client-6"] == pytest.approx(direct[6])


@pytest.mark.parametrize("attackers", [(0,), (2, 7)])
def test_sign_flippers_are_suspected_and_honest_clients_are_not(attackers: tuple[int, ...]) -> None:
    deltas = flipped(crowd(10, spread=0.8), *attackers)
    found = likeness.malicious(statistics_of(deltas))
    assert found["suspects"] == [f"client-{row}" for row in attackers]
    assert likeness.malicious(statistics_of(crowd(10, spread=0.8)))["suspects"] == []


@pytest.mark.parametrize(
    "deltas", [np.zeros((5, 20)), np.tile(crowd(1, 20), (5, 1))], ids=["zero", "identical"]
)
def test_every_filter_bears_updates_without_differences(deltas: Float) -> None:
    statistics = statistics_of(deltas)
    for ask in (likeness.cosine_filter, likeness.norm_outliers):
        assert ask(statistics)["rejected"] == []
    assert likeness.krum(statistics)["scores"] == pytest.approx(
        dict.fromkeys(statistics.clients, 0.0), abs=1e-9
    )
    votes = likeness.malicious(statistics)
    assert votes["suspects"] == []


def test_two_clients_cannot_outvote_each_other() -> None:
    statistics = statistics_of(flipped(crowd(2), 1))
    assert likeness.cosine_filter(statistics)["rejected"] == []
    with pytest.raises(ValueError, match="has 2 updates that count, and this needs 3"):
        likeness.malicious(statistics)


# -- clusters -----------------------------------------------------------------------------------


def three_groups() -> Float:
    rng = np.random.default_rng(4)
    centres = 3.0 * rng.normal(size=(3, 200))
    return np.concatenate([centre + 0.3 * rng.normal(size=(4, 200)) for centre in centres])


def test_kmeans_on_the_embedding_finds_what_kmeans_finds_on_the_vectors() -> None:
    deltas = three_groups()
    statistics = statistics_of(deltas)
    found = likeness.clusters(statistics, k=3)
    direct = KMeans(3, n_init=10, random_state=0).fit(deltas)
    assert found["inertia"] == pytest.approx(direct.inertia_, rel=1e-6)
    assert [len(group) for group in found["groups"]] == [4, 4, 4]
    assert found["silhouette"] == pytest.approx(silhouette_score(deltas, direct.labels_))
    assert likeness.clusters(statistics)["groups"] == found["groups"], "three fit best"


def test_kmeans_ends_in_an_optimum_of_the_vectors() -> None:
    deltas = crowd(30, 40, spread=3.0)
    points = embedding(deltas @ deltas.T)
    first = clustering.seeds(points, 4, np.random.default_rng(0), restarts=20)
    labels, inertia = clustering.kmeans(points, first)
    centres = np.stack([deltas[labels == label].mean(axis=0) for label in range(4)])
    apart = ((deltas[:, None] - centres[None]) ** 2).sum(axis=2)
    assert inertia == pytest.approx(apart[np.arange(30), labels].sum())
    assert (apart.argmin(axis=1) == labels).all()
    rival = KMeans(4, n_init=20, random_state=0).fit(deltas)
    assert inertia <= rival.inertia_ * 1.02


@pytest.mark.parametrize("k", [1, 2, 5])
def test_kmeans_bears_identical_points(k: int) -> None:
    found = likeness.clusters(statistics_of(np.tile(crowd(1), (5, 1))), k=k)
    assert found["inertia"] == pytest.approx(0.0, abs=1e-6)
    assert sum(len(group) for group in found["groups"]) == 5


def test_as_many_groups_as_clients_leave_each_alone() -> None:
    found = likeness.clusters(statistics_of(crowd(4)), k=4)
    assert found["groups"] == [[f"client-{row}"] for row in range(4)]
    assert found["silhouette"] == 0.0
    assert likeness.clusters(statistics_of(crowd(1)))["groups"] == [["client-0"]]


def test_directions_are_clustered_without_lengths() -> None:
    deltas = three_groups()
    deltas[0] *= 50.0
    found = likeness.clusters(statistics_of(deltas), k=3, is_by_direction=True)
    assert [len(group) for group in found["groups"]] == [4, 4, 4]


@pytest.mark.parametrize("seed", range(5))
def test_the_split_is_the_best_of_all_splits(seed: int) -> None:
    deltas = np.random.default_rng(seed).normal(size=(7, 30))
    cosines = similarities(deltas @ deltas.T)
    sides, across = clustering.bipartition(cosines)
    best = min(
        max(cosines[i, j] for i in left for j in range(7) if j not in left)
        for size in range(1, 4)
        for left in itertools.combinations(range(7), size)
    )
    assert across == pytest.approx(best)
    assert across == pytest.approx(
        max(cosines[i, j] for i in range(7) for j in range(7) if sides[i] != sides[j])
    )
    assert 0 < sides.sum() < 7
    assert not sides[0]


def test_clients_that_disagree_are_parted_once_training_has_settled() -> None:
    deltas = crowd(8, 100, spread=0.1)
    deltas[4:] *= -1.0
    statistics = statistics_of(deltas)
    found = likeness.cfl_split(statistics, mean_norm_max=4.0, norm_min=5.0)
    assert found["sides"] == [[f"client-{row}" for row in part] for part in (range(4), range(4, 8))]
    assert found["is_split"]
    assert found["mean_norm"] == pytest.approx(np.linalg.norm(deltas.mean(axis=0)))
    assert not likeness.cfl_split(statistics, mean_norm_max=0.01, norm_min=5.0)["is_split"]
    with pytest.raises(ValueError, match="needs 2"):
        likeness.cfl_split(statistics_of(crowd(1)))


def test_a_map_says_how_much_it_shows() -> None:
    deltas = crowd(5)
    found = likeness.chart(statistics_of(deltas), axes=16)
    points = np.array(list(found["points"].values()))
    assert points.shape == (5, 16)
    assert found["explained_share"] == pytest.approx(1.0)
    assert np.allclose(points @ points.T, deltas @ deltas.T)
    assert likeness.chart(statistics_of(np.zeros((3, 4))))["explained_share"] == 1.0

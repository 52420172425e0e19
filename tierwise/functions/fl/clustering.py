"""Clients in groups that move alike. Pure: points come from the Gram matrix, chance from a seed."""

import numpy as np

from tierwise.functions.fl.geometry import Float, Index, Mask

RESTARTS = 8
STEPS_MAX = 100


def kmeans(
    points: Float, k: int, rng: np.random.Generator, *, restarts: int = RESTARTS
) -> tuple[Index, float]:
    """Return a cluster per point, shape (n,), and the sum of squared distances to the centres.

    Lloyd's algorithm (IEEE Trans. Inf. Theory, 1982) from k-means++ seeds (Arthur and
    Vassilvitskii, SODA 2007), the best of `restarts`, which run side by side. On the points of
    `geometry.embedding` it does what it would do on the deltas, for distances are the same. A
    centre that loses all its points moves to the point that is worst served. Clusters are numbered
    by their first member.

    Args:
        points: Shape (n, d).
        k: In 1 … n.
        rng: Draws the seeds.
        restarts: How many seeds are tried.
    """
    squares = np.einsum("nd,nd->n", points, points)
    centres = points[_seeds(points, squares, k, rng, restarts)]  # (restarts, k, d)
    labels = np.full((restarts, len(points)), -1, dtype=np.intp)
    for _ in range(STEPS_MAX):
        apart = _squared_distances(points, squares, centres)
        found = apart.argmin(axis=1)
        if np.array_equal(found, labels):
            break
        labels = found
        is_member = labels[:, None, :] == np.arange(k)[None, :, None]  # (restarts, k, n)
        sizes = is_member.sum(axis=2)
        centres = (is_member @ points) / np.maximum(sizes, 1)[:, :, None]
        for run, cluster in np.argwhere(sizes == 0):
            served = apart[run].min(axis=0)
            worst = int(served.argmax())
            centres[run, cluster] = points[worst]
            apart[run, :, worst] = 0.0
    apart = _squared_distances(points, squares, centres)
    inertia = np.take_along_axis(apart, labels[:, None, :], axis=1).sum(axis=(1, 2))
    best = int(inertia.argmin())
    return _in_order(labels[best]), max(float(inertia[best]), 0.0)


def silhouette(distances: Float, labels: Index) -> float:
    """Return the mean silhouette in [−1, 1]: how much nearer clients are to their own cluster.

    (b − a) ÷ max(a, b) with a the mean distance to the own cluster, b to the nearest other one; 0
    for a cluster of one. Rousseeuw, J. Comput. Appl. Math. 20 (1987). 0 if there is one cluster.

    Args:
        distances: Euclidean, not squared, shape (n, n).
        labels: 0 … k − 1, shape (n,).
    """
    k = int(labels.max()) + 1
    if k < 2:
        return 0.0
    is_member = labels[:, None] == np.arange(k)[None, :]  # (n, k)
    sizes = is_member.sum(axis=0)
    sums = distances @ is_member
    rows = np.arange(len(labels))
    own_size = sizes[labels]
    own = sums[rows, labels] / np.maximum(own_size - 1, 1)
    others = np.where(is_member, np.inf, sums / sizes).min(axis=1)
    most = np.maximum(own, others)
    gains = np.where(most > 0.0, (others - own) / np.where(most > 0.0, most, 1.0), 0.0)
    return float(np.where(own_size > 1, gains, 0.0).mean())


def bipartition(similarities: Float) -> tuple[Mask, float]:
    """Return the split whose two sides are least alike, shape (n,), and their largest cosine.

    Clustered federated learning (Sattler, Müller and Samek, IEEE TNNLS 2021, section III and
    Alg. 1) wants argmin over splits of the largest similarity across: the weakest edge of a maximum
    spanning tree (Prim's), which is the last merge of their greedy algorithm. The first row is on
    the side False.

    Raises:
        ValueError: There are fewer than two clients.
    """
    count = len(similarities)
    if count < 2:
        raise ValueError("one client cannot be split: ask of a round with two or more")
    nearest = similarities[0].copy()
    parent = np.zeros(count, dtype=np.intp)
    is_out = np.ones(count, dtype=np.bool_)
    is_out[0] = False
    order: list[int] = []
    edges = np.empty(count)
    for _ in range(count - 1):
        row = int(np.where(is_out, nearest, -np.inf).argmax())
        is_out[row] = False
        order.append(row)
        edges[row] = nearest[row]
        is_nearer = is_out & (similarities[row] > nearest)
        nearest = np.where(is_nearer, similarities[row], nearest)
        parent[is_nearer] = row
    cut = min(order, key=lambda row: edges[row])
    sides = np.zeros(count, dtype=np.bool_)
    for row in order:
        sides[row] = row == cut or sides[parent[row]]
    return sides, float(edges[cut])


def _seeds(points: Float, squares: Float, k: int, rng: np.random.Generator, restarts: int) -> Index:
    """Return rows of the first centres, shape (restarts, k): each drawn ∝ distance² to the last."""
    count = len(points)
    seeds = np.empty((restarts, k), dtype=np.intp)
    seeds[:, 0] = rng.integers(count, size=restarts)
    nearest = np.full((restarts, count), np.inf)
    for place in range(1, k):
        last = points[seeds[:, place - 1]]
        apart = squares[None, :] + squares[seeds[:, place - 1]][:, None] - 2.0 * (last @ points.T)
        nearest = np.minimum(nearest, np.maximum(apart, 0.0))
        cumulated = np.cumsum(nearest, axis=1)
        drawn = rng.random(restarts) * cumulated[:, -1]
        seeds[:, place] = np.minimum((cumulated <= drawn[:, None]).sum(axis=1), count - 1)
    return seeds


def _squared_distances(points: Float, squares: Float, centres: Float) -> Float:
    """Return squared distances, shape (restarts, k, n)."""
    own = np.einsum("rkd,rkd->rk", centres, centres)
    found: Float = own[:, :, None] + squares[None, None, :] - 2.0 * (centres @ points.T)
    return np.maximum(found, 0.0)


def _in_order(labels: Index) -> Index:
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.intp)

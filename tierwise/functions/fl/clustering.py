"""Clients in groups that move alike. Pure: points come from the Gram matrix, chance from a seed."""

import numpy as np

from tierwise.functions.fl.geometry import Float, Index, Mask, distances_squared

RESTARTS = 8
STEPS_MAX = 100


def seeds(points: Float, k: int, rng: np.random.Generator, *, restarts: int = RESTARTS) -> Index:
    """Return rows of first centres, shape (restarts, k): k-means++.

    The first is drawn evenly, each other one ∝ its squared distance to those before it (Arthur and
    Vassilvitskii, SODA 2007, section 2.2). So the first j columns are seeds for j clusters.

    Args:
        points: Shape (n, d).
        k: In 1 … n.
        rng: Draws them.
        restarts: How many sets.
    """
    count = len(points)
    found = np.empty((restarts, k), dtype=np.intp)
    found[:, 0] = rng.integers(count, size=restarts)
    chances = rng.random((k, restarts))
    apart = distances_squared(points @ points.T)
    nearest = apart[found[:, 0]]
    for place in range(1, k):
        cumulated = nearest.cumsum(axis=1)
        drawn = (cumulated <= (chances[place] * cumulated[:, -1])[:, None]).sum(axis=1)
        found[:, place] = np.minimum(drawn, count - 1)
        nearest = np.minimum(nearest, apart[found[:, place]])
    return found


def kmeans(points: Float, first: Index) -> tuple[Index, float]:
    """Return a cluster per point, shape (n,), and the sum of squared distances to the centres.

    Lloyd's algorithm (IEEE Trans. Inf. Theory, 1982), the best of several starts, which run side by
    side. On the points of `geometry.embedding` it does what it would do on the deltas, for
    distances are the same. A centre that loses all its points moves to the point that is worst
    served. Clusters are numbered by their first member.

    Args:
        points: Shape (n, d).
        first: Rows of the first centres, shape (restarts, k), see `seeds`.
    """
    restarts, k = first.shape
    squares = np.einsum("nd,nd->n", points, points)
    transposed = np.ascontiguousarray(points.T)
    centres = points[first]  # (restarts, k, d)
    labels = np.full((restarts, len(points)), -1, dtype=np.intp)
    numbers = np.arange(k)[None, :, None]
    for _ in range(STEPS_MAX):
        own = np.einsum("rkd,rkd->rk", centres, centres)
        apart = (own[:, :, None] + squares) - 2.0 * (centres @ transposed)  # (restarts, k, n)
        found = apart.argmin(axis=1)
        if (found == labels).all():
            break
        labels = found
        is_member = (labels[:, None, :] == numbers).astype(np.float64)
        sizes = is_member.sum(axis=2)
        centres = (is_member @ points) / np.maximum(sizes, 1.0)[:, :, None]
        for run, cluster in () if sizes.all() else np.argwhere(sizes == 0.0):
            worst = int(apart[run].min(axis=0).argmax())
            centres[run, cluster] = points[worst]
            apart[run, :, worst] = 0.0
    # Of the clusters' own means, whether or not the steps have ended.
    inertia = squares.sum() - (sizes * np.einsum("rkd,rkd->rk", centres, centres)).sum(axis=1)
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


def _in_order(labels: Index) -> Index:
    numbers: dict[int, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels.tolist()])

"""Means that a minority of bad clients cannot move far. Arguments as in `aggregate`."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tierwise.functions.fl.blocks import Matrix, Vector, blocks, mean
from tierwise.functions.fl.geometry import nearest_sums

NETWORK_ROWS_MAX = 24  # that are sorted by a network of exchanges


def median(matrix: Matrix, rows: Sequence[int]) -> Vector:
    """Return the median of each coordinate, shape (parameters,).

    Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML
    2018, definition 1. Example counts do not weigh: who lies about updates lies about counts.

    Raises:
        ValueError: No row counts.
    """
    low, high = (len(rows) - 1) // 2, len(rows) // 2
    return _by_block(matrix, rows, lambda block: block[low : high + 1].mean(axis=0))


def trimmed_mean(matrix: Matrix, rows: Sequence[int], share: float) -> Vector:
    """Return the mean of each coordinate without the lowest and highest ⌊share × n⌋ values.

    Yin et al. 2018 (see `median`), definition 2.

    Raises:
        ValueError: No row counts, or `share` is not in [0, 0.5), or nothing would be left.
    """
    if not 0.0 <= share < 0.5:
        raise ValueError(f"share = {share}: trim less than half on each side")
    cut = int(share * len(rows))
    return _by_block(matrix, rows, lambda block: block[cut : len(rows) - cut].mean(axis=0))


def krum_scores(gram: NDArray[np.float64], byzantine_count: int) -> NDArray[np.float64]:
    """Return Krum's score of each update, shape (n,): lower is closer to its neighbours.

    See `nearest_sums`. Aggregation goes on as long as there is a neighbour to compare with; what
    the paper proves needs more updates, see `filtering.krum_scores`.

    Raises:
        ValueError: n < f + 3: no neighbour would be left.
    """
    count = len(gram)
    kept = count - byzantine_count - 2
    if byzantine_count < 0 or kept < 1:
        raise ValueError(
            f"Krum with {byzantine_count} bad clients needs {byzantine_count + 3} updates or more, "
            f"there are {count}"
        )
    return nearest_sums(gram, kept)


def multi_krum(
    matrix: Matrix,
    rows: Sequence[int],
    weights: Sequence[float],
    base: Vector,
    byzantine_count: int,
    kept_count: int = 0,
) -> tuple[Vector, list[int]]:
    """Return the weighted mean of the updates with the lowest Krum scores, and their rows.

    Blanchard et al. 2017 (see `nearest_sums`), section 4.2: the m best of n; by default
    m = n − f. m = 1 is Krum itself.

    Args:
        matrix: The updates.
        rows: Which of them count.
        weights: One per row.
        base: What distances are measured around: only the precision depends on it.
        byzantine_count: f, how many clients may send anything.
        kept_count: m; 0: n − f.

    Raises:
        ValueError: There are too few updates for f.
    """
    scores = krum_scores(gram_of(matrix, rows, base), byzantine_count)
    kept = min(kept_count or len(rows) - byzantine_count, len(rows))
    best = sorted(np.argsort(scores, kind="stable")[:kept].tolist())
    chosen = [int(rows[i]) for i in best]
    return mean(matrix, chosen, [weights[i] for i in best]), chosen


def gram_of(matrix: Matrix, rows: Sequence[int], base: Vector) -> NDArray[np.float64]:
    """Return the inner products of all updates less `base`, shape (n, n), summed in float64."""
    gram = np.zeros((len(rows), len(rows)))
    picked = np.asarray(rows, dtype=np.intp)
    for start, end in blocks(matrix.shape[1], 2 * len(rows)):
        delta = matrix[picked, start:end].astype(np.float64) - base[start:end]
        gram += delta @ delta.T
    return gram


def _by_block(matrix: Matrix, rows: Sequence[int], of: Callable[[Matrix], Vector]) -> Vector:
    """Return what `of` makes of each block of the rows that count, each of its columns sorted."""
    if not len(rows):
        raise ValueError("there is nothing to aggregate")
    out = np.empty(matrix.shape[1], dtype=np.float32)
    picked = np.asarray(rows, dtype=np.intp)
    for start, end in blocks(matrix.shape[1], 2 * len(rows)):
        out[start:end] = of(_sorted(matrix[picked, start:end]))
    return out


def _sorted(block: Matrix) -> Matrix:
    """Sort each column in place.

    Few rows go through Batcher's odd-even merge sort ("Sorting networks and their applications",
    AFIPS 1968): its exchanges are whole rows at a time, five times faster than sorting columns.
    """
    count = len(block)
    if count > NETWORK_ROWS_MAX:
        block.sort(axis=0)
        return block
    low = np.empty(block.shape[1], dtype=block.dtype)
    for i, j in _exchanges(count):
        np.minimum(block[i], block[j], out=low)
        np.maximum(block[i], block[j], out=block[j])
        block[i] = low
    return block


def _exchanges(count: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of rows that Batcher's network compares, in order (Knuth, TAOCP 5.3.4)."""
    p = 1
    while p < count:
        k = p
        while k >= 1:
            for j in range(k % p, count - k, 2 * k):
                for i in range(min(k, count - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        yield i + j, i + j + k
            k //= 2
        p *= 2

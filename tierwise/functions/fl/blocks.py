"""Weighted sums of rows, block by block: what all aggregation is made of.

Updates are rows of one matrix, shape (clients, parameters), float32, which is only read: it may be
a view of shared memory. Some of its rows may hold nothing or nonsense (a client that never sent, an
update that was refused), so every function is told which `rows` count and touches no other. All
work goes block by block over the columns, which stay in the CPU's cache meanwhile.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 4 << 20  # of the rows that one block holds
Vector = NDArray[np.float32]
Matrix = NDArray[np.float32]


def mean(matrix: Matrix, rows: Sequence[int], weights: Sequence[float]) -> Vector:
    """Return the weighted mean of rows, shape (parameters,): FedAvg with example counts as weights.

    Σ n_k w_k ÷ Σ n_k (McMahan et al., "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017, algorithm 1). FedProx (Li et al., "Federated Optimization in
    Heterogeneous Networks", MLSys 2020) has the same server: its term is added by the client, see
    `aggregate.proximal`.

    Raises:
        ValueError: No row counts, or the weights are negative, not finite, or all zero.
    """
    share = shares(rows, weights)
    out = np.zeros(matrix.shape[1], dtype=np.float32)
    neighbours = list(runs(rows))
    for start, end in blocks(matrix.shape[1], len(rows)):
        part = out[start:end]
        for first, last, at in neighbours:  # each is one product, without a copy
            part += share[at : at + last - first] @ matrix[first:last, start:end]
    return out


def shares(rows: Sequence[int], weights: Sequence[float]) -> NDArray[np.float32]:
    """Return the weights as shares of 1, shape (n,).

    Raises:
        ValueError: There is none, or they cannot be shares.
    """
    found: NDArray[np.float64] = np.asarray(weights, dtype=np.float64)
    if not len(rows) or found.shape != (len(rows),):
        raise ValueError("there is nothing to aggregate, or not one weight per update")
    total = float(found.sum())
    if not (np.isfinite(total) and (found >= 0.0).all() and total > 0.0):
        raise ValueError("weights must be finite, not negative, and not all zero")
    return (found / total).astype(np.float32)


def runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, last row + 1, position in `rows`) of each run of neighbours."""
    at = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[at], rows[i - 1] + 1, at
            at = i


def blocks(column_count: int, row_count: int) -> Iterator[tuple[int, int]]:
    """Yield (first, last + 1) of the columns whose rows fit into a block."""
    width = max(1024, BLOCK_BYTES // (4 * max(1, row_count)))
    for start in range(0, column_count, width):
        yield start, min(start + width, column_count)

"""What each client's update was worth to the round. Pure.

A *utility* v(S) says what the clients S achieve together; v(∅) = 0. From the Gram matrix, with
FedAvg's weights n_i and Δ_S = Σ_S n_i δ_i ÷ Σ_S n_i:

    alignment    v(S) = cos(Δ_S, Δ_N): Xu et al., NeurIPS 2021 (CGSV), section 3
    linear       v(S) = ⟨Σ_S n_i δ_i, Δ_N⟩ ÷ (Σ_N n_i · ‖Δ_N‖²): the share of the round's move along
                 itself. Additive, so leave-one-out and Shapley value are the same, and sum to 1

`alignment` is 1 for all clients together and punishes those who pull elsewhere; both know nothing
of accuracy. For that, `gtg_shapley` takes any utility, such as a model's score on held-out data.
"""

from collections.abc import Callable, Iterable

import numpy as np

from tierwise.functions.fl.geometry import Float, Index, Mask, norms

EXACT_MAX = 10  # clients: 2^10 coalitions
PERMUTATIONS_MAX = 2000
CONVERGED = 0.05
RECENT = 10
PREFIXES_MIN = 32

Prefixes = Callable[[Index], Iterable[float]]


def alignments(gram: Float, weights: Float, coalitions: Mask) -> Float:
    """Return v(S) = cos(Δ_S, Δ_N) of coalitions given as rows, shape (m, K); result shape (m,)."""
    sums = coalitions * weights
    dots = sums @ (gram @ weights)
    squares = np.einsum("mk,mk->m", sums @ gram, sums)
    total = float(weights @ gram @ weights)
    return _cosines(dots, squares, total)


def linear_values(gram: Float, weights: Float) -> Float:
    """Return each client's part in the linear utility, shape (K,): leave-one-out and Shapley alike.

    n_i·⟨δ_i, Δ_N⟩ ÷ ‖Δ_N‖², the sum is 1; all 0 if the round did not move.
    """
    dots = weights * (gram @ weights)
    total = float(dots.sum())
    return dots / total if total > 0.0 else np.zeros(len(weights))


def leave_one_out(gram: Float, weights: Float) -> Float:
    """Return v(N) − v(N∖i) of the alignment, shape (K,).

    Large for who turned the round's direction. Without the only client nothing is left: v(∅) = 0.
    """
    count = len(weights)
    everybody_but = ~np.eye(count, dtype=np.bool_)
    together = alignments(gram, weights, np.ones((1, count), dtype=np.bool_))[0]
    found: Float = together - alignments(gram, weights, everybody_but)
    return found


def influences(gram: Float, weights: Float) -> Float:
    """Return ‖Δ_N − Δ_{N∖i}‖, shape (K,): how far the aggregate moves without a client.

    Fed-Influence on parameters (Xue et al., AAAI 2021). Δ_N − Δ_{N∖i} = n_i ÷ (1 − n_i) ·
    (δ_i − Δ_N) with weights of sum 1. Without the only client there is nothing: its own length.
    """
    dots = gram @ weights
    squares = np.diagonal(gram) - 2.0 * dots + float(weights @ dots)
    lengths = np.sqrt(np.maximum(squares, 0.0))
    rest = 1.0 - weights
    is_alone = rest <= 1e-12
    alone = norms(gram)
    found: Float = np.where(is_alone, alone, weights / np.where(is_alone, 1.0, rest) * lengths)
    return found


def all_coalitions(count: int) -> Mask:
    """Return membership of all 2^K coalitions, shape (2^K, K): the bits of each row's number."""
    codes = np.arange(1 << count)[:, None]
    found: Mask = (codes >> np.arange(count)[None, :]) & 1 == 1
    return found


def shapley_coefficients(coalitions: Mask) -> Float:
    """Return the matrix that makes Shapley values of the utilities of all coalitions.

    φ_i = Σ_{S∌i} |S|!·(K − |S| − 1)!÷K! · (v(S ∪ i) − v(S)): each coalition counts with
    (|S| − 1)!·(K − |S|)!÷K! for its members, and against the others with |S|!·(K − |S| − 1)!÷K!.
    Shapley, A Value for n-Person Games (1953).

    Args:
        coalitions: All of them, shape (2^K, K), see `all_coalitions`.

    Returns:
        Shape (K, 2^K).
    """
    count = coalitions.shape[1]
    factorials = np.cumprod(np.concatenate([[1.0], np.arange(1.0, count + 1)]))
    size = coalitions.sum(axis=1)
    inside = factorials[np.maximum(size - 1, 0)] * factorials[count - size]
    outside = factorials[size] * factorials[np.maximum(count - size - 1, 0)]
    found: Float = np.where(coalitions.T, inside, -outside) / factorials[count]
    return found


def gtg_shapley(
    prefixes: Prefixes,
    count: int,
    together: float,
    rng: np.random.Generator,
    *,
    between: float = 0.0,
    within: float = 0.001,
    permutations_max: int = PERMUTATIONS_MAX,
) -> tuple[Float, int]:
    """Return estimated Shapley values, shape (K,), and how many permutations they took.

    GTG-Shapley (Liu, Chen, Yu, Liu and Cui, ACM TIST 13(4), 2022, Alg. 1): sweeps of K guided
    permutations, each client once in front; a round that changed nothing (|v(N) − v(∅)| ≤
    `between`) gives nobody anything; a permutation ends early, its rest worth 0, once |v(N) −
    v(prefix)| < `within`; after a sweep it ends if the estimates of the last 10 permutations were
    within 5 % on average. Every permutation that is walked to the end hands out v(N) exactly.

    Args:
        prefixes: Given an order of all clients, yields v of its first, first two, … clients; asked
            for no more than are needed.
        count: K.
        together: v(N); v(∅) is 0.
        rng: Draws permutations.
        between: Truncation between rounds.
        within: Truncation within one.
        permutations_max: Bound. Each sweep goes through the clients in another order, so that one
            that is cut short prefers nobody.
    """
    sums = np.zeros(count)
    if abs(together) <= between:
        return sums, 0
    recent: list[Float] = []
    permutations = 0
    while permutations < permutations_max:
        for first in rng.permutation(count)[: permutations_max - permutations]:
            order = rng.permutation(count)
            order[[0, np.flatnonzero(order == first)[0]]] = first, order[0]
            before = 0.0
            for client, value in zip(order, prefixes(order), strict=False):
                sums[client] += value - before
                before = value
                if abs(together - before) < within:
                    break
            permutations += 1
            recent = [*recent[1 - RECENT :], sums / permutations]
        if permutations > RECENT and _has_converged(recent):
            break
    return sums / permutations, permutations


def alignment_prefixes(gram: Float, weights: Float) -> Prefixes:
    """Return the alignment of prefixes, for `gtg_shapley`: computed some at a time."""
    weighted = weights[:, None] * gram * weights
    toward = weighted.sum(axis=1)
    total = float(toward.sum())

    def prefixes(order: Index) -> Iterable[float]:
        dots, squares = np.cumsum(toward[order]), 0.0
        start, stop = 0, min(PREFIXES_MIN, len(order))
        while start < len(order):
            block = weighted[order[start:stop, None], order[None, :stop]]
            # A client adds its products with those before it, twice, and with itself.
            with_before = block.cumsum(axis=1).diagonal(start)
            lengths = squares + np.cumsum(2.0 * with_before - block.diagonal(start))
            yield from _cosines(dots[start:stop], lengths, total).tolist()
            squares = float(lengths[-1])
            start, stop = stop, min(2 * stop, len(order))

    return prefixes


def _cosines(dots: Float, squares: Float, total: float) -> Float:
    below = np.sqrt(np.maximum(squares * total, 0.0))
    is_defined = below > 0.0
    return np.where(is_defined, dots / np.where(is_defined, below, 1.0), 0.0)


def _has_converged(recent: list[Float]) -> bool:
    last = recent[-1]
    off = np.abs(np.stack(recent) - last) / (np.abs(last) + 1e-12)
    return bool(off.mean(axis=1).max() <= CONVERGED)

"""Lengths, angles and distances of a round's deltas, from their Gram matrix alone. Pure.

With deltas δ_i (update − base) as rows of D, shape (K, P), the Gram matrix is G = D·Dᵀ, float64,
shape (K, K). It settles every question about lengths, angles, distances and linear combinations:

    ‖δ_i‖ = √G_ii      cos(δ_i, δ_j) = G_ij ÷ √(G_ii·G_jj)      ‖δ_i − δ_j‖² = G_ii + G_jj − 2·G_ij
    ‖Σ a_i δ_i‖² = aᵀGa            ⟨δ_i, Σ a_j δ_j⟩ = (Ga)_i

A squared distance is a difference of larger numbers: its error is near 1e-16 × ‖δ‖², so distances
below about 1e-8 × ‖δ‖ read as noise.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]
Index = NDArray[np.intp]
NO_LENGTH = 0.0  # the cosine with a zero vector, by convention


def norms(gram: Float) -> Float:
    """Return Euclidean lengths, shape (K,)."""
    return np.sqrt(np.maximum(np.diagonal(gram), 0.0))


def similarities(gram: Float) -> Float:
    """Return cosines in [−1, 1], shape (K, K): 1 on the diagonal, 0 with a zero delta."""
    lengths = norms(gram)
    safe = np.where(lengths > 0.0, lengths, 1.0)
    cosines: Float = np.clip(gram / np.outer(safe, safe), -1.0, 1.0)
    is_zero = lengths == 0.0
    if is_zero.any():
        cosines[is_zero, :] = NO_LENGTH
        cosines[:, is_zero] = NO_LENGTH
    np.fill_diagonal(cosines, 1.0)
    return cosines


def distances_squared(gram: Float) -> Float:
    """Return squared Euclidean distances, shape (K, K): never negative, 0 on the diagonal."""
    squares = np.diagonal(gram)
    found: Float = np.maximum(squares[:, None] + squares[None, :] - 2.0 * gram, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def nearest_sums(gram: Float, nearest: int) -> Float:
    """Return Σ ‖δ_i − δ_j‖² over the `nearest` others that lie nearest to i, shape (K,).

    Krum's scores (Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries:
    Byzantine Tolerant Gradient Descent", NeurIPS 2017, section 4), with `nearest` = K − f − 2. Each
    sum begins with the smallest, so that the order of clients does not show in the last digits.

    Args:
        gram: The base cancels: distances of deltas are those of updates.
        nearest: In 1 … K − 1.
    """
    squares = distances_squared(gram)
    np.fill_diagonal(squares, np.inf)
    found: Float = np.sort(squares, axis=1)[:, :nearest].sum(axis=1)
    return found


def embedding(gram: Float) -> Float:
    """Return points with the Gram matrix `gram`, shape (K, rank), largest axis first.

    E = V·Λ^½ of G = VΛVᵀ, so E·Eᵀ = G: the points lie to each other and to 0 as the deltas do. It
    is classical scaling (Torgerson, Psychometrika 1952) without centring. Axes below 1e-12 of the
    largest are left out. An axis points to where its largest entry is positive.
    """
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    is_kept = values > max(float(values[0]), 0.0) * 1e-12
    if not is_kept.any():
        return np.zeros((len(gram), 1))
    points: Float = vectors[:, is_kept] * np.sqrt(values[is_kept])
    largest = np.abs(points).argmax(axis=0)
    signs = np.sign(points[largest, np.arange(points.shape[1])])
    found: Float = points * signs
    return found


def shares(counts: ArrayLike) -> Float:
    """Return FedAvg's weights n_i ÷ Σn (McMahan et al., AISTATS 2017, Alg. 1), shape (K,).

    Equal ones, if no count is known.
    """
    numbers = np.asarray(counts, dtype=np.float64)
    total = float(numbers.sum())
    return numbers / total if total > 0.0 else np.full(len(numbers), 1.0 / max(len(numbers), 1))


def cosines_with(dots: Float, lengths: Float, length: float) -> Float:
    """Return cosines with one vector of length `length`, from dot products with it, shape (K,)."""
    below = lengths * length
    is_defined = below > 0.0
    found: Float = np.where(is_defined, dots / np.where(is_defined, below, 1.0), NO_LENGTH)
    return np.clip(found, -1.0, 1.0)


def cosines_with_sum(gram: Float, weights: Float, lengths: Float) -> Float:
    """Return each delta's cosine with Σ w_j δ_j, shape (K,); `lengths` are `norms(gram)`."""
    dots = gram @ weights
    length = float(np.sqrt(max(float(weights @ dots), 0.0)))
    return cosines_with(dots, lengths, length)


def median(values: Float) -> float:
    """Return the median of at least one number: of few, several times as fast as NumPy's."""
    ordered = np.sort(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return float(ordered[middle])
    return float(ordered[middle - 1] + ordered[middle]) / 2.0


def robust_scores(values: Float) -> Float:
    """Return how far each value is from the median, in robust standard deviations, shape (K,).

    0.6745·(x − median) ÷ MAD; where more than half of the values are equal (MAD = 0), (x − median)
    ÷ (1.2533 × mean absolute deviation); 0 if all are. Above 3.5 is an outlier. Iglewicz and
    Hoaglin, How to Detect and Handle Outliers (1993), section 3. Deviations of less than 1e-9 of
    the median are rounding.
    """
    middle = median(values)
    off = values - middle
    off = np.where(np.abs(off) <= 1e-9 * abs(middle), 0.0, off)
    sizes = np.abs(off)
    spread = median(sizes)
    if spread > 0.0:
        return 0.6745 * off / spread
    mean = float(sizes.mean())
    return off / (1.253314 * mean) if mean > 0.0 else np.zeros_like(off)
